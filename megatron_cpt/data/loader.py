"""Batches in the order of a schedule, prepared ahead in processes of their own.

A batch is a pure function of the plan and its sample numbers, so a worker holds no state that could be
lost: one that dies is started again and asked again for what it owed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Protocol

from megatron_cpt.data.batches import Batch, batch
from megatron_cpt.data.windows import Sample
from megatron_cpt.errors import CptError, TrainingError
from megatron_cpt.runtime.launcher import ROOT, START

MOST_DEATHS = 3  # in a row over one batch: then it is the batch, and no accident


class Samples(Protocol):
    """Numbered samples, such as a `SamplePlan`; what goes to a worker has to be picklable, and small."""

    def sample(self, number: int) -> Sample:
        """Sample `number`, from 0: always the same."""


class Loader:
    """An iterator over the batches of a schedule; use it in a `with` block.

    Args:
        plan: where samples come from.
        schedule: the sample numbers of each batch, in order; may be endless.
        num_workers: processes that prepare batches in turn; 0: each is made when it is asked for.
        prefetch: batches that are asked for before they are needed, of all workers together.
    """

    def __init__(
        self, plan: Samples, schedule: Iterable[Sequence[int]], num_workers: int = 1, prefetch: int = 8
    ) -> None:
        self._plan, self._schedule = plan, iter(schedule)
        letter = pickle.dumps(plan) if num_workers else b""
        self._workers = [_Worker(letter) for _ in range(num_workers)]
        self._ask_next = itertools.cycle(self._workers)
        self._take_next = itertools.cycle(self._workers)
        for numbers in itertools.islice(self._schedule, prefetch if num_workers else 0):
            next(self._ask_next).ask(numbers)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what they had prepared is dropped."""
        for worker in self._workers:
            worker.close()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch of the schedule.

        Raises:
            DataError: damaged data.
            TrainingError: a worker died `MOST_DEATHS` times over this batch, or its answer cannot be read.
        """
        if not self._workers:
            return batch([self._plan.sample(number) for number in next(self._schedule)])
        worker = next(self._take_next)
        if not worker.owed:
            raise StopIteration
        made = worker.take()
        for numbers in itertools.islice(self._schedule, 1):
            next(self._ask_next).ask(numbers)
        return made

    @property
    def worker_ids(self) -> list[int]:
        """Process id of each worker."""
        return [worker.process.pid for worker in self._workers]


class _Worker:
    """A process, what it owes, and a thread that takes in what it has made."""

    def __init__(self, letter: bytes) -> None:
        self._letter = letter
        self._deaths = 0  # since the last batch
        self.owed: deque[Sequence[int]] = deque()
        self._start()

    def _start(self) -> None:
        self._answers: queue.SimpleQueue[Batch | CptError | None] = queue.SimpleQueue()
        command = [sys.executable, "-c", START, str(ROOT), "megatron_cpt.data.loader_worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None
        with self.process.stdin, self.process.stdout:
            self._requests = Connection(os.dup(self.process.stdin.fileno()), readable=False)
            answers = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self._reader = threading.Thread(target=_read, args=(answers, self._answers), daemon=True)
        self._reader.start()
        with contextlib.suppress(ConnectionError):  # `take` will see that it is dead
            self._requests.send_bytes(self._letter)
            for numbers in self.owed:
                self._requests.send(numbers)

    def ask(self, numbers: Sequence[int]) -> None:
        """Order a batch."""
        self.owed.append(numbers)
        with contextlib.suppress(ConnectionError):  # as above; what is owed will be ordered again
            self._requests.send(numbers)

    def take(self) -> Batch:
        """The batch that was ordered first, once it is there."""
        while (answer := self._answers.get()) is None:
            self._deaths += 1
            code = self._end()
            if self._deaths == MOST_DEATHS:
                raise TrainingError(
                    f"the process that prepares batches ended {MOST_DEATHS} times over samples "
                    f"{list(self.owed[0])[:8]} ({_how(code)}); see what it said on standard error, or set "
                    "data.loader_workers=0 to prepare them in the training process"
                )
            self._start()
        self._deaths = 0
        self.owed.popleft()
        if isinstance(answer, CptError):
            raise answer
        return answer

    def close(self) -> None:
        """Kill the process: it writes nothing that could be left half done."""
        self.process.kill()
        self._end()

    def _end(self) -> int:
        self._requests.close()
        self._reader.join()
        return self.process.wait()


def _read(answers: Connection, taken: queue.SimpleQueue[Batch | CptError | None]) -> None:
    """Take in answers until the process ends; None says that it has."""
    with answers:
        while True:
            try:
                answer = answers.recv_bytes()
            except (EOFError, OSError):  # between two answers, and in the midst of one
                taken.put(None)
                return
            try:
                made = pickle.loads(answer)
            except Exception as caught:  # whatever the answer is made of may raise while it is put together
                made = TrainingError(f"an answer of the process that prepares batches cannot be read: {caught!r}")
            taken.put(made)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
