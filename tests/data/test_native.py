"""The C++ core against its Python twin, and against what a permutation has to be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.data import _native, reference

KEYS = st.integers(0, 2**64 - 1)


@given(size=st.integers(1, 5000), key=KEYS)
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int) -> None:
    assert np.array_equal(np.sort(_native.permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(1, 2**62), key=KEYS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_permute_and_visit_equal_their_twins(size: int, key: int, data: st.DataObject) -> None:
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=8)), np.int64)
    assert np.array_equal(_native.permute(positions, size, key), reference.permute(positions, size, key))
    indices = np.array(data.draw(st.lists(st.integers(0, 2**63 - 1), max_size=8)), np.int64)
    assert np.array_equal(_native.visit(indices, size, key), reference.visit(indices, size, key))


@given(key=KEYS, number=KEYS)
def test_derive_equals_its_twin(key: int, number: int) -> None:
    assert _native.derive(key, number) == reference.derive(key, number)


@given(quotas=st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(sum), key=KEYS, first=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_locate_equals_its_twin(quotas: list[int], key: int, first: int) -> None:
    samples = np.arange(first, first + 50)
    ours, twin = (each.locate(samples, np.array(quotas, np.int64), key) for each in (_native, reference))
    assert np.array_equal(ours[0], twin[0]) and np.array_equal(ours[1], twin[1])


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
    assert _native.permute(np.arange(10), 10, 7).tolist() == [0, 2, 9, 8, 1, 4, 3, 5, 7, 6]
    assert _native.visit(np.arange(6), 3, 5).tolist() == [0, 2, 1, 2, 1, 0]
    sources, indices = _native.locate(np.arange(6), np.array([2, 1]), 3)
    assert (sources.tolist(), indices.tolist()) == ([0, 1, 0, 0, 0, 1], [0, 0, 1, 2, 3, 1])


def test_the_permutation_mixes() -> None:
    """Over many keys every image of a position is about equally frequent, also for tiny sizes."""
    for size in (2, 3, 5, 16, 61):
        images = np.array([_native.permute(np.arange(size), size, _native.derive(11, k)) for k in range(4000)])
        for position in (0, size - 1):
            counts = np.bincount(images[:, position], minlength=size)
            chi_square = ((counts - 4000 / size) ** 2 / (4000 / size)).sum()
            assert chi_square < size - 1 + 5 * (2 * size) ** 0.5 + 5, (size, position, counts)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: _native.permute(np.arange(3), 0, 1), ValueError),
        (lambda: _native.permute(np.array([3]), 3, 1), IndexError),
        (lambda: _native.permute(np.array([-1]), 3, 1), IndexError),
        (lambda: _native.visit(np.array([-1]), 3, 1), IndexError),
        (lambda: _native.locate(np.array([-1]), np.array([1]), 1), IndexError),
        (lambda: _native.locate(np.array([0]), np.array([0]), 1), ValueError),
        (lambda: _native.locate(np.array([0]), np.array([3, -1]), 1), ValueError),
        (lambda: _native.locate(np.array([0]), np.array([2**63 - 1, 5]), 1), ValueError),
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
