"""One job at a time in a folder, and short moments in which a process is alone."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_cpt.errors import ConfigError, InputError


@contextmanager
def lock_folder(folder: Path, name: str = ".lock", what: Path | None = None) -> Iterator[None]:
    """Hold a folder for one job; the lock goes with the process, however it ends.

    Args:
        folder: where the lock file lies.
        name: of the lock file.
        what: is held, where that is not the folder itself.

    Raises:
        ConfigError: another job holds it, or its file system has no locks.
    """
    path = folder / name
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            is_held = try_lock(file, ConfigError)
            if not _is_at(path, file):  # removed since it was opened: another file is the lock now
                continue
            if not is_held:
                raise ConfigError(f"another job is running in {what or folder}; wait for it or choose another folder")
            yield
            return


@contextmanager
def lock_briefly(path: Path, error: type[InputError]) -> Iterator[None]:
    """Be alone among the processes that come here with the same path; waits for the one that is inside.

    The file at `path` is there only meanwhile (and after a kill, until the next process comes).

    Args:
        path: the lock file; its folder is made.
        error: what to raise where files cannot be locked.

    Raises:
        InputError: of the type `error`: the file system has no locks.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by the with below
        except FileNotFoundError:  # another process has just removed the folder
            continue
        with file:
            if not _lock(file, fcntl.LOCK_EX, error):
                continue
            if not _is_at(path, file):  # whoever was inside has removed it: another file is the lock now
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def try_lock(file: IO[str], error: type[InputError], shared: bool = False) -> bool:
    """Lock an open file for as long as it is open; False where another process holds it, or has removed it.

    Args:
        file: the lock file; readable for a shared lock, writable for one alone.
        error: what to raise where files cannot be locked.
        shared: beside others that share it.

    Raises:
        InputError: of the type `error`: the file system has no locks.
    """
    try:
        return _lock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, error)
    except BlockingIOError:
        return False


def _lock(file: IO[str], operation: int, error: type[InputError]) -> bool:
    """Lock it; False where the file is no longer there, as another host of a network file system has removed it."""
    try:
        fcntl.flock(file, operation)
        return True
    except BlockingIOError:
        raise
    except OSError as caught:
        if caught.errno == errno.ESTALE:
            return False
        raise error(
            f"{file.name} cannot be locked ({caught.strerror}); its file system has no locks (flock) or they are "
            "switched off: mount it with them, or write to another file system"
        ) from None


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
