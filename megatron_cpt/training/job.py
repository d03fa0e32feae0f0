"""A whole training job from outside: refuse wrong input, bring the initial weights into form, start the ranks.

Nothing here imports megatron-core, so that the process that starts a job stays light.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.convert import convert
from megatron_cpt.checkpoint.fingerprint import fingerprint
from megatron_cpt.checkpoint.random import write_random_hf
from megatron_cpt.checkpoint.tokenizer_files import MODEL_FILES
from megatron_cpt.config.manifest import MANIFEST, read_json, sha256_json, write_json_atomic, write_text_atomic
from megatron_cpt.config.schema import TrainConfig
from megatron_cpt.data import IndexedDataset, is_packed, pack_dataset
from megatron_cpt.errors import TrainingError
from megatron_cpt.runtime.launcher import launch, refuse_more_processes_than_devices
from megatron_cpt.runtime.lock import lock_folder
from megatron_cpt.tokenizer import Tokenizer
from megatron_cpt.training.folder import (
    checkpoint_folders,
    initial_folder,
    last_checkpoint,
    refuse_other_run,
    run_identity,
)
from megatron_cpt.training.inputs import is_given_in_form, read_inputs

LONGEST_WAIT_SECONDS = 1800.0


def run_job(config: TrainConfig, num_processes: int) -> Path:
    """Train `config` with `num_processes` ranks on this machine; resumes what is there.

    Returns:
        the folder of the last checkpoint.

    Raises:
        InputError: something does not fit; nothing was changed.
        TrainingError: a rank failed.
    """
    refuse_more_processes_than_devices(num_processes)
    _pack_sources(config)
    inputs, output = read_inputs(config, num_processes), Path(config.output)
    identity = run_identity(config, inputs)
    refuse_other_run(output, identity)
    # Held until the last rank has ended: what the ranks read and say lies in this folder.
    with lock_folder(output):
        refuse_other_run(output, identity)  # another job may have begun here before the lock was ours
        done = checkpoint_folders(output)
        if done and done[-1][0] >= config.train_steps:
            print(f"{output}: all {config.train_steps} steps are done already", flush=True)
            return done[-1][1]
        _make_initial_once(config, inputs.tokenizer)
        job = output / "logs" / "job.json"
        write_text_atomic(job, config.model_dump_json(indent=2) + "\n")
        launch("megatron_cpt.training.worker", [str(job)], num_processes, output / "logs")
    return last_checkpoint(output)


def prepare(config: TrainConfig, world_size: int, rank: int = 0) -> None:
    """What `run_job` does before it starts ranks, for ranks that somebody else has started (torchrun, Slurm).

    Packs the sources that ask for it and refuses wrong input, then brings the initial weights into `torch_dist`
    form, in `<output>/initial`, once.

    Args:
        config: the job.
        world_size: number of ranks.
        rank: this one; rank 0 does the work and the others wait for it.

    Raises:
        InputError: something does not fit; nothing was changed.
    """
    if rank == 0:
        _pack_sources(config)
    else:
        _wait(lambda: not _sources_to_pack(config), "has not packed the sources with packing: best_fit")
    inputs = read_inputs(config, world_size)
    output = Path(config.output)
    refuse_other_run(output, run_identity(config, inputs))
    if rank != 0:
        _wait(lambda: _is_ready(config, inputs.tokenizer), f"has not made {initial_folder(config)}")
        return
    with lock_folder(output):
        _make_initial_once(config, inputs.tokenizer)


def _request(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the initial weights are made from."""
    given = config.initial_checkpoint
    source = fingerprint(given) if given is not None else [config.shape and config.shape.model_dump(), config.seed]
    return {"key": sha256_json([source, tokenizer.sha256, config.vocab_divisor])}


def _record(config: TrainConfig) -> Path:
    return Path(config.output) / "logs" / "initial.json"


def _is_ready(config: TrainConfig, tokenizer: Tokenizer) -> bool:
    if is_given_in_form(config):
        return True
    initial, record = initial_folder(config), _record(config)
    made = (initial / MANIFEST).exists() and record.exists()
    return made and bool(read_json(record) == _request(config, tokenizer))


def _wait(is_done: Callable[[], bool], failure: str) -> None:
    """Wait for the work of rank 0."""
    deadline = time.monotonic() + LONGEST_WAIT_SECONDS
    while not is_done():
        if time.monotonic() > deadline:
            raise TrainingError(f"rank 0 {failure}; see what it said")
        time.sleep(0.2)


def _sources_to_pack(config: TrainConfig) -> list[IndexedDataset]:
    wanted = [IndexedDataset(source.prefix) for source in config.data.train if source.packing == "best_fit"]
    return [dataset for dataset in wanted if not is_packed(dataset, config.batch.seq_length)]


def _pack_sources(config: TrainConfig) -> None:
    for dataset in _sources_to_pack(config):
        pack_dataset(dataset, config.batch.seq_length)


def _make_initial_once(config: TrainConfig, tokenizer: Tokenizer) -> None:
    if _is_ready(config, tokenizer):
        return
    initial, record = initial_folder(config), _record(config)
    record.unlink(missing_ok=True)
    shutil.rmtree(initial, ignore_errors=True)
    if config.initial_checkpoint is not None:
        source = Path(config.initial_checkpoint)
    else:
        assert config.shape is not None  # a rule of the configuration
        source = initial.with_name(".initial-hf")
        shutil.rmtree(source, ignore_errors=True)
        write_random_hf(config.shape, tokenizer.vocab_size, config.seed, source, tokenizer.bos_id, tokenizer.eos_id)
    folder = tokenizer.path.parent if tokenizer.path.name in MODEL_FILES else None
    # With `initial_optimizer` the checkpoint is given in form; otherwise a state would be made and never read.
    convert(source, initial, "torch_dist", config.vocab_divisor, folder, optimizer=False)
    if config.initial_checkpoint is None:
        shutil.rmtree(source)
    write_json_atomic(record, _request(config, tokenizer))
