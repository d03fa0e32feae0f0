"""Threads over the blocks of a job's parts: any thread reads and works, results are written in order.

There are exactly as many threads as asked for and no special one: each takes the next block of a part nobody
is reading at that moment, works on it, and writes whatever results are next in order. A second part is only
opened while all open ones are being read, so slow decompression spreads over the files by itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_cpt.data.blocks import LONG_BYTES
from megatron_cpt.data.part import Part
from megatron_cpt.data.parts import Notice, Parts

Progress = Callable[[int, int], None]
COMMIT_BYTES = 256 << 20  # of blocks between two entries in the journal: what a killed job has to do again
_BLOCK_BYTES = 1 << 20  # assumed before a block is read
_LEAST_IN_FLIGHT = 32 << 20


class RawItem(Protocol):
    """A block as it was read: `position` is the place behind it, `held_bytes` what it takes in memory."""

    @property
    def position(self) -> dict[str, Any]:
        """Where to read on after this block, as JSON."""

    @property
    def held_bytes(self) -> int:
        """Bytes of the block in memory."""


class Reader(Protocol):
    """What cuts one input into blocks; called by one thread at a time.

    Attributes:
        before_long: set by `run_parts`; to be called before a block grows beyond LONG_BYTES. May wait.
    """

    before_long: Callable[[], None] | None

    @property
    def bytes_read(self) -> int:
        """Bytes of the file on disk that are behind the reader."""

    def read(self) -> Any:
        """The next block, None at the end."""

    def sha256(self) -> str:
        """Hash of the whole file, once it was read."""

    def close(self) -> None:
        """Let go of the file."""


class Work(Protocol):
    """What is done with the blocks of one part; made anew, from `part.state`, whenever a part is opened."""

    def process(self, raw: Any, number: int) -> Any:
        """Work on block `number` of the input; any thread, any order, several at once."""

    def write(self, result: Any) -> None:
        """Take the results one at a time, in the order of the blocks; appends to the part's files."""

    def state(self) -> dict[str, Any]:
        """What has been counted so far, as JSON."""


def run_parts(
    parts: Parts,
    numbers: Sequence[int],
    open_reader: Callable[[Path, dict[str, Any] | None], Reader],
    open_work: Callable[[Part], Work],
    workers: int = 1,
    on_progress: Progress | None = None,
    notice: Notice | None = None,
) -> None:
    """Bring the parts `numbers` to their end, from wherever their journals say; one that is done stays as it is.

    The files of a part do not depend on `workers`, nor on how often the work was stopped and continued.

    Args:
        parts: the job, claimed.
        numbers: parts to work on, as `parts.pending()` gives them.
        open_reader: opens an input at a place; None: its start.
        open_work: the work on one part.
        workers: threads; one means the calling thread.
        on_progress: called with (bytes of these inputs done, bytes in all), one thread at a time.
        notice: is told when work that was done is done again.

    Raises:
        CptError: the first failure in the order of a part's blocks; what was committed is kept.
    """
    _Job(parts, numbers, open_reader, open_work, workers, on_progress, notice).run()


class _Failed:
    def __init__(self, cause: BaseException) -> None:
        self.cause = cause


