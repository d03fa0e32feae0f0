"""The state of a training run: saved whole or not at all, resumed only where it belongs.

A run folder holds `run.json` (its identity), `checkpoints/iter_<step>/` and `metrics.jsonl`. A
checkpoint is written under a temporary name, its manifest last, and then renamed: a folder
`iter_*` is complete. The state of the data is one integer, the step.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import save_file
from torch import Tensor

from megatron_cpt.checkpoint import read_checkpoint_manifest, write_checkpoint_manifest
from megatron_cpt.config.manifest import MANIFEST, read_json, write_json_atomic
from megatron_cpt.config.schema import LlamaShape, TrainConfig
from megatron_cpt.errors import CheckpointError, ConfigError, InputError

CHECKPOINTS = "checkpoints"
PROOF = "proof.safetensors"
# What a resumed run may change: it alters speed and what is shown, never the numbers' meaning.
FREE_FIELDS = ("output", "parallel", "kernels", "checkpoint", "eval_interval_steps", "log_interval_steps")
OPTIMIZER_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def run_identity(config: TrainConfig, plan_hash: str) -> dict[str, Any]:
    """Everything that decides the numbers of a run, as flat `section.field` -> value."""
    document = config.model_dump(mode="json", exclude=set(FREE_FIELDS))
    document["batch"].pop("micro_batch_size")
    document["data"] = {"order": plan_hash}
    return dict(_flatten(document))


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def claim_run_folder(output: Path, identity: dict[str, Any]) -> None:
    """Begin a run in `output`, or continue the one that is there when it is the same run.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """
    record = output / "run.json"
    if not record.exists():
        write_json_atomic(record, identity)
        return
    earlier = read_json(record, InputError)
    changed = [key for key in {**earlier, **identity} if earlier.get(key) != identity.get(key)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{output} holds a run with other settings: {key} was {earlier.get(key)!r} and is now {identity.get(key)!r}"
            + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
            + "; restore the setting to resume, or choose another output folder"
        )


def checkpoint_folders(output: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    found = []
    for path in (output / CHECKPOINTS).glob("iter_*"):
        if (match := re.fullmatch(r"iter_(\d{7,})", path.name)) and (path / MANIFEST).exists():
            found.append((int(match.group(1)), path))
    return sorted(found)


def model_state(model: Sequence[Any]) -> dict[str, Any]:
    """Sharded state of the model chunks, under names that do not depend on the layout."""
    return {f"model{index}": chunk.module.sharded_state_dict() for index, chunk in enumerate(model)}


def load_weights(model: Sequence[Any], optimizer: Any, folder: Path) -> None:
    """Load the weights alone from a torch_dist folder; optimizer masters follow them."""
    loaded = dist_checkpointing.load(model_state(model), str(folder))
    _set_weights(model, loaded, folder)
    optimizer.reload_model_params()


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
) -> Path:
    """Save weights and optimizer after `step` updates; every rank calls it.

    Args:
        facts: `vocab_size`, `padded_vocab_size`, `tokenizer_sha256`, `inputs` for the manifest.
        proof: tokens, positions and the model's logits there; on one rank, None on the others.

    Returns:
        the checkpoint folder, complete on return.
    """
    root = Path(config.output) / CHECKPOINTS
    final = root / f"iter_{step:07d}"
    temporary = root / f".iter_{step:07d}.tmp"
    if dist.get_rank() == 0:
        for stale in (temporary, final):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    state = model_state(model)
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=OPTIMIZER_METADATA)
    state["step"] = step
    dist_checkpointing.save(state, str(temporary))
    if proof is not None:
        save_file(proof, temporary / PROOF)
    dist.barrier()
    if dist.get_rank() == 0:
        write_checkpoint_manifest(temporary, shape, step=step, precision=config.precision, **facts)
        os.rename(temporary, final)
        for _, old in checkpoint_folders(Path(config.output))[: -config.checkpoint.keep_last]:
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
    state = model_state(model)
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=True, metadata=OPTIMIZER_METADATA)
    loaded = dist_checkpointing.load(state, str(folder))
    _set_weights(model, loaded, folder)
    optimizer.load_state_dict(loaded["optimizer"])
    return step
