"""Boxes that make up a tensor, against a count of every element."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_cpt.checkpoint.cover import check_cover
from megatron_cpt.checkpoint.metadata import Chunk, check_chunks
from megatron_cpt.checkpoint.runs import Placed, Run, check_runs
from megatron_cpt.errors import CheckpointError


def split(draw: random.Random, first: tuple[int, ...], extent: tuple[int, ...], times: int) -> list:
    """A box cut in two again and again, anywhere: cuts that no grid has."""
    boxes = [(first, extent)]
    for _ in range(times):
        at, size = boxes.pop(draw.randrange(len(boxes)))
        dimension = draw.randrange(len(size))
        part = draw.randint(0, size[dimension])  # 0: an empty box
        boxes.append((at, (*size[:dimension], part, *size[dimension + 1 :])))
        behind = (*at[:dimension], at[dimension] + part, *at[dimension + 1 :])
        boxes.append((behind, (*size[:dimension], size[dimension] - part, *size[dimension + 1 :])))
    draw.shuffle(boxes)
    return boxes


def counted(shape: tuple[int, ...], boxes: list) -> torch.Tensor:
    """How many boxes hold each element."""
    times = torch.zeros(shape, dtype=torch.int64)
    for first, extent in boxes:
        times[tuple(slice(a, a + n) for a, n in zip(first, extent, strict=True))] += 1
    return times


@pytest.mark.parametrize("shape", [(9,), (6, 7), (4, 5, 6)])
def test_every_answer_is_that_of_counting(shape: tuple[int, ...]) -> None:
    draw, right, wrong = random.Random(0), 0, 0
    for _ in range(400):
        boxes = split(draw, (0,) * len(shape), shape, draw.randrange(12))
        for _ in range(draw.randrange(3)):  # one gone, one twice, or one elsewhere: volumes may still add up
            number = draw.randrange(len(boxes))
            first, extent = boxes[number]
            moved = tuple(draw.randint(0, size - n) for n, size in zip(extent, shape, strict=True))
            boxes[number : number + 1] = draw.choice([[], [boxes[number]] * 2, [(moved, extent)], [boxes[number]]])
            boxes = boxes or [((0,) * len(shape), (0,) * len(shape))]
        times = counted(shape, boxes)
        files = [f"file {number}" for number in range(len(boxes))]
        if bool((times == 1).all()):
            right += 1
            check_cover("it", shape, boxes, files)
            continue
        wrong += 1
        with pytest.raises(CheckpointError) as caught:
            check_cover("it", shape, boxes, files)
        at = tuple(int(place) for place in (times != 1).nonzero()[0])  # the first, row by row
        if (held := sum(int(torch.tensor(extent).prod()) for _, extent in boxes)) < times.numel():
            assert f"it: {held} of its {times.numel()} elements" in str(caught.value)
        elif times[at]:
            assert f"its element {at} is stored {int(times[at])} times" in str(caught.value)
        else:
            assert f"its element {at} is missing" in str(caught.value)
    assert min(right, wrong) > 50


@pytest.mark.parametrize(
    ("shape", "boxes", "message"),
    [
        ((4,), [((2,), (3,)), ((0,), (1,))], r"file 0 should hold of it, \(3,\) elements from \(2,\) on, lies outside"),
        ((4,), [((-1,), (1,)), ((0,), (3,))], "lies outside"),
        ((4,), [((4,), (-4,)), ((0,), (4,))], "lies outside"),
        ((4, 1), [((0,), (4,)), ((0, 0), (4, 1))], "lies outside"),
        ((), [((), ()), ((), ())], r"element \(\) is stored 2 times: parts of it overlap, in file 0 and file 1"),
        ((2**70, 2**70), [((0, 0), (2**70, 2**70)), ((1, 2**69), (1, 1))], f"element \\(1, {2**69}\\) is stored 2"),
        ((1,) * 60, [((0,) * 60, (1,) * 60)] * 2, "got 60 dimensions, expected at most 4"),
        ((3,), [], "0 of its 3 elements"),
    ],
)
def test_boxes_that_no_checkpoint_has(shape, boxes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_cover("it", shape, boxes, [f"file {number}" for number in range(len(boxes))])


class Counted(int):
    """A number that counts how often it is compared."""

    compared = 0

    def _count(self, other: int, compare: str) -> bool:
        Counted.compared += 1
        return getattr(int, compare)(self, other)

    def __lt__(self, other: int) -> bool:
        return self._count(other, "__lt__")

    def __gt__(self, other: int) -> bool:
        return self._count(other, "__gt__")

    def __le__(self, other: int) -> bool:
        return self._count(other, "__le__")

    def __ge__(self, other: int) -> bool:
        return self._count(other, "__ge__")

    def __eq__(self, other: object) -> bool:
        return self._count(other, "__eq__")  # type: ignore[arg-type]

    __hash__ = int.__hash__


def rows_of_a_layer(count: int) -> None:
    zero, one = Counted(0), Counted(1)
    chunks = [Chunk((zero, Counted(row), zero), (one, one, Counted(8)), "file", row, 1) for row in range(count)]
    check_chunks("it", (1, count, 8), chunks)


def columns(count: int) -> None:
    runs = [Run("file", 0, 4, Counted(0), Counted(8), Counted(at), Counted(1)) for at in range(count)]
    check_runs("it", Placed((8, count), torch.float32, tuple(runs)))


@pytest.mark.parametrize("check", [rows_of_a_layer, columns])
def test_four_times_the_parts_are_not_sixteen_times_the_work(check) -> None:
    taken = []
    for count in (100, 400):
        before = Counted.compared
        check(count)
        taken.append(Counted.compared - before)
    assert 4 <= taken[1] / taken[0] < 6
