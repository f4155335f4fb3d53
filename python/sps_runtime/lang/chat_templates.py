"""How roles become text on the client, by the names that SGLang's front end knows.

Programs append to one text, so that a model's own template, which wants all messages at once,
cannot be used; prefix and suffix of each role can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Affixes = tuple[str, str]
_NOTHING: Affixes = ("", "")


@dataclass(frozen=True)
class ChatTemplate:
    """Attributes:
    name: what SGLang calls it.
    roles: what comes before and after a message, by role.
    default_system: the system message of a conversation that begins without one.
    stop: what ends an answer.
    folds_system: the system message stands inside the first user message (Llama 2).
    """

    name: str
    roles: Mapping[str, Affixes] = field(default_factory=dict)
    default_system: str | None = None
    stop: tuple[str, ...] = ()
    folds_system: bool = False

    def affixes(self, role: str, before: Sequence[Mapping[str, str]]) -> Affixes:
        """Prefix and suffix of a message of `role` that comes after the messages `before`."""
        prefix, suffix = self.roles.get(role, _NOTHING)
        if self.folds_system and role == "system" and not before:
            prefix = self.roles["user"][0] + prefix
        if self.folds_system and role == "user" and len(before) == 1:
            prefix = ""
        return prefix, suffix


def _same(pattern: str, suffix: str, assistant: str = "assistant") -> dict[str, Affixes]:
    names = {"system": "system", "user": "user", "assistant": assistant}
    return {role: (pattern.format(name), suffix) for role, name in names.items()}


_CHATML = _same("<|im_start|>{}\n", "<|im_end|>\n")
_TEMPLATES = (
    ChatTemplate("default", {r: (f"{r.upper()}:", "\n") for r in ("system", "user", "assistant")}),
    ChatTemplate("chatml", _CHATML, stop=("<|im_end|>",)),
    ChatTemplate("qwen", _CHATML, "You are a helpful assistant.", ("<|im_end|>",)),
    ChatTemplate(
        "llama-2-chat",
        {
            "system": ("<<SYS>>\n", "\n<</SYS>>\n\n"),
            "user": ("[INST] ", " [/INST]"),
            "assistant": ("", " </s><s>"),
        },
        folds_system=True,
    ),
    ChatTemplate(
        "llama-3-instruct",
        _same("<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
        stop=("<|eot_id|>",),
    ),
    ChatTemplate(
        "llama-4",
        _same("<|header_start|>{}<|header_end|>\n\n", "<|eot|>"),
        stop=("<|eot|>",),
    ),
    ChatTemplate(
        "mistral",
        {
            "system": ("[SYSTEM_PROMPT] ", " [/SYSTEM_PROMPT]"),
            "user": ("[INST] ", " [/INST]"),
            "assistant": ("", " </s><s>"),
        },
        stop=("</s>",),
    ),
    ChatTemplate(
        "gemma-it",
        {
            "user": ("<start_of_turn>user\n", "<end_of_turn>\n"),
            "assistant": ("<start_of_turn>model\n", "<end_of_turn>\n"),
        },
    ),
    ChatTemplate(
        "deepseek-v3",
        {
            "user": ("<｜User｜>", ""),
            "assistant": ("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
        },
        stop=("<｜end▁of▁sentence｜>",),
    ),
    ChatTemplate(
        "granite-3-instruct",
        _same("<|start_of_role|>{}<|end_of_role|>", "<|end_of_text|>"),
        stop=("<|end_of_text|>",),
    ),
)
TEMPLATES: Mapping[str, ChatTemplate] = {template.name: template for template in _TEMPLATES}

# The first that matches a model's path names its template.
_MODELS: tuple[tuple[str, str], ...] = (
    (r"deepseek-(v3|r1)(?!.*base)", "deepseek-v3"),
    (r"llama-2.*chat|codellama.*instruct", "llama-2-chat"),
    (r"(mistral|mixtral).*instruct", "mistral"),
    (r"llama-3.*instruct", "llama-3-instruct"),
    (r"tinyllama", "chatml"),
    (r"qwen.*(chat|instruct)", "qwen"),
    (r"gemma.*it|gemma-3", "gemma-it"),
    (r"granite.*instruct", "granite-3-instruct"),
)


def get_chat_template(name: str) -> ChatTemplate:
    """The template called `name`. Raises ValueError for an unknown one."""
    if name not in TEMPLATES:
        raise ValueError(f"unknown chat template {name!r}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def template_of_model(model_path: str) -> ChatTemplate:
    """The template that SGLang would take for this model, ``default`` for an unknown one."""
    for pattern, name in _MODELS:
        if re.search(pattern, model_path, re.IGNORECASE):
            return TEMPLATES[name]
    return TEMPLATES["default"]
