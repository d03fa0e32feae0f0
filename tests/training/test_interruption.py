"""A job that is killed at any moment goes on as if it had not been."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint.torch_dist import open_torch_dist
from megatron_cpt.training.folder import checkpoint_folders, last_checkpoint
from megatron_cpt.training.metrics import read_metrics
from tests.runtime.test_launcher import is_alive, wait_until
from tests.training.conftest import SHAPE, Tiny

ROOT = Path(__file__).resolve().parents[2]
LAST_STEP, SAVE_INTERVAL, KILLED_AFTER = 40, 10, 13
TIMES = {"tokens_per_second", "bytes_per_second", "mfu"}


def write_config(tiny: Tiny, output: Path) -> Path:
    """Forty steps at TP2, from random weights, of batches that processes of the loader prepare."""
    config = tiny.config(
        output,
        initial_checkpoint=None,
        shape=SHAPE.model_copy(update={"num_layers": 2}).model_dump(),
        train_steps=LAST_STEP,
        batch={"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 4},
        parallel={"tensor_model_parallel_size": 2},
        checkpoint={"save_interval_steps": SAVE_INTERVAL},
        eval_interval_steps=SAVE_INTERVAL,
    )
    document = config.model_dump(mode="json")
    document["data"]["loader_workers"] = 1
    path = output.with_suffix(".yaml")
    path.write_text(json.dumps(document))
    return path


def start(module: list[str], config: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *module, "train", str(config), *options]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:  # it has ended meanwhile
        return []
    return children + [below for child in children for below in descendants(child)]


def loader_workers(pid: int) -> list[int]:
    found = []
    for each in descendants(pid):
        with contextlib.suppress(FileNotFoundError):  # it has ended meanwhile
            if b".loader_worker" in Path(f"/proc/{each}/cmdline").read_bytes():
                found.append(each)
    return found


def end_all(processes: list[int]) -> str:
    left = [pid for pid in processes if is_alive(pid)]
    commands = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in left]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return f"left behind: {commands}"


def numbers(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_metrics(output)]


@pytest.fixture(scope="module")
def undisturbed(tiny: Tiny) -> Path:
    """The whole run, as two processes of torchrun."""
    output = tiny.root / "undisturbed"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megatron_cpt.cli.main"]
    job = start(torchrun, write_config(tiny, output))
    out, error = job.communicate(timeout=120)
    assert job.returncode == 0, error
    assert out.count(f"step {LAST_STEP}/{LAST_STEP} | loss") == 1
    return output


def test_killed_job_goes_on_as_if_it_had_not_been(undisturbed: Path, tiny: Tiny) -> None:
    """The second time the processes that prepare its batches are killed, twice, while the ranks go on."""
    output = tiny.root / "killed"
    config = write_config(tiny, output)
    job = start(["megatron_cpt.cli.main"], config, "--nproc", "2")
    assert wait_until(lambda: len(read_metrics(output)) > KILLED_AFTER, 60)
    processes = descendants(job.pid)
    assert len(processes) >= 2 and job.poll() is None
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert wait_until(lambda: not any(is_alive(pid) for pid in processes)), end_all(processes)
    job.communicate()  # nobody holds its pipes any more
    step, checkpoint = checkpoint_folders(output)[-1]
    reached = read_metrics(output)[-1]["step"]
    assert SAVE_INTERVAL <= step <= reached < LAST_STEP - 15
    with open(output / "metrics.jsonl", "a", encoding="utf-8") as metrics:
        metrics.write(f'{{"step": {LAST_STEP - 1}, "loss": 4.9')
    half_written = output / "checkpoints" / f"iter_{LAST_STEP:07d}"
    shutil.copytree(checkpoint, half_written, ignore=shutil.ignore_patterns("manifest.json"))
    assert last_checkpoint(output) == checkpoint

    job = start(["megatron_cpt.cli.main"], config, "--nproc", "2", "--json")
    for number in (reached + 1, reached + 4):
        assert wait_until(lambda least=number: read_metrics(output)[-1]["step"] >= least, 60)  # type: ignore[misc]
        assert wait_until(lambda: len(loader_workers(job.pid)) == 2, 60)  # one that was killed is started again
        for pid in loader_workers(job.pid):
            os.kill(pid, signal.SIGKILL)
    out, error = job.communicate(timeout=120)
    assert job.returncode == 0, error
    assert json.loads(out) == {"checkpoint": str(half_written)} and "| loss" in error
    told = [number for number in range(LAST_STEP + 1) if f"step {number:2}/{LAST_STEP} | loss" in error]
    assert told == list(range(step + 1, LAST_STEP + 1))
    assert numbers(output) == numbers(undisturbed)
    resumed, whole = (open_torch_dist(last_checkpoint(folder)) for folder in (output, undisturbed))
    assert all(torch.equal(resumed.read(name), whole.read(name)) for name in whole.names())


def test_killed_before_the_first_checkpoint_begins_again(tiny: Tiny, undisturbed: Path) -> None:
    """Its records of the first attempt are dropped: nothing is told twice."""
    output = tiny.root / "begun"
    shutil.copytree(undisturbed, output)
    shutil.rmtree(output / "checkpoints")
    config = json.loads(undisturbed.with_suffix(".yaml").read_text())
    tiny.train_many({"begun": {key: value for key, value in config.items() if key != "output"}}, 2)
    assert numbers(output) == numbers(undisturbed)
