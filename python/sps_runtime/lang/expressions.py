"""What a program appends to its text: expressions, made of steps that run in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from sps_runtime.lang.choices import ChoicesSamplingMethod
from sps_runtime.lang.draft import Draft
from sps_runtime.lang.sampling import Sampling


class Expression:
    """Something to append; ``+`` joins expressions and text."""

    def steps(self) -> Iterator[Step]:
        """The steps that it is made of, in order."""
        raise TypeError(f"{type(self).__name__} cannot be appended")

    def __add__(self, other: Expression | str) -> Expression:
        return Sequence((*self.steps(), *as_expression(other).steps()))

    def __radd__(self, other: Expression | str) -> Expression:
        return Sequence((*as_expression(other).steps(), *self.steps()))


def as_expression(value: Any) -> Expression:
    """`value` as an expression. Raises TypeError for what is neither text nor an expression."""
    if isinstance(value, Expression):
        return value
    if isinstance(value, str):
        return Text(value)
    raise TypeError(f"only text and expressions can be appended, not {type(value).__name__}")


@dataclass(frozen=True)
class Sequence(Expression):
    items: tuple[Step, ...]

    def steps(self) -> Iterator[Step]:
        yield from self.items


class Step(Expression):
    """One indivisible expression.

    Attributes:
        asks_model: it waits for an answer, so that it never runs in the program's own thread.
    """

    asks_model: ClassVar[bool] = False

    def steps(self) -> Iterator[Step]:
        yield self

    def promises(self) -> tuple[str, ...]:
        """Variables that readers wait for from the moment this step is appended."""
        return ()

    def keeps(self) -> tuple[str, ...]:
        """Variables that are there when this step has run."""
        return self.promises()


@dataclass(frozen=True)
class Text(Step):
    value: str


@dataclass(frozen=True)
class Gen(Step):
    asks_model: ClassVar[bool] = True
    name: str | None
    sampling: Sampling

    def promises(self) -> tuple[str, ...]:
        return () if self.name is None else (self.name,)


@dataclass(frozen=True)
class Select(Step):
    asks_model: ClassVar[bool] = True
    name: str | None
    choices: tuple[str, ...]
    temperature: float
    method: ChoicesSamplingMethod

    def promises(self) -> tuple[str, ...]:
        return () if self.name is None else (self.name,)


@dataclass(frozen=True)
class RoleBegin(Step):
    role: str


@dataclass(frozen=True)
class RoleEnd(Step):
    role: str


@dataclass(frozen=True)
class ScopeBegin(Step):
    name: str

    def promises(self) -> tuple[str, ...]:
        return (self.name,)

    def keeps(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class ScopeEnd(Step):
    name: str

    def promises(self) -> tuple[str, ...]:
        return ()

    def keeps(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True)
class SplitReasoning(Step):
    """Take the thoughts out of a generated variable, into one called NAME_reasoning_content."""

    name: str
    model_type: str

    @property
    def thoughts(self) -> str:
        return f"{self.name}_reasoning_content"

    def promises(self) -> tuple[str, ...]:
        return (self.name, self.thoughts)


@dataclass(frozen=True)
class Prefill(Step):
    """Have the text so far computed and cached: branches are about to share it."""

    asks_model: ClassVar[bool] = True


@dataclass(frozen=True)
class AppendBranches(Step):
    """Append what each of some branches wrote since it was forked."""

    asks_model: ClassVar[bool] = True
    branches: tuple[Draft, ...]
