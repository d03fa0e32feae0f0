"""The journal of a job over input files: each file is a part, and no part is done twice.

`<folder>/job.json` says what the job is. Part k has the data files `NNNNN.<ending>`, which only ever grow,
and a journal `NNNNN.json`: the input as it was, how much of it is done, the length of each data file at
that point, and what the work has counted. The journal is replaced after the data files are on disk; what a
killed process wrote behind it is cut off when the part is opened again. So a part that is continued ends
with the bytes it would have had. A process holds a lock on the part it works on.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import read_json, sha256_file, write_json_atomic
from megatron_cpt.errors import DataError
from megatron_cpt.runtime.lock import try_lock

Notice = Callable[[str], None]
_JOB = "job.json"


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
        return (self.folder / _JOB).exists() and not self._differences()

    def claim(self, replace: bool = False) -> None:
        """Make the folder for this job, or find the one in which it was begun.

        Args:
            replace: throw away what another job left in the folder.

        Raises:
            DataError: a missing or repeated input, or a folder that holds something else.
        """
        self.check_inputs()
        self.sweep()
        if self._is_foreign():
            raise DataError(f"{self.folder} is not empty and holds no job; move it away or write to another place")
        if replace and (self.folder / _JOB).exists() and self._differences():
            self.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = self.folder / f"{_JOB}.{os.uname().nodename}.{os.getpid()}"
        write_json_atomic(mine, self._job)
        try:
            os.link(mine, self.folder / _JOB)  # several processes may begin at once: the first one wins
        except FileExistsError:
            pass  # compared below
        finally:
            mine.unlink()
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
        """Raise DataError for inputs that are missing, or given twice."""
        seen: dict[str, Path] = {}
        for path in self.inputs:
            if not path.is_file():
                raise DataError(f"corpus {path} {'is a folder; name its files' if path.is_dir() else 'does not exist'}")
            other = seen.setdefault(os.path.realpath(path), path)
            if other is not path:
                raise DataError(f"{path} is given twice (also as {other}); name every file once")
        if not self.inputs:
            raise DataError("no input files; name at least one")

    def _differences(self) -> list[str]:
        held, mine = read_json(self.folder / _JOB, DataError), self._job
        if not isinstance(held, dict) or held.keys() != mine.keys() or not isinstance(held["options"], dict):
            return ["its job.json is damaged or of another version"]
        before, now = held["options"], mine["options"]
        found = [
            f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name) != now.get(name)
        ]
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

    def discard_untouched(self) -> None:
        """Remove the folder where no journal holds anything and nobody works: the attempt has gained nothing."""
        if not self.folder.exists() or any(self.folder.glob("*[0-9].json")):
            return
        try:
            with ExitStack() as held:
                for path in self.folder.glob("*.lock"):
                    held.enter_context(_locked(path, path))
        except DataError:
            return
        self.remove()

    def remove(self) -> None:
        """Remove the folder and everything in it; a process killed here leaves no part that looks whole."""
        self.sweep()
        self.folder.rename(self._removed)
        self.sweep()

    def sweep(self) -> None:
        """Remove what a process killed inside `remove` has left."""
        if self._removed.exists():
            shutil.rmtree(self._removed)

    @property
    def _removed(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.removed")


class Part:
    """One input file and what is made of it.

    Attributes:
        number: its place among the inputs, from 0.
        input: the file.
        begun: whether the journal holds anything.
        position: where to read on, None at the start; `blocks` are behind it.
        state: what the work had counted there.
        sha256: hash of the whole input, once it is done.
    """

    def __init__(self, folder: Path, number: int, input: Path) -> None:
        self.number, self.input = number, input
        self._stem = folder / f"{number:05d}"
        self._files: dict[str, IO[bytes]] = {}
        journal = self.journal_path
        self._load(read_json(journal, DataError) if journal.exists() else {})
        self._input_now = _identity(input)

    def _load(self, held: dict[str, Any]) -> None:
        self.begun = bool(held)
        self.position: dict[str, Any] | None = held.get("position")
        self.blocks: int = held.get("blocks", 0)
        self.state: dict[str, Any] = held.get("state", {})
        self.sha256: str = held.get("sha256", "")
        self._done: bool = held.get("done", False)
        self._sizes: dict[str, int] = held.get("sizes", {})
        self._input_then: dict[str, int] = held.get("input", {})

    @property
    def journal_path(self) -> Path:
        """Path of the part's journal."""
        return self._stem.with_suffix(".json")

    @property
    def input_bytes(self) -> int:
        """Size of the input on disk."""
        return self._input_now["bytes"]

    def path(self, ending: str) -> Path:
        """Path of one of the part's data files."""
        return self._stem.with_suffix(f".{ending}")

    def size(self, ending: str) -> int:
        """Committed length of a data file, 0 where there is none."""
        return self._sizes.get(ending, 0)

    def same_input(self) -> bool:
        """Whether the input is the one the journal speaks of: the same file, untouched, or (done) the same content."""
        if self._input_then == self._input_now:
            return True
        same_size = self._input_then.get("bytes") == self._input_now["bytes"]
        return self._done and same_size and sha256_file(self.input) == self.sha256

    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self._done and self.same_input()

    def file(self, ending: str) -> IO[bytes]:
        """The data file to append to, cut to its committed length.

        Raises:
            DataError: the file is shorter than the journal says.
        """
        if ending not in self._files:
            self._check_size(ending)
            file = open(self.path(ending), "ab", buffering=1 << 20)  # noqa: SIM115 - closed by close()
            file.truncate(self.size(ending))
            self._files[ending] = file
        return self._files[ending]

    def cut(self, ending: str) -> Path:
        """Path of a data file, there and cut to its committed length; only where nobody works on the part.

        Raises:
            DataError: the file is shorter than the journal says.
        """
        self.file(ending)
        self.close()
        return self.path(ending)

    def array(self, ending: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """The committed bytes of a data file as values of `dtype`, mapped; what is changed in them stays in memory.

        Raises:
            DataError: the file is shorter than the journal says.
        """
        count = self.size(ending) // np.dtype(dtype).itemsize
        self._check_size(ending)
        if not count:
            return np.zeros(0, dtype)
        return np.memmap(self.path(ending), dtype, "c", shape=(count,))

    def _check_size(self, ending: str) -> None:
        path, size = self.path(ending), self.size(ending)
        held = path.stat().st_size if path.exists() else 0
        if held < size:
            raise DataError(f"{path} has {held} bytes, its journal counts {size}; remove {self.journal_path}")

    def write(self, ending: str, data: Any) -> None:
        """Append bytes (anything with a buffer) to a data file; an error of the system names the file."""
        try:
            self.file(ending).write(data)
        except OSError as caught:
            raise _named(caught, self.path(ending)) from None

    def commit(
        self, position: dict[str, Any] | None, blocks: int, state: dict[str, Any], done: bool = False, sha256: str = ""
    ) -> None:
        """Put everything written so far on disk, then say so in the journal.

        Args:
            position: where to read on.
            blocks: how many blocks are behind it.
            state: what the work has counted up to there, as JSON.
            done: nothing is left to read.
            sha256: hash of the whole input, where done.

        Raises:
            DataError: the input was changed while it was read.
        """
        if _identity(self.input) != self._input_now:
            raise DataError(f"{self.input} was changed while it was read; run the command again")
        for ending, file in self._files.items():
            try:
                file.flush()
                os.fsync(file.fileno())
            except OSError as caught:
                raise _named(caught, self.path(ending)) from None
            # tell() would count what was cut off, until something is written
            self._sizes = {**self._sizes, ending: os.fstat(file.fileno()).st_size}
        held = {
            "input": self._input_now,
            "position": position,
            "blocks": blocks,
            "state": state,
            "sizes": self._sizes,
            "done": done,
            "sha256": sha256,
        }
        write_json_atomic(self.journal_path, held)
        self._load(held)

    def forget(self) -> None:
        """Go back to the start: remove the journal, then the data files, which count for nothing without it."""
        self.journal_path.unlink(missing_ok=True)
        for path in self._stem.parent.glob(f"{self._stem.name}.*"):
            if path.suffix != ".lock":
                path.unlink(missing_ok=True)
        self._load({})

    def close(self) -> None:
        """Close the data files; what was not committed will be cut off."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk: what is in the buffer was not committed and does not count
                continue
        self._files.clear()


def _identity(path: Path) -> dict[str, int]:
    try:
        held = path.stat()
    except FileNotFoundError:
        raise DataError(f"corpus {path} does not exist") from None
    return {
        "bytes": held.st_size,
        "mtime_ns": held.st_mtime_ns,
        "ctime_ns": held.st_ctime_ns,  # moves on where the date was set back to what it was
        "inode": held.st_ino,  # another one where the file was replaced
    }


def _named(caught: OSError, path: Path) -> OSError:
    return OSError(caught.errno, caught.strerror, str(path))


@contextmanager
def _locked(path: Path, input: Path) -> Iterator[None]:
    with open(path, "a", encoding="utf-8") as file:
        if not try_lock(file, DataError):
            raise _HeldError(f"another process works on {input} ({path}); wait until it has ended")
        yield


class _HeldError(DataError):
    """Another process works on the part."""


def check_shard(shard: tuple[int, int]) -> None:
    """Raise DataError for a shard that cannot be: (i, n) with i from 0 to n - 1."""
    if not 0 <= shard[0] < shard[1]:
        raise DataError(f"shard {shard[0]}/{shard[1]}: expected i/n with i from 0 to n - 1 (n tasks over the files)")
