"""A build killed at any step on the file system, and repeated, ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.data import DatasetBuild, Document, build_files, ordered, verify_dataset
from tests.data.killed import STEPS, in_child

ENDINGS = ("bin", "idx", "manifest.json", "faults.txt")


def test_an_exception_of_a_child_fails_its_test() -> None:
    with pytest.raises(AssertionError, match="an exception in the child"):
        in_child(lambda: 1 // 0)
    assert in_child(lambda: None) == 0


def killed_at(step: int, work: Callable[[], Any]) -> Callable[[], None]:
    """The work, in a process that kills itself at the given step on the file system; 0: ends with their number."""
    seen = 0

    def count(event: str, _: Any) -> None:
        nonlocal seen
        if event.startswith(STEPS):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        sys.addaudithook(count)
        work()
        if not step:
            os._exit(min(seen, 255))

    return run


@pytest.fixture(scope="session")
def files(documents: list[Document], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of several blocks each, with broken records."""
    folder = tmp_path_factory.mktemp("killed")
    draw = random.Random(5)
    paths = []
    for name in "abc":
        lines = [json.dumps({"text": draw.choice(documents).text}, ensure_ascii=False) for _ in range(14000)]
        lines[20:10000:3000] = ["{broken"] * len(lines[20:10000:3000])
        paths.append(folder / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def contents(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{ending}").read_bytes() for ending in ENDINGS]


def test_killed_at_every_kind_of_step_the_dataset_is_the_same(
    files: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered, "COMMIT_BYTES", 2 << 20)

    def build(prefix: Path) -> Callable[[], Any]:
        return lambda: build_files(DatasetBuild(files, tokenizer, prefix, "xx", on_error="skip"), workers=2)

    build(tmp_path / "whole")()
    expected = contents(tmp_path / "whole")
    total = in_child(killed_at(0, build(tmp_path / "counted")))
    assert 60 < total < 255
    continued = kills = 0
    steps = sorted({*range(2, total - 16, 11), *range(total - 16, total, 2)})
    for step in steps:
        prefix = tmp_path / f"x{step}"
        kills += in_child(killed_at(step, build(prefix))) == -signal.SIGKILL
        continued += any(Path(f"{prefix}.parts").glob("0000?.json"))
        in_child(killed_at(3 * step % total + 1, build(prefix)))  # and once more, somewhere else
        build(prefix)()
        assert contents(prefix) == expected, step
        assert len(list(tmp_path.glob(f"x{step}.*"))) == len(ENDINGS), step
    assert continued > 3 and kills > len(steps) // 2  # threads: another run may have fewer steps
    assert verify_dataset(prefix, inputs=True)["inputs_checked"] == 4


def test_killed_at_random_moments_while_threads_write(
    files: list[Path], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordered, "COMMIT_BYTES", 1 << 20)
    started = time.monotonic()
    build_files(DatasetBuild(files, tokenizer, tmp_path / "whole", "xx", on_error="skip"), workers=3)
    duration = time.monotonic() - started
    expected, draw = contents(tmp_path / "whole"), random.Random(7)

    def build() -> None:
        build_files(DatasetBuild(files, tokenizer, tmp_path / "x", "xx", on_error="skip"), workers=3, overwrite=True)

    def killed_after(seconds: float) -> None:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        build()

    for _ in range(4):
        for _ in range(2):
            in_child(partial(killed_after, draw.uniform(0.02, duration)))
        build()
        assert contents(tmp_path / "x") == expected
