"""Files that appear whole or not at all, and what killed processes leave of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from megatron_cpt.config.manifest import temporary_path, write_text_atomic

CHILD = """
import sys, time
from megatron_cpt.config.manifest import temporary_path
temporary_path(sys.argv[1]).write_text("half")
print("ready", flush=True)
time.sleep(60)
"""


def begun(path: Path) -> subprocess.Popen[bytes]:
    """A process that is writing a file."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    return child


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_next_attempt_removes_what_a_killed_one_has_left_and_nothing_else(tmp_path: Path) -> None:
    path, host = tmp_path / "x.[1].bin", os.uname().nodename
    child = begun(path)
    mine = f".{path.name}.{host}.{child.pid}.tmp"
    others = {
        f".{path.name}.another-host.{child.pid}.tmp",
        f".{path.name}.{child.pid}.tmp",
        f".{path.name}.{host}.{child.pid}.idx.tmp",
        f".{path.name}.{host}.x{child.pid}.tmp",
        f".y{path.name}.{host}.{child.pid}.tmp",
        f"{path.name}.{host}.{child.pid}.tmp",
    }
    for name in others:
        (tmp_path / name).touch()
    try:
        write_text_atomic(path, "of another process")
        assert names(tmp_path) == others | {path.name, mine}, "a process that lives keeps its file"
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()
    write_text_atomic(tmp_path / "y", "another file")
    assert mine in names(tmp_path)
    write_text_atomic(path, "whole")
    assert names(tmp_path) == others | {path.name, "y"} and path.read_text() == "whole"


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert temporary_path(tmp_path / "none" / "x").parent == tmp_path / "none"
