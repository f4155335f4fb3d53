"""The words of the language: what programs append."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn

from sps_runtime.lang.choices import ChoicesSamplingMethod, token_length_normalized
from sps_runtime.lang.expressions import (
    Expression,
    Gen,
    RoleBegin,
    RoleEnd,
    Select,
    SplitReasoning,
    as_expression,
)
from sps_runtime.lang.expressions import Sequence as Sequenced
from sps_runtime.lang.sampling import Sampling

Stop = str | Sequence[str] | None


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: Stop = None,
    stop_token_ids: Sequence[int] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesSamplingMethod | None = None,
    regex: str | None = None,
    json_schema: str | None = None,
    *,
    stop_regex: Stop = None,
) -> Expression:
    """Have the model write, into the variable `name`; options not told are those of ``run``.

    Args:
        dtype: int, float, str or bool (or its name): write a literal of that type.
        choices: write one of these instead, as `select` does with `choices_method`.
        regex, json_schema: what the text must match.
        n: more than 1 makes the variable a list; the text goes on with its first entry.

    Raises:
        re.error: for a malformed regex.
    """
    if choices:
        method = choices_method or token_length_normalized
        return select(name, choices, temperature or 0.0, method)
    if regex is not None:
        re.compile(regex)
    sampling = Sampling(
        max_new_tokens=max_tokens,
        min_new_tokens=min_tokens,
        n=n,
        stop=stop,
        stop_token_ids=stop_token_ids,
        stop_regex=stop_regex,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        frequency_penalty=frequency_penalty,
        presence_penalty=presence_penalty,
        ignore_eos=ignore_eos,
        return_logprob=return_logprob,
        logprob_start_len=logprob_start_len,
        top_logprobs_num=top_logprobs_num,
        return_text_in_logprobs=return_text_in_logprobs,
        dtype=dtype,
        regex=regex,
        json_schema=json_schema,
    )
    return Gen(name, sampling)


def gen_int(
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: Stop = None,
    stop_token_ids: Sequence[int] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
) -> Expression:
    """`gen` of an integer."""
    options = {key: value for key, value in locals().items() if key != "name"}
    return gen(name, dtype=int, **options)


def gen_string(
    name: str | None = None,
    max_tokens: int | None = None,
    n: int | None = None,
    stop: Stop = None,
    stop_token_ids: Sequence[int] | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
) -> Expression:
    """`gen` of a string in double quotes."""
    options = {key: value for key, value in locals().items() if key != "name"}
    return gen(name, dtype=str, **options)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesSamplingMethod = token_length_normalized,
) -> Expression:
    """Write that one of `choices` which the model finds best. Raises ValueError without any."""
    if not choices:
        raise ValueError("select needs choices")
    return Select(name, tuple(choices), temperature, choices_method)


def role(name: str, expression: Expression | str | None = None) -> Expression:
    """A whole message of the role `name`."""
    content = () if expression is None else tuple(as_expression(expression).steps())
    return Sequenced((RoleBegin(name), *content, RoleEnd(name)))


def system(expr: Expression | str | None = None) -> Expression:
    """A system message."""
    return role("system", expr)


def user(expr: Expression | str | None = None) -> Expression:
    """A user's message."""
    return role("user", expr)


def assistant(expr: Expression | str | None = None) -> Expression:
    """A message of the assistant, generated or given."""
    return role("assistant", expr)


def system_begin() -> Expression:
    return RoleBegin("system")


def system_end() -> Expression:
    return RoleEnd("system")


def user_begin() -> Expression:
    return RoleBegin("user")


def user_end() -> Expression:
    return RoleEnd("user")


def assistant_begin() -> Expression:
    return RoleBegin("assistant")


def assistant_end() -> Expression:
    return RoleEnd("assistant")


def separate_reasoning(expr: Expression | str, model_type: str) -> Expression:
    """`expr`, and each variable that it generates without its thoughts.

    Those become NAME_reasoning_content. In a stream everything stays as it came.
    """
    steps = tuple(as_expression(expr).steps())
    names = [step.name for step in steps if isinstance(step, Gen | Select) and step.name]
    return Sequenced((*steps, *(SplitReasoning(name, model_type) for name in names)))


def image(expr: object) -> NoReturn:
    """Not served. Raises ValueError."""
    raise ValueError("images are not served: models here read text")


def video(path: str, num_frames: int) -> NoReturn:
    """Not served. Raises ValueError."""
    raise ValueError("videos are not served: models here read text")
