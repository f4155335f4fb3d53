"""Grammar backends by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from sps_runtime.grammar.protocol import GrammarBackend, GrammarError, Vocabulary
from sps_runtime.registry import resolve

BACKENDS: Mapping[str, str] = {
    "llguidance": "sps_runtime.grammar.llguidance_backend:LLGuidance",
    "xgrammar": "sps_runtime.grammar.xgrammar_backend:XGrammar",
}
MAX_TOKENIZER_BYTES = 256 << 20


def make_backend(name: str, vocabulary: Vocabulary) -> GrammarBackend:
    """Make the backend `name`; plug-ins add others as ``grammar_backend.NAME``.

    Raises:
        ConfigError: nobody knows the name.
        GrammarError: it cannot serve this vocabulary, or its library is not installed.
    """
    try:
        factory = resolve("grammar_backend", BACKENDS, name)
    except ImportError as error:
        raise GrammarError(f"the grammar backend {name} is not installed") from error
    return cast(Callable[[Vocabulary], GrammarBackend], factory)(vocabulary)


def load_vocabulary(directory: str | Path, size: int, eos_ids: tuple[int, ...]) -> Vocabulary:
    """The vocabulary of a model's tokenizer. Raises GrammarError when it cannot be read."""
    path = Path(directory) / "tokenizer.json"
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise GrammarError("tokenizer.json is too large")
        return Vocabulary(path.read_text(encoding="utf-8"), size, eos_ids)
    except (OSError, UnicodeDecodeError) as error:
        raise GrammarError(f"tokenizer.json cannot be read: {type(error).__name__}") from None
