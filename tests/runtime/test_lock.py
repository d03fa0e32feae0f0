"""Locks whose file is removed by another host of a network file system between its opening and its locking."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO, Any

import pytest

from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.runtime.lock import lock_briefly, lock_folder, try_lock

REAL = fcntl.flock


def stale_at_first(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[int]:
    """The first flock meets a file that is gone; what is returned counts the calls."""
    calls: list[int] = []

    def flock(file: IO[Any], operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            path.unlink()
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        REAL(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    return calls


def test_a_removed_lock_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    with open(path, "a", encoding="utf-8") as file:
        stale_at_first(monkeypatch, path)
        assert not try_lock(file, DataError)


def test_a_folder_whose_lock_was_removed_is_locked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = stale_at_first(monkeypatch, tmp_path / ".lock")
    with lock_folder(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="another job is running"), lock_folder(tmp_path):
            pass
    with lock_folder(tmp_path):
        pass


def test_a_moment_alone_is_tried_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    calls = stale_at_first(monkeypatch, path)
    with lock_briefly(path, DataError):
        assert len(calls) == 2 and path.exists()
    assert not path.exists()
