"""SentencePiece model files: the few facts needed of them, and other pieces in them.

A `.model` file is a protobuf message. Protobuf lets a repeated field be extended by appending records
to the bytes, so the pieces of the base stay byte for byte what they were and no protobuf package or
schema is needed. Source: google/sentencepiece src/sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from megatron_cpt.errors import TokenizerError

SPACE = "\u2581"


class PieceType(IntEnum):
    """The kinds of piece a model file knows."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One vocabulary entry; its id is its place in the file."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class TrainingRules:
    """What decides how a model cuts text up: pieces trained under other rules may never be reached.

    The defaults are the format's own: a field that a file does not hold has them.
    """

    max_piece_length: int = 16
    split_by_unicode_script: bool = True
    split_by_number: bool = True
    split_by_whitespace: bool = True
    split_digits: bool = False
    treat_whitespace_as_suffix: bool = False
    allow_whitespace_only_pieces: bool = False
    byte_fallback: bool = False


@dataclass(frozen=True)
class Normalizer:
    """What a model does to a text before it is cut; `charsmap` is its compiled table of replacements."""

    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @property
    def identity(self) -> bool:
        """Whether no character is replaced."""
        return not self.charsmap

    def __str__(self) -> str:
        """What it does, in words; a table has some 100,000 bytes."""
        does = [
            f"a table of replacements of {len(self.charsmap):,} bytes" if self.charsmap else "no replacements",
            "a space before each text" if self.add_dummy_prefix else "no space before a text",
            "runs of spaces made one" if self.remove_extra_whitespaces else "spaces kept",
            "spaces written as U+2581" if self.escape_whitespaces else "spaces written as they are",
        ]
        return ", ".join(does)


@dataclass(frozen=True)
class ModelFile:
    """The content of a SentencePiece model file; `type` is "bpe" or "unigram"."""

    data: bytes
    pieces: tuple[Piece, ...]
    rules: TrainingRules
    normalizer: Normalizer
    type: str = "bpe"

    def alphabet(self) -> set[str]:
        """The characters that are pieces."""
        return {piece.text for piece in self.pieces if piece.type is PieceType.NORMAL and len(piece.text) == 1}

    def with_appended(self, pieces: Sequence[Piece]) -> bytes:
        """The file's bytes with more pieces at the end; everything before them is unchanged."""
        return self.data + b"".join(map(_piece_record, pieces))

    def with_pieces(self, pieces: Sequence[Piece]) -> bytes:
        """A file with these pieces and all settings of this one.

        Its self-test, which states how the old pieces cut some texts, is left out.
        """
        kept = (self.data[start:end] for field, start, end in _spans(self.data) if field not in (_PIECES, _SELF_TEST))
        return b"".join(map(_piece_record, pieces)) + b"".join(kept)


def without_prefix(data: bytes) -> bytes:
    """The same model without the dummy prefix: it cuts a piece's surface as it stands inside a text.

    A later record of the same message overrides the fields it names.
    """
    return data + b"\x1a\x04\x18\x00\x20\x00"  # normalizer_spec: add_dummy_prefix and remove_extra_whitespaces false


_RULE_FIELDS = {
    20: "max_piece_length",
    21: "split_by_unicode_script",
    22: "split_by_whitespace",
    23: "split_by_number",
    24: "treat_whitespace_as_suffix",
    25: "split_digits",
    26: "allow_whitespace_only_pieces",
    35: "byte_fallback",
}
_NORMALIZER_FIELDS = {3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}
_TYPES = {1: "unigram", 2: "bpe"}
_PIECES, _TRAINER, _NORMALIZER, _SELF_TEST = 1, 2, 3, 4  # the fields of a model


def read_model_file(path: str | Path) -> ModelFile:
    """Read a SentencePiece BPE or Unigram model file.

    Raises:
        TokenizerError: the file is missing, is not such a model, or holds a model of another type.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as caught:
        raise TokenizerError(f"cannot read {path}: {caught.strerror or caught}") from None
    try:
        return parse_model(data, str(path))
    except (IndexError, struct.error, ValueError) as caught:
        raise TokenizerError(f"{path} is not a SentencePiece model, or it was cut short ({caught})") from None


def parse_model(data: bytes, name: str = "the model") -> ModelFile:
    """The content of a model file's bytes; `name` names it in errors."""
    pieces: list[Piece] = []
    rules: dict[str, Any] = {}
    normalizer: dict[str, Any] = {}
    model_type = 1
    for field, record in _fields(data):
        if field == _PIECES:
            pieces.append(_piece(_as_bytes(record)))
        elif field == _TRAINER:
            spec = dict(_fields(_as_bytes(record)))
            model_type = _as_int(spec.get(3, model_type))
            rules |= {key: _as_int(spec[number]) for number, key in _RULE_FIELDS.items() if number in spec}
        elif field == _NORMALIZER:
            spec = dict(_fields(_as_bytes(record)))
            normalizer |= {"charsmap": _as_bytes(spec[2])} if 2 in spec else {}
            normalizer |= {key: bool(spec[number]) for number, key in _NORMALIZER_FIELDS.items() if number in spec}
    if not pieces:
        raise TokenizerError(f"{name} holds no piece: it is not a SentencePiece model, or it was cut short")
    if model_type not in _TYPES:
        raise TokenizerError(f"{name} is a SentencePiece model of type {model_type}, expected 2 (BPE) or 1 (Unigram)")
    rules = {key: value if key == "max_piece_length" else bool(value) for key, value in rules.items()}
    return ModelFile(data, tuple(pieces), TrainingRules(**rules), Normalizer(**normalizer), _TYPES[model_type])


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The (field number, value) pairs of one protobuf message; nested messages stay bytes."""
    at = 0
    while at < len(data):
        field, value, at = _field(data, at)
        yield field, value


def _spans(data: bytes) -> Iterator[tuple[int, int, int]]:
    """The (field number, begin, end) of each record of one protobuf message."""
    at = 0
    while at < len(data):
        start = at
        field, _, at = _field(data, at)
        yield field, start, at


def _field(data: bytes, at: int) -> tuple[int, int | bytes, int]:
    """Number and value of the field that begins at a byte, and where the next begins."""
    key, at = _varint(data, at)
    kind = key & 7
    if kind == 0:
        number, at = _varint(data, at)
        return key >> 3, number, at
    size = {1: 8, 5: 4}.get(kind)
    if size is None:
        if kind != 2:
            raise ValueError(f"wire type {kind} at byte {at}")
        size, at = _varint(data, at)
    if at + size > len(data):
        raise ValueError(f"a record ends {at + size - len(data)} bytes after the end of the file")
    return key >> 3, data[at : at + size], at + size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def _piece(record: bytes) -> Piece:
    fields = dict(_fields(record))
    (score,) = struct.unpack("<f", _as_bytes(fields.get(2, bytes(4))))
    return Piece(_as_bytes(fields.get(1, b"")).decode(), score, PieceType(_as_int(fields.get(3, PieceType.NORMAL))))


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where a record was expected")
    return value


def _as_int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a record stands where a number was expected")
    return value


def _piece_record(piece: Piece) -> bytes:
    text = piece.text.encode()
    body = b"\x0a" + _encoded_varint(len(text)) + text + b"\x15" + struct.pack("<f", piece.score)
    if piece.type is not PieceType.NORMAL:
        body += b"\x18" + _encoded_varint(int(piece.type))
    return b"\x0a" + _encoded_varint(len(body)) + body


def _encoded_varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
