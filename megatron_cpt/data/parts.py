"""The journal of a job over input files: each file is a part, and no part is done twice.

`<folder>/job.json` says what the job is, and beside it stand the files of its parts (`part.Part`). A process
holds a shared lock on `job.json` as long as it has to do with the job, and one of its own on the part it works
on. The folder is made and removed by one process at a time, which holds `<folder>.lock` for that moment, and
removed only where nobody holds the job.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import read_json, write_json_atomic
from megatron_cpt.data.part import Part
from megatron_cpt.errors import DataError
from megatron_cpt.runtime.lock import lock_briefly, try_lock

Notice = Callable[[str], None]
_JOB = "job.json"
_JOURNAL = re.compile(r"[0-9]+\.json")
_LET_GO_SECONDS = 60.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Parts:
    """The parts of one job; a plain value, which another process on a shared file system may use.

    Args:
        folder: where the journal lives; made by `claim`.
        kind: what the job makes, such as "dataset".
        options: everything but the inputs that decides the result, as JSON.
        inputs: the input files; part k works on the k-th.
    """

    folder: Path
    kind: str
    options: Mapping[str, Any]
    inputs: tuple[Path, ...]

    @property
    def _job(self) -> dict[str, Any]:
        inputs = [os.path.abspath(path) for path in self.inputs]
        return {"kind": self.kind, "options": dict(self.options), "inputs": inputs}

    def is_begun(self) -> bool:
        """Whether the folder holds this very job, begun before."""
        try:
            return not self._differences()
        except DataError:
            if (self.folder / _JOB).exists():
                raise
            return False  # also where it was removed just now

    def claim(self, replace: bool = False) -> None:
        """Make the folder for this job, or find the one in which it was begun; see `claimed`."""
        with self.claimed(replace):
            pass

    @contextmanager
    def claimed(self, replace: bool = False) -> Iterator[None]:
        """Hold the folder of this job, made here or begun before; any number of processes may hold it at once.

        Nobody removes the folder meanwhile. Left by an error before any journal holds something, it is removed
        unless another process holds it too: the attempt has gained nothing.

        Args:
            replace: throw away what another job left in the folder.

        Raises:
            DataError: a missing or repeated input, or a folder that holds something else.
        """
        self.check_inputs()
        with ExitStack() as held:
            with self._alone():
                self._make(replace)
                job = held.enter_context(open(self.folder / _JOB, encoding="utf-8"))
                try_lock(job, DataError, shared=True)  # never in vain: who wants it for himself is alone, too
            try:
                yield
            except BaseException:
                held.close()
                self.discard()
                raise

    def _make(self, replace: bool) -> None:
        if self._is_foreign():
            raise DataError(f"{self.folder} is not empty and holds no job; move it away or write to another place")
        job = self.folder / _JOB
        if replace and job.exists() and self._differences() and not self._remove_free():
            raise DataError(f"another process works on another job in {self.folder}; wait until it has ended")
        self.folder.mkdir(parents=True, exist_ok=True)
        if not job.exists():
            write_json_atomic(job, self._job)
        differences = self._differences()
        if differences:
            raise DataError(
                f"{self.folder} holds an unfinished job that differs ({'; '.join(differences)}); "
                "repeat the command that began it, or remove that folder to begin anew"
            )

    def _is_foreign(self) -> bool:
        """Whether there are files, and not only those of a job that was killed before it began."""
        if not self.folder.exists() or (self.folder / _JOB).exists():
            return False
        return any(_JOB not in path.name for path in self.folder.iterdir())

    def check_inputs(self) -> None:
        """See the function `check_inputs`."""
        check_inputs(self.inputs)

    def _differences(self) -> list[str]:
        held, mine = read_json(self.folder / _JOB, DataError), self._job
        if not isinstance(held, dict) or held.keys() != mine.keys() or not isinstance(held["options"], dict):
            return ["its job.json is damaged or of another version"]
        found = differences(held["options"], mine["options"])
        if held["kind"] != mine["kind"]:
            found.append(f"it makes a {held['kind']}, this makes a {mine['kind']}")
        if held["inputs"] != mine["inputs"]:
            found.append(f"it has {len(held['inputs'])} inputs, now {len(mine['inputs'])} or others")
        return found

    def pending(self, shard: tuple[int, int] | None = None) -> list[int]:
        """Numbers of the parts that are not done, or whose input has changed since.

        Args:
            shard: (i, n) takes every n-th part only, from the i-th on, i from 0.
        """
        first, step = shard or (0, 1)
        return [k for k in range(first, len(self.inputs), step) if not self.read(k).is_done()]

    def read(self, number: int) -> Part:
        """Part `number` as its journal shows it, without taking hold of it."""
        return Part(self.folder, number, self.inputs[number])

    @contextmanager
    def open(self, number: int, notice: Notice | None = None) -> Iterator[Part]:
        """Take hold of a part to work on it; a part whose input has changed begins anew.

        Args:
            number: the part.
            notice: is told when work that was done is done again, and why.

        Raises:
            DataError: another process works on it, or its files are damaged.
        """
        with _locked(self.folder / f"{number:05d}.lock", self.inputs[number]):
            part = self.read(number)
            if not part.same_input():
                if part.begun and notice is not None:
                    notice(f"{part.input} has changed since its part was made; it is done again")
                part.forget()
            try:
                yield part
            finally:
                part.close()

    def wait_for(self, number: int, seconds: float) -> None:
        """Wait until no process works on a part, at most so long: what a lost host has held is let go late."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                with _locked(self.folder / f"{number:05d}.lock", self.inputs[number]):
                    return
            except _HeldError:
                time.sleep(1.0)

    def discard(self, begun: bool = False) -> None:
        """Remove the folder of this job, unless another process holds it, and what a killed removal has left.

        Args:
            begun: also where a part or a later step has been begun.
        """
        with self._alone():
            if self.is_begun() and (begun or not self._is_touched()):
                self._remove_free()

    def _is_touched(self) -> bool:
        return any(path.is_dir() or _JOURNAL.fullmatch(path.name) for path in self.folder.iterdir())

    def remove(self) -> None:
        """Remove the folder and everything in it, once no other process holds the job.

        Raises:
            DataError: one has not let go of it for a minute.
        """
        end = time.monotonic() + _LET_GO_SECONDS
        while True:
            with self._alone():
                if not self.folder.exists() or self._remove_free():
                    return
            if time.monotonic() > end:
                raise DataError(
                    f"another process still holds {self.folder}, in which nothing is left to do; run the command again "
                    "when it has ended"
                )
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """No other process makes or removes the folder meanwhile; what one killed in `_remove_free` left is gone."""
        with lock_briefly(self.folder.with_name(f"{self.folder.name}.lock"), DataError):
            self._sweep()
            yield

    def _remove_free(self) -> bool:
        """Remove the folder unless another process holds the job or a part; a kill leaves nothing that looks whole."""
        with ExitStack() as held:
            for path in [path for path in (self.folder / _JOB, *self.folder.glob("*.lock")) if path.exists()]:
                if not try_lock(held.enter_context(open(path, "r+", encoding="utf-8")), DataError):
                    return False
            self.folder.rename(self._removed)
        self._sweep()
        return True

    def _sweep(self) -> None:
        if self._removed.exists():
            shutil.rmtree(self._removed)

    @property
    def _removed(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.removed")


@contextmanager
def _locked(path: Path, input: Path) -> Iterator[None]:
    with open(path, "a", encoding="utf-8") as file:
        if not try_lock(file, DataError):
            raise _HeldError(f"another process works on {input} ({path}); wait until it has ended")
        yield


class _HeldError(DataError):
    """Another process works on the part."""


def check_inputs(paths: Sequence[Path]) -> None:
    """Raise DataError for input files that are missing or given twice, or where there are none."""
    seen: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise DataError(f"corpus {path} {'is a folder; name its files' if path.is_dir() else 'does not exist'}")
        other = seen.setdefault(os.path.realpath(path), path)
        if other is not path:
            raise DataError(f"{path} is given twice (also as {other}); name every file once")
    if not paths:
        raise DataError("no input files; name at least one")


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of options, in words; empty where nothing does."""
    return [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def check_shard(shard: tuple[int, int]) -> None:
    """Raise DataError for a shard that cannot be: (i, n) with i from 0 to n - 1."""
    if not 0 <= shard[0] < shard[1]:
        raise DataError(f"shard {shard[0]}/{shard[1]}: expected i/n with i from 0 to n - 1 (n tasks over the files)")
