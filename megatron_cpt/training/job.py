"""A whole training job from outside: prepare the initial weights, start the ranks, wait for them.

Nothing here imports megatron-core, so that the process that starts a job stays light.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from megatron_cpt.checkpoint import convert, open_torch_dist
from megatron_cpt.checkpoint.random import write_random_hf
from megatron_cpt.config.manifest import MANIFEST, read_json, sha256_json, write_json_atomic, write_text_atomic
from megatron_cpt.config.schema import TrainConfig
from megatron_cpt.errors import ConfigError, TrainingError
from megatron_cpt.runtime.launcher import launch
from megatron_cpt.runtime.mesh import world_from_environment
from megatron_cpt.tokenizer import load_tokenizer

INITIAL = "initial"
OWN_FILES = {"logs", ".lock", INITIAL, "run.json"}  # what may be there before the first step


def run_job(config: TrainConfig, num_processes: int) -> Path:
    """Train `config` with `num_processes` ranks on this machine; resumes what is there.

    Returns:
        the folder of the last checkpoint.

    Raises:
        InputError: a rank refused its input.
        TrainingError: a rank failed.
    """
    output = Path(config.output)
    job = output / "logs" / "job.json"
    write_text_atomic(job, prepare(config).model_dump_json(indent=2) + "\n")
    launch("megatron_cpt.training.worker", [str(job)], num_processes, output / "logs")
    return last_checkpoint(output)


def last_checkpoint(output: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        TrainingError: there is none.
    """
    complete = sorted(path.parent for path in (output / "checkpoints").glob(f"iter_*/{MANIFEST}"))
    if not complete:
        raise TrainingError(f"{output} holds no complete checkpoint; train it first")
    return complete[-1]


def prepare(config: TrainConfig) -> TrainConfig:
    """Bring the initial weights into `torch_dist` form, in `<output>/initial`, once.

    Under torchrun or Slurm rank 0 does it and the others wait for it.

    Returns:
        the configuration with `initial_checkpoint` set to a torch_dist folder and no shape.
    """
    _refuse_foreign(Path(config.output))
    given = config.initial_checkpoint
    if given is not None and (Path(given) / ".metadata").exists():
        open_torch_dist(given)  # reads its index without running it, and refuses one that would run something
        return config.model_copy(update={"shape": None})
    initial = Path(config.output) / INITIAL
    request = Path(config.output) / "logs" / "initial.json"
    shape = config.shape.model_dump() if config.shape else None
    wanted = {"key": sha256_json([given, shape, config.seed, config.vocab_divisor, config.tokenizer])}
    ready = request.exists() and (initial / MANIFEST).exists() and read_json(request) == wanted
    if not ready and world_from_environment().rank == 0:
        shutil.rmtree(initial, ignore_errors=True)
        _make_initial(config, initial)
        write_json_atomic(request, wanted)
    while not (request.exists() and read_json(request) == wanted):
        time.sleep(0.2)  # another rank is at work; when it fails, its launcher ends this one too
    return config.model_copy(update={"initial_checkpoint": str(initial), "shape": None})


def _make_initial(config: TrainConfig, initial: Path) -> None:
    if config.initial_checkpoint is not None:
        source = Path(config.initial_checkpoint)
        convert(source, initial, "torch_dist", vocab_divisor=config.vocab_divisor, tokenizer=config.tokenizer)
        return
    assert config.shape is not None  # config.rules checked it
    random_hf = initial.with_name(".initial-hf")
    shutil.rmtree(random_hf, ignore_errors=True)
    tokenizer = load_tokenizer(config.tokenizer)
    write_random_hf(config.shape, tokenizer.vocab_size, config.seed, random_hf, tokenizer.bos_id, tokenizer.eos_id)
    convert(random_hf, initial, "torch_dist", vocab_divisor=config.vocab_divisor, tokenizer=config.tokenizer)
    shutil.rmtree(random_hf)


def _refuse_foreign(output: Path) -> None:
    """Refuse a folder with something in it that no training run put there."""
    if not output.exists() or (output / "run.json").exists():
        return
    foreign = sorted(path.name for path in output.iterdir() if path.name not in OWN_FILES)
    if foreign:
        raise ConfigError(
            f"{output} is not empty ({', '.join(foreign[:3])}) and holds no training run; choose another output folder"
        )
