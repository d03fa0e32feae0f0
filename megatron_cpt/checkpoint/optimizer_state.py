"""The state of Megatron's optimizers: which parameter each number belongs to, and the settings of parameter groups.

Neither form of a legacy checkpoint names what it holds. The plain optimizer numbers the parameters group by group;
the distributed one lays those of a model chunk out in one buffer, the last first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_cpt.checkpoint.llama import MAX_SIZE, STORED_EMBEDDING, STORED_HEAD
from megatron_cpt.errors import CheckpointError

LEAVE_BEHIND = "leave it behind with --no-optimizer"
VOCABULARY = (STORED_EMBEDDING, STORED_HEAD)
ALIGNMENT = 64  # elements; where a parameter may begin in a buffer
_NEEDED: dict[str, Any] = {"wd_mult": None, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
_SETTINGS = (
    "default_config",
    "max_lr",
    "min_lr",
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "bias_correction",
    "start_wd",
    "end_wd",
    "optimizer",
)
_RATES = ("max_lr", "min_lr", "lr", "weight_decay")  # what a scheduler is made of
_PROGRESS = ("consumed_train_samples", "consumed_valid_samples", "skipped_train_samples", "global_batch_size")
Shapes = Mapping[str, tuple[int, ...]]  # of the parameters of a model chunk, in the order of its modules


@dataclass(frozen=True)
class OptimizerFacts:
    """What there is of an optimizer beside its tensors.

    Attributes:
        step: number of updates made.
        groups: settings of the parameter groups: matrices, the vocabulary where it has its own, norms.
        scheduler: of the learning rate, as Megatron keeps it; empty where it is not known.
        progress: of the data, by the names of Megatron's arguments.
    """

    step: int
    groups: tuple[Mapping[str, Any], ...]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, int] = field(default_factory=dict)

    def stepped_groups(self) -> list[dict[str, Any]]:
        """The groups as the optimizers of apex and Transformer Engine keep them: the step is one of the settings."""
        return [{**group, "step": self.step} for group in self.groups]

    def scheduler_state(self) -> dict[str, Any]:
        """What Megatron's scheduler has to find; where nothing is known, for `--override-opt_param-scheduler`."""
        if self.scheduler:
            return dict(self.scheduler)
        first = self.groups[0]
        decay = float(first.get("weight_decay") or 0.0)
        seen = self.progress.get("consumed_train_samples", 0)
        return {
            "max_lr": first.get("max_lr") or first.get("lr"),
            "lr_warmup_steps": 0,
            "num_steps": seen,
            "lr_decay_style": "constant",
            "lr_decay_steps": max(seen, 1),
            "min_lr": first.get("min_lr") or 0.0,
            "start_wd": decay,
            "end_wd": decay,
            "wd_incr_style": "constant",
            "wd_incr_steps": 0,
        }


def facts_of(
    groups: Iterable[Mapping[str, Any]],
    steps: Iterable[float],
    scheduler: Any,
    args: Mapping[str, Any] | None,
    where: str,
) -> OptimizerFacts:
    """Facts from the parameter groups of all ranks.

    Raises:
        CheckpointError: no step is known or several are, or the groups are not those of a Llama.
    """
    groups = list(groups)
    found = set(map(float, steps))
    if len(found) != 1 or not 0 <= min(found) <= MAX_SIZE:
        told = ", ".join(f"{step:g}" for step in sorted(found)) or "nothing"
        raise CheckpointError(
            f"{where}: the optimizer says {told} of the number of its updates, expected one number; {LEAVE_BEHIND}"
        )
    kinds: dict[int, Mapping[str, Any]] = {}
    apart = vocabulary_group(groups, where)
    for group in groups:
        rank = 2 if _setting(group, "wd_mult", where) == 0 else int(_is_apart(group) and apart)
        kinds.setdefault(rank, {key: _setting(group, key, where) for key in _NEEDED} | _settings(group))
    if 0 not in kinds or 2 not in kinds:
        raise CheckpointError(
            f"{where}: the optimizer has groups for {sorted(kinds)} of 0 (matrices), 1 (vocabulary) and 2 (norms), "
            f"expected matrices and norms; {LEAVE_BEHIND}"
        )
    progress = {key: value for key in _PROGRESS if type(value := (args or {}).get(key)) is int}
    known = scheduler if isinstance(scheduler, Mapping) else {}
    known = {key: value for key, value in known.items() if type(key) is str and _is_plain(value)}
    return OptimizerFacts(int(found.pop()), tuple(kinds[kind] for kind in sorted(kinds)), known, progress)


def vocabulary_group(groups: Iterable[Mapping[str, Any]], where: str) -> bool:
    """Whether embedding and head are a group with a learning rate of their own, beside the other matrices."""
    matrices = [group for group in groups if _setting(group, "wd_mult", where) != 0]
    return any(map(_is_apart, matrices)) and not all(map(_is_apart, matrices))


def _is_apart(group: Mapping[str, Any]) -> bool:
    lr_mult = group.get("lr_mult", group.get("pre_lr_mult", 1.0))
    return bool(group.get("is_decoupled_lr")) or lr_mult != 1.0 or group.get("default_config") is False


