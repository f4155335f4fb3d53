"""What each step does to a branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from sps_runtime.lang.branch import Branch


def run(branch: Branch, step: Step) -> None:
    """Run `step` on `branch`, to its end."""
    _RUN[type(step)](branch, step)


def _text(branch: Branch, step: Text) -> None:
    branch.write(step.value)


def _gen(branch: Branch, step: Gen) -> None:
    sampling = step.sampling.over(branch.sampling)
    sampling = sampling.stopping_at(branch.backend.chat_template.stop)
    if branch.stream:
        _gen_in_pieces(branch, step.name, sampling)
        return
    texts, meta_info = branch.backend.generate(branch.text, sampling)
    with branch.changing():
        branch.text += texts if isinstance(texts, str) else texts[0]
        _keep(branch, step.name, texts, meta_info)


def _gen_in_pieces(branch: Branch, name: str | None, sampling: Any) -> None:
    made = ""
    with branch.changing():
        _keep(branch, name, made, {})
    for piece, meta_info in branch.backend.generate_stream(branch.text, sampling):
        made += piece
        with branch.changing():
            branch.text += piece
            _keep(branch, name, made, meta_info)


def _select(branch: Branch, step: Select) -> None:
    decided = branch.backend.select(branch.text, step.choices, step.temperature, step.method)
    with branch.changing():
        branch.text += decided.decision
        _keep(branch, step.name, decided.decision, decided.meta_info)


def _role_begin(branch: Branch, step: RoleBegin) -> None:
    if branch.role is not None:
        raise ValueError(f"role {step.role} begins inside of role {branch.role}")
    template = branch.backend.chat_template
    if not branch.messages and step.role != "system" and template.default_system:
        _role_begin(branch, RoleBegin("system"))
        branch.write(template.default_system)
        _role_end(branch, RoleEnd("system"))
    branch.role = step.role
    branch.write(template.affixes(step.role, branch.messages)[0])
    branch.role_start = len(branch.text)


def _role_end(branch: Branch, step: RoleEnd) -> None:
    if branch.role != step.role:
        raise ValueError(f"role {step.role} ends, but {branch.role or 'no role'} has begun")
    content = branch.text[branch.role_start :].lstrip()
    branch.write(branch.backend.chat_template.affixes(step.role, branch.messages)[1])
    branch.messages.append({"role": step.role, "content": content})
    branch.role = None


def _scope_begin(branch: Branch, step: ScopeBegin) -> None:
    branch.scopes[step.name] = len(branch.text)


def _scope_end(branch: Branch, step: ScopeEnd) -> None:
    with branch.changing():
        branch.variables[step.name] = branch.text[branch.scopes.pop(step.name) :]


def _split_reasoning(branch: Branch, step: SplitReasoning) -> None:
    if branch.stream:
        return  # it has been read already
    generated = branch.variables[step.name]
    thoughts, answer = split_reasoning(step.model_type, generated)
    with branch.changing():
        branch.variables[step.name] = answer
        branch.variables[step.thoughts] = thoughts
        if branch.text.endswith(generated):
            branch.text = branch.text[: len(branch.text) - len(generated)] + answer


def _prefill(branch: Branch, step: Prefill) -> None:
    branch.backend.cache_prefix(branch.text)


def _append_branches(branch: Branch, step: AppendBranches) -> None:
    for other in step.branches:
        other.sync()
        if other.error is not None:
            raise other.error
        branch.write(other.text[other.fork_start :])


def _keep(branch: Branch, name: str | None, value: Any, meta_info: Any) -> None:
    if name is not None:
        branch.variables[name] = value
        branch.meta_info[name] = meta_info


_RUN: Mapping[type[Step], Callable[[Branch, Any], None]] = {
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
