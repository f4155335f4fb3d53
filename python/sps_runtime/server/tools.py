"""Tools that a request brings, and how the answer may use them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from sps_runtime.frontend.parsing.tool_formats import ToolFormat
from sps_runtime.frontend.parsing.tool_parser import ToolParser
from sps_runtime.server.grammars import Grammar
from sps_runtime.server.service import Service
from sps_runtime.server.tool_grammars import calls_grammar, strict_grammar
from sps_runtime.types.errors import InvalidRequest

MAX_TOOLS = 128
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
Choice = Literal["none", "auto", "required"]


class Function(msgspec.Struct, kw_only=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """An entry of ``tools``."""

    function: Function
    type: Literal["function"] = "function"


def as_tools(
    told: Sequence[tuple[str | None, Function]], kinds: Sequence[str | None], only: str
) -> list[Tool]:
    """Functions of another API's ``tools``, each with the type that it says there.

    Raises:
        InvalidRequest: for a type that is none of `kinds`; `only` says what is supported.
    """
    for index, (kind, _) in enumerate(told):
        if kind not in kinds:
            field = f"tools[{index}].type"
            raise InvalidRequest(f"{field}: {only}", field=field, code="unsupported_option")
    return [Tool(function=function) for _, function in told]


class NamedFunction(msgspec.Struct):
    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    """A ``tool_choice`` that names the one function to call."""

    function: NamedFunction
    type: Literal["function"] = "function"


@dataclass(frozen=True)
class Toolbox:
    """The tools of one request.

    Attributes:
        form: how the model writes calls; None where nothing is parsed.
        functions: those that may be called; empty where none may.
        choice: a function's name, or what the client chose.
        parallel: whether several calls may stand in one answer.
        special: special tokens of the model.
    """

    form: ToolFormat | None = None
    functions: tuple[Function, ...] = ()
    choice: str = "none"
    parallel: bool = True
    special: dict[str, int] | None = None

    @property
    def active(self) -> bool:
        """Whether answers are searched for calls."""
        return bool(self.functions) and self.form is not None

    def described(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [_described(function) for function in self.functions]

    def parser(self) -> ToolParser | None:
        """A parser for one answer."""
        if self.form is None or not self.functions:
            return None
        names = [function.name for function in self.functions]
        return ToolParser(self.form, names, 1 << 30 if self.parallel else 1)

    def grammar(self) -> Grammar | None:
        """What forces calls, or keeps those that come to strict schemas."""
        if self.form is None or not self.functions:
            return None
        special = self.special or {}
        if self.choice == "auto":
            strict = [function for function in self.functions if function.strict]
            spec = strict_grammar(self.form, _signatures(strict)) if strict else None
        else:
            wanted = [f for f in self.functions if self.choice in ("required", f.name)]
            parallel = self.parallel and self.choice == "required"
            spec = calls_grammar(self.form, _signatures(wanted), special, parallel=parallel)
        return None if spec is None else Grammar("tools", spec)


def make_toolbox(
    service: Service,
    tools: Sequence[Tool] | None,
    choice: Choice | NamedTool | None,
    parallel: bool | None,
) -> Toolbox:
    """Check a request's tools.

    Raises:
        InvalidRequest: naming the field.
    """
    functions = [tool.function for tool in tools or ()]
    chosen = choice.function.name if isinstance(choice, NamedTool) else choice
    if not functions:
        if chosen not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice needs tools", field="tool_choice")
        return Toolbox()
    _check(functions)
    names = {function.name for function in functions}
    if isinstance(choice, NamedTool) and chosen not in names:
        raise InvalidRequest("tool_choice names none of the tools", field="tool_choice")
    if chosen == "none":
        return Toolbox()
    if service.tool_format is None:
        raise InvalidRequest(
            "tools are not supported by this server: it was started with --tool-call-parser none",
            field="tools",
            code="unsupported_option",
        )
    return Toolbox(
        form=service.tool_format,
        functions=tuple(functions),
        choice=chosen or "auto",
        parallel=parallel is not False,
        special=service.manager.tokenizer.special_texts,
    )


def _check(functions: Sequence[Function]) -> None:
    if len(functions) > MAX_TOOLS:
        raise InvalidRequest(f"tools holds more than {MAX_TOOLS} tools", field="tools")
    for index, function in enumerate(functions):
        field = f"tools[{index}].function.name"
        if not _NAME.fullmatch(function.name):
            raise InvalidRequest(
                f"{field} must be 1 to 64 letters, digits, or any of _ . : -", field=field
            )
    if len({function.name for function in functions}) < len(functions):
        raise InvalidRequest("tools holds two functions of one name", field="tools")


def _described(function: Function) -> dict[str, Any]:
    content: dict[str, Any] = {"name": function.name, "description": function.description or ""}
    content["parameters"] = function.parameters or {"type": "object", "properties": {}}
    return {"type": "function", "function": content}


def _signatures(functions: Sequence[Function]) -> dict[str, Any]:
    return {function.name: function.parameters or {"type": "object"} for function in functions}


def parsed_arguments(text: str) -> Any:
    """A former call's arguments as templates want them: an object where they are one."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
