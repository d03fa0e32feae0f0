"""The state of a training run: saved whole or not at all, resumed only where it belongs.

A checkpoint is written under a temporary name, its manifest last, and then renamed: a folder
`iter_*` with a manifest is complete. The state of the data is one integer, the step.
"""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cpt.checkpoint import read_checkpoint_manifest, write_checkpoint_manifest
from megatron_cpt.checkpoint.tokenizer_files import copy_tokenizer
from megatron_cpt.config.manifest import MANIFEST
from megatron_cpt.config.schema import LlamaShape, TrainConfig
from megatron_cpt.errors import CheckpointError
from megatron_cpt.training.folder import CHECKPOINTS, checkpoint_folders
from megatron_cpt.training.masters import OPTIMIZER_METADATA, LoadedWeights, optimizer_state_to_save

PROOF = "proof.safetensors"
_OF_STATE = ("params", "step")  # of a parameter group: what is not a setting


def model_state(model: Sequence[Any]) -> dict[str, Any]:
    """Sharded state of the model chunks, under names that do not depend on the layout."""
    return {f"model{index}": chunk.module.sharded_state_dict() for index, chunk in enumerate(model)}


def load_weights(model: Sequence[Any], optimizer: Any, folder: Path) -> None:
    """Load the weights alone from a torch_dist folder; optimizer masters follow them."""
    loaded = _load(model_state(model), folder, "make it again")
    _set_weights(model, loaded, folder)
    optimizer.reload_model_params()


def load_weights_and_optimizer(model: Sequence[Any], optimizer: Any, folder: Path) -> None:
    """Load weights, masters and moments from another run's checkpoint; the settings of the optimizer stay this run's.

    Its count of updates goes on, as it belongs to the moments (bias correction).
    """
    settings = [
        {key: value for key, value in group.items() if key not in _OF_STATE} for group in optimizer.param_groups
    ]
    _load_all(model, optimizer, folder, "make it again")
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)


def _load_all(model: Sequence[Any], optimizer: Any, folder: Path, advice: str) -> None:
    state = model_state(model)
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=OPTIMIZER_METADATA)
    loaded = _load(state, folder, advice)
    _set_weights(model, loaded, folder)
    weights = LoadedWeights(model, optimizer)
    optimizer.load_state_dict(loaded["optimizer"])
    weights.refuse_other_masters(folder)


def _load(state: dict[str, Any], folder: Path, advice: str) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder))
    except (torch.OutOfMemoryError, torch.distributed.DistBackendError):
        raise  # not the folder's fault
    except (CheckpointException, Exception) as caught:  # a damaged file can end in any error of its readers
        raise CheckpointError(f"{folder} is damaged ({_cause(caught)}); {advice}") from caught


def _cause(caught: BaseException) -> str:
    """In one line, what the engine or, below it, a rank's reader has met."""
    if isinstance(caught, CheckpointException) and caught.failures:
        caught = next(iter(caught.failures.values()))[0]
    return next(iter(str(caught).strip().splitlines()), "") or type(caught).__name__


def _set_weights(model: Sequence[Any], loaded: dict[str, Any], folder: Path) -> None:
    for index, chunk in enumerate(model):
        state = loaded[f"model{index}"]
        try:
            chunk.module.load_state_dict(state, strict=True)
        except RuntimeError as caught:
            raise CheckpointError(f"{folder} does not fit the model: {caught}") from None


def save_checkpoint(
    model: Sequence[Any],
    optimizer: Any,
    step: int,
    config: TrainConfig,
    facts: dict[str, Any],
    shape: LlamaShape,
    proof: dict[str, Tensor] | None,
    tokenizer: Path,
) -> Path:
    """Save weights and optimizer after `step` updates; every rank calls it.

    Args:
        facts: `vocab_size`, `padded_vocab_size`, `tokenizer_sha256`, `inputs` for the manifest.
        proof: tokens, positions and the model's logits there; on one rank, None on the others.
        tokenizer: the model file; it goes along with what lies beside it, so that the checkpoint can be exported alone.

    Returns:
        the checkpoint folder, complete on return.
    """
    root = Path(config.output) / CHECKPOINTS
    final = root / f"iter_{step:07d}"
    temporary = root / f".iter_{step:07d}.tmp"
    if dist.get_rank() == 0:
        for stale in (*root.glob(".iter_*.tmp"), final):  # the first ones are of saves that were cut off
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    state = model_state(model)
    state["optimizer"] = optimizer_state_to_save(optimizer, state)
    state["step"] = step
    # Saving is synchronous here: the engine's own queue would start a server process on every rank,
    # which imports everything again and outlives a rank that is killed.
    filesystem_async._results_queue = queue.SimpleQueue()
    dist_checkpointing.save(state, str(temporary))
    if proof is not None:
        save_file(proof, temporary / PROOF)
    dist.barrier()
    if dist.get_rank() == 0:
        copy_tokenizer(tokenizer, temporary)
        write_checkpoint_manifest(temporary, shape, step=step, precision=config.precision, **facts)
        os.rename(temporary, final)
        for _, old in checkpoint_folders(Path(config.output))[: -config.checkpoint.keep_last]:
            (old / MANIFEST).unlink()  # from here on it is no checkpoint, even if the next line is cut short
            shutil.rmtree(old)
    dist.barrier()
    return final


def resume(model: Sequence[Any], optimizer: Any, output: Path) -> int:
    """Load the newest complete checkpoint of a run, saved in any layout.

    Returns:
        the number of updates already made, 0 when there is no checkpoint.
    """
    complete = checkpoint_folders(output)
    if not complete:
        return 0
    step, folder = complete[-1]
    if read_checkpoint_manifest(folder)["step"] != step:
        raise CheckpointError(f"{folder}/{MANIFEST} names another step than its folder; remove the folder and resume")
    advice = "remove this checkpoint folder and start again: the run goes on from the one before"
    _load_all(model, optimizer, folder, advice)
    return step
