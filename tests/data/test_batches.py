"""Batches: rows of samples whose labels, borders and positions are what a plain loop gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import (
    IGNORED,
    Batch,
    Document,
    IndexedDataset,
    Sample,
    SamplePlan,
    batch,
    build_dataset,
    open_windows,
    scored_bytes,
    validation_batch,
)
from megatron_cpt.errors import DataError


@pytest.fixture(scope="module")
def dataset(documents: list[Document], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix = tmp_path_factory.mktemp("batches") / "x"
    build_dataset(documents, tokenizer, prefix, "xx")
    return IndexedDataset(prefix)


def batch_of(plan: SamplePlan, numbers: list[int] | range) -> Batch:
    return batch([plan.sample(number) for number in numbers])


@given(numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=5), seq_length=st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_a_batch_is_what_a_plain_loop_gives(dataset: IndexedDataset, numbers: list[int], seq_length: int) -> None:
    plan = SamplePlan([(dataset, "xx", 1.0)], seq_length, 3)
    made = batch_of(plan, numbers)
    starts = set(dataset.document_starts[:-1].tolist())
    last = dataset.num_tokens - 1
    tokens, labels, borders, positions = [], [], [], []
    for number in numbers:
        first = plan.place(number).window * seq_length
        for at in range(first, first + seq_length):
            tokens.append(dataset.stream[at] if at < last else 0)
            labels.append(IGNORED if at + 1 in starts or at >= last else dataset.stream[at + 1])
            if at in (first, last) or at in starts:
                borders.append(len(tokens) - 1)
            positions.append(len(tokens) - 1 - borders[-1])
    assert made.tokens_N.tolist() == tokens and made.labels_N.tolist() == labels
    assert made.cu_seqlens.tolist() == [*borders, len(tokens)]
    assert made.position_ids_N.tolist() == positions
    assert made.sources.tolist() == [0] * len(numbers)
    arrays = (made.tokens_N, made.labels_N, made.cu_seqlens, made.position_ids_N)
    assert [array.dtype.name for array in arrays] == ["int64", "int64", "int32", "int64"]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 6)])
def test_the_tokens_of_a_step_do_not_depend_on_ranks_and_micro_batches(
    ranks: int, micro_batch: int, dataset: IndexedDataset
) -> None:
    plan = SamplePlan([(dataset, "xx", 1.0)], 40, 3)
    step = batch_of(plan, range(24, 48))
    slices = [batch_of(plan, range(first, first + micro_batch)) for first in range(24, 48, micro_batch)]
    by_rank = [slices[rank::ranks] for rank in range(ranks)]
    again = [by_rank[number % ranks][number // ranks] for number in range(len(slices))]
    for name in ("tokens_N", "labels_N", "position_ids_N"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in again]), getattr(step, name))


def test_validation_knows_the_bytes_behind_its_labels(documents: list[Document], dataset: IndexedDataset) -> None:
    assert scored_bytes(dataset) == sum(len(document.text.encode()) for document in documents)
    with pytest.raises(DataError, match="does not know its bytes"):
        scored_bytes(IndexedDataset(dataset.prefix, foreign=True))


@pytest.mark.parametrize("seq_length", [1, 7, 64, 100_000])
def test_behind_the_last_window_there_is_padding(seq_length: int, dataset: IndexedDataset) -> None:
    windows = open_windows(dataset, seq_length)
    filled, alone = (validation_batch(windows, len(windows) - 1, count) for count in (3, 1))
    assert len(filled.tokens_N) == 3 * seq_length
    for name in ("tokens_N", "labels_N", "position_ids_N"):
        assert np.array_equal(getattr(filled, name)[:seq_length], getattr(alone, name))
    assert (filled.labels_N[seq_length:] == IGNORED).all() and not filled.tokens_N[seq_length:].any()
    with pytest.raises(DataError, match="has no window -1"):
        validation_batch(windows, -1, 2)


def test_the_first_token_of_a_document_is_no_label_without_bos_either(
    documents: list[Document], tokenizer: Path, tmp_path: Path
) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx", append_bos=False)
    dataset = IndexedDataset(tmp_path / "x")
    made = validation_batch(open_windows(dataset, dataset.num_tokens), 0, 1)
    assert np.flatnonzero(made.labels_N == IGNORED).tolist() == [
        *(dataset.document_starts[1:-1] - 1).tolist(),
        dataset.num_tokens - 1,
    ]
    with pytest.raises(DataError, match="was built without bos"):
        scored_bytes(dataset)


def test_samples_of_no_length_or_of_two_are_no_batch(dataset: IndexedDataset) -> None:
    with pytest.raises(DataError, match="batch of 0 samples"):
        batch([])
    samples = [Sample(open_windows(dataset, length).window(0), 0, "xx") for length in (8, 9)]
    with pytest.raises(DataError, match=r"2 samples of lengths \[8, 9\]"):
        batch(samples)
