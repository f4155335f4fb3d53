"""Bodies of SGLang's native routes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from sps_runtime.frontend.attention_options import FIELD as ATTENTION
from sps_runtime.frontend.attention_options import AttentionOptions
from sps_runtime.frontend.query import LogprobOptions, SamplingOptions
from sps_runtime.server.body import IdLists, WantedIds, decode, is_nothing, nothing
from sps_runtime.server.grammars import Grammar, given, only
from sps_runtime.types.errors import InvalidRequest

_UNSUPPORTED = ("custom_params",)
SAMPLING = "sampling_params"


class NativeSampling(SamplingOptions, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``sampling_params``: unknown keys are an error."""

    json_schema: Any = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None
    custom_params: Any = None

    def grammar(self) -> Grammar | None:
        """Return the grammar. Raises InvalidRequest for several at once."""
        return only(
            (
                given(f"{SAMPLING}.regex", "regex", self.regex),
                given(f"{SAMPLING}.json_schema", "json_schema", self.json_schema),
                given(f"{SAMPLING}.ebnf", "ebnf", self.ebnf),
                given(f"{SAMPLING}.structural_tag", "structural_tag", self.structural_tag),
            )
        )

    def checked(self) -> SamplingOptions:
        """Return the plain options.

        Raises:
            InvalidRequest: naming an unsupported option that is really used.
        """
        for name in _UNSUPPORTED:
            if getattr(self, name):
                field = f"{SAMPLING}.{name}"
                raise InvalidRequest(
                    f"{field} is not supported by this server",
                    field=field,
                    code="unsupported_option",
                )
        names = SamplingOptions.__struct_fields__
        return SamplingOptions(**{name: getattr(self, name) for name in names})


class NativeInput(msgspec.Struct, kw_only=True):
    """What every native route takes."""

    text: str | list[str] | None = None
    input_ids: IdLists = msgspec.field(default_factory=nothing)
    rid: str | list[str] | None = None
    attention: AttentionOptions | list[AttentionOptions | None] | None = None

    @property
    def is_batch(self) -> bool:
        """Whether the input is a list of prompts, so that the answer is a list, too."""
        if self.text is not None:
            return isinstance(self.text, list)
        return bytes(self.input_ids).lstrip()[1:].lstrip().startswith(b"[")

    def prompts(self) -> tuple[str, list[str | list[int]]]:
        """Return the input's field name and its prompts.

        Raises:
            InvalidRequest: unless exactly one of text and input_ids is there.
        """
        has_ids = not is_nothing(self.input_ids)
        if self.text is not None and has_ids:
            raise InvalidRequest("give text or input_ids, not both", field="input_ids")
        if self.text is not None:
            prompts: list[str | list[int]] = (
                [self.text] if isinstance(self.text, str) else list(self.text)
            )
            field = "text"
        else:
            field = "input_ids"
            kind = list[list[int]] if self.is_batch else list[int]
            ids = decode(self.input_ids, kind, field=field) if has_ids else []
            prompts = list(ids) if self.is_batch else [ids]
        if not prompts or prompts == [[]]:
            raise InvalidRequest("text or input_ids is empty", field=field)
        return field, prompts

    def attentions(self, prompts: int) -> list[tuple[str, AttentionOptions | None]]:
        """Return each prompt's attention, and how the client calls it."""
        told = _per_prompt(ATTENTION, self.attention, prompts, None)
        listed = isinstance(self.attention, list)
        names = (f"{ATTENTION}[{i}]" if listed else ATTENTION for i in range(prompts))
        return list(zip(names, told, strict=True))


class GenerateBody(NativeInput, kw_only=True):
    """POST or PUT /generate."""

    sampling_params: NativeSampling | list[NativeSampling] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: WantedIds = msgspec.field(default_factory=nothing)
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None

    def sampling(self, prompts: int) -> list[NativeSampling]:
        """Return the options of each prompt."""
        told = self.sampling_params
        if not isinstance(told, list):
            return [told or NativeSampling()] * prompts
        return list(_per_prompt(SAMPLING, told, prompts, None))

    def logprobs(self, sampling: Sequence[SamplingOptions]) -> list[LogprobOptions | None]:
        """Return the wanted logprobs of each prompt.

        Who generates nothing and does not tell where to start can only mean the whole prompt:
        SGLang's front end asks so for unconditional likelihoods.
        """
        prompts = len(sampling)
        wanted = _per_prompt("return_logprob", self.return_logprob, prompts, False)
        starts = _per_prompt("logprob_start_len", self.logprob_start_len, prompts, None)
        starts = [
            (0 if options.max_new_tokens == 0 else -1) if start is None else start
            for start, options in zip(starts, sampling, strict=True)
        ]
        tops = _per_prompt("top_logprobs_num", self.top_logprobs_num, prompts, 0)
        ids = self._wanted_ids(prompts)
        return [
            LogprobOptions(tops[i], ids[i], starts[i]) if wanted[i] else None
            for i in range(prompts)
        ]

    def _wanted_ids(self, prompts: int) -> list[list[int]]:
        field = "token_ids_logprob"
        if is_nothing(self.token_ids_logprob):
            return [[]] * prompts
        nested = bytes(self.token_ids_logprob).lstrip()[1:].lstrip()[:1] in (b"[", b"n")
        if not nested:
            return [decode(self.token_ids_logprob, list[int], field=field)] * prompts
        listed = decode(self.token_ids_logprob, list[list[int] | None], field=field)
        return [ids or [] for ids in _per_prompt(field, listed, prompts, None)]


class EncodeBody(NativeInput, kw_only=True):
    """POST or PUT /encode.

    Attributes:
        sampling_params: sent by clients of SGLang, without a meaning.
        normalize: divide the vector by its length; true unless told.
    """

    sampling_params: msgspec.Raw = msgspec.field(default_factory=nothing)
    normalize: bool | None = None
    model: str | None = None


def _per_prompt(field: str, value: Any, prompts: int, default: Any) -> Sequence[Any]:
    """One value for all prompts, or a list with one for each."""
    if not isinstance(value, list):
        return [default if value is None else value] * prompts
    if len(value) != prompts:
        raise InvalidRequest(f"{field} must have one entry for each of {prompts}", field=field)
    return value
