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
}
NATIVE = frozenset(
    _FOREIGN
    | {
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
)
OPENAI = frozenset(
    _FOREIGN
    | {
        "best_of",
        "suffix",
        "functions",
        "function_call",
        "modalities",
        "audio",
        "prediction",
        "web_search_options",
        "reasoning_effort",
        "verbosity",
        "prompt_logprobs",
        "return_token_ids",
        "chat_template",
        "continue_final_message",
        "documents",
        "add_special_tokens",
        "response_prefix",
    }
)
EMBEDDING = frozenset(
    _FOREIGN - {"use_beam_search", "length_penalty"}
    | {"dimensions", "task", "instruction", "input_type", "truncate", "add_special_tokens"}
)
ANTHROPIC = frozenset(
    {"container", "context_management", "mcp_servers", "prefill", "output_format"}
)
RESPONSES_API = frozenset(
    {
        "background",
        "context_management",
        "conversation",
        "include",
        "max_tool_calls",
        "moderation",
        "prompt",
        "reasoning",
        "top_logprobs",
        "truncation",
    }
)
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "guided_decoding_backend": ("auto", "guidance", "llguidance"),
    "modalities": (["text"],),
    "length_penalty": (1, 1.0),
    "add_special_tokens": (True,),
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
