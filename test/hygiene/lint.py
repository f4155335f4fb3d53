"""What the hygiene tests look for in the source of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "sps_runtime"

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "recv_pyobj", "send_pyobj"}
FORBIDDEN_DOTTED = {
    "torch.load",
    "torch.save",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "multiprocessing.Queue",
    "multiprocessing.Pipe",
    "multiprocessing.Manager",
    "jinja2.Environment",
    "os.system",
}
ENVIRONMENT = {"os.environ", "os.getenv", "os.environb", "os.putenv"}


def python_files(*directories: Path) -> list[Path]:
    return sorted(path for directory in directories for path in directory.rglob("*.py"))


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain, else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return ""


def imported_names(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """(name in this file, full dotted name, line) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}", node.lineno


def resolved_uses(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every dotted name used, with import aliases undone, and its line."""
    names = {local: full for local, full, _ in imported_names(tree) if "." not in local}
    plain = {local: full for local, full in names.items() if full != local}
    for node in ast.walk(tree):
        name = dotted(node)
        if name:
            head, _, rest = name.partition(".")
            full = plain.get(head, head)
            yield (f"{full}.{rest}" if rest else full), getattr(node, "lineno", 0)


def forbidden(source: str) -> list[str]:
    """Every use of something that deserializes code or runs text."""
    tree = ast.parse(source)
    found = []
    for _, full, line in imported_names(tree):
        if full.split(".")[0] in FORBIDDEN_MODULES or full in FORBIDDEN_DOTTED:
            found.append(f"{line}: imports {full}")
    for name, line in resolved_uses(tree):
        last = name.rsplit(".", 1)[-1]
        if name in FORBIDDEN_DOTTED or ("torch.distributed" in name and "object" in last):
            found.append(f"{line}: uses {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func
            is_name = isinstance(called, ast.Name) and called.id in FORBIDDEN_CALLS
            is_method = isinstance(called, ast.Attribute) and called.attr in (
                "recv_pyobj",
                "send_pyobj",
            )
            if is_name or is_method:
                found.append(f"{node.lineno}: calls {ast.unparse(called)}")
    return found


def environment_reads(source: str) -> list[str]:
    return [
        f"{line}: {name}"
        for name, line in resolved_uses(ast.parse(source))
        if name in ENVIRONMENT or any(name.startswith(f"{entry}.") for entry in ENVIRONMENT)
    ]


def long_functions(source: str, limit: int) -> list[str]:
    """Functions longer than `limit` lines, docstring not counted."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if ast.get_docstring(node) is not None:
                first = node.body[0]
                lines -= (first.end_lineno or first.lineno) - first.lineno + 1
            if lines > limit:
                found.append(f"{node.lineno}: {node.name} has {lines} lines")
    return found


def global_statements(source: str) -> list[str]:
    return [
        f"{node.lineno}: global {', '.join(node.names)}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Global)
    ]
