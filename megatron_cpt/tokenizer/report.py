"""What a tokenizer does to text, in numbers, and the proof that its two files agree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers

from megatron_cpt.config.manifest import MANIFEST, read_manifest, sha256_file
from megatron_cpt.errors import TokenizerError, VerificationError
from megatron_cpt.tokenizer.loading import (
    JSON_FILE,
    SENTENCEPIECE_FILE,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_cpt.tokenizer.vocab_map import VOCAB_MAP_FILE, VocabMap

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_BATCH = 512
_EXAMPLES = 5

# Where tokenizers are known to part: spaces and their runs, line ends, characters outside every
# vocabulary, joined emoji, full-width forms, the space mark itself, and specials spelt out.
HARD_TEXTS = (
    "",
    " ",
    "  ",
    " leading",
    "trailing ",
    "a  b   c    d" + " " * 20 + "e",
    " " * 37,
    "\t",
    "\tif x:\n\t\treturn  1\r\n\r\n",
    "\u2581",
    "\u2581\u2581a \u2581 b",
    "a</s>b <s>c<unk> <0x41>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5",
    "\uff21\uff22\uff23\u3000\uff11\uff12\uff13\uff01",
    "e\u0301 \u00e9 \ufb01 \u00a0 \u200b \ufeff \ufffd \x00 \x7f",
    "\U0010ffff\U00020bb7",
    "1234567890 3.14 0x1F",
)


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """How densely a tokenizer writes texts.

    Returns:
        `tokens` and UTF-8 `bytes` of all texts, `bytes_per_token`, and `byte_fallback_share`: the share of
        tokens that stand for one byte because no piece holds the character.
    """
    bytes_ids = {id for id in range(tokenizer.vocab_size) if _BYTE_PIECE.fullmatch(tokenizer.piece(id))}
    num_tokens = num_bytes = num_fallback = 0
    for batch in _batches(texts):
        num_bytes += sum(len(text.encode()) for text in batch)
        for ids in tokenizer.encode_batch(batch):
            num_tokens += len(ids)
            num_fallback += sum(id in bytes_ids for id in ids)
    return {
        "tokens": num_tokens,
        "bytes": num_bytes,
        "bytes_per_token": num_bytes / num_tokens if num_tokens else 0.0,
        "byte_fallback_share": num_fallback / num_tokens if num_tokens else 0.0,
    }


def source_lines_changed(old: Tokenizer, new: Tokenizer, lines: Iterable[str]) -> dict[str, Any]:
    """How many lines two tokenizers cut differently; compared piece by piece, whatever the ids are.

    Returns:
        `changed`, `total`, and up to five changed lines as `examples`.
    """
    changed = total = 0
    examples: list[str] = []
    for batch in _batches(lines):
        total += len(batch)
        for text, before, after in zip(batch, old.encode_batch(batch), new.encode_batch(batch), strict=True):
            if list(map(old.piece, before)) != list(map(new.piece, after)):
                changed += 1
                examples += [text] * (len(examples) < _EXAMPLES)
    return {"changed": changed, "total": total, "examples": examples}


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
    slow = SentencePieceTokenizer(folder / SENTENCEPIECE_FILE)
    load_tokenizer(folder / JSON_FILE)  # raises the family's error for a broken file
    fast = tokenizers.Tokenizer.from_file(str(folder / JSON_FILE))
    mismatches = total = 0
    examples: list[str] = []
    for batch in _batches(lines):
        total += len(batch)
        encoded = fast.encode_batch(batch, add_special_tokens=False)
        for text, ids, other in zip(batch, slow.encode_batch(batch), encoded, strict=True):
            if ids != other.ids or slow.decode(ids) != fast.decode(ids, skip_special_tokens=True):
                mismatches += 1
                examples += [text] * (len(examples) < _EXAMPLES)
    return {"mismatches": mismatches, "total": total, "examples": examples}


def verify_tokenizer(folder: str | Path, lines: Iterable[str]) -> dict[str, Any]:
    """Prove that a tokenizer folder is what its manifest says and that its two files agree.

    Checked: the hashes of the manifest, the ids and decoded text of `lines` and of texts known to be hard,
    and that the vocabulary map fits the vocabulary.

    Returns:
        `mismatches` (0) and `total` lines compared, `vocab_size`, `sha256`, `vocab_map` (counts, or None).

    Raises:
        TokenizerError: the folder is not a finished tokenizer.
        VerificationError: one of the checks fails.
    """
    folder = Path(folder)
    manifest = read_manifest(folder / MANIFEST, "tokenizer", TokenizerError)
    tokenizer = load_tokenizer(folder)
    for name, expected in manifest["outputs"].items():
        if sha256_file(folder / name) != expected:
            raise VerificationError(f"{folder / name} is not the file its manifest describes: make the tokenizer again")
    result = fast_slow_mismatches(folder, chain(HARD_TEXTS, lines))
    if result["mismatches"]:
        raise VerificationError(
            f"{JSON_FILE} and {SENTENCEPIECE_FILE} of {folder} differ on {result['mismatches']} of {result['total']} "
            f"lines, the first being {result['examples'][0][:80]!r}: make the tokenizer again"
        )
    counts = None
    if (folder / VOCAB_MAP_FILE).is_file():
        vocab_map = VocabMap.load(folder)
        if (vocab_map.new_size, vocab_map.new_sha256) != (tokenizer.vocab_size, tokenizer.sha256):
            raise VerificationError(
                f"{folder / VOCAB_MAP_FILE} belongs to another vocabulary of {vocab_map.new_size} ids; expected "
                f"{tokenizer.vocab_size}: make the tokenizer again"
            )
        counts = vocab_map.counts()
    return {
        "mismatches": result["mismatches"],
        "total": result["total"],
        "vocab_size": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "vocab_map": counts,
    }


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        yield batch