def _setting(group: Mapping[str, Any], key: str, where: str) -> Any:
    """A setting under its name, or that which NeMo gives it."""
    value = group.get(key, group.get(f"pre_{key}", _NEEDED[key]))
    if value is None or not _is_plain(value):
        raise CheckpointError(
            f"{where}: a group of the optimizer's parameters has no {key}, expected that of Megatron's Adam; "
            f"{LEAVE_BEHIND}"
        )
    return value


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: group[key] for key in _SETTINGS if key in group and _is_plain(group[key])}
    return {key: value for key, value in known.items() if key not in _RATES or _is_rate(value)}


def _is_rate(value: Any) -> bool:
    return value is None or type(value) in (int, float) and 0 <= value < 1e30


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def nested_groups(value: Any) -> Iterator[Mapping[str, Any]]:
    """Parameter groups of a saved optimizer, however deep optimizers are nested."""
    for groups in nested_values(value, "param_groups"):
        if isinstance(groups, list):
            yield from (group for group in groups if isinstance(group, Mapping))


def nested_values(value: Any, name: str, depth: int = 4) -> Iterator[Any]:
    """What a saved optimizer holds under a name."""
    if isinstance(value, list) and depth:
        for inner in value:
            yield from nested_values(inner, name, depth - 1)
    elif isinstance(value, Mapping) and depth:
        for key, inner in value.items():
            if key == name:
                yield inner
            elif key in ("optimizer", "state") or type(key) is int:
                yield from nested_values(inner, name, depth - 1)


def members(groups: Sequence[Mapping[str, Any]], chunks: Sequence[Shapes], where: str) -> list[list[tuple[int, str]]]:
    """For each group, chunk and name of its parameters in order: norms do not decay, and they alone.

    Raises:
        CheckpointError: the groups are not (matrices[, vocabulary], norms).
    """
    matrices = [group for group in groups if _setting(group, "wd_mult", where) != 0]
    apart = vocabulary_group(groups, where)
    if len(groups) - len(matrices) > 1 or len(matrices) > 1 + apart:
        raise CheckpointError(
            f"{where}: the optimizer has {len(matrices)} groups of parameters that decay and "
            f"{len(groups) - len(matrices)} of others, expected matrices, perhaps the vocabulary, and norms; "
            f"{LEAVE_BEHIND}"
        )
    found = []
    for group in groups:
        norms, vocabulary = _setting(group, "wd_mult", where) == 0, apart and _is_apart(group)
        found.append(
            [
                (number, name)
                for number, chunk in enumerate(chunks)
                for name, shape in chunk.items()
                if (len(shape) == 1) == norms and (norms or not apart or (name in VOCABULARY) == vocabulary)
            ]
        )
    return found


def buffer_layout(
    parameters: Sequence[tuple[str, int]], bucket_size: int | None, shared: str | None
) -> tuple[dict[str, int], int]:
    """Where each parameter begins in the buffer of a model chunk, and the buffer's size; in elements.

    Args:
        parameters: name and number of elements, in the order of the modules; the buffer has the last first.
        bucket_size: at which a bucket is closed; None: there is one. The padding at its end is not stored, but the
            next begins aligned.
        shared: a tied table that lies on two stages, behind which a bucket is closed.
    """
    starts: dict[str, int] = {}
    base = here = 0  # of the bucket, and in it
    for name, count in reversed(parameters):
        here = _aligned(here)
        starts[name] = base + here
        here += count
        if name == shared or (bucket_size is not None and here >= bucket_size):
            base, here = base + here, 0
    return starts, base + here


def starts_in_buckets(parameters: Sequence[tuple[str, int]], sizes: Sequence[int]) -> dict[str, int] | None:
    """As `buffer_layout`, from the sizes of the buckets; None where the parameters do not fill them."""
    starts: dict[str, int] = {}
    base = here = bucket = 0
    for name, count in reversed(parameters):
        here = _aligned(here)
        if here and here >= sizes[bucket]:
            base, here, bucket = base + sizes[bucket], 0, bucket + 1
        if bucket == len(sizes):
            return None
        starts[name] = base + here
        here += count
        if here == sizes[bucket] and bucket + 1 < len(sizes):
            base, here, bucket = base + here, 0, bucket + 1
    return starts if base + here == sum(sizes) else None


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT


def bucket_sizes(args: Mapping[str, Any] | None, parameters: int) -> list[int | None]:
    """Sizes at which a run may have closed the buckets of its first model chunk, the likeliest first.

    Args:
        args: of the run.
        parameters: elements that the rank holds.
    """
    args = args or {}
    ranks = int(args.get("data_parallel_size") or 1) * int(args.get("context_parallel_size") or 1)
    size = int(args.get("ddp_bucket_size") or max(40_000_000, 1_000_000 * ranks))
    if args.get("ddp_num_buckets"):
        size = parameters // int(args["ddp_num_buckets"])
    return [size, None] if args.get("overlap_grad_reduce") else [None, size]
