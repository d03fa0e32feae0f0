"""Processes that tests kill."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

STEPS = ("open", "os.")  # audit events: files opened, cut, linked, renamed, removed
_RAISED = 255  # exit code of a child that an exception ended


def in_child(work: Callable[[], Any]) -> int:
    """Run something in a process of its own; returns its exit code, minus the signal that ended it.

    An exception there fails the test.
    """
    return start_child(work)()


def start_child(work: Callable[[], Any]) -> Callable[[], int]:
    """The same beside this process; returns what waits for the end."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(_RAISED)
        os._exit(0)

    def wait() -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code != _RAISED, "an exception in the child, told on standard error"
        return code

    return wait
