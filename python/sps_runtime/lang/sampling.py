"""How to sample: the options of ``gen`` over those of ``run``, as a server wants them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

REGEX_INT = r"[-+]?[0-9]+[ \n]*"
REGEX_FLOAT = r"[-+]?[0-9]*\.?[0-9]+[ \n]*"
REGEX_BOOL = r"(True|False)"
REGEX_STR = r"\"[\w\d\s]*\""

# By type or its name: the language of its values, and what ends one.
_DTYPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "int": (REGEX_INT, (" ", "\n")),
    "float": (REGEX_FLOAT, (" ", "\n")),
    "str": (REGEX_STR, ()),
    "bool": (REGEX_BOOL, ()),
}

# Fields of a request that stand beside sampling_params.
_LOGPROBS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


@dataclass(frozen=True)
class Sampling:
    """Options of one generation, as in SGLang's ``sampling_params``; None is "not told"."""

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    n: int | None = None
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    stop_regex: str | Iterable[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    ignore_eos: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    dtype: type | str | None = None
    regex: str | None = None
    json_schema: str | None = None

    def over(self, base: Sampling) -> Sampling:
        """What is told here, and `base` where nothing is."""
        return replace(base, **self.told())

    def told(self) -> dict[str, Any]:
        """The options that are not None, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def stopping_at(self, more: Iterable[str]) -> Sampling:
        """The same, ending also where one of `more` is generated."""
        return replace(self, stop=(*_texts(self.stop), *more))

    def request(self) -> dict[str, Any]:
        """Fields of ``/generate``: sampling_params, and beside them those about logprobs.

        Raises:
            ValueError: for a dtype that is none of int, float, str and bool.
        """
        plain = self._with_dtype()
        told = plain.told()
        told.pop("dtype", None)
        told["stop"] = list(_texts(plain.stop))
        told["stop_token_ids"] = list(plain.stop_token_ids or ())
        beside = {name: told.pop(name) for name in _LOGPROBS if name in told}
        return {"sampling_params": told, **beside}

    def _with_dtype(self) -> Sampling:
        if self.dtype is None:
            return self
        name = self.dtype if isinstance(self.dtype, str) else self.dtype.__name__
        if name not in _DTYPES:
            raise ValueError(f"dtype {name!r} is none of {', '.join(_DTYPES)}")
        if self.regex is not None:
            warnings.warn(f"dtype {name} takes the place of regex {self.regex!r}", stacklevel=2)
        regex, ends = _DTYPES[name]
        return replace(self, dtype=None, regex=regex).stopping_at(ends)


# What SGLang's front end sends when a program says nothing; a server's own defaults may differ.
DEFAULTS = Sampling(
    max_new_tokens=128,
    min_new_tokens=0,
    n=1,
    stop=(),
    stop_token_ids=(),
    temperature=1.0,
    top_p=1.0,
    top_k=-1,
    min_p=0.0,
    frequency_penalty=0.0,
    presence_penalty=0.0,
    ignore_eos=False,
)

# Options that run and run_batch take for all of a program's calls; other names are its arguments.
RUN_OPTIONS = frozenset(field.name for field in fields(Sampling)) - {
    "min_new_tokens",
    "stop_regex",
    "dtype",
    "regex",
    "json_schema",
}


def _texts(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
