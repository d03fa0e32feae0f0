"""Whose a part is, and of which input: changed files, locks, file systems without them."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.data.parts import Parts
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.runtime.lock import lock_folder
from tests.data.killed import start_child


def claimed(tmp_path: Path) -> Parts:
    (tmp_path / "in.txt").write_text("first\n")
    parts = Parts(tmp_path / "job", "x", {}, (tmp_path / "in.txt",))
    parts.claim()
    return parts


@pytest.mark.parametrize("how", ["replaced", "written over"])
def test_another_input_of_the_same_size_and_date_begins_anew(how: str, tmp_path: Path) -> None:
    parts = claimed(tmp_path)
    (path,) = parts.inputs
    with parts.open(0) as part:
        part.write("out", b"first")
        part.commit({"at": 3}, 1, {"count": 1})
    before = path.stat()
    if how == "replaced":
        (tmp_path / "new").write_text("other\n")
        (tmp_path / "new").replace(path)
    else:
        path.write_text("other\n")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    said: list[str] = []
    with parts.open(0, said.append) as part:
        assert not part.begun and part.position is None and part.state == {} and part.size("out") == 0
    assert len(said) == 1 and "has changed" in said[0]


def test_a_file_system_without_locks_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = claimed(tmp_path)

    def flock(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(DataError, match=r"00000.lock cannot be locked \(No locks available\)"), parts.open(0):
        pass
    with pytest.raises(DataError, match="its file system has no locks"):
        parts.wait_for(0, 60)  # at once
    with pytest.raises(ConfigError, match=r"\.lock cannot be locked"), lock_folder(tmp_path):
        pass


class _NothingGainedError(Exception):
    pass


def work_and_fail(parts: Parts, number: int, seconds: float) -> int:
    """Claim the job, hold a part, fail, again and again until the time is over; returns the rounds."""
    end, rounds = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with suppress(_NothingGainedError), parts.claimed():
            with parts.open(number) as part:
                part.write("out", b"gained nothing")
            assert parts.is_begun(), "the job is there as long as it is claimed"
            rounds += 1
            raise _NothingGainedError
    return rounds


def test_shards_that_begin_and_end_at_once_leave_each_other_alone(tmp_path: Path) -> None:
    inputs = (tmp_path / "a.txt", tmp_path / "b.txt")
    for path in inputs:
        path.write_text("text\n")
    parts = Parts(tmp_path / "jobs" / "job", "x", {}, inputs)

    def other() -> None:
        assert work_and_fail(parts, 1, 1.5) > 5

    wait = start_child(other)
    assert work_and_fail(parts, 0, 1.5) > 5
    assert wait() == 0
    assert not list((tmp_path / "jobs").iterdir()), "nothing is left of attempts that gained nothing"


def test_a_job_is_only_removed_where_no_other_process_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = claimed(tmp_path)
    other = replace(parts, options={"other": 1})
    monkeypatch.setattr("megatron_cpt.data.parts._LET_GO_SECONDS", 0.1)
    with parts.claimed():
        parts.discard(begun=True)
        with pytest.raises(DataError, match="another process works on another job in"):
            other.claim(replace=True)
        with pytest.raises(DataError, match="another process still holds .*job, in which nothing is left to do"):
            parts.remove()
        assert parts.is_begun()
    with parts.open(0) as part:
        part.commit(None, 0, {})
    parts.discard()
    other.discard(begun=True)
    assert parts.is_begun(), "a journal holds something; and it is no job of the other"
    other.claim(replace=True)
    assert other.is_begun() and not parts.is_begun()
    other.remove()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt"]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    parts = claimed(tmp_path)
    parts.claim()
    assert parts.is_begun()


def test_what_a_killed_process_has_left_beside_the_folder_is_removed(tmp_path: Path) -> None:
    (tmp_path / "job.removed").mkdir()
    (tmp_path / "job.removed" / "00000.out").touch()
    (tmp_path / "job.lock").touch()
    parts = claimed(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "job"]
    assert [path.name for path in parts.folder.iterdir()] == ["job.json"]
