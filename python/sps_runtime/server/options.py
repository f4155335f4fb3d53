"""Options that this server does not have: those that would change the answer are refused by name.

Anything else that a body brings and no struct knows is accepted and named in the response header
``x-sps-ignored``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from sps_runtime.server.body import decode, is_nothing
from sps_runtime.server.sampling_fields import SamplingFields
from sps_runtime.types.errors import InvalidRequest

IGNORED_HEADER = "x-sps-ignored"
_MAX_NAMED = 20

_FOREIGN = {
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "custom_logit_processor",
    "custom_params",
    "lora_path",
    "lora_id",
    "session_params",
    "image_data",
    "video_data",
    "audio_data",
    "input_embeds",
    "prompt_embeds",
    "return_hidden_states",
    "return_entropy",
    "return_prompt_token_ids",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bad_words",
    "allowed_token_ids",
    "logits_processors",
    "use_beam_search",
    "length_penalty",
    "truncate_prompt_tokens",
    "cache_salt",
    "extra_key",
    "return_routed_experts",
    "require_reasoning",
}
_SAMPLERS = {
    "typical_p",
    "top_a",
    "tfs",
    "tfs_z",
    "mirostat",
    "mirostat_mode",
    "dry_multiplier",
    "xtc_probability",
    "dynatemp_range",
    "epsilon_cutoff",
    "eta_cutoff",
    "no_repeat_ngram_size",
    "guidance_scale",
    "negative_prompt",
}
"""Ways to sample that other servers have."""
_GRAMMARS = {
    "regex",
    "json_schema",
    "ebnf",
    "structural_tag",
    "response_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "structured_outputs",
}
_ELSEWHERE = {
    "n",
    "logprobs",
    "echo",
    "max_new_tokens",
    "chat_template",
    "chat_template_kwargs",
    "continue_final_message",
    "reasoning_effort",
    "enable_thinking",
}
"""What OpenAI's older routes and their kin have, for routes that do not."""
NATIVE = frozenset(_FOREIGN | _SAMPLERS | _GRAMMARS)
OPENAI = frozenset(
    _FOREIGN
    | _SAMPLERS
    | {
        "best_of",
        "suffix",
        "functions",
        "function_call",
        "modalities",
        "audio",
        "prediction",
        "web_search_options",
        "reasoning",
        "reasoning_effort",
        "include_reasoning",
        "stream_reasoning",
        "thinking",
        "thinking_token_budget",
        "enable_thinking",
        "verbosity",
        "prompt_logprobs",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "chat_template",
        "continue_final_message",
        "documents",
        "add_special_tokens",
        "response_prefix",
        "echo",
        "max_new_tokens",
        "sampling_params",
        "sampling_seed",
    }
)
EMBEDDING = frozenset(
    _FOREIGN - {"use_beam_search", "length_penalty"}
    | {
        "dimensions",
        "task",
        "instruction",
        "input_type",
        "truncate",
        "messages",
        "chat_template",
        "pooling_type",
        "embed_dtype",
        "endianness",
    }
)
TOKENIZE = frozenset(
    {"chat_template", "continue_final_message", "documents", "return_token_strs"}
    | {"truncate_prompt_tokens"}
)
ANTHROPIC = frozenset(
    {"container", "context_management", "mcp_servers", "prefill", "output_format"}
    | _FOREIGN
    | _SAMPLERS
    | _GRAMMARS
    | _ELSEWHERE
    | set(SamplingFields.__struct_fields__)
)
RESPONSES_API = frozenset(
    {
        "background",
        "context_management",
        "conversation",
        "include",
        "max_tokens",
        "max_tool_calls",
        "moderation",
        "prompt",
        "reasoning",
        "top_logprobs",
        "truncation",
    }
    | _FOREIGN
    | _SAMPLERS
    | _GRAMMARS
    | _ELSEWHERE
)
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "guided_decoding_backend": ("auto", "guidance", "llguidance"),
    "modalities": (["text"],),
    "length_penalty": (1, 1.0),
    "add_special_tokens": (False,),
    "include_reasoning": (True,),
    "stream_reasoning": (True,),
    "skip_special_tokens": (True,),
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_p": (0, 0.0),
    "min_tokens": (0,),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "reasoning": ({"effort": None, "summary": None}, {"effort": None}),
    "include": (["reasoning.encrypted_content"],),
}
_NEEDLESS = frozenset(
    {
        "model",
        "user",
        "store",
        "metadata",
        "service_tier",
        "prompt_cache_key",
        "safety_identifier",
    }
)
"""Known, without any effect on the answer, and sent by ordinary clients: not worth naming."""


@dataclass(frozen=True)
class Accepts:
    """What a route's body may be.

    Attributes:
        kind: the struct that it is decoded into.
        unsupported: options that are refused by name.
    """

    kind: type[msgspec.Struct]
    unsupported: frozenset[str] = frozenset()


def check_options(
    fields: Mapping[str, msgspec.Raw], known: type[msgspec.Struct], unsupported: frozenset[str]
) -> dict[str, str]:
    """Refuse what cannot be honoured; return the response headers that name what was ignored.

    Args:
        fields: the body's top level.
        known: the struct that the body is decoded into.
        unsupported: names to refuse.

    Raises:
        InvalidRequest: naming the first unsupported option that is really used.
    """
    names = set(fields) - set(known.__struct_encode_fields__)
    for name in sorted(names & unsupported):
        refuse_if_used(name, fields[name])
    ignored = sorted(names - unsupported - _NEEDLESS)
    printable = [name for name in ignored if name.isascii() and name.isidentifier()]
    shown = [name[:64] for name in printable[:_MAX_NAMED]]
    if len(ignored) > len(shown):
        shown.append(f"+{len(ignored) - len(shown)}")
    return {IGNORED_HEADER: ", ".join(shown)} if shown else {}


def refuse_if_used(name: str, raw: msgspec.Raw) -> None:
    """Raise unless the value says nothing or asks for what is done anyway."""
    if is_nothing(raw) or decode(raw, Any, field=name) in _HARMLESS.get(name, ()):
        return
    raise InvalidRequest(
        f"{name} is not supported by this server", field=name, code="unsupported_option"
    )
