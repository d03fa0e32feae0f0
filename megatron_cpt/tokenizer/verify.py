"""The proof that everything which reads a tokenizer folder cuts texts in one way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import MANIFEST, read_json, read_manifest, sha256_file
from megatron_cpt.errors import TokenizerError, VerificationError
from megatron_cpt.tokenizer.loading import (
    JSON_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
    load_tokenizer,
)
from megatron_cpt.tokenizer.measure import batches
from megatron_cpt.tokenizer.vocab_map import VOCAB_MAP_FILE, VocabMap

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_EXAMPLES = 5
Mismatch = dict[str, Any]

# Where tokenizers are known to part: spaces and their runs, line ends, characters outside every
# vocabulary, joined emoji, full-width forms, the space mark itself, and specials spelt out.
HARD_TEXTS = (
    "",
    " ",
    "  ",
    " leading",
    "   leading",
    "trailing ",
    "a  b   c    d" + " " * 20 + "e",
    " " * 37,
    "\t",
    "\t\t",
    "\tif x:\n\t\treturn  1\r\n\r\n",
    "a\n\nb\n \n  c\r\nd\re",
    "\u2581",
    "\u2581\u2581a \u2581 b",
    "a</s>b <s>c<unk> <0x41>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5",
    "\uff21\uff22\uff23\u3000\uff11\uff12\uff13\uff01",
    "e\u0301 \u00e9 \ufb01 \u00a0 \u200b \ufeff \ufffd \x00 \x7f",
    "\U0010ffff\U00020bb7",
    "1234567890 3.14 0x1F",
)


@dataclass(frozen=True)
class Peer:
    """Another reader of the same tokenizer, to be compared with the first.

    Attributes:
        name: what it is called in results.
        encode_batch: ids of texts, without BOS and EOS, the spelling of a special token being text.
        decode: text of ids; None for one that does not decode.
    """

    name: str
    encode_batch: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[list[int]], str] | None = None


def peer_of_json(path: Path) -> Peer:
    """A tokenizer.json as the `tokenizers` library reads it."""
    fast = load_tokenizer(path)
    return Peer(JSON_FILE, fast.encode_batch, fast.decode)


def compare_peers(
    reference: Tokenizer,
    peers: Sequence[Peer],
    texts: Iterable[str],
    on_mismatch: Callable[[Mismatch], None] = lambda mismatch: None,
) -> dict[str, Any]:
    """Hold the ids, and the text decoded from them, of several readers against a tokenizer's.

    Args:
        reference: what they have to equal.
        peers: the readers.
        texts: consumed once; numbered from 1.
        on_mismatch: called with every difference: `peer`, `number`, `text`, the pieces `expected` and `got`,
            the `differences` between them (spans that do not fit), and where decoded text differs,
            `expected_text` and `got_text`.

    Returns:
        `total` texts, and `mismatches`: the number of texts for each peer.
    """
    found = dict.fromkeys((peer.name for peer in peers), 0)
    total = 0
    for batch in batches(texts):
        expected = reference.encode_batch(batch)
        for peer in peers:
            for place, (text, ids, got) in enumerate(zip(batch, expected, peer.encode_batch(batch), strict=True)):
                mismatch = _mismatch(reference, peer, text, ids, got)
                if mismatch is not None:
                    found[peer.name] += 1
                    on_mismatch({"peer": peer.name, "number": total + place + 1, **mismatch})
        total += len(batch)
    return {"total": total, "mismatches": found}


def fast_slow_mismatches(folder: str | Path, lines: Iterable[str]) -> dict[str, Any]:
    """On how many lines tokenizer.json and tokenizer.model of one folder differ, in ids or in decoded text.

    Returns:
        `mismatches`, `total`, and up to five such lines as `examples`.

    Raises:
        TokenizerError: the folder lacks one of the two files.
    """
    folder = Path(folder)
    for name in (SENTENCEPIECE_FILE, JSON_FILE):
        if not (folder / name).is_file():
            raise TokenizerError(f"{folder} has no {name}: both files are needed to compare them")
    examples: list[str] = []

    def keep(mismatch: Mismatch) -> None:
        examples.extend([mismatch["text"]] * (len(examples) < _EXAMPLES))

    result = compare_peers(load_tokenizer(folder), [peer_of_json(folder / JSON_FILE)], lines, keep)
    return {"mismatches": result["mismatches"][JSON_FILE], "total": result["total"], "examples": examples}


def verify_tokenizer(
    path: str | Path,
    texts: Iterable[str],
    peers: Sequence[Peer] = (),
    on_mismatch: Callable[[Mismatch], None] = lambda mismatch: None,
) -> dict[str, Any]:
    """Prove that a tokenizer folder is what its manifest says and that all its readers agree.

    The reference is SentencePiece reading tokenizer.model, or `tokenizers` reading tokenizer.json where there
    is no other file. Compared with it: tokenizer.json where there are both, and `peers`. Checked beside that:
    the hashes of the manifest, and that the vocabulary map fits the vocabulary.

    Args:
        path: a tokenizer folder, of this tool or of anybody else; or a tokenizer.model alone.
        texts: compared after those that are known to be hard.
        peers: further readers.
        on_mismatch: called with every difference; see `compare_peers`.

    Returns:
        `mismatches` (texts, of all readers together) and `total` texts, `readers`: mismatches of each,
        `reference` (file name), `vocab_size`, `sha256`, `manifest` (whether there is one of this tool),
        `vocab_map` (counts, or None).

    Raises:
        TokenizerError: there is no tokenizer, or it is one of this tool and unfinished.
        VerificationError: a file is not the one that the manifest or the vocabulary map describes.
    """
    reference = load_tokenizer(path)
    folder = Path(path) if Path(path).is_dir() else None
    facts = {"manifest": False, "vocab_map": None} if folder is None else _check_folder(folder, reference)
    if reference.path.name != JSON_FILE and folder is not None and (folder / JSON_FILE).is_file():
        peers = [peer_of_json(folder / JSON_FILE), *peers]
    result = compare_peers(reference, peers, chain(HARD_TEXTS, texts), on_mismatch)
    return {
        "mismatches": sum(result["mismatches"].values()),
        "total": result["total"],
        "readers": result["mismatches"],
        "reference": reference.path.name,
        "vocab_size": reference.vocab_size,
        "sha256": reference.sha256,
        **facts,
    }


def _check_folder(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the manifest and the vocabulary map of a folder say, where they are there and right."""
    has_map = (folder / VOCAB_MAP_FILE).is_file()
    has_manifest = has_map or _is_ours(folder)
    if has_manifest:
        manifest = read_manifest(folder / MANIFEST, "tokenizer", TokenizerError)
        for name, expected in manifest["outputs"].items():
            if not (folder / name).is_file() or sha256_file(folder / name) != expected:
                raise VerificationError(
                    f"{folder / name} is not the file its manifest describes: make the tokenizer again"
                )
    counts = None
    if has_map:
        vocab_map = VocabMap.load(folder)
        if (vocab_map.new_size, vocab_map.new_sha256) != (tokenizer.vocab_size, tokenizer.sha256):
            raise VerificationError(
                f"{folder / VOCAB_MAP_FILE} belongs to another vocabulary of {vocab_map.new_size} ids; expected "
                f"{tokenizer.vocab_size}: make the tokenizer again"
            )
        counts = vocab_map.counts()
    return {"manifest": has_manifest, "vocab_map": counts}


