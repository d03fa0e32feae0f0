"""The C++ core against its Python twin, and against what a permutation has to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import _native, reference

KEYS = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 5000), key=KEYS, epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_an_epoch_of_visits_is_a_permutation(size: int, key: int, epoch: int) -> None:
    visits = [_native.visit(epoch * size + k, size, key) for k in range(size)]
    assert np.array_equal(np.sort(visits), np.arange(size))


@given(size=st.integers(1, 2**62), key=KEYS, index=st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_visit_equals_its_twin(size: int, key: int, index: int) -> None:
    assert _native.visit(index, size, key) == reference.visit(index, size, key)


@given(key=KEYS, number=KEYS)
def test_derive_equals_its_twin(key: int, number: int) -> None:
    assert _native.derive(key, number) == reference.derive(key, number)


@st.composite
def stage_orders(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """Lanes, unit, samples and block of a stage: shares that stand still or move, and sources in turn."""
    count, unit = draw(st.integers(1, 6)), draw(st.sampled_from([7, 60, 1000, 2**20, 2**40]))

    def shares() -> list[int]:
        cuts = sorted(draw(st.lists(st.integers(0, unit), min_size=count - 1, max_size=count - 1)))
        return [after - before for before, after in zip([0, *cuts], [*cuts, unit], strict=True)]

    start, block = shares(), draw(st.sampled_from([1, 4, 16]))
    end = shares() if draw(st.booleans()) else start
    samples = draw(st.integers(2 * block, 20 * block))
    lanes = [[one, other, 0, -1] for one, other in zip(start, end, strict=True)]
    if draw(st.booleans()):
        border = draw(st.integers(1, samples // block - 1))
        lanes = [[*lanes[0][:3], border], [*lanes[0][:2], border, -1], *lanes[1:]]
    return np.array(lanes, np.int64), unit, samples, block


@given(stage=stage_orders())
@settings(max_examples=60, deadline=None)
def test_a_stage_order_equals_its_twin(stage: tuple[np.ndarray, int, int, int]) -> None:
    ours, twin = _native.StageOrder(*stage), reference.StageOrder(*stage)
    samples = stage[2]
    for sample in range(0, samples, 1 + samples // 20):
        assert ours.at(sample) == twin.at(sample)
        assert ours.counts(sample).tolist() == twin.counts(sample).tolist()
    assert ours.counts(samples).tolist() == twin.counts(samples).tolist()


@pytest.mark.parametrize("shares", [[40, 1, 40, 13, 2], [8, 40, 40, 8, 8, 1, 2, 5], [1] * 50 + [13, 40, 7]])
@pytest.mark.parametrize("block", [1, 2, 8])
def test_small_shares_wait_their_turn(shares: list[int], block: int) -> None:
    """Rounding up whoever lacks most is not enough: who has to be served soonest comes first."""
    unit = sum(shares)
    order = _native.StageOrder(np.array([[share, share, 0, -1] for share in shares]), unit, 5 * unit, block)
    for samples in range(0, 5 * unit + 1, block):
        for count, share in zip(order.counts(samples).tolist(), shares, strict=True):
            assert abs(count * unit - share * samples) < unit


def test_many_sources_and_a_distant_sample() -> None:
    """More lanes than bits in a word; a stage without end; the largest numbers."""
    lanes = np.array([[1, 1, 0, -1]] * 70 + [[30, 30, 0, -1]], np.int64)
    ours, twin = _native.StageOrder(lanes, 100, 0, 16), reference.StageOrder(lanes, 100, 0, 16)
    assert [ours.at(n) for n in range(500)] == [twin.at(n) for n in range(500)]
    assert ours.counts(10**15).tolist() == [10**13] * 70 + [30 * 10**13]
    lane, index = ours.at(10**15 + 7)
    assert (lane, index % 10**13) == (ours.at(7)[0], ours.at(7)[1])
    moving = np.array([[2**40, 0, 0, -1], [0, 2**40, 0, -1]], np.int64)
    counts = _native.StageOrder(moving, 2**40, 2**26, 1024).counts(2**25).tolist()
    assert counts == [3 * 2**23, 2**23]


@given(data=st.data(), dtype=st.sampled_from(["u1", "i1", "i2", "u2", "i4", "i8"]))
@settings(max_examples=80, deadline=None)
def test_gather_equals_its_twin(data: st.DataObject, dtype: str) -> None:
    stream = np.array(data.draw(st.lists(st.integers(0, 120), min_size=1, max_size=60)), dtype)
    inner = data.draw(st.sets(st.integers(0, len(stream) - 1)))
    starts = np.array(sorted(inner), np.int64)
    first = data.draw(st.integers(0, len(stream)))
    length = data.draw(st.integers(0, len(stream) - first))
    ours, twin = (each.gather(stream, starts, first, length, 121) for each in (_native, reference))
    assert ours[0].dtype == np.int64
    assert np.array_equal(ours[0], twin[0]) and np.array_equal(ours[1], twin[1])


def test_the_order_is_the_order_of_record() -> None:
    """A change of these values would silently reorder the data of runs that are resumed."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]  # SplitMix64 from seed 1234567
    assert [_native.derive(1234567, number) for number in range(3)] == published
    assert [_native.visit(index, 10, 7) for index in range(10)] == [0, 2, 1, 6, 5, 3, 4, 9, 7, 8]
    assert [_native.visit(index, 3, 5) for index in range(6)] == [0, 2, 1, 2, 1, 0]
    order = _native.StageOrder(np.array([[5, 5, 0, -1], [2, 2, 0, -1], [1, 1, 0, -1]]), 8, 0, 16)
    assert [order.at(sample)[0] for sample in range(16)] == [0, 0, 1, 0, 0, 1, 0, 2] * 2


