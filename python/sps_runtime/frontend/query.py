"""What a caller asks the manager for, in the caller's own words, before the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sps_runtime.frontend.attention_options import AttentionOptions
from sps_runtime.types.grammar import GrammarSpec


class SamplingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Sampling as a client writes it: None is "not told". The names are SGLang's.

    `n`, `skip_special_tokens`, `no_stop_trim` concern the front end alone; everything else becomes
    `types.sampling.SamplingParams` in the gate.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    sampling_seed: int | None = None
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class LogprobOptions:
    """Which logprobs are wanted; None in place of it for none.

    Attributes:
        top: alternatives per position.
        token_ids: ids wanted at every position.
        prompt_start: first prompt position reported, -1 for none of the prompt.
    """

    top: int = 0
    token_ids: Sequence[int] = ()
    prompt_start: int = -1


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Plain text; literal special tokens in it are parsed.

    Attributes:
        add_special_tokens: put what the tokenizer puts around a text, such as a BOS.
    """

    text: str
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids, taken as they are."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the model's chat template.

    Attributes:
        messages: each with ``role`` and ``content`` (text), in order.
        variables: further template variables, scalars only.
        tools: functions that the model may call, as OpenAI describes them.
    """

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] = field(default_factory=dict)
    tools: Sequence[Mapping[str, Any]] = ()


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One prompt and what is wanted for it.

    Attributes:
        prompt: text, ids or a conversation.
        options: how to sample.
        logprobs: None for none.
        attention: None: the server's default.
        default_max_new_tokens: where the options do not tell; None: all the room there is.
        use_model_defaults: take temperature and its kin from the model's generation_config where
            the options do not tell (OpenAI routes; SGLang's native route has fixed defaults).
        tenant: cache namespace, chosen by the server.
        owner: who may abort it by its label.
        label: the client's own id of it, "" for none. Never used as an identity in the engine.
        names: how the client calls the gate's fields, for error messages.
        grammar: what the answer must follow; the client calls it ``names["grammar"]``.
        hidden_state: generate nothing, answer with the hidden state of the prompt's last token.
    """

    prompt: Prompt
    options: SamplingOptions = field(default_factory=SamplingOptions)
    logprobs: LogprobOptions | None = None
    attention: AttentionOptions | None = None
    default_max_new_tokens: int | None = 128
    use_model_defaults: bool = False
    tenant: str = ""
    owner: str = ""
    label: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    grammar: GrammarSpec | None = None
    hidden_state: bool = False
