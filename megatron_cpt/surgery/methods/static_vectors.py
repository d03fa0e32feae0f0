"""A vector for each piece of a vocabulary, from the pieces that stand around it in text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from megatron_cpt.config.surgery import VectorsMethod
from megatron_cpt.errors import InputError
from megatron_cpt.surgery.methods.pairs import Array, PairCounts
from megatron_cpt.surgery.random_rows import normal_rows
from megatron_cpt.surgery.threads import in_blocks
from megatron_cpt.tokenizer import Tokenizer

_SMOOTHING = 0.75  # of context frequencies: rare contexts would otherwise look telling
_SPARE = 16  # columns beyond the wanted ones, and rounds of the subspace iteration
_ROUNDS = 4
_BLOCK_ROWS = 2048
_THREADS = 8


def static_vectors(tokenizer: Tokenizer, batches: Iterable[Sequence[str]], method: VectorsMethod) -> Tensor:
    """Unit vectors of the pieces that a tokenizer cuts texts into, as `vectors_of_ids` makes them.

    Args:
        tokenizer: what cuts the texts.
        batches: the texts.
        method: dimension, window, and how often a piece must occur.

    Returns:
        float32, a row for each id; zero for pieces that occur fewer than `min_count` times.

    Raises:
        InputError: no piece occurs so often.
    """
    ids = _ids_of_texts(tokenizer, batches, method.window)
    vectors = vectors_of_ids(ids, tokenizer.vocab_size, method.dimension, method.window, method.min_count)
    if not bool(vectors.any()):
        raise InputError(
            f"{tokenizer.path}: no piece occurs {method.min_count} times beside another: give more text, or a smaller "
            "min_count"
        )
    return vectors


def vectors_of_ids(ids: Iterable[Array], vocab_size: int, dimension: int, window: int, min_count: int) -> Tensor:
    """Unit vectors of ids, such that ids with like surroundings are near each other.

    PPMI(v, c) = max(0, log(n(v, c) * sum of f^0.75 / (f(v) * f(c)^0.75))), n counts c within `window` pieces of
    v, nearer ones more (window, ..., 2, 1), f its sums; the vector is v's row of U * sqrt(S), with U S V' the
    singular value decomposition of PPMI, cut to `dimension`. Skip-gram with negative sampling factorises the same
    matrix, less log k.

    Source: Levy and Goldberg 2014, "Neural word embedding as implicit matrix factorization"; smoothing and square
    root: Levy, Goldberg and Dagan 2015; the decomposition by subspace iteration: Halko, Martinsson and Tropp 2011
    (arXiv 0909.4061), algorithm 4.4.
    Deviates: no rounds of stochastic training, so the result is the same every time.

    Args:
        ids: text in parts; no pair spans two parts, nor a negative id.
        vocab_size: ids are below it.
        dimension: numbers of a vector.
        window: ids to either side that count.
        min_count: rarer ids get no vector.

    Returns:
        float32, a row for each id; zero for those that occur fewer than `min_count` times.
    """
    occurrences, pairs = _count(ids, vocab_size, window)
    first, second, count = pairs.found()
    del pairs
    frequent = occurrences >= min_count
    kept = frequent[first] & frequent[second]
    known = np.flatnonzero(frequent)
    if not kept.any():
        return torch.zeros(vocab_size, dimension)
    place = (np.cumsum(frequent) - 1).astype(np.int32)
    first, second, count = place[first[kept]], place[second[kept]], count[kept]
    left = _factor(*_matrices(first, second, count, len(known)), dimension)
    vectors = torch.zeros(vocab_size, left.shape[1])
    vectors[torch.from_numpy(known)] = left / left.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return vectors


def centred(vectors_VE: Tensor) -> Tensor:
    """Unit vectors without what all that are not zero have in common, their mean; zero ones stay.

    Source: Mu and Viswanath 2018 (arXiv 1702.01417), section 3, with no direction but the mean taken away.
    """
    known_V = vectors_VE.any(dim=1)
    if bool(known_V.any()):
        vectors_VE = torch.where(known_V[:, None], vectors_VE - vectors_VE[known_V].mean(dim=0), 0.0)
    return vectors_VE / vectors_VE.norm(dim=1, keepdim=True).clamp(min=1e-30)


def _ids_of_texts(tokenizer: Tokenizer, batches: Iterable[Sequence[str]], window: int) -> Iterator[Array]:
    gap = [-1] * window  # between texts, so that no pair spans two
    for texts in batches:
        yield np.array([id for ids in tokenizer.encode_batch(texts, _THREADS) for id in (*ids, *gap)], np.int64)


def _count(parts: Iterable[Array], size: int, window: int) -> tuple[Array, PairCounts]:
    """How often each id occurs; how often two stand together, the smaller id first, weighted by nearness."""
    occurrences = np.zeros(size, np.int64)
    pairs = PairCounts(size)
    for flat in parts:
        occurrences += np.bincount(flat[flat >= 0], minlength=size)
        for distance in range(1, window + 1):
            near, far = flat[:-distance], flat[distance:]
            inside = (near >= 0) & (far >= 0)
            near, far = near[inside], far[inside]
            pairs.add(np.minimum(near, far), np.maximum(near, far), window + 1 - distance)
    return occurrences, pairs


def _matrices(first: Array, second: Array, count: Array, size: int) -> tuple[_Sparse, _Sparse]:
    """PPMI of symmetric counts, given as pairs with first <= second; and its transpose.

    This is where memory is at its most: 32 bits for each number, and little that is not needed is kept.
    """
    other = first != second
    keys = np.concatenate(
        [first.astype(np.int64) * size + second, second[other].astype(np.int64) * size + first[other]]
    )
    # Two of a kind beside each other are each the other's context.
    values = np.concatenate([np.where(other, count, 2 * count), count[other]])
    order = keys.argsort()
    keys, values = keys[order], values[order]
    del order, other
    rows, columns = (keys // size).astype(np.int32), (keys % size).astype(np.int32)
    starts = np.searchsorted(keys, np.arange(size + 1) * size)
    del keys
    frequency = np.bincount(rows, values, size).clip(min=1e-30)
    smoothed = _SMOOTHING * np.log(frequency)
    smoothed -= np.log(np.exp(smoothed).sum())
    log_frequency, log_smoothed = np.log(frequency).astype(np.float32), smoothed.astype(np.float32)
    log_count = np.log(values.astype(np.float32))
    del values
    straight = _Sparse(starts, columns, log_count - log_frequency[rows] - log_smoothed[columns])
    return straight, _Sparse(starts, columns, log_count - log_frequency[columns] - log_smoothed[rows])


def _factor(straight: _Sparse, turned: _Sparse, dimension: int) -> Tensor:
    """U * sqrt(S) of a sparse matrix; `turned` is its transpose."""
    size = len(straight.starts) - 1
    width = min(dimension, size)
    basis = straight.times(normal_rows(1, 0, range(size), min(width + _SPARE, size)))
    for _ in range(_ROUNDS):
        basis = straight.times(_orthonormal(turned.times(_orthonormal(basis))))
    basis = _orthonormal(basis)
    # PPMI ~ basis @ small', and small = Q R; so with R = P S T' it is (basis @ T) S (Q P)'.
    small = turned.times(basis).double()
    ((_, values, turns),) = in_blocks(lambda tall: torch.linalg.svd(torch.linalg.qr(tall, mode="r").R), [small])
    return ((basis.double() @ turns[:width].T) * values[:width].sqrt()).float()


class _Sparse:
    """A sparse matrix whose negative entries count as 0, times thin dense ones."""

    def __init__(self, starts: Array, columns: Array, values: Array) -> None:
        self.starts = torch.from_numpy(starts)
        self.columns = torch.from_numpy(columns)
        self.values = torch.from_numpy(values).clamp_(min=0)

    def times(self, dense: Tensor) -> Tensor:
        """The product; every row is summed by one thread in the order of the columns."""

        def rows(first: int) -> Tensor:
            starts = self.starts[first : first + _BLOCK_ROWS + 1]
            span = slice(int(starts[0]), int(starts[-1]))
            inside = (starts - starts[0]).int()
            return embedding_bag(
                self.columns[span],
                dense,
                inside,
                mode="sum",
                per_sample_weights=self.values[span],
                include_last_offset=True,
            )

        return torch.cat(list(in_blocks(rows, range(0, len(self.starts) - 1, _BLOCK_ROWS))))


def _orthonormal(tall: Tensor) -> Tensor:
    (basis,) = in_blocks(lambda matrix: torch.linalg.qr(matrix.double()).Q.float(), [tall])
    return basis