def test_the_permutation_mixes() -> None:
    """Over many epochs every image of a position is about equally frequent, also for tiny sizes."""
    for size in (2, 3, 5, 16, 61):
        for position in (0, size - 1):
            images = [_native.visit(epoch * size + position, size, 11) for epoch in range(4000)]
            counts = np.bincount(images, minlength=size)
            chi_square = ((counts - 4000 / size) ** 2 / (4000 / size)).sum()
            assert chi_square < size - 1 + 5 * (2 * size) ** 0.5 + 5, (size, position, counts)


def stage(lanes: list[list[int]], unit: int = 1, samples: int = 0, block: int = 16) -> _native.StageOrder:
    return _native.StageOrder(np.array(lanes, np.int64), unit, samples, block)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: _native.visit(-1, 3, 1), IndexError),
        (lambda: _native.visit(1, 0, 1), ValueError),
        (lambda: stage([[1, 1, 0, -1]]).at(-1), IndexError),
        (lambda: stage([[1, 1, 0, -1]], samples=9).at(9), IndexError),
        (lambda: stage([[1, 1, 0, -1]], samples=9).counts(10), IndexError),
        (lambda: stage([[1, 0, 0, -1]]), ValueError),
        (lambda: stage([[1, 1, 0, 2]]), ValueError),
        (lambda: stage([[1, 1, 0, -1]], unit=2), ValueError),
        (lambda: stage([[1, 1, 0, -1], [1, 1, 0, -1]]), ValueError),
        (lambda: stage([[1, 1, 0, 2]], samples=900), ValueError),
        (lambda: stage([[1, 1, 3, 3]], samples=900), ValueError),
        (lambda: stage([[-1, 1, 0, -1]], samples=900), ValueError),
        (lambda: stage([[1, 1, 0]]), ValueError),
        (lambda: stage([[1, 1, 0, -1]], unit=2**41), ValueError),
        (lambda: stage([[1, 1, 0, -1]], block=0), ValueError),
        (lambda: _native.gather(np.arange(5), np.array([0]), 3, 3, 9), IndexError),
        (lambda: _native.gather(np.arange(5), np.array([0]), -1, 3, 9), IndexError),
        (lambda: _native.gather(np.arange(5), np.array([0]), 0, -1, 9), IndexError),
        (lambda: _native.gather(np.arange(5), np.array([0]), 2**63 - 1, 5, 9), IndexError),
        (lambda: _native.gather(np.arange(5), np.array([0]), 0, 5, 4), ValueError),
        (lambda: _native.gather(np.array([-1]), np.array([0]), 0, 1, 4), ValueError),
        (lambda: _native.gather(np.arange(5.0), np.array([0]), 0, 5, 4), ValueError),
        (lambda: _native.gather(np.arange(10)[::2], np.array([0]), 0, 5, 99), ValueError),
        (lambda: _native.gather(np.arange(5), np.array([0.0]), 0, 5, 9), TypeError),
    ],
)
def test_wrong_arguments_are_refused(call, error) -> None:
    with pytest.raises(error):
        call()
