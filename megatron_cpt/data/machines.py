"""Where parts and other independent tasks are worked on: by threads here, or on the hosts of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from megatron_cpt.data.cluster import WorkOnParts, open_cluster
from megatron_cpt.data.ordered import Progress
from megatron_cpt.data.parts import Notice, Parts


class Machines(Protocol):
    """Where work is done; what comes of it is the same everywhere."""

    def run_parts(
        self,
        parts: Parts,
        work: WorkOnParts,
        numbers: Sequence[int],
        shared: Iterable[Path] = (),
        on_progress: Progress | None = None,
        notice: Notice | None = None,
    ) -> None:
        """Bring the parts `numbers` to their end.

        Args:
            parts: the job, claimed.
            work: picklable; called as `work(numbers, workers, on_progress, notice)`, maybe on another host and
                with one number at a time.
            numbers: parts to work on, as `parts.pending()` gives them.
            shared: files and folders beside the parts and inputs that the work reads.
            on_progress: called with (bytes of these inputs done, bytes in all).
            notice: is told when work that was done is done again.

        Raises:
            CptError: the first failure of a part, as itself.
        """

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """The results of a picklable function for each task, in any order; a task has one core.

        Raises:
            CptError: a task has raised it.
        """


def threads_here(workers: int | None) -> int:
    """So many threads, or one for each core that this process may use."""
    return workers or len(os.sched_getaffinity(0))


@contextmanager
def open_machines(ray: str | None, workers: int | None) -> Iterator[Machines]:
    """Where to work: here, or on the cluster at `ray`.

    Args:
        ray: address as `open_cluster` takes it; None: here.
        workers: threads here, None: one a core; on a cluster the threads (and cores) of each part, None: as
            many as let all parts be worked on at once.

    Raises:
        ConfigError: see `open_cluster`.
    """
    if ray is None:
        yield _Here(threads_here(workers))
    else:
        with open_cluster(ray, workers) as cluster:
            yield cluster


class _Here:
    """The threads of this process."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def run_parts(
        self,
        parts: Parts,
        work: WorkOnParts,
        numbers: Sequence[int],
        shared: Iterable[Path] = (),
        on_progress: Progress | None = None,
        notice: Notice | None = None,
    ) -> None:
        work(numbers, self.workers, on_progress, notice)

    def map(self, function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        with ThreadPoolExecutor(self.workers) as pool:
            yield from pool.map(function, tasks)
