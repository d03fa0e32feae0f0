"""What holds for every test and for every process that a test starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[1])

# These tests are of the CPU, on machines that have an accelerator too; and their matrices are tiny.
os.environ.setdefault("MEGATRON_CPT_DEVICE", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton decides when it is imported whether it compiles its kernels or interprets them, so this cannot wait for
# tests/kernels. Only a call that names the implementation takes interpreted kernels.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Tests start hundreds of processes; without cached byte code each compiles every module that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Ranks that tests start run modules of the tests; the current folder is not on their path.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))

_FIRST = ("tests/training/", "tests/pipeline/", "tests/examples/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One more than cores: tests wait for processes that they start, and for files to be on the disk."""
    return min((os.cpu_count() or 1) + 1, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests take minutes come first, so that none of them is left for one process at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(_FIRST))
