"""A model's tokenizer from its directory: tokenizer.json through `tokenizers`, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer as FastTokenizer

from sps_runtime.frontend.chat_template import ChatTemplate
from sps_runtime.frontend.detokenizer import ByteDecoder, IncrementalDecoder, WindowDecoder
from sps_runtime.frontend.token_bytes import speller
from sps_runtime.types.errors import ConfigError

MAX_FILE_BYTES = 256 << 20
_CACHED_SPELLINGS = 1 << 18


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_AddedToken] | None = None
    decoder: Any = None


class Tokenizer:
    """Text to ids and back. Methods may be called from any thread.

    Args:
        path: a directory with tokenizer.json, and perhaps tokenizer_config.json and a template.
        chat_template: path of a template file in place of the model's own.

    Attributes:
        special_texts: ids of special added tokens, by what they read.

    Raises:
        ConfigError: when a file is missing or unreadable.
    """

    def __init__(self, path: str | Path, chat_template: str | Path = "") -> None:
        directory = Path(path)
        raw = read_bounded(directory / "tokenizer.json")
        try:
            parts = msgspec.json.decode(raw, type=_TokenizerFile)
            self._fast = FastTokenizer.from_str(raw.decode())
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ConfigError(f"cannot read {directory / 'tokenizer.json'}: {error}") from None
        self._fast.no_truncation()
        self._fast.no_padding()
        self.special_texts = {t.content: t.id for t in parts.added_tokens or () if t.special}
        self._special = frozenset(self.special_texts.values())
        spell = speller(parts.decoder)
        self._spell = None if spell is None else lru_cache(_CACHED_SPELLINGS)(self._speller(spell))
        config = _read_json_object(directory / "tokenizer_config.json")
        self.bos_token = _token_text(config.get("bos_token"))
        self.eos_token = _token_text(config.get("eos_token"))
        self._bos_id = self._fast.token_to_id(self.bos_token) if self.bos_token else None
        self.chat_template = _load_template(directory, config, chat_template, self)
        self.longest_token_chars = max(map(len, self._fast.get_vocab(with_added_tokens=True)))

    def _speller(self, spell: Any) -> Any:
        def spell_id(token_id: int) -> bytes:
            token = self._fast.id_to_token(token_id)
            return b"" if token is None else spell(token)

        return spell_id

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of special added tokens, hidden by ``skip_special_tokens``."""
        return self._special

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`; literal special tokens in it are parsed.

        The beginning-of-sequence token is not doubled when the text brings its own.
        """
        # A batch of one: `encode` keeps the GIL, which stops every thread while it runs.
        batch = self._fast.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        if add_special_tokens and len(ids) > 1 and ids[0] == ids[1] == self._bos_id:
            return ids[1:]
        return ids

    def decoder(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """Return a fresh incremental decoder."""
        if self._spell is not None:
            return ByteDecoder(self._spell, self._special if skip_special_tokens else ())
        return WindowDecoder(
            lambda ids: self._fast.decode(ids, skip_special_tokens=skip_special_tokens)
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`, as an incremental decoder would give it."""
        decoder = self.decoder(skip_special_tokens=skip_special_tokens)
        return decoder.push(ids) + decoder.finish()

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; of its text where single tokens have no bytes."""
        if self._spell is not None:
            spelled: bytes = self._spell(token_id)
            return spelled
        return self._fast.decode([token_id], skip_special_tokens=False).encode()

    def token_text(self, token_id: int) -> str:
        """Return one token as text; incomplete characters become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


def read_bounded(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Return a file's content, or raise `ConfigError` when it is missing or too large."""
    try:
        if path.stat().st_size > limit:
            raise ConfigError(f"{path} is larger than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _read_json_object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return msgspec.json.decode(read_bounded(path), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def _token_text(entry: Any) -> str:
    """A special token in tokenizer_config.json is a string or an object with ``content``."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else ""


def _load_template(
    directory: Path, config: dict[str, Any], override: str | Path, tokenizer: Tokenizer
) -> ChatTemplate | None:
    """Find the chat template: the operator's file, chat_template.jinja, or the config's entry."""
    own_file = directory / "chat_template.jinja"
    if override:
        source = read_bounded(Path(override)).decode()
    elif own_file.exists():
        source = read_bounded(own_file).decode()
    else:
        source = _template_entry(config.get("chat_template"))
    if not source:
        return None
    return ChatTemplate(source, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def _template_entry(entry: Any) -> str:
    """A template string, or of a list of named templates the one called ``default``."""
    if isinstance(entry, list):
        named = {item.get("name"): item.get("template") for item in entry if isinstance(item, dict)}
        entry = named.get("default") or next(iter(named.values()), "")
    return entry if isinstance(entry, str) else ""
