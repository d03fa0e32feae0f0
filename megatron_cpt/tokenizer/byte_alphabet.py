"""The characters by which a byte-level vocabulary writes bytes.

A byte that prints in Latin-1 is written as itself, the other 68 as U+0100 and on, in their order.
Source: Radford et al. 2019, the byte-level BPE of GPT-2.
"""

from __future__ import annotations

_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]

CHARACTERS: tuple[str, ...] = tuple(
    chr(byte) if byte in _PRINTED else chr(0x100 + _OTHERS.index(byte)) for byte in range(256)
)
_BYTES = {character: byte for byte, character in enumerate(CHARACTERS)}


def written(data: bytes) -> str:
    """Bytes in the characters of a byte-level vocabulary."""
    return "".join(map(CHARACTERS.__getitem__, data))


def unwritten(piece: str) -> bytes | None:
    """The bytes that a piece of a byte-level vocabulary stands for; None where a character is not of the table."""
    try:
        return bytes(map(_BYTES.__getitem__, piece))
    except KeyError:
        return None
