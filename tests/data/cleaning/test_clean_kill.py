"""A cleaning killed at any step on the file system, or while threads work, and repeated, ends with the same bytes."""

from __future__ import annotations

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

from megatron_cpt.data import blocks, ordered
from megatron_cpt.data.cleaning import Profile, clean_files, load_profile
from tests.data.killed import STEPS, in_child

PROFILE = """
about: texts of this test
normalise: [line_ends]
rules:
  short: {metric: characters, at_least: 60, reason: "fragments"}
  runs: {metric: longest_run, at_most: 20, reason: "rulers"}
duplicates: {threshold: 0.8, num_permutations: 32}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of texts that break rules, come again, and hold what is no text."""
    folder = tmp_path_factory.mktemp("killed")
    draw = random.Random(3)
    words = ["river", "town", "quiet", "old", "goes", "nobody", "asks", "where", "runs", "past", "winter", "water"]
    texts = [
        " ".join(draw.choices(words, k=draw.randint(4, 60))) + "-" * draw.choice([0, 0, 0, 30]) for _ in range(900)
    ]
    texts += draw.sample(texts, 90) + [text.replace("old", "very\r\nold", 1) for text in draw.sample(texts, 60)]
    draw.shuffle(texts)
    half = len(texts) // 2
    for name, part in (("a", texts[:half]), ("b", texts[half:])):
        (folder / f"{name}.txt").write_bytes("\n\n".join([*part[:300], "\0", *part[300:]]).encode())
    return [folder / "a.txt", folder / "b.txt"]


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    (tmp_path / "profile.yaml").write_text(PROFILE)
    return load_profile(tmp_path / "profile.yaml").config


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks and a journal of many entries, as in files of gigabytes."""
    monkeypatch.setattr(blocks, "CUT_BYTES", 8192)
    monkeypatch.setattr(ordered, "COMMIT_BYTES", 16384)


def kill_at(step: int) -> Callable[[], int]:
    """Let this process kill itself at the given step on the file system (0: never); returns the count of steps."""
    seen = 0

    def count(event: str, _: Any) -> None:
        nonlocal seen
        if event.startswith(STEPS):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    return lambda: seen


def kill_after(seconds: float) -> None:
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_killed_at_every_kind_of_step_the_output_is_the_same(
    corpus: list[Path], profile: Profile, tmp_path: Path
) -> None:
    def clean(folder: Path) -> None:
        clean_files(corpus, folder, profile, workers=2, on_error="skip")

    def killed(step: int, folder: Path) -> None:
        kill_at(step)
        clean(folder)

    def counted(folder: Path) -> None:
        steps = kill_at(0)
        clean(folder)
        (tmp_path / "steps").write_text(str(steps()))

    clean(tmp_path / "whole")
    in_child(partial(counted, tmp_path / "counted"))
    expected, total = contents(tmp_path / "whole"), int((tmp_path / "steps").read_text())
    assert {"a.jsonl.zst", "b.jsonl.zst", "faults.log", "manifest.json", "report.json", "report.md"} < set(expected)
    continued = kills = 0
    steps = [*range(3, total - 30, total // 12), *range(total - 30, total - 2, 4)]
    for step in steps:
        folder = tmp_path / f"at{step}"
        kills += in_child(partial(killed, step, folder)) == -signal.SIGKILL
        continued += any(folder.glob(".work/**/0000?.json"))
        in_child(partial(killed, 3 * step % total + 1, folder))  # and once more, somewhere else
        clean(folder)
        assert contents(folder) == expected, step
    assert continued > 5 and kills > len(steps) // 2  # threads: another run may have fewer steps


def test_killed_at_random_moments_while_threads_work(corpus: list[Path], profile: Profile, tmp_path: Path) -> None:
    started = time.monotonic()
    clean_files(corpus, tmp_path / "whole", profile, workers=3, on_error="skip")
    duration = time.monotonic() - started
    expected, draw = contents(tmp_path / "whole"), random.Random(7)

    def clean(folder: Path) -> None:
        clean_files(corpus, folder, profile, workers=3, on_error="skip", overwrite=True)

    def killed(seconds: float) -> None:
        kill_after(seconds)
        clean(tmp_path / "out")

    for _ in range(3):  # the folder holds what the round before has left
        for _ in range(2):
            in_child(partial(killed, draw.uniform(0.02, duration)))
        clean(tmp_path / "out")
        assert contents(tmp_path / "out") == expected
