"""Thoughts and answer of a model that thinks aloud."""

from __future__ import annotations

from sps_runtime.frontend.parsing.events import Reasoning, Text
from sps_runtime.frontend.parsing.reasoning import REASONING_FORMATS, ReasoningParser


def split_reasoning(model_type: str, text: str) -> tuple[str, str]:
    """`text` as (thoughts, answer).

    Args:
        model_type: a name of `frontend.parsing.reasoning`.

    Raises:
        ValueError: for an unknown one.
    """
    if model_type not in REASONING_FORMATS:
        known = ", ".join(REASONING_FORMATS)
        raise ValueError(f"unknown reasoning format {model_type!r}; known: {known}")
    parser = ReasoningParser(REASONING_FORMATS[model_type])
    events = [*parser.push(text), *parser.finish()]
    thoughts = "".join(event.text for event in events if isinstance(event, Reasoning))
    answer = "".join(event.text for event in events if isinstance(event, Text))
    return thoughts, answer
