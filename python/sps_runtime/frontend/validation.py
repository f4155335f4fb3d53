"""The one gate: every `GenerateRequest` is made here, and nothing behind it checks a range again.

Each rule names the field as the client wrote it. Intervals are closed and written ``not lo <= x <=
hi``, so that NaN fails them; every token id in every field goes through `check_ids`.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from sps_runtime.config.attention import AttentionConfig
from sps_runtime.frontend.attention_options import FIELD, attention_spec
from sps_runtime.frontend.limits import Limits
from sps_runtime.frontend.query import (
    LogprobOptions,
    Query,
    SamplingOptions,
    TextPrompt,
    TokenPrompt,
)
from sps_runtime.frontend.regex_program import compile_patterns
from sps_runtime.frontend.regex_syntax import RegexError
from sps_runtime.types.attention import AttentionSpec
from sps_runtime.types.errors import InvalidRequest
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.sampling import GREEDY_TEMPERATURE, LogprobParams, SamplingParams
from sps_runtime.types.tokens import pack_ids

MAX_TEMPERATURE = 100.0
MAX_LOGIT_BIAS = 100.0
MAX_TOP_K = 1 << 30
_SEED_MASK = (1 << 63) - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What the model's own generation_config.json suggests; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class _Fields:
    """Checks single values and words their errors with the client's field names."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def name(self, field: str) -> str:
        return self._names.get(field, field)

    def fail(self, field: str, why: str, *, code: str | None = None) -> InvalidRequest:
        name = self.name(field)
        return InvalidRequest(f"{name} {why}", field=name, code=code)

    def number(self, field: str, value: float, low: float, high: float) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(field, "must be a number")
        if not low <= value <= high:
            raise self.fail(field, f"must be between {low:g} and {high:g}")
        return float(value)

    def integer(self, field: str, value: int, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(field, "must be an integer")
        if not low <= value <= high:
            raise self.fail(field, f"must be between {low} and {high}")
        return value


def check_ids(ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raise `InvalidRequest` unless every id is an int (no bool) in [0, vocab_size)."""
    if set(map(type, ids)) - {int}:
        raise InvalidRequest(f"{field} must hold integers only", field=field)
    if len(ids) and not (min(ids) >= 0 and max(ids) < vocab_size):
        raise InvalidRequest(
            f"{field} holds a token id outside of [0, {vocab_size})",
            field=field,
            code="token_id_out_of_range",
        )


def too_long(field: str, tokens: int, limits: Limits, *, at_least: bool = False) -> InvalidRequest:
    """The error for a prompt that leaves no room."""
    return InvalidRequest(
        f"{field} has {'at least ' if at_least else ''}{tokens} tokens, but the context length is"
        f" {limits.context_length}",
        field=field,
        code="context_length_exceeded",
    )


def draw_seed() -> int:
    """Return 63 random bits."""
    return secrets.randbits(63)


def choice_seed(seed: int, choice: int) -> int:
    """The seed of choice `choice` of n; choice 0 keeps the request's own, the others differ."""
    return (seed + choice * _GOLDEN) & _SEED_MASK


class Gate:
    """Turns queries into requests or refuses them.

    Args:
        limits: the bounds.
        defaults: the model's own sampling defaults.
        seeds: draws the seed of a request that has none.
        attention: of requests that do not tell.
    """

    def __init__(
        self,
        limits: Limits,
        defaults: SamplingDefaults | None = None,
        seeds: Callable[[], int] = draw_seed,
        attention: AttentionConfig | None = None,
    ) -> None:
        self.limits = limits
        self._defaults = defaults or SamplingDefaults()
        self._seeds = seeds
        self._attention = attention or AttentionConfig()

    def check(self, query: Query) -> None:
        """Refuse what can be refused before the prompt is tokenized."""
        fields = _Fields(query.names)
        self.choices(query)
        if isinstance(query.prompt, TokenPrompt):
            self._check_prompt(fields, query.prompt.ids)
        elif isinstance(query.prompt, TextPrompt) and not query.prompt.text:
            raise fields.fail("prompt", "is empty")
        self._sampling(query, fields, prompt_tokens=1)
        self._logprobs(query.logprobs, fields, None)
        self._attention_spec(query, fields)

    def choices(self, query: Query) -> int:
        """Return how many sequences `query` asks for."""
        n = 1 if query.options.n is None else query.options.n
        return _Fields(query.names).integer("n", n, 1, self.limits.max_choices)

    def requests(
        self, query: Query, tokens: Sequence[int], grammar: str = ""
    ) -> list[GenerateRequest]:
        """Return one request for each of the query's choices.

        Args:
            query: what is wanted.
            tokens: the prompt's ids.
            grammar: the query's, prepared.

        Raises:
            InvalidRequest: naming the offending field.
        """
        fields = _Fields(query.names)
        self._check_prompt(fields, tokens)
        sampling = self._sampling(query, fields, prompt_tokens=len(tokens))
        sampling = msgspec.structs.replace(sampling, grammar=grammar) if grammar else sampling
        logprobs = self._logprobs(query.logprobs, fields, len(tokens))
        attention = self._attention_spec(query, fields)
        packed = pack_ids(tokens)
        return [
            GenerateRequest(
                rid=secrets.token_hex(16),
                tokens=packed,
                sampling=_with_seed(sampling, choice_seed(sampling.seed, choice)),
                tenant=query.tenant,
                attention=attention,
                logprobs=logprobs,
                hidden_state=query.hidden_state,
            )
            for choice in range(self.choices(query))
        ]

    def _check_prompt(self, fields: _Fields, tokens: Sequence[int]) -> None:
        if not len(tokens):
            raise fields.fail("prompt", "is empty")
        if len(tokens) > self.limits.context_length:
            raise too_long(fields.name("prompt"), len(tokens), self.limits)
        check_ids(tokens, self.limits.vocab_size, fields.name("prompt"))

    def _sampling(self, query: Query, fields: _Fields, *, prompt_tokens: int) -> SamplingParams:
        options = query.options
        max_new = self._max_new_tokens(query, fields, prompt_tokens)
        min_new = fields.integer("min_new_tokens", options.min_new_tokens or 0, 0, _SEED_MASK)
        if min_new > max_new:
            raise fields.fail("min_new_tokens", f"is {min_new}, above the {max_new} tokens allowed")
        seed = options.sampling_seed
        if seed is not None:
            fields.integer("sampling_seed", seed, -(1 << 63), (1 << 63) - 1)
        return SamplingParams(
            max_new_tokens=max_new,
            min_new_tokens=min_new,
            temperature=self._temperature(query, fields),
            top_k=self._top_k(query, fields),
            top_p=self._top_p(query, fields),
            min_p=fields.number("min_p", self._told(query, "min_p", 0.0), 0, 1),
            presence_penalty=fields.number(
                "presence_penalty", options.presence_penalty or 0, -2, 2
            ),
            frequency_penalty=fields.number(
                "frequency_penalty", options.frequency_penalty or 0, -2, 2
            ),
            repetition_penalty=self._repetition_penalty(query, fields),
            logit_bias=self._logit_bias(options, fields),
            seed=self._seeds() & _SEED_MASK if seed is None else seed & _SEED_MASK,
            stop=self._stop("stop", options.stop, fields),
            stop_regex=self._stop_regex(options, fields),
            stop_token_ids=self._stop_ids(options, fields),
            ignore_eos=bool(options.ignore_eos),
        )

    def _attention_spec(self, query: Query, fields: _Fields) -> AttentionSpec:
        return attention_spec(query.attention, self._attention, fields.name(FIELD))

    def _told(self, query: Query, field: str, fallback: float) -> float:
        """The client's value of `field`, else the model's, else `fallback`."""
        value = getattr(query.options, field)
        if value is None and query.use_model_defaults:
            value = getattr(self._defaults, field)
        return fallback if value is None else value

    def _max_new_tokens(self, query: Query, fields: _Fields, prompt_tokens: int) -> int:
        if query.hidden_state:
            return 0
        room = self.limits.context_length - prompt_tokens
        told = query.options.max_new_tokens
        if told is None:
            default = query.default_max_new_tokens
            if room < 1 and default != 0:
                raise too_long(fields.name("prompt"), prompt_tokens, self.limits)
            return room if default is None else min(default, room)
        if isinstance(told, bool) or not isinstance(told, int) or told < 0:
            raise fields.fail("max_new_tokens", "must be an integer of at least 0")
        if told > room:
            raise fields.fail(
                "max_new_tokens",
                f"is {told}: with a prompt of {prompt_tokens} tokens or more that exceeds the"
                f" context length of {self.limits.context_length}",
                code="context_length_exceeded",
            )
        return told

    def _temperature(self, query: Query, fields: _Fields) -> float:
        value = self._told(query, "temperature", 1.0)
        value = fields.number("temperature", value, 0, MAX_TEMPERATURE)
        return 0.0 if value < GREEDY_TEMPERATURE else value

    def _top_k(self, query: Query, fields: _Fields) -> int:
        value = int(self._told(query, "top_k", 0))
        fields.integer("top_k", value, -1, MAX_TOP_K)
        return 0 if value < 1 or value >= self.limits.vocab_size else value

    def _top_p(self, query: Query, fields: _Fields) -> float:
        value = fields.number("top_p", self._told(query, "top_p", 1.0), 0, 1)
        if value == 0:
            raise fields.fail("top_p", "must be above 0")
        return value

    def _repetition_penalty(self, query: Query, fields: _Fields) -> float:
        told = self._told(query, "repetition_penalty", 1.0)
        value = fields.number("repetition_penalty", told, 0, 2)
        if value == 0:
            raise fields.fail("repetition_penalty", "must be above 0")
        return value

    def _logit_bias(self, options: SamplingOptions, fields: _Fields) -> dict[int, float]:
        bias = options.logit_bias or {}
        if len(bias) > self.limits.max_ids:
            raise fields.fail("logit_bias", f"has more than {self.limits.max_ids} entries")
        check_ids(list(bias), self.limits.vocab_size, fields.name("logit_bias"))
        return {
            token: fields.number("logit_bias", value, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
            for token, value in bias.items()
        }

    def _stop(self, field: str, told: str | list[str] | None, fields: _Fields) -> tuple[str, ...]:
        """Stop strings or expressions."""
        if told is None:
            return ()
        listed = (told,) if isinstance(told, str) else tuple(told)
        if len(listed) > self.limits.max_stop_strings:
            raise fields.fail(field, f"has more than {self.limits.max_stop_strings} strings")
        for stop in listed:
            if not isinstance(stop, str) or not 1 <= len(stop) <= self.limits.max_stop_chars:
                raise fields.fail(
                    field, f"must hold strings of 1 to {self.limits.max_stop_chars} characters"
                )
        return tuple(dict.fromkeys(listed))

    def _stop_regex(self, options: SamplingOptions, fields: _Fields) -> tuple[str, ...]:
        patterns = self._stop("stop_regex", options.stop_regex, fields)
        if patterns:
            try:
                compile_patterns(patterns)
            except RegexError as error:
                raise fields.fail("stop_regex", str(error), code="invalid_regex") from None
        return patterns

    def _stop_ids(self, options: SamplingOptions, fields: _Fields) -> tuple[int, ...]:
        ids = options.stop_token_ids or []
        if len(ids) > self.limits.max_ids:
            raise fields.fail("stop_token_ids", f"has more than {self.limits.max_ids} entries")
        check_ids(ids, self.limits.vocab_size, fields.name("stop_token_ids"))
        return tuple(dict.fromkeys(ids))

    def _logprobs(
        self, wanted: LogprobOptions | None, fields: _Fields, prompt_tokens: int | None
    ) -> LogprobParams | None:
        if wanted is None:
            return None
        fields.integer("top_logprobs", wanted.top, 0, self.limits.max_top_logprobs)
        highest = self.limits.context_length if prompt_tokens is None else prompt_tokens
        fields.integer("logprob_start_len", wanted.prompt_start, -1, highest)
        if len(wanted.token_ids) > self.limits.max_ids:
            raise fields.fail("token_ids_logprob", f"has more than {self.limits.max_ids} entries")
        check_ids(wanted.token_ids, self.limits.vocab_size, fields.name("token_ids_logprob"))
        return LogprobParams(
            top=wanted.top,
            token_ids=tuple(dict.fromkeys(wanted.token_ids)),
            prompt_start=wanted.prompt_start,
        )


def _with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    if params.seed == seed:
        return params
    values = {field: getattr(params, field) for field in params.__struct_fields__}
    return SamplingParams(**{**values, "seed": seed})


def finite(value: float | None) -> float | None:
    """A logprob as JSON can carry it: -inf and NaN become None."""
    return value if value is not None and math.isfinite(value) else None
