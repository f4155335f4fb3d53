"""What each step does to the text that it is appended to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sps_runtime.lang.draft import Draft
from sps_runtime.lang.expressions import (
    AppendBranches,
    Gen,
    Prefill,
    RoleBegin,
    RoleEnd,
    ScopeBegin,
    ScopeEnd,
    Select,
    SplitReasoning,
    Step,
    Text,
)
from sps_runtime.lang.reasoning import split_reasoning


def run(draft: Draft, step: Step) -> None:
    """Run `step` on `draft`, to its end."""
    _RUN[type(step)](draft, step)


def _text(draft: Draft, step: Text) -> None:
    draft.write(step.value)


def _gen(draft: Draft, step: Gen) -> None:
    sampling = step.sampling.over(draft.sampling)
    sampling = sampling.stopping_at(draft.backend.chat_template.stop)
    if draft.stream:
        _gen_in_pieces(draft, step.name, sampling)
        return
    texts, meta_info = draft.backend.generate(draft.text, sampling)
    with draft.changing():
        draft.text += texts if isinstance(texts, str) else texts[0]
        _keep(draft, step.name, texts, meta_info)


def _gen_in_pieces(draft: Draft, name: str | None, sampling: Any) -> None:
    made = ""
    with draft.changing():
        _keep(draft, name, made, {})
    for piece, meta_info in draft.backend.generate_stream(draft.text, sampling):
        made += piece
        with draft.changing():
            draft.text += piece
            _keep(draft, name, made, meta_info)


def _select(draft: Draft, step: Select) -> None:
    decided = draft.backend.select(draft.text, step.choices, step.temperature, step.method)
    with draft.changing():
        draft.text += decided.decision
        _keep(draft, step.name, decided.decision, decided.meta_info)


def _role_begin(draft: Draft, step: RoleBegin) -> None:
    if draft.role is not None:
        raise ValueError(f"role {step.role} begins inside of role {draft.role}")
    template = draft.backend.chat_template
    if not draft.messages and step.role != "system" and template.default_system:
        _role_begin(draft, RoleBegin("system"))
        draft.write(template.default_system)
        _role_end(draft, RoleEnd("system"))
    draft.role = step.role
    draft.write(template.affixes(step.role, draft.messages)[0])
    draft.role_start = len(draft.text)


def _role_end(draft: Draft, step: RoleEnd) -> None:
    if draft.role != step.role:
        raise ValueError(f"role {step.role} ends, but {draft.role or 'no role'} has begun")
    content = draft.text[draft.role_start :].lstrip()
    draft.write(draft.backend.chat_template.affixes(step.role, draft.messages)[1])
    draft.messages.append({"role": step.role, "content": content})
    draft.role = None


def _scope_begin(draft: Draft, step: ScopeBegin) -> None:
    draft.scopes[step.name] = len(draft.text)


def _scope_end(draft: Draft, step: ScopeEnd) -> None:
    with draft.changing():
        draft.variables[step.name] = draft.text[draft.scopes.pop(step.name) :]


def _split_reasoning(draft: Draft, step: SplitReasoning) -> None:
    if draft.stream:
        return  # it has been read already
    generated = draft.variables[step.name]
    thoughts, answer = split_reasoning(step.model_type, generated)
    with draft.changing():
        draft.variables[step.name] = answer
        draft.variables[step.thoughts] = thoughts
        if draft.text.endswith(generated):
            draft.text = draft.text[: len(draft.text) - len(generated)] + answer


def _prefill(draft: Draft, step: Prefill) -> None:
    draft.backend.cache_prefix(draft.text)


def _append_branches(draft: Draft, step: AppendBranches) -> None:
    for other in step.branches:
        other.sync()
        if other.error is not None:
            raise other.error
        draft.write(other.text[other.fork_start :])


def _keep(draft: Draft, name: str | None, value: Any, meta_info: Any) -> None:
    if name is not None:
        draft.variables[name] = value
        draft.meta_info[name] = meta_info


_RUN: Mapping[type[Step], Callable[[Draft, Any], None]] = {
    Text: _text,
    Gen: _gen,
    Select: _select,
    RoleBegin: _role_begin,
    RoleEnd: _role_end,
    ScopeBegin: _scope_begin,
    ScopeEnd: _scope_end,
    SplitReasoning: _split_reasoning,
    Prefill: _prefill,
    AppendBranches: _append_branches,
}
