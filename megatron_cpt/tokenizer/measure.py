"""What tokenizers do to text, in numbers: how densely they write it, and where two of them part."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.tokenizer.loading import Tokenizer
from megatron_cpt.tokenizer.pieces import Pieces, old_ids, read_pieces

_BATCH = 512
_EXAMPLES = 5
# Thai, Lao, Myanmar, Khmer, kana, Han: no spaces between words.
_SPACELESS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_SPACELESS_SHARE = 0.2  # of a text's characters, from which on spaces do not show where its words are


@dataclass(frozen=True)
class Usage:
    """What a tokenizer makes of texts.

    Attributes:
        counts: int64 [V], how often each id came up.
        bytes: of the texts in UTF-8.
        characters: code points of the texts.
        words: runs of characters between white space; None where much of the text is in a script that puts
            no spaces between words.
    """

    counts: npt.NDArray[np.int64]
    bytes: int
    characters: int
    words: int | None

    @property
    def tokens(self) -> int:
        """All that came up."""
        return int(self.counts.sum())


def count_usage(tokenizer: Tokenizer, texts: Iterable[str]) -> Usage:
    """Encode texts and count what comes up."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    num_bytes = characters = words = spaceless = 0
    for batch in batches(texts):
        ids = [id for encoded in tokenizer.encode_batch(batch) for id in encoded]
        counts += np.bincount(np.array(ids, np.int64), minlength=len(counts))
        for text in batch:
            num_bytes += len(text.encode())
            characters += len(text)
            words += len(text.split())
            spaceless += len(_SPACELESS.findall(text))
    return Usage(counts, num_bytes, characters, None if spaceless > _SPACELESS_SHARE * characters else words)


def density(pieces: Pieces, usage: Usage) -> dict[str, Any]:
    """How densely texts are written, from what came up; see `measure`."""

    def share(ids: npt.NDArray[np.bool_]) -> float:
        return _ratio(int(usage.counts[ids].sum()), usage.tokens)

    return {
        "tokens": usage.tokens,
        "bytes": usage.bytes,
        "bytes_per_token": _ratio(usage.bytes, usage.tokens),
        "tokens_per_character": _ratio(usage.tokens, usage.characters),
        "fertility": None if usage.words is None else _ratio(usage.tokens, usage.words),
        "byte_fallback_share": share(pieces.is_byte),
        "line_end_share": share(pieces.is_line_end),
    }


def measure(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, Any]:
    """How densely a tokenizer writes texts.

    Returns:
        `tokens` and UTF-8 `bytes` of all texts, `bytes_per_token`, `tokens_per_character`, `fertility`
        (tokens per word, a word being a run of characters between white space; None where more than a fifth
        of the characters are Han, kana or of another script that is written without such spaces),
        `byte_fallback_share` (the share of tokens that stand for one byte, or for a part of a character,
        because no piece holds the character), and beside it `line_end_share`: tokens that are the byte of
        a line end, which a vocabulary such as Llama 2's writes for every new line.
    """
    return density(read_pieces(tokenizer), count_usage(tokenizer, texts))


def source_lines_changed(
    old: Tokenizer, new: Tokenizer, lines: Iterable[str], examples: int = _EXAMPLES
) -> dict[str, Any]:
    """How many lines two tokenizers cut differently; compared piece by piece, whatever the ids are.

    Returns:
        `changed`, `total`, and the first changed lines as `examples`: `text`, and the pieces `old` and `new`
        for people.
    """
    return lines_changed(read_pieces(old), read_pieces(new), lines, examples)


def lines_changed(old: Pieces, new: Pieces, lines: Iterable[str], examples: int) -> dict[str, Any]:
    """`source_lines_changed`, of pieces that have been read."""
    as_old = old_ids(old, new)
    changed = total = 0
    shown: list[dict[str, Any]] = []
    for batch in batches(lines):
        total += len(batch)
        before, after = old.tokenizer.encode_batch(batch), new.tokenizer.encode_batch(batch)
        for text, first, second in zip(batch, before, after, strict=True):
            if len(first) != len(second) or first != [as_old[id] for id in second]:
                changed += 1
                if len(shown) < examples:
                    cuts = {"old": list(map(old.shown, first)), "new": list(map(new.shown, second))}
                    shown.append({"text": text, **cuts})
    return {"changed": changed, "total": total, "examples": shown}


def batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    """Texts some hundred at a time."""
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        yield batch


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
