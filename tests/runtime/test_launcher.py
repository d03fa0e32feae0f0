"""The launcher says why a job failed and never leaves a process behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.errors import CptError, InputError, TrainingError
from megatron_cpt.runtime.launcher import launch

MODULE = "tests.runtime.rank_job"


def facts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")  # one that nobody waited for is dead all the same
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def failure(folder: Path, *behaviours: str) -> CptError:
    with pytest.raises(CptError) as caught:
        launch(MODULE, [str(folder), *behaviours], len(behaviours), folder / "logs")
    assert not any(is_alive(facts["pid"]) for facts in facts_of(folder))
    return caught.value


def test_ranks_know_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.delenv(name, raising=False)
    launch(MODULE, [str(tmp_path), "work", "work"], 2, tmp_path / "logs")
    first, second = facts_of(tmp_path)
    assert (first["RANK"], first["LOCAL_RANK"], second["RANK"], second["LOCAL_RANK"]) == ("0", "0", "1", "1")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        assert first[name] == second[name] == "2"
    assert first["MASTER_ADDR"] == "127.0.0.1" and first["MASTER_PORT"] == second["MASTER_PORT"]
    assert int(first["OMP_NUM_THREADS"]) == max(1, (os.cpu_count() or 1) // 2)
    assert first["CUDA_DEVICE_MAX_CONNECTIONS"] == second["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert capfd.readouterr().out == "rank 0 is talking on standard output\n"
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "rank 1 is talking on standard output\n"


def test_what_the_user_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS"):
        monkeypatch.setenv(name, "7")
    launch(MODULE, [str(tmp_path), "work"], 1, tmp_path / "logs")
    (facts,) = facts_of(tmp_path)
    assert facts["OMP_NUM_THREADS"] == facts["CUDA_DEVICE_MAX_CONNECTIONS"] == "7"


def test_refusal_arrives_as_the_rank_said_it(tmp_path: Path) -> None:
    caught = failure(tmp_path, "linger", "refuse:0")
    assert isinstance(caught, InputError) and str(caught) == "the text is not Japanese"


def test_failure_names_rank_log_and_last_words(tmp_path: Path) -> None:
    caught = failure(tmp_path, "linger", "crash:0")
    assert isinstance(caught, TrainingError)
    log = tmp_path / "logs" / "rank_1.log"
    wanted = f"rank 1 ended with code 1: ConnectionError: closed by the other side (all it said: {log})"
    assert str(caught) == wanted and "Traceback" in log.read_text()


@pytest.mark.parametrize(
    ("behaviours", "kind", "message"),
    [
        (("crash:0", "refuse:0.5"), InputError, "the text is not Japanese"),
        (("crash:0", "crash:0", "lose:0.5"), TrainingError, "rank 2 ended with code 1: the loss is nan"),
        (("crash:0.5", "murder"), TrainingError, "rank 1 was killed from outside (SIGKILL)"),
        (("exit",), TrainingError, "rank 0 ended with code 3: cannot open the index (all it said"),
        (("crash:0.5", "crash:0"), TrainingError, "rank 1 ended with code 1"),
    ],
)
def test_the_root_cause_is_told(
    behaviours: tuple[str, ...], kind: type[CptError], message: str, tmp_path: Path
) -> None:
    caught = failure(tmp_path, *behaviours)
    assert type(caught) is kind and str(caught).startswith(message)


def test_a_killed_rank_ends_the_others_soon(tmp_path: Path) -> None:
    begun = time.monotonic()
    caught = failure(tmp_path, "linger", "murder")
    log = tmp_path / "logs" / "rank_1.log"
    wanted = f"rank 1 was killed from outside (SIGKILL), perhaps for lack of memory (all it said: {log})"
    assert str(caught) == wanted and "nothing to do with it" in log.read_text()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_nothing_is_left_when_the_launcher_is_killed(how: signal.Signals, code: int, tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from megatron_cpt.runtime.launcher import launch\n"
        f"launch({MODULE!r}, [{str(tmp_path)!r}, 'linger', 'linger'], 2, Path({str(tmp_path)!r}, 'logs'))\n"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    assert wait_until(lambda: len(facts_of(tmp_path)) == 2)
    pids = [facts["pid"] for facts in facts_of(tmp_path)]
    assert all(is_alive(pid) for pid in pids)
    os.kill(launcher.pid, how)
    assert launcher.wait(10) == code
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))
