"""What a training job reads: opened, and refused where it does not belong together.

Every process of a job does this, and before them the one that starts them, so that wrong input costs
a second and no process.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.checkpoint import check_belongs, open_torch_dist, read_shape
from megatron_cpt.checkpoint.metadata import METADATA
from megatron_cpt.checkpoint.torch_dist import holds_optimizer
from megatron_cpt.config.schema import LlamaShape, TrainConfig
from megatron_cpt.data import IndexedDataset, SamplePlan, open_plan, open_windows, scored_bytes
from megatron_cpt.errors import ConfigError, DataError
from megatron_cpt.model.kernels import refuse_kernels
from megatron_cpt.planning.layout import Layout, check_layout
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class Inputs:
    """Everything a job reads but the weights, checked against each other."""

    tokenizer: Tokenizer
    shape: LlamaShape
    layout: Layout
    plan: SamplePlan
    validation: dict[str, IndexedDataset]


def read_inputs(config: TrainConfig, world_size: int) -> Inputs:
    """Open tokenizer, datasets and the description of the initial weights.

    Args:
        config: the job.
        world_size: number of ranks.

    Raises:
        InputError: something is missing, damaged, or does not belong together, or a named kernel cannot run here.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    shape = _shape(config, tokenizer)
    refuse_kernels(config.kernels, config.precision, shape.head_dim)
    length = config.batch.seq_length
    layout = check_layout(shape, tokenizer.vocab_size, config.vocab_divisor, config.parallel, config.batch, world_size)
    plan = open_plan(config.data, length, config.seed)
    validation = {source.language: IndexedDataset(source.prefix) for source in config.data.validation}
    for dataset in (*plan.datasets, *validation.values()):
        _refuse_other_tokenizer(dataset, tokenizer)
    plan.require(config.train_steps * config.batch.global_batch_size)
    for dataset in validation.values():
        open_windows(dataset, length)  # here and in the next line, what no bits per byte can be had of is refused
        scored_bytes(dataset)
    return Inputs(tokenizer, shape, layout, plan, validation)


def is_given_in_form(config: TrainConfig) -> bool:
    """Whether `initial_checkpoint` is a torch_dist folder, so that nothing has to be made of it."""
    return config.initial_checkpoint is not None and (Path(config.initial_checkpoint) / METADATA).exists()


def _shape(config: TrainConfig, tokenizer: Tokenizer) -> LlamaShape:
    """The architecture, from the initial checkpoint where there is one; that has to be the tokenizer's."""
    if config.initial_checkpoint is None:
        assert config.shape is not None  # a rule of the configuration
        if config.initial_optimizer:
            raise ConfigError("initial_optimizer is set without an initial_checkpoint; name one, or leave it out")
        return config.shape
    folder = Path(config.initial_checkpoint)
    shape, _ = read_shape(folder)
    if is_given_in_form(config):
        open_torch_dist(folder)  # reads its index without running it, and refuses one that would run something
    if config.initial_optimizer and not (is_given_in_form(config) and holds_optimizer(folder)):
        raise ConfigError(
            f"initial_optimizer is set, yet initial_checkpoint={folder} holds no optimizer state; give the checkpoint "
            "of a run (surgery without --no-optimizer keeps the state), or leave initial_optimizer out"
        )
    if config.shape not in (None, shape):
        raise ConfigError(f"shape is not that of initial_checkpoint={folder}; leave it out, the checkpoint states it")
    check_belongs(folder, tokenizer)
    return shape


def _refuse_other_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    made_by = str(dataset.manifest.get("tokenizer_sha256"))
    if made_by != tokenizer.sha256:
        raise DataError(
            f"{dataset.prefix} was built with another tokenizer (SHA-256 {made_by[:12]}...) than "
            f"{tokenizer.path} ({tokenizer.sha256[:12]}...); build it again with `data build --tokenizer`"
        )
