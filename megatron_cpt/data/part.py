"""One part of a job: an input file, what is made of it, and the journal of how far that is.

Part k has the data files `NNNNN.<ending>`, which only ever grow, and a journal `NNNNN.json`: the input as it was,
how much of it is done, the length of each data file at that point, and what the work has counted. The journal is
replaced after the data files are on disk; what a killed process wrote behind it is cut off when the part is opened
again. So a part that is continued ends with the bytes it would have had.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.config.manifest import read_json, sha256_file, write_json_atomic
from megatron_cpt.errors import DataError


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