def _is_ours(folder: Path) -> bool:
    """Whether a manifest of a tokenizer lies in a folder; that of a model beside it is not meant."""
    if not (folder / MANIFEST).is_file():
        return False
    manifest = read_json(folder / MANIFEST, TokenizerError)
    return isinstance(manifest, dict) and manifest.get("kind") == "tokenizer"


def _mismatch(reference: Tokenizer, peer: Peer, text: str, ids: list[int], got: list[int]) -> Mismatch | None:
    same_ids = ids == got
    decoded = {}
    if same_ids and peer.decode is not None:
        texts = {"expected_text": reference.decode(ids), "got_text": peer.decode(ids)}
        decoded = texts if texts["expected_text"] != texts["got_text"] else {}
    if same_ids and not decoded:
        return None
    expected = [reference.piece(id) for id in ids]
    other = [reference.piece(id) if id < reference.vocab_size else f"id {id}" for id in got]
    spans = [{"expected": left, "got": right} for left, right in differing_spans(expected, other)]
    return {"text": text, "expected": expected, "got": other, "differences": spans, **decoded}


def differing_spans(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[list[str], list[str]]]:
    """Where two cuts of one text differ: the pieces of both between two borders that they share.

    Cuts that do not spell the same text have one span, from the first difference to the last.
    """
    start = 0
    while start < min(len(first), len(second)) and first[start] == second[start]:
        start += 1
    end = 0
    while end < min(len(first), len(second)) - start and first[-1 - end] == second[-1 - end]:
        end += 1
    left, right = list(first[start : len(first) - end]), list(second[start : len(second) - end])
    if sum(map(_size, left)) != sum(map(_size, right)):
        yield left, right
        return
    i = j = 0
    while i < len(left):
        from_i, from_j = i, j
        size, other = _size(left[i]), _size(right[j])
        i, j = i + 1, j + 1
        while size != other:
            if size < other:
                size, i = size + _size(left[i]), i + 1
            else:
                other, j = other + _size(right[j]), j + 1
        if left[from_i:i] != right[from_j:j]:
            yield left[from_i:i], right[from_j:j]


def _size(piece: str) -> int:
    return 1 if _BYTE_PIECE.fullmatch(piece) else len(piece.encode())
