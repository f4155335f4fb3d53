"""What a grammar backend is: two small protocols, and the error of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sps_runtime.types.errors import SpsError
from sps_runtime.types.grammar import GrammarSpec

Allowed = npt.NDArray[np.bool_]
"""``[vocab]``: whether each id may come next."""


MAX_MESSAGE_CHARS = 500


class GrammarError(SpsError):
    """A grammar that is wrong or too large, or tokens that it does not have."""


def one_line(message: str) -> str:
    """What a library said, as a client may be told it."""
    return " ".join(message.split())[:MAX_MESSAGE_CHARS]


@dataclass(frozen=True)
class Vocabulary:
    """What a backend must know of a model's tokens.

    Attributes:
        tokenizer: the content of tokenizer.json.
        size: width of the logits; ids that the tokenizer does not have are never allowed.
        eos_ids: ids that end an answer: allowed exactly where the grammar is satisfied.
    """

    tokenizer: str
    size: int
    eos_ids: tuple[int, ...]


class Matcher(Protocol):
    """One answer's way through a grammar."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Go on by some tokens. Raises GrammarError for one that may not come."""
        ...

    def allowed(self) -> Allowed:
        """What may come next. Raises GrammarError when nothing may, or a limit is exceeded."""
        ...

    def copy(self) -> Matcher:
        """A matcher in the same state."""
        ...


class GrammarBackend(Protocol):
    """Made with a `Vocabulary`; raises GrammarError when it cannot serve it."""

    def prepare(self, spec: GrammarSpec) -> str:
        """Translate and check; the text that `matcher` takes. Raises GrammarError."""
        ...

    def matcher(self, prepared: str) -> Matcher:
        """A matcher at the beginning. Raises GrammarError."""
        ...
