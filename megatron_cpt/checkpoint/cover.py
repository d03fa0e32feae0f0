"""Whether boxes make up a larger box: every element of it in exactly one of them, however they are cut."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby, product
from math import prod
from operator import add, itemgetter, neg

from megatron_cpt.errors import CheckpointError

Box = tuple[Sequence[int], Sequence[int]]  # its first element, and how many there are from there along each dimension
_MAX_DIMENSIONS = 4  # a box has 2 ** dimensions corners


def check_cover(name: str, shape: Sequence[int], boxes: Iterable[Box], files: Sequence[str]) -> None:
    """Raise CheckpointError unless boxes hold every element of a tensor exactly once.

    Args:
        name: of the tensor, for messages.
        shape: of the tensor.
        boxes: what is stored of it, in any order; some may be empty.
        files: where each box lies, for messages.
    """
    boxes, expected = list(boxes), prod(shape)
    if len(shape) > _MAX_DIMENSIONS:
        raise CheckpointError(
            f"{name}: got {len(shape)} dimensions, expected at most {_MAX_DIMENSIONS}, as a Llama has"
        )
    whole = (0,) * len(shape), tuple(shape)
    if [tuple(map(tuple, box)) for box in boxes[:2]] == [whole]:
        return
    for (first, extent), file in zip(boxes, files, strict=True):
        if len(first) != len(shape) or len(extent) != len(shape) or not _lies_inside(first, extent, shape):
            raise CheckpointError(
                f"{name}: what {file} should hold of it, {tuple(extent)} elements from {tuple(first)} on, lies outside "
                f"of its shape {tuple(shape)}; the checkpoint is damaged"
            )
    held = sum(prod(extent) for _, extent in boxes)
    if held < expected:
        raise CheckpointError(
            f"{name}: {held} of its {expected} elements are stored; a part of the checkpoint is missing"
        )
    corner = _first_corner(whole, [box for box in boxes if prod(box[1])])
    if corner is not None:
        holding = [file for box, file in zip(boxes, files, strict=True) if _is_in(corner, box)]
        told = f"stored {len(holding)} times: parts of it overlap, in {' and '.join(holding[:2])}"
        raise CheckpointError(
            f"{name}: its element {corner} is {told if holding else 'missing'}; the checkpoint is damaged"
        )


def _first_corner(whole: Box, boxes: Sequence[Box]) -> tuple[int, ...] | None:
    """The first element, row by row, that the boxes do not hold exactly once; None where there is none.

    How often an element is held is a sum over the corners of all boxes that come before it along every dimension: +1
    for the first corner of a box, and the sign turned for every dimension along which a corner is behind the last
    element. So boxes make up the whole if and only if their corners, as signed points, cancel those of the whole. The
    first corner, row by row, that does not cancel is the first element that is not held once, since all that could
    make up for it would come before. That takes a sort, and never looks at two boxes together.
    """
    signs = [prod(turns) for turns in product((1, -1), repeat=len(whole[0]))]
    points: list[tuple[tuple[int, ...], int]] = []
    for number, (first, extent) in enumerate([whole, *boxes]):
        behind = map(add, first, extent)
        points += zip(product(*zip(first, behind, strict=True)), signs if number else map(neg, signs), strict=True)
    points.sort()  # not a dict, whose hashes a stranger could make equal
    for point, same in groupby(points, itemgetter(0)):
        if sum(sign for _, sign in same):
            return point
    return None


def _lies_inside(first: Sequence[int], extent: Sequence[int], shape: Sequence[int]) -> bool:
    return all(min(a, n) >= 0 and a + n <= size for a, n, size in zip(first, extent, shape, strict=True))


def _is_in(element: Sequence[int], box: Box) -> bool:
    return all(first <= at < first + count for at, first, count in zip(element, *box, strict=True))
