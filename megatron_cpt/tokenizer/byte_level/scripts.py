"""Which bytes belong to a script: the rule of `tokenizer.scripts` for pieces that may end inside a character."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from functools import cache

from megatron_cpt.tokenizer.scripts import script_rule

_SIZES = ((0xC2, 0xDF, 2), (0xE0, 0xEF, 3), (0xF0, 0xF4, 4))  # lead bytes and the bytes of their characters


def byte_rule(script: str) -> Callable[[bytes], bool]:
    """Whether bytes can only stand in a text that has a character of the script.

    True when they hold such a character whole, or end with the beginning of a character and every character
    that begins so is of the script. UTF-8 never shows a character's bytes inside others, so a merge that
    makes such bytes leaves every text without the script as it is cut. (Characters that Unicode has not
    assigned are not counted.)

    Raises:
        TokenizerError: the script is unknown.
    """
    rule = script_rule(script)
    if script == "any":
        return lambda data: True

    @cache
    def begins(part: bytes) -> bool:
        characters = [text for text in _beginning_with(part) if unicodedata.category(text) not in ("Cn", "Cs")]
        return bool(characters) and all(map(rule.search, characters))

    def holds(data: bytes) -> bool:
        text = data.decode(errors="ignore")
        return rule.search(text) is not None or begins(_unfinished(data))

    return holds


def num_characters(data: bytes) -> int:
    """Characters that begin or lie in the bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


def _unfinished(data: bytes) -> bytes:
    """The beginning of a character at the end of the bytes; empty where they end with a whole one."""
    for size in range(1, min(4, len(data) + 1)):
        lead = data[-size]
        if lead & 0xC0 != 0x80:
            whole = next((count for first, last, count in _SIZES if first <= lead <= last), 1)
            return data[-size:] if size < whole else b""
    return b""


def _beginning_with(part: bytes) -> list[str]:
    """Every character whose UTF-8 begins with `part`."""
    if not part:
        return []
    whole = next(count for first, last, count in _SIZES if first <= part[0] <= last)
    missing = whole - len(part)
    value = part[0] & (0x7F >> whole)
    for byte in part[1:]:
        value = value << 6 | byte & 0x3F
    first = value << (6 * missing)
    characters = (chr(code) for code in range(first, min(first + (1 << 6 * missing), 0x110000)))
    return [text for text in characters if text.encode(errors="replace").startswith(part)]
