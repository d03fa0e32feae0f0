"""Results whose bits do not follow the number of threads.

A product's last bits may follow the number of threads that share it. So none is shared: each is computed by one
thread, and several at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_MAX_THREADS = 8
Part = TypeVar("Part")
Made = TypeVar("Made")


@contextmanager
def by_one_thread() -> Iterator[int]:
    """What torch computes inside, each thread computes alone; gives the number of threads that there were."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_blocks(make: Callable[[Part], Made], parts: Iterable[Part]) -> Iterator[Made]:
    """`make` of each part, in order; as many at a time as torch has threads, each computed by one."""
    with by_one_thread() as threads:
        if threads == 1:
            yield from map(make, parts)
            return
        with ThreadPoolExecutor(min(threads, _MAX_THREADS)) as pool:
            yield from pool.map(make, parts)
