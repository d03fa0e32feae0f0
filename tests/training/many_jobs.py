"""Training jobs in ranks that are forked from one process that has imported everything: imports are paid for once.

`python -m tests.training.many_jobs` takes lines [NUM_PROCESSES, LOG_FOLDER, [CONFIG.json, ...]] and does what
`training.worker` does, for each file in turn. What a job fails with goes to CONFIG.error.
Every rank leaves the weights that it held at the last save in CONFIG.rank_R.pt, in its own names and cuts.
In a job named `slow-...` a validation, and the wait for the first batch, take an hour each by the clock that it is
measured with. In a job named `bucketed-...` a bucket is full at 1,000 numbers, as others are at 40 million.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_cpt.config.schema import TrainConfig
from megatron_cpt.errors import CptError
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.engine import install_engine
from megatron_cpt.runtime.launcher import free_port
from megatron_cpt.training.job import prepare


@contextmanager
def slow_surroundings() -> Iterator[None]:
    """An hour passes for each validation and for the first batch, and no time is lost."""
    from megatron_cpt.training import loop, metrics

    hours = [0]

    def hour_before(function: Callable[..., Any], times: int = -1) -> Callable[..., Any]:
        left = [times]

        def slow(*arguments: Any) -> Any:
            hours[0] += left[0] != 0
            left[0] -= left[0] > 0
            return function(*arguments)

        return slow

    clock = SimpleNamespace(
        perf_counter=lambda: time.perf_counter() + 3600 * hours[0],
        monotonic=lambda: time.monotonic() + 3600 * hours[0],
    )
    with (
        mock.patch.object(loop, "time", clock),
        mock.patch.object(metrics, "time", clock),
        mock.patch.object(loop.Trainer, "_validate", hour_before(loop.Trainer._validate)),
        mock.patch.object(loop.Loader, "__next__", hour_before(loop.Loader.__next__, times=1)),
    ):
        yield


@contextmanager
def small_buckets() -> Iterator[None]:
    """Gradients are reduced in buckets of 1,000 numbers, where the job overlaps that."""
    from megatron_cpt.training import loop

    settings = partial(loop.DistributedDataParallelConfig, bucket_size=1000)
    with mock.patch.object(loop, "DistributedDataParallelConfig", settings):
        yield


@contextmanager
def weights_kept(path: Path) -> Iterator[None]:
    """Whenever the job saves, what this rank holds goes to `path`, past every code that saves and loads."""
    from megatron_cpt.runtime.engine import parallel_state
    from megatron_cpt.training import loop

    save = loop.save_checkpoint

    def keep(model: Sequence[Any], *arguments: Any) -> Path:
        state = parallel_state()
        held = {
            "tensor_rank": state.get_tensor_model_parallel_rank(),
            "pipeline_rank": state.get_pipeline_model_parallel_rank(),
            "data_rank": state.get_data_parallel_rank(),
            "chunks": [
                {name: weight.detach().clone() for name, weight in chunk.module.named_parameters()} for chunk in model
            ],
            "bucket_padding": [
                bucket.grad_data.numel() - bucket.numel_unpadded
                for chunk in model
                for buffer in chunk.buffers
                for bucket in buffer.buckets
            ],
        }
        torch.save(held, path)
        return save(model, *arguments)

    with mock.patch.object(loop, "save_checkpoint", keep):
        yield


def run_rank(rank: int, num_processes: int, paths: list[str], ports: list[int]) -> None:
    from megatron_cpt.training.loop import train

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
    for path, port in zip(paths, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        config = TrainConfig.model_validate_json(Path(path).read_bytes())
        prepare(config, num_processes, rank)
        kind = Path(path).stem.partition("-")[0]
        try:
            with (
                {"slow": slow_surroundings, "bucketed": small_buckets}.get(kind, nullcontext)(),
                weights_kept(Path(path).with_suffix(f".rank_{rank}.pt")),
            ):
                train(config)
        except CptError as caught:  # on every rank alike
            Path(path).with_suffix(".error").write_text(f"{type(caught).__name__}: {caught}")


def import_everything() -> None:
    """What a rank needs; also torch's compiler, which the first optimizer imports."""
    install_engine(current_device().type)
    import torch._dynamo  # noqa: F401

    import megatron_cpt.training.loop  # noqa: F401


def main(num_processes: int, paths: list[str]) -> None:
    """Run jobs of one process in this one."""
    import_everything()
    run_rank(0, num_processes, paths, [free_port() for _ in paths])


def run_logged(rank: int, num_processes: int, paths: list[str], ports: list[int], log_folder: Path) -> None:
    """`run_rank`, with all that it says in a file."""
    log = os.open(log_folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_rank(rank, num_processes, paths, ports)


def serve() -> None:
    """Answer requests, a line of JSON each, until there are no more: "" or what went wrong."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_everything()
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}  # as the launcher
    # A fork spares each rank the imports; elsewhere than on Linux it is not safe.
    method = "fork" if sys.platform == "linux" else "spawn"
    for line in sys.stdin:
        num_processes, log_folder, paths = json.loads(line)
        Path(log_folder).mkdir(parents=True)
        arguments = num_processes, paths, [free_port() for _ in paths], Path(log_folder)
        answer = ""
        try:
            torch.multiprocessing.start_processes(run_logged, arguments, nprocs=num_processes, start_method=method)
        except Exception:
            answer = traceback.format_exc()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