class _Lane:
    """An open part: its reader, its work, and the results that wait for their turn."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.held = ExitStack()
        self.reading, self.exhausted, self.writing = True, False, False
        self.next_read = self.next_write = 0
        self.ready: dict[int, tuple[RawItem | None, Any]] = {}
        self.since_commit = 0
        self.reader: Reader | None = None

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read if self.reader is not None else 0

    def read(self, job: _Job) -> RawItem | None:
        if self.reader is None:
            self.open(job)
        if self.reader is None:  # done by another process since
            return None
        raw: RawItem | None = self.reader.read()
        if raw is not None and raw.held_bytes > LONG_BYTES:
            job.claim_long(self)
        return raw

    def open(self, job: _Job) -> None:
        self.part = self.held.enter_context(job.parts.open(self.number, job.notice))
        self.next_read = self.next_write = self.part.blocks
        if self.part.is_done():  # only known under the part's lock: another process may have just ended it
            return
        self.work = job.open_work(self.part)
        self.reader = job.open_reader(self.part.input, self.part.position)
        self.held.callback(self.reader.close)
        self.reader.before_long = partial(job.claim_long, self)

    def write(self, raw: RawItem | None, result: Any) -> None:
        """Write the next result; `raw` without its bytes says where it ends."""
        if isinstance(result, _Failed):
            raise result.cause
        assert raw is not None
        self.work.write(result)
        self.since_commit += raw.held_bytes
        if self.since_commit >= COMMIT_BYTES:
            self.part.commit(raw.position, self.next_write + 1, self.work.state())
            self.since_commit = 0

    def finish(self) -> None:
        if self.reader is not None:
            state = self.work.state()
            self.part.commit(None, self.next_write, state, done=True, sha256=self.reader.sha256())
        self.held.close()


class _Place:
    """The position and size of a block, once its bytes are no longer needed."""

    def __init__(self, raw: RawItem) -> None:
        self.position, self.held_bytes = raw.position, raw.held_bytes


class _Job:
    def __init__(
        self,
        parts: Parts,
        numbers: Sequence[int],
        open_reader: Callable[[Path, dict[str, Any] | None], Reader],
        open_work: Callable[[Part], Work],
        workers: int,
        on_progress: Progress | None,
        notice: Notice | None,
    ) -> None:
        self.parts, self.open_reader, self.open_work = parts, open_reader, open_work
        self.workers, self.on_progress, self.notice = workers, on_progress, notice
        self.total = sum(parts.read(number).input_bytes for number in numbers)
        self.finished = 0  # bytes of the inputs that are done
        self.waiting = deque(numbers)
        self.lanes: list[_Lane] = []
        self.changed = threading.Condition()
        self.in_flight = 0
        self.long: tuple[_Lane, int] | None = None  # the one long block
        self.most_in_flight = max(_LEAST_IN_FLIGHT, 2 * workers * _BLOCK_BYTES)
        self.failure: BaseException | None = None

    def run(self) -> None:
        threads = [threading.Thread(target=self.loop, daemon=True) for _ in range(self.workers - 1)]
        try:
            for thread in threads:
                thread.start()
            self.loop()
        except BaseException as caught:  # Ctrl-C: the others end after the block they are at
            self.fail(caught)
        for thread in threads:
            thread.join()
        for lane in self.lanes:
            lane.held.close()
        if self.failure is not None:
            raise self.failure

    def fail(self, cause: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or cause
            self.changed.notify_all()

    def loop(self) -> None:
        """What each thread does until nothing is left."""
        try:
            while (lane := self.choose()) is not None:
                number, raw, result = self.take(lane)
                with self.changed:
                    lane.ready[number] = (raw, result)
                self.write(lane)
        except Exception as caught:
            self.fail(caught)

    def choose(self) -> _Lane | None:
        """A part to read a block of, marked as being read; None when there is nothing to do any more."""
        with self.changed:
            while self.failure is None and (self.waiting or self.lanes):
                if not self.in_flight or self.in_flight + _BLOCK_BYTES <= self.most_in_flight:
                    free = (lane for lane in self.lanes if not lane.reading and not lane.exhausted)
                    lane = next(free, None)
                    if lane is None and self.waiting:
                        lane = _Lane(self.waiting.popleft())
                        self.lanes.append(lane)
                    if lane is not None:
                        lane.reading = True
                        self.in_flight += _BLOCK_BYTES
                        return lane
                self.changed.wait()
            return None

    def claim_long(self, lane: _Lane) -> None:
        """Wait until no long block is held, then hold one: the block that `lane` reads. Its earlier ones need none."""
        mine = (lane, lane.next_read)
        with self.changed:
            while self.failure is None and self.long not in (None, mine):
                self.changed.wait()
            self.long = mine

    def take(self, lane: _Lane) -> tuple[int, _Place | None, Any]:
        """Read the next block and work on it; a failure is a result too, raised when its turn comes."""
        raw: RawItem | None = None
        result: Any = None
        try:
            raw = lane.read(self)
        except Exception as caught:
            result = _Failed(caught)
        with self.changed:
            number = lane.next_read
            lane.next_read += 1
            lane.reading, lane.exhausted = False, raw is None
            self.in_flight += (0 if raw is None else raw.held_bytes) - _BLOCK_BYTES
            self.changed.notify_all()
        if raw is None:
            return number, None, result
        place = _Place(raw)
        try:
            return number, place, lane.work.process(raw, number)
        except Exception as caught:
            return number, place, _Failed(caught)

    def write(self, lane: _Lane) -> None:
        """Write what is next in order, unless another thread is at it."""
        while True:
            with self.changed:
                if lane.writing or lane.next_write not in lane.ready or self.failure is not None:
                    return
                place, result = lane.ready.pop(lane.next_write)
                lane.writing = True
            ended = place is None and not isinstance(result, _Failed)
            if ended:
                lane.finish()
            else:
                lane.write(place, result)
            with self.changed:
                if self.long == (lane, lane.next_write):
                    self.long = None
                lane.next_write += 1
                lane.writing = False
                self.in_flight -= 0 if place is None else place.held_bytes
                if ended:
                    self.lanes.remove(lane)
                    self.finished += lane.part.input_bytes
                if self.on_progress is not None:
                    self.on_progress(self.finished + sum(other.bytes_read for other in self.lanes), self.total)
                self.changed.notify_all()
