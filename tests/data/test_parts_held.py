"""Whose a part is, and of which input: changed files, locks, file systems without them."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.data.parts import Parts
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.runtime.lock import lock_folder


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
