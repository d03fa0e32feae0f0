"""What the ids of a vocabulary stand for: their text, which of them are new, which can never come up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from megatron_cpt.tokenizer.loading import ByteLevelTokenizer, Tokenizer
from megatron_cpt.tokenizer.model_file import SPACE

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_BATCH = 4096
_CONTEXTS = (("\n", ""), ("", ""), ("a", ""), ("1", "\n"), ("a", "a"))


@dataclass(frozen=True)
class Pieces:
    """The pieces of one tokenizer, whatever its kind.

    Attributes:
        tokenizer: whose they are.
        names: the entries of the vocabulary as its file writes them.
        data: the bytes of text that each id stands for, None for special and unused ids.
        texts: the same as text; None too for single bytes that stand in for a character, and parts of characters.
        is_byte: bool [V], ids that are such a byte or part, line ends left out.
        is_line_end: bool [V], bytes that end a line, where the vocabulary has no piece for it.
    """

    tokenizer: Tokenizer
    names: tuple[str, ...]
    data: tuple[bytes | None, ...]
    texts: tuple[str | None, ...]
    is_byte: npt.NDArray[np.bool_]
    is_line_end: npt.NDArray[np.bool_]

    @property
    def is_byte_level(self) -> bool:
        """Whether the names are written in a byte-level alphabet, which is no text for people."""
        return isinstance(self.tokenizer, ByteLevelTokenizer)

    def shown(self, id: int) -> str:
        """A piece for people: spaces as U+2581, bytes and parts of characters as `<E3>`."""
        text, data = self.texts[id], self.data[id]
        if text is not None:
            return text.replace(" ", SPACE)
        return self.names[id] if data is None else "".join(f"<{byte:02X}>" for byte in data)

    @cached_property
    def by_data(self) -> dict[bytes, int]:
        """The id of each string of bytes; a piece of text before a byte that stands in for it."""
        known = {data: id for id, data in enumerate(self.data) if data is not None}
        return known | {
            data: id for id, data in enumerate(self.data) if data is not None and self.texts[id] is not None
        }

    @cached_property
    def by_name(self) -> dict[str, int]:
        """The id of each name."""
        return {name: id for id, name in enumerate(self.names) if name}


def read_pieces(tokenizer: Tokenizer) -> Pieces:
    """What each id of a tokenizer stands for."""
    ids = range(tokenizer.vocab_size)
    names = tuple(map(tokenizer.piece, ids))
    data = tuple(map(tokenizer.piece_bytes, ids))
    stands_in = [tokenizer.kind(id) == "byte" and bool(_BYTE_PIECE.fullmatch(names[id])) for id in ids]
    texts = tuple(None if stands_in[id] else _text(data[id]) for id in ids)
    ends = np.array([stands_in[id] and data[id] in (b"\n", b"\r") for id in ids], bool)
    parts = np.array([data[id] is not None and texts[id] is None for id in ids], bool)
    return Pieces(tokenizer, names, data, texts, parts & ~ends, ends)


def old_ids(old: Pieces, new: Pieces) -> list[int | None]:
    """For each id of `new` the id of the same piece in `old`, None for what `old` does not have.

    Two vocabularies of one kind are compared by the names of their pieces, others by the exact bytes; special
    tokens always by name.
    """
    same_kind = old.is_byte_level == new.is_byte_level
    found: list[int | None] = []
    for name, data in zip(new.names, new.data, strict=True):
        by_name: Mapping[str, int] = old.by_name
        found.append(by_name.get(name) if same_kind or data is None else old.by_data.get(data))
    return found


def new_ids(old: Pieces, new: Pieces) -> list[int]:
    """The ids of `new` whose piece `old` does not have under any id."""
    return [id for id, before in enumerate(old_ids(old, new)) if before is None and new.names[id]]


def dead_ids(pieces: Pieces, ids: Iterable[int] | None = None) -> list[int]:
    """Those of the ids (by default all) that are not produced when their own text is encoded.

    Tried alone, at the beginning of a line, behind a letter, between a digit and a line end, and between
    letters. Ids without text of their own are not judged.
    """
    wanted = [id for id in (range(len(pieces.names)) if ids is None else ids) if pieces.texts[id]]
    alive: set[int] = set()
    for context in (*_CONTEXTS, None):
        left = [id for id in wanted if id not in alive]
        for start in range(0, len(left), _BATCH):
            batch = left[start : start + _BATCH]
            encoded = pieces.tokenizer.encode_batch([_placed(pieces.texts[id] or "", context) for id in batch])
            alive.update(id for id, found in zip(batch, encoded, strict=True) if id in found)
    return [id for id in wanted if id not in alive]


def _placed(text: str, context: tuple[str, str] | None) -> str:
    """A piece between its neighbours; None: alone, where the tokenizer itself puts the space it begins with."""
    return text.removeprefix(" ") if context is None else context[0] + text + context[1]


def cut(pieces: Pieces, data: Sequence[bytes]) -> list[list[str]]:
    """How a tokenizer cuts strings of bytes inside a text, for people."""
    return [[pieces.shown(id) for id in pieces.tokenizer.encode_bytes(part)] for part in data]


def _text(data: bytes | None) -> str | None:
    try:
        return None if data is None else data.decode()
    except UnicodeDecodeError:
        return None
