"""Windows: every prediction of a dataset once in a pass, laid out as a plain loop lays it out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import IGNORED, Document, IndexedDataset, Window, build_dataset, open_windows, pack_dataset
from megatron_cpt.data.writing import IndexedDatasetWriter
from megatron_cpt.errors import DataError

SEQ_LENGTHS = [1, 2, 7, 64, 100_000]


def write_dataset(prefix: Path, lengths: list[int], seed: int = 0) -> IndexedDataset:
    """A dataset of documents of these lengths, of random ids below 1,000."""
    draw = np.random.default_rng(seed)
    with IndexedDatasetWriter(prefix, 1000) as writer:
        for length in lengths:
            writer.add(draw.integers(0, 1000, length))
        writer.finish({})
    return IndexedDataset(prefix)


@pytest.fixture(scope="module")
def dataset(documents: list[Document], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> IndexedDataset:
    prefix = tmp_path_factory.mktemp("windows") / "x"
    build_dataset(documents, tokenizer, prefix, "xx")
    return IndexedDataset(prefix)


def laid_out(dataset: IndexedDataset, pieces: list[tuple[int, int]], seq_length: int) -> Window:
    """The window of these pieces (first prediction, predictions), position by position."""
    documents = set(dataset.document_starts.tolist())
    tokens, labels, starts = [], [], []
    for first, count in pieces:
        for at in range(first, first + count):
            if at == first or at in documents:
                starts.append(len(tokens))
            tokens.append(int(dataset.stream[at]))
            labels.append(IGNORED if at + 1 in documents else int(dataset.stream[at + 1]))
    if len(tokens) < seq_length:
        starts.append(len(tokens))
    rest = seq_length - len(tokens)
    return Window(np.array(tokens + [0] * rest), np.array(labels + [IGNORED] * rest), np.array(starts))


def same(ours: Window, other: Window) -> bool:
    fields = ("tokens_S", "labels_S", "starts")
    assert all(getattr(ours, name).dtype == np.int64 for name in fields)
    return all(getattr(ours, name).tolist() == getattr(other, name).tolist() for name in fields)


@pytest.mark.parametrize("seq_length", SEQ_LENGTHS)
def test_windows_are_spans_of_the_stream(seq_length: int, dataset: IndexedDataset) -> None:
    windows = open_windows(dataset, seq_length)
    last = dataset.num_tokens - 1
    assert (len(windows) - 1) * seq_length < last <= len(windows) * seq_length
    for number in {0, 1, len(windows) // 2, len(windows) - 2, len(windows) - 1} & set(range(len(windows))):
        first = number * seq_length
        expected = laid_out(dataset, [(first, min(seq_length, last - first))], seq_length)
        assert same(windows.window(number), expected)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("seq_length", SEQ_LENGTHS)
def test_a_pass_predicts_every_token_but_a_documents_first_exactly_once(
    seq_length: int, packing: str, dataset: IndexedDataset
) -> None:
    pack_dataset(dataset, seq_length)
    windows = open_windows(dataset, seq_length, packing)  # type: ignore[arg-type]
    predicted: list[int] = []
    for number in range(len(windows)):
        window = windows.window(number)
        places = np.concatenate([np.arange(f, f + n) for f, n in zip(*windows.pieces(number), strict=True)])
        scored = window.labels_S[: len(places)] != IGNORED
        assert (window.labels_S[len(places) :] == IGNORED).all()
        assert np.array_equal(window.tokens_S[: len(places)], dataset.stream[places])
        assert np.array_equal(window.labels_S[: len(places)][scored], dataset.stream[places + 1][scored])
        predicted += (places[scored] + 1).tolist()
    firsts = np.isin(np.arange(dataset.num_tokens), dataset.document_starts)
    assert sorted(predicted) == np.flatnonzero(~firsts).tolist()


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12).filter(lambda each: sum(each) > 1),
    seq_length=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_documents_of_any_lengths(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], seq_length: int
) -> None:
    dataset = write_dataset(tmp_path_factory.mktemp("any") / "x", lengths)
    windows = open_windows(dataset, seq_length)
    for number in range(len(windows)):
        [(first, count)] = zip(*windows.pieces(number), strict=True)
        assert same(windows.window(number), laid_out(dataset, [(int(first), int(count))], seq_length))


def test_empty_documents_begin_nothing(dataset: IndexedDataset) -> None:
    """A border twice, as other tools write it for an empty text."""
    windows = open_windows(dataset, 64)
    before = [windows.window(number) for number in range(len(windows))]
    windows._borders = np.repeat(dataset.document_starts, 3)
    assert all(same(windows.window(number), window) for number, window in enumerate(before))


def test_padding_alone(dataset: IndexedDataset) -> None:
    assert same(open_windows(dataset, 5).padding(), Window(np.zeros(5), np.full(5, IGNORED), np.zeros(1)))


def test_the_content_hash_names_the_windows(dataset: IndexedDataset, tmp_path: Path) -> None:
    whole, cut = (write_dataset(tmp_path / name, lengths) for name, lengths in (("a", [100]), ("b", [50, 50])))
    assert np.array_equal(whole.stream[:50], cut.stream[:50])
    pack_dataset(dataset, 8)
    opened = [open_windows(each, 8) for each in (dataset, whole, cut)]
    opened += [open_windows(dataset, 9), open_windows(dataset, 8, "best_fit")]
    assert len({windows.content_hash for windows in opened}) == 5


def test_what_cannot_be_is_refused(dataset: IndexedDataset, tmp_path: Path) -> None:
    windows = open_windows(dataset, 8)
    for number in (-1, len(windows)):
        with pytest.raises(DataError, match=rf"has no window {number}; expected 0 to {len(windows) - 1}"):
            windows.window(number)
    with pytest.raises(DataError, match="at least 2 and 1"):
        open_windows(dataset, 0)
    with pytest.raises(DataError, match="with 1 tokens"):
        open_windows(write_dataset(tmp_path / "one", [1]), 8)
    with pytest.raises(DataError, match="packing 'best'; expected one of concat, best_fit"):
        open_windows(dataset, 8, "best")  # type: ignore[arg-type]


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "x", [40])
    stream = np.fromfile(tmp_path / "x.bin", "<u2")
    stream[17] = 1000
    stream.tofile(tmp_path / "x.bin")
    windows = open_windows(dataset, 8)
    assert windows.window(0).labels_S[7] == stream[8]
    windows.window(1)
    with pytest.raises(DataError, match=r"x\.bin: token id 1000 at token 17, expected 0 to 999; build"):
        windows.window(2)
