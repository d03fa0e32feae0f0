"""How a new vocabulary came out of an old one: one entry for every new id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from megatron_cpt.config.manifest import read_json, write_text_atomic
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.loading import SentencePieceTokenizer, Tokenizer

VOCAB_MAP_FILE = "vocab_map.json"
Origin = Literal["kept", "new", "byte", "special"]
_FORMAT = 1


class Entry(NamedTuple):
    """Where one id of the new vocabulary comes from.

    Attributes:
        origin: "kept" (a piece of the old vocabulary), "byte" or "special" (the same, of that kind), or "new".
        old_id: its id in the old vocabulary; None for a new piece.
        old_pieces: for a new piece, the ids the old tokenizer cuts its surface into; empty otherwise.
    """

    origin: Origin
    old_id: int | None
    old_pieces: tuple[int, ...] = ()


@dataclass(frozen=True)
class VocabMap:
    """The map from a new vocabulary to the old one; `entries[new_id]` tells where each id comes from.

    `old_sha256` and `new_sha256` are the hashes of the two model files. The constructor checks that the map
    means something.

    Raises:
        TokenizerError: an entry points outside the old vocabulary, or says nothing about where it comes from.
    """

    old_size: int
    new_size: int
    old_sha256: str
    new_sha256: str
    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if len(self.entries) != self.new_size:
            raise TokenizerError(f"the map has {len(self.entries)} entries for {self.new_size} ids: it is damaged")
        for id, entry in enumerate(self.entries):
            if entry.origin not in get_args(Origin):
                raise TokenizerError(f"id {id} of the vocabulary map has the unknown origin {entry.origin!r}")
            sources = entry.old_pieces if entry.origin == "new" else (entry.old_id,)
            if not sources or not all(type(old) is int and 0 <= old < self.old_size for old in sources):
                raise TokenizerError(
                    f"id {id} of the vocabulary map comes from {list(sources)}, expected ids below {self.old_size}"
                )

    @classmethod
    def identity(cls, tokenizer: Tokenizer) -> VocabMap:
        """The map of a vocabulary onto itself."""
        size, sha256 = tokenizer.vocab_size, tokenizer.sha256
        return cls(size, size, sha256, sha256, tuple(kept_entries(tokenizer)))

    @classmethod
    def load(cls, path: str | Path) -> VocabMap:
        """Read a map from its file, or from the tokenizer folder that holds it.

        Raises:
            TokenizerError: the file is missing, damaged, or of another format.
        """
        path = Path(path)
        path = path / VOCAB_MAP_FILE if path.is_dir() else path
        value = read_json(path, TokenizerError)
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise TokenizerError(f"{path} is not a vocabulary map of format {_FORMAT}: make the tokenizer again")
        try:
            entries = tuple(Entry(origin, old_id, tuple(pieces)) for origin, old_id, pieces in value["entries"])
            return cls(value["old_size"], value["new_size"], value["old_sha256"], value["new_sha256"], entries)
        except (KeyError, TypeError, ValueError) as caught:
            raise TokenizerError(f"{path} is damaged ({caught!r}): make the tokenizer again") from None

    def save(self, path: str | Path) -> None:
        """Write the map, one entry a line."""
        head = {
            "format": _FORMAT,
            "old_size": self.old_size,
            "new_size": self.new_size,
            "old_sha256": self.old_sha256,
            "new_sha256": self.new_sha256,
        }
        lines = ",\n".join(json.dumps([entry.origin, entry.old_id, entry.old_pieces]) for entry in self.entries)
        write_text_atomic(path, json.dumps(head)[:-1] + f', "entries": [\n{lines}\n]}}\n')

    def counts(self) -> dict[str, int]:
        """Number of ids of each origin."""
        found = Counter(entry.origin for entry in self.entries)
        return {origin: found[origin] for origin in get_args(Origin)}


def kept_entries(tokenizer: Tokenizer) -> Sequence[Entry]:
    """One entry for each id of a tokenizer, kept where it is."""
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id}

    def origin(id: int) -> Origin:
        if isinstance(tokenizer, SentencePieceTokenizer):
            if tokenizer.processor.is_byte(id):
                return "byte"
            if tokenizer.processor.is_control(id) or tokenizer.processor.is_unknown(id):
                return "special"
        return "special" if id in specials else "kept"

    return [Entry(origin(id), id) for id in range(tokenizer.vocab_size)]
