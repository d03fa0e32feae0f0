"""What of an optimizer's state goes along in a conversion, and which of its weights are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from megatron_cpt.checkpoint.layout import Target
from megatron_cpt.checkpoint.runs import MASTER, STATES, Placed, StoredModel
from megatron_cpt.errors import CheckpointError

WITH_STATE = ("torch_dist", "mp_rank")
FORMS = ("distributed", "plain")


def wants_state(target: Target, optimizer: bool, masters: bool) -> bool:
    """Whether the state of the source's optimizer has to be found."""
    return masters or (optimizer and target.format in WITH_STATE)


def masters_as_weights(source: StoredModel) -> StoredModel:
    """The model with the optimizer's float32 masters in the place of its weights.

    They are still proven to round to the weights.

    Raises:
        CheckpointError: there are none.
    """
    masters = {name: source.tensors.get(f"{MASTER}/{name}") for name in source.names()}
    if None in masters.values():
        raise CheckpointError(
            f"{source.folder} holds no float32 masters beside its weights; leave out --masters, or give a checkpoint "
            "with the state of an optimizer"
        )
    weights = {name: source.tensors[name] for name in masters}

    def taken(table: Mapping[str, Any]) -> dict[str, Any]:
        mine = {name: table[f"{MASTER}/{name}"] for name in masters if f"{MASTER}/{name}" in table}
        return {**{name: value for name, value in table.items() if name not in masters}, **mine}

    return replace(
        source,
        tensors=taken(source.tensors),
        padding=taken(source.padding),
        copies=taken(source.copies),
        rounded={**weights, **{f"{MASTER}/{name}": placed for name, placed in weights.items()}},
    )


def carried_state(
    source: StoredModel, target: Target, dtypes: Mapping[str, torch.dtype], optimizer: bool
) -> tuple[StoredModel, dict[str, torch.dtype], dict[str, Any]]:
    """What of the optimizer's state is written.

    Args:
        source: opened with its optimizer where that is wanted.
        target: what is written.
        dtypes: of the weights that are written.
        optimizer: whether the state goes along where it can.

    Returns:
        the source, with masters where the target asks for some and the weights are float32 themselves; the dtypes of
        the state's tensors by name; and facts for the manifest.

    Raises:
        CheckpointError: the weights would be rounded otherwise than the optimizer rounds them.
    """
    if not source.holds_optimizer:
        return source, {}, {}
    facts = source.optimizer
    if facts is None or not optimizer or target.format not in WITH_STATE:
        return source, {}, {"optimizer": "left behind"}
    if target.optimizer_form not in FORMS:
        raise CheckpointError(f"got optimizer form {target.optimizer_form!r}, expected one of {', '.join(FORMS)}")
    for name, dtype in dtypes.items():
        if name not in source.rounded and dtype != source.dtype(name):
            raise CheckpointError(
                f"{source.folder}: {name} would be cast from {source.dtype(name)} to {dtype}, and the optimizer's "
                "state is that of the weights as they are; add --masters (what is cast are then its float32 masters), "
                "or leave the state behind with --no-optimizer"
            )
    if target.format == "mp_rank" and len(set(dtypes.values())) > 1:
        raise CheckpointError(
            f"{source.folder}: its weights are {', '.join(sorted(map(str, set(dtypes.values()))))}, and Megatron's "
            "optimizers keep each dtype apart; state one dtype with --dtype and --masters, or add --no-optimizer"
        )
    plain = target.format == "mp_rank" and target.optimizer_form == "plain"
    wide = all(dtype == torch.float32 for dtype in dtypes.values())
    states = STATES[1:] if plain and wide else STATES
    tensors: dict[str, Placed] = dict(source.tensors)
    copies, padding = dict(source.copies), dict(source.padding)
    for name in source.names():
        master = f"{MASTER}/{name}"
        if master not in tensors and source.dtype(name) == torch.float32:  # a run in float32 keeps no others
            tensors[master] = tensors[name]
            copies |= {master: copies[name]} if name in copies else {}
            padding |= {master: padding[name]} if name in padding else {}
    names = [f"{state}/{name}" for state in states for name in source.names()]
    if missing := [name for name in names if name not in tensors]:
        raise CheckpointError(
            f"{source.folder}: the optimizer's state lacks {missing[0]} (and {len(missing) - 1} more); it is "
            "incomplete, leave it behind with --no-optimizer"
        )
    source = replace(source, tensors=tensors, copies=copies, padding=padding)
    told = {"optimizer": "carried", "step": source.stated.get("step", facts.step)}
    return source, dict.fromkeys(names, torch.float32), told
