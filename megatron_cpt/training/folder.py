"""A run folder: whose it is, who is at work in it, and which checkpoints in it are complete.

It holds `run.json` (the run's identity), `initial/` (weights brought into form), `checkpoints/iter_<step>/`,
`metrics.jsonl`, `logs/` and `.lock`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint.fingerprint import fingerprint
from megatron_cpt.config.manifest import MANIFEST, read_json, write_json_atomic
from megatron_cpt.config.schema import TrainConfig
from megatron_cpt.data.lineage import what_changed
from megatron_cpt.errors import ConfigError, TrainingError
from megatron_cpt.training.inputs import Inputs, is_given_in_form

CHECKPOINTS = "checkpoints"
INITIAL = "initial"
RECORD = "run.json"
ORDER = "content.data"  # key of the order's description in it
OWN_FILES = {"logs", INITIAL}  # beside hidden ones, what may be there before a run has begun
# What a resumed run may change: it alters speed and what is shown, never the numbers' meaning.
FREE_FIELDS = ("output", "parallel", "kernels", "checkpoint", "eval_interval_steps", "log_interval_steps")


def run_identity(config: TrainConfig, inputs: Inputs) -> dict[str, Any]:
    """Everything that decides the numbers of a run, as flat `section.field` -> value.

    Tokenizer, initial weights and data stand in it by content, so that they may be moved; the order of the data
    as the description of its plan, whose part that was not yet read may change.
    """
    by_content = {"tokenizer", "initial_checkpoint", "data"}
    document = config.model_dump(mode="json", exclude={*FREE_FIELDS, *by_content, "shape"})
    document["batch"].pop("micro_batch_size")
    document["shape"] = inputs.shape.model_dump(mode="json")
    given = config.initial_checkpoint
    document["content"] = {
        "tokenizer": inputs.tokenizer.sha256,
        "initial_checkpoint": None if given is None else fingerprint(given),
    }
    return {**_flatten(document), ORDER: inputs.plan.description}


def _flatten(value: Any) -> dict[str, Any]:
    return dict(_leaves(value, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    else:
        yield path, value


def refuse_other_run(output: Path, identity: dict[str, Any]) -> None:
    """Check that `output` is new, or holds the run with this identity; nothing is written.

    A run may have grown: more steps (what is left follows the learning rates of the new length), and another
    order of the samples that it has not yet read.

    Raises:
        ConfigError: the folder holds a run with other settings, or something that is no training run.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; choose another output folder")
    if not (output / RECORD).exists():
        names = sorted(path.name for path in output.iterdir()) if output.exists() else []
        foreign = [name for name in names if name not in OWN_FILES and not name.startswith(".")]
        if foreign:
            raise ConfigError(
                f"{output} is not empty ({', '.join(foreign[:3])}) and holds no training run; "
                "choose another output folder"
            )
        return
    earlier = read_json(output / RECORD, ConfigError)
    if not isinstance(earlier, dict) or "train_steps" not in earlier:
        raise ConfigError(f"{output / RECORD} is not of a training run; choose another output folder")
    changed = [key for key in {**earlier, **identity} if earlier.get(key) != identity.get(key) and key != ORDER]
    if "train_steps" in changed and earlier["train_steps"] < identity["train_steps"]:
        changed.remove("train_steps")
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{output} holds a run with other settings: {key} was {earlier.get(key)!r} and is now {identity.get(key)!r}"
            + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
            + "; restore the setting to resume, or choose another output folder"
        )
    _refuse_other_past(output, earlier.get(ORDER), identity)


def _refuse_other_past(output: Path, earlier: Any, identity: dict[str, Any]) -> None:
    """Check that the samples that the newest checkpoint has read are the first ones of this plan too."""
    complete = checkpoint_folders(output)
    steps = complete[-1][0] if complete else 0
    if not isinstance(earlier, dict):
        raise ConfigError(
            f"{output} holds a run whose data was ordered by another version of this tool; finish it with that one, "
            "or choose another output folder"
        )
    samples = steps * identity["batch.global_batch_size"]
    if reason := what_changed(earlier, identity[ORDER], samples):
        raise ConfigError(
            f"{output} holds a run that has read {samples:,} samples in {steps} steps, and this configuration "
            f"changes which ones these were: {reason}; restore it to resume (later stages may change), or choose "
            "another output folder"
        )


def claim_run_folder(output: Path, identity: dict[str, Any]) -> None:
    """Begin a run in `output`, or continue the one that is there; raises as `refuse_other_run` does."""
    refuse_other_run(output, identity)
    if not (output / RECORD).exists() or read_json(output / RECORD, ConfigError) != identity:
        write_json_atomic(output / RECORD, identity)


def initial_folder(config: TrainConfig) -> Path:
    """The torch_dist folder that training starts from: the one given, or the one `job.prepare` makes."""
    if config.initial_checkpoint is not None and is_given_in_form(config):
        return Path(config.initial_checkpoint)
    return Path(config.output) / INITIAL


def checkpoint_folders(output: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    found = []
    for path in (output / CHECKPOINTS).glob("iter_*"):
        if (match := re.fullmatch(r"iter_(\d{7,})", path.name)) and (path / MANIFEST).exists():
            found.append((int(match.group(1)), path))
    return sorted(found)


def last_checkpoint(output: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        TrainingError: there is none.
    """
    complete = checkpoint_folders(output)
    if not complete:
        raise TrainingError(f"{output} holds no complete checkpoint; train it first")
    return complete[-1][1]
