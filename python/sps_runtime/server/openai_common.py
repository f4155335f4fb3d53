"""Pieces of OpenAI's answers: usage, finish reasons, labels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sps_runtime.frontend.attention_options import report_fields
from sps_runtime.frontend.request_state import Finish, RequestState
from sps_runtime.types.errors import InvalidRequest

_LABEL = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def legal_label(label: str | None) -> str:
    """A client's id of a request, "" where it is none or not made of harmless characters."""
    return label if label is not None and _LABEL.fullmatch(label) else ""


def labels_of(rid: str | list[str] | None, prompts: int) -> list[str]:
    """One label per prompt; a single one is numbered when there are several prompts.

    Raises:
        InvalidRequest: when a list has another length than the prompts.
    """
    if isinstance(rid, list):
        if len(rid) != prompts:
            raise InvalidRequest(f"rid must name each of {prompts} prompts", field="rid")
        return [legal_label(label) for label in rid]
    label = legal_label(rid)
    if prompts == 1 or not label:
        return [label] * prompts
    return [legal_label(f"{label}_{i}") for i in range(prompts)]


def usage(
    states: Sequence[RequestState], choices_per_prompt: int, *, cache_report: bool
) -> dict[str, Any]:
    """Token counts of an answer; a prompt counts once, however many choices it has."""
    prompt = sum(state.prompt_tokens for state in states[::choices_per_prompt])
    completion = sum(state.completion_tokens for state in states)
    cached = sum(state.cached_tokens for state in states[::choices_per_prompt])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached} if cache_report else None,
    }


def attention_report(finish: Finish | None, state: RequestState) -> dict[str, Any]:
    """Our further field of a choice that has ended, where sparse attention was asked for; clients
    that do not know it ignore it."""
    if finish is None or state.attention is None:
        return {}
    return {"sps_attention": report_fields(state.attention)}


def finish_reason(finish: Finish | None) -> str | None:
    return None if finish is None else finish.kind


def matched_stop(finish: Finish | None) -> int | str | None:
    return None if finish is None else finish.matched
