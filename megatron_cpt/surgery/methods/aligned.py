"""Rows of new pieces by the old pieces that stand at the same place in real text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from megatron_cpt.config.surgery import AlignedMethod
from megatron_cpt.errors import InputError
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.methods.inputs import Reading
from megatron_cpt.surgery.methods.pairs import Array, PairCounts, groups
from megatron_cpt.surgery.methods.rows import Task
from megatron_cpt.surgery.row_mix import Row
from megatron_cpt.tokenizer import Tokenizer

_THREADS = 8


def aligned(task: Task, method: AlignedMethod) -> MatrixPlan:
    """row(v) = sum of n(v, u) * old_row(u) / sum of n(v, u): u overlaps v at n(v, u) places of the text.

    The text is cut by both tokenizers. What a new piece is made of is so decided by the contexts it stands in;
    an old piece that reaches beyond it counts too. A new piece that the text does not have is the mean of the
    old pieces of its surface.

    Source: Yamaguchi, Villavicencio and Aletras 2024 (arXiv 2406.11477), "Align".
    Deviates: positions are bytes, so pieces that are parts of a character align too; texts that the two
    tokenizers do not spell alike (one of them normalises) are left out and counted.

    Raises:
        InputError: no text is spelt alike by the two tokenizers.
    """
    rows, facts = task.inputs.once(method, lambda: _rows(task, method))
    return task.plan_or_fall_back(rows, facts)


def _rows(task: Task, method: AlignedMethod) -> tuple[dict[int, Row], dict[str, object]]:
    reading = Reading(task.inputs.read_texts(method.target_corpus, "target"), method.max_bytes, "target_corpus")
    old, new = _Spelling(task.inputs.old), _Spelling(task.inputs.new)
    wanted = np.zeros(task.vocab_map.new_size, np.bool_)
    wanted[task.new_rows] = True
    pairs = PairCounts(task.vocab_map.old_size)
    skipped = read = 0
    for texts in reading:
        old_spans, new_spans, unlike = _spans(old, new, texts)
        skipped, read = skipped + unlike, read + len(texts)
        _overlaps(pairs, old_spans, new_spans, wanted)
    if skipped == read:
        raise InputError(
            f"the old and the new tokenizer spell none of {read} texts alike (one of them normalises), so their "
            "pieces cannot be aligned: take the method mean, or clp"
        )
    new_ids, old_ids, counts = pairs.found()
    rows: dict[int, Row] = {}
    ids, starts = groups(new_ids)
    for id, start, stop in zip(ids.tolist(), starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        rows[id] = old_ids[start:stop], counts[start:stop] / counts[start:stop].sum()
    return rows, {"target_corpus": reading.facts() | {"skipped": skipped}}


class _Spelling:
    """The bytes of each id of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.bytes = [tokenizer.piece_bytes(id) or b"" for id in range(tokenizer.vocab_size)]
        self.lengths = np.array([len(data) for data in self.bytes], np.int64)

    def cut(self, texts: Sequence[str]) -> Iterator[tuple[list[int], bytes]]:
        """Ids of each text, and what they spell."""
        for ids in self.tokenizer.encode_batch(texts, _THREADS):
            yield ids, b"".join(map(self.bytes.__getitem__, ids))


Spans = tuple[Array, Array, Array]  # ids, where each begins, where it ends


def _spans(old: _Spelling, new: _Spelling, texts: Sequence[str]) -> tuple[Spans, Spans, int]:
    """Places of all pieces in the texts laid end to end, and the number of texts that are spelt in two ways."""
    sides: tuple[list[Array], list[Array]] = ([], [])
    begins: tuple[list[Array], list[Array]] = ([], [])
    base = unlike = 0
    for (old_ids, old_text), (new_ids, new_text) in zip(old.cut(texts), new.cut(texts), strict=True):
        # One may put a space before a text that the other does not put: it stands one place earlier.
        early = [int(text == b" " + other) for text, other in ((old_text, new_text), (new_text, old_text))]
        if old_text != new_text and not any(early):
            unlike += 1
            continue
        for side, spelling, ids in ((0, old, old_ids), (1, new, new_ids)):
            array = np.array(ids, np.int64)
            lengths = spelling.lengths[array]
            sides[side].append(array)
            begins[side].append(base - early[side] + np.cumsum(lengths) - lengths)
        base += max(len(old_text), len(new_text)) + 1
    return _joined(sides[0], begins[0], old), _joined(sides[1], begins[1], new), unlike


def _joined(ids: list[Array], begins: list[Array], spelling: _Spelling) -> Spans:
    none = [np.empty(0, np.int64)]
    all_ids, starts = np.concatenate(ids or none), np.concatenate(begins or none)
    return all_ids, starts, starts + spelling.lengths[all_ids]


def _overlaps(pairs: PairCounts, old: Spans, new: Spans, wanted: Array) -> None:
    """Count the old pieces that each wanted new piece overlaps."""
    old_ids, old_starts, old_ends = old
    new_ids, starts, ends = (part[wanted[new[0]]] for part in new)
    first = np.searchsorted(old_ends, starts, side="right")
    counts = np.searchsorted(old_starts, ends, side="left") - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pairs.add(np.repeat(new_ids, counts), old_ids[np.repeat(first, counts) + within])
