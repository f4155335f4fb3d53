"""The bytes behind each token, read off the tokenizer's own decoder.

Byte-level and sentencepiece-like vocabularies map every token to bytes by itself, so text can be
decoded incrementally by a UTF-8 decoder with at most three bytes pending, whatever ids come. Other
decoders (WordPiece and the like) look at neighbours; for them there is no table.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Spell = Callable[[str], bytes]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte (Radford et al. 2019), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


def _byte_level_speller() -> Spell:
    alphabet = _byte_level_alphabet()

    def spell(token: str) -> bytes:
        try:
            return bytes([alphabet[char] for char in token])
        except KeyError:  # an added token, written as it reads
            return token.encode()

    return spell


def _sentencepiece_speller(space: str, byte_fallback: bool) -> Spell:
    def spell(token: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.match(token)):
            return bytes([int(match[1], 16)])
        return token.replace(space, " ").encode()

    return spell


def speller(decoder: Any) -> Spell | None:
    """Return how a token's string becomes bytes, or None where single tokens do not say.

    Args:
        decoder: the ``decoder`` entry of a tokenizer.json, parsed.
    """
    if not isinstance(decoder, dict):
        return None
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = {part.get("type") for part in parts}
    if kinds == {"ByteLevel"}:
        return _byte_level_speller()
    if kinds == {"Metaspace"}:
        return _sentencepiece_speller(parts[0].get("replacement", "▁"), False)
    if not kinds <= {"Replace", "ByteFallback", "Fuse", "Strip"} or "Replace" not in kinds:
        return None
    replaced = [part for part in parts if part["type"] == "Replace"]
    space = replaced[0].get("pattern", {}).get("String")
    if len(replaced) != 1 or not space or replaced[0].get("content") != " ":
        return None
    return _sentencepiece_speller(space, "ByteFallback" in kinds)
