"""Batches: rows of samples whose labels, borders and positions are what a plain loop gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import (
    IGNORED,
    Document,
    IndexedDataset,
    SamplePlan,
    ValidationWindows,
    batch,
    build_dataset,
    validation_windows,
)
from megatron_cpt.errors import DataError


@pytest.fixture(scope="module")
def dataset(documents: list[Document], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix = tmp_path_factory.mktemp("batches") / "x"
    build_dataset(documents, tokenizer, prefix, "xx")
    return IndexedDataset(prefix)


@given(numbers=st.lists(st.integers(0, 10**6), min_size=1, max_size=5), seq_length=st.integers(1, 90))
@settings(max_examples=60, deadline=None)
def test_a_batch_is_what_a_plain_loop_gives(dataset: IndexedDataset, numbers: list[int], seq_length: int) -> None:
    plan = SamplePlan([(dataset, "xx", 1.0)], seq_length, 3)
    made = batch(plan, numbers)
    starts = set(dataset.document_starts.tolist())
    tokens, labels, borders, positions = [], [], [], []
    for number in numbers:
        first = plan.place(number).window * seq_length
        for at in range(first, first + seq_length):
            tokens.append(dataset.stream[at])
            labels.append(IGNORED if at + 1 in starts else dataset.stream[at + 1])
            if at == first or at in starts:
                borders.append(len(tokens) - 1)
            positions.append(len(tokens) - 1 - borders[-1])
    assert made.tokens_N.tolist() == tokens and made.labels_N.tolist() == labels
    assert made.cu_seqlens.tolist() == [*borders, len(tokens)]
    assert made.position_ids_N.tolist() == positions
    assert made.max_seqlen == max(positions) + 1
    assert made.sources.tolist() == [0] * len(numbers)
    assert [a.dtype.name for a in (made.tokens_N, made.labels_N, made.cu_seqlens, made.position_ids_N)] == [
        "int64",
        "int64",
        "int32",
        "int64",
    ]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 1), (1, 4), (2, 2), (4, 1), (2, 6)])
def test_the_tokens_of_a_step_do_not_depend_on_ranks_and_micro_batches(
    ranks: int, micro_batch: int, dataset: IndexedDataset
) -> None:
    plan = SamplePlan([(dataset, "xx", 1.0)], 40, 3)
    step = batch(plan, range(24, 48))
    slices = [batch(plan, range(first, first + micro_batch)) for first in range(24, 48, micro_batch)]
    by_rank = [slices[rank::ranks] for rank in range(ranks)]
    again = [by_rank[number % ranks][number // ranks] for number in range(len(slices))]
    for name in ("tokens_N", "labels_N", "position_ids_N"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in again]), getattr(step, name))


@pytest.mark.parametrize("seq_length", [1, 2, 7, 64, 100_000])
def test_every_validation_token_is_a_label_exactly_once(seq_length: int, dataset: IndexedDataset) -> None:
    windows = validation_windows(dataset, seq_length)
    labels = np.concatenate([batch(windows, [number]).labels_N for number in range(len(windows))])
    firsts = np.isin(np.arange(dataset.num_tokens), dataset.document_starts)
    assert labels[labels != IGNORED].tolist() == dataset.stream[~firsts].tolist()
    assert len(labels) == len(windows) * seq_length and len(labels) - (dataset.num_tokens - 1) < seq_length
    assert windows.language == "xx"


def test_validation_knows_the_bytes_behind_its_labels(documents: list[Document], dataset: IndexedDataset) -> None:
    assert validation_windows(dataset, 8).text_bytes == sum(len(document.text.encode()) for document in documents)
    with pytest.raises(DataError, match="does not know its bytes"):
        _ = validation_windows(IndexedDataset(dataset.prefix, foreign=True), 8).text_bytes


@pytest.mark.parametrize("seq_length", [1, 7, 64, 100_000])
def test_samples_after_the_last_window_only_fill_up(seq_length: int, dataset: IndexedDataset) -> None:
    windows = ValidationWindows(dataset, seq_length)
    for number in (len(windows), len(windows) + 5):
        filled = batch(windows, [len(windows) - 1, number])
        alone = batch(windows, [len(windows) - 1])
        assert np.array_equal(filled.labels_N[:seq_length], alone.labels_N)
        assert (filled.labels_N[seq_length:] == IGNORED).all()
        assert filled.tokens_N.max() < dataset.vocab_size and len(filled.tokens_N) == 2 * seq_length


def test_the_first_token_of_a_document_is_no_label_without_bos_either(
    documents: list[Document], tokenizer: Path, tmp_path: Path
) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx", append_bos=False)
    dataset = IndexedDataset(tmp_path / "x")
    made = batch(validation_windows(dataset, dataset.num_tokens), [0])
    assert np.flatnonzero(made.labels_N == IGNORED).tolist() == [
        *(dataset.document_starts[1:-1] - 1).tolist(),
        dataset.num_tokens - 1,
    ]


def test_an_empty_batch_and_a_dataset_of_one_token_are_refused(dataset: IndexedDataset) -> None:
    with pytest.raises(DataError, match="batch of no samples"):
        batch(validation_windows(dataset, 8), [])
    with pytest.raises(DataError, match="counted from 0"):
        batch(validation_windows(dataset, 8), [-1])
    with pytest.raises(DataError, match="at least 2 and 1"):
        validation_windows(dataset, 0)
