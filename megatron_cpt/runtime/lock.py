"""One job at a time in a folder."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_cpt.errors import ConfigError, InputError


@contextmanager
def lock_folder(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a folder for one job; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another job holds it, or its file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / name, "a", encoding="utf-8") as file:
        if not try_lock(file, ConfigError):
            raise ConfigError(f"another job is running in {folder}; wait for it or choose another folder")
        yield


def try_lock(file: IO[str], error: type[InputError]) -> bool:
    """Lock an open file for as long as it is open; False where another process holds it.

    Args:
        file: the lock file.
        error: what to raise where files cannot be locked.

    Raises:
        InputError: of the type `error`: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as caught:
        raise error(
            f"{file.name} cannot be locked ({caught.strerror}); its file system has no locks (flock) or they are "
            "switched off: mount it with them, or write to another file system"
        ) from None
    return True
