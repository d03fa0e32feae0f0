"""How a new vocabulary came out of an old one: one entry for every new id."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from megatron_cpt.config.manifest import read_json, write_text_atomic
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.loading import Tokenizer

VOCAB_MAP_FILE = "vocab_map.json"
Origin = Literal["kept", "new", "byte", "special", "padding"]
_FORMAT = 1


class Entry(NamedTuple):
    """Where one id of the new vocabulary comes from.

    Attributes:
        origin: "kept" (a piece of the old vocabulary), "byte" or "special" (the same, of that kind), "new", or
            "padding" (an id that no text gives).
        old_id: its id in the old vocabulary; None for a new piece and for padding.
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

    Attributes:
        nfkc_equal: (new id, old id) of new pieces that an old piece equals under NFKC but not byte for byte,
            such as a full-width letter. They are named for people to see; the rows are not merged.

    Raises:
        TokenizerError: an entry points outside the old vocabulary, or says nothing about where it comes from.
    """

    old_size: int
    new_size: int
    old_sha256: str
    new_sha256: str
    entries: tuple[Entry, ...]
    nfkc_equal: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if len(self.entries) != self.new_size:
            raise TokenizerError(f"the map has {len(self.entries)} entries for {self.new_size} ids: it is damaged")
        for id, entry in enumerate(self.entries):
            if entry.origin not in get_args(Origin):
                raise TokenizerError(f"id {id} of the vocabulary map has the unknown origin {entry.origin!r}")
            if entry.origin == "padding" and entry == Entry("padding", None):
                continue
            sources = entry.old_pieces if entry.origin == "new" else (entry.old_id,)
            if not sources or not all(_is_id(old, self.old_size) for old in sources):
                raise TokenizerError(
                    f"id {id} of the vocabulary map comes from {list(sources)}, expected ids below {self.old_size}"
                )
        for new, old in self.nfkc_equal:
            if not _is_id(new, self.new_size) or not _is_id(old, self.old_size) or self.entries[new].origin != "new":
                raise TokenizerError(f"the pair {new}, {old} of equal forms is not of a new and an old piece: damaged")

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
        if path.is_file() and path.suffix != ".json":
            raise TokenizerError(
                f"{path} is no vocabulary map: name the folder that `tokenizer extend` or `replace` has written"
            )
        value = read_json(path, TokenizerError)
        if not isinstance(value, dict) or value.get("format") != _FORMAT:
            raise TokenizerError(f"{path} is not a vocabulary map of format {_FORMAT}: make the tokenizer again")
        try:
            entries = tuple(Entry(origin, old_id, tuple(pieces)) for origin, old_id, pieces in value["entries"])
            pairs = tuple((new, old) for new, old in value.get("nfkc_equal", ()))
            hashes = value["old_sha256"], value["new_sha256"]
            return cls(value["old_size"], value["new_size"], *hashes, entries, pairs)
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
            "nfkc_equal": self.nfkc_equal,
        }
        lines = ",\n".join(json.dumps([entry.origin, entry.old_id, entry.old_pieces]) for entry in self.entries)
        write_text_atomic(path, json.dumps(head)[:-1] + f', "entries": [\n{lines}\n]}}\n')

    def counts(self) -> dict[str, int]:
        """Number of ids of each origin."""
        found = Counter(entry.origin for entry in self.entries)
        return {origin: found[origin] for origin in get_args(Origin)}


def map_vocabularies(old: Tokenizer, new: Tokenizer) -> VocabMap:
    """Find every piece of a new vocabulary in an old one, of the same family or another, by its exact bytes.

    SentencePiece and byte-level vocabularies write the same text in different ways; see `Tokenizer.piece_bytes`.
    Of two old pieces with the same bytes, such as `a` and `<0x61>`, the one that is written alike is taken, else
    the one that texts use. BOS, EOS and the unknown token are matched by what they are for, other special tokens
    by their spelling. A new special token that the old vocabulary lacks counts as a new piece, cut as its spelling.

    Args:
        old: the vocabulary a model has.
        new: the one it shall have.

    Raises:
        TokenizerError: the old vocabulary cannot spell some new piece.
    """
    found, specials = _by_bytes(old), _matched_specials(old, new)
    entries: list[Entry] = []
    for id in range(new.vocab_size):
        kind, data = new.kind(id), new.piece_bytes(id)
        if kind == "unused":
            entries.append(Entry("padding", None))
            continue
        old_id = specials.get(id) if data is None else found.get((data, new.piece(id)), found.get((data, None)))
        if old_id is None:
            entries.append(new_entry(old, new.piece(id).encode() if data is None else data))
        else:
            entries.append(Entry("kept" if kind == "text" else kind, old_id))
    pairs = tuple(_nfkc_equal(old, new, entries))
    return VocabMap(old.vocab_size, new.vocab_size, old.sha256, new.sha256, tuple(entries), pairs)


def new_entry(old: Tokenizer, data: bytes) -> Entry:
    """The entry of a new piece that stands for `data`, with its cut by the old tokenizer inside a text.

    Raises:
        TokenizerError: the old vocabulary cannot spell it.
    """
    return Entry("new", None, tuple(old.encode_bytes(data)))


def kept_entries(tokenizer: Tokenizer) -> Sequence[Entry]:
    """One entry for each id of a tokenizer, kept where it is."""

    def origin(id: int) -> Origin:
        kind = tokenizer.kind(id)
        return kind if kind in ("byte", "special") else "kept"

    return [Entry(origin(id), id) for id in range(tokenizer.vocab_size)]


def _by_bytes(tokenizer: Tokenizer) -> dict[tuple[bytes, str | None], int]:
    """Ids by (bytes, piece as it is written), and by (bytes, None) whatever there is, text before byte pieces."""
    found: dict[tuple[bytes, str | None], int] = {}
    for id in sorted(range(tokenizer.vocab_size), key=lambda id: tokenizer.kind(id) == "byte"):
        data = tokenizer.piece_bytes(id)
        if data is not None:
            found.setdefault((data, None), id)
            found.setdefault((data, tokenizer.piece(id)), id)
    return found


def _matched_specials(old: Tokenizer, new: Tokenizer) -> dict[int, int]:
    """New id -> old id of the special tokens that both have."""
    spelled = {old.piece(id): id for id in range(old.vocab_size) if old.kind(id) == "special"}
    roles = [(new.unk_id, old.unk_id), (new.eos_id, old.eos_id), (new.bos_id, old.bos_id)]
    by_role = {new_id: old_id for new_id, old_id in roles if new_id is not None and old_id is not None}
    ids = (id for id in range(new.vocab_size) if new.kind(id) == "special")
    return by_role | {id: spelled[new.piece(id)] for id in ids if new.piece(id) in spelled}


def _nfkc_equal(old: Tokenizer, new: Tokenizer, entries: Sequence[Entry]) -> Iterator[tuple[int, int]]:
    forms: dict[str, int] = {}
    for id in sorted(range(old.vocab_size), key=lambda id: old.kind(id) == "byte"):  # text goes before byte pieces
        if (form := _nfkc(old, id)) is not None:
            forms.setdefault(form, id)
    for id, entry in enumerate(entries):
        form = _nfkc(new, id) if entry.origin == "new" else None
        if form is not None and form in forms:
            yield id, forms[form]


def _nfkc(tokenizer: Tokenizer, id: int) -> str | None:
    """The normal form of a piece; None where it is not text of its own."""
    data = tokenizer.piece_bytes(id)
    try:
        return None if data is None else unicodedata.normalize("NFKC", data.decode())
    except UnicodeDecodeError:
        return None


def _is_id(id: object, size: int) -> bool:
    return type(id) is int and 0 <= id < size
