"""Carry a Hugging Face model over to its new vocabulary, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint import open_hf, write_checkpoint_manifest, write_hf
from megatron_cpt.checkpoint.hf_config import CONFIG
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.checkpoint.tokenizer_files import copy_tokenizer, recorded_tokenizer
from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.errors import CheckpointError, TokenizerError
from megatron_cpt.surgery.matrix import MatrixPlan, RowMaker
from megatron_cpt.surgery.plan import SurgeryPlan
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

# More unused rows than any padding leaves (a multiple of 128 for 8 tensor-parallel ranks) look like another vocabulary.
_MOST_PADDING = 1024


def apply_surgery(
    plan: SurgeryPlan,
    source_hf: str | Path,
    destination_hf: str | Path,
    tokenizer_folder: str | Path,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a Hugging Face model whose embedding and head have the rows of a plan.

    Every other tensor is carried over bit for bit. A tied model has one matrix and keeps one. Rows of the
    source beyond the old vocabulary's true size are padding: they are not used and not carried over. One
    old matrix and one block of new rows are in memory at a time.

    Args:
        plan: how the rows are made.
        source_hf: folder of the base model (config.json and safetensors).
        destination_hf: a new or empty folder; it appears when it is complete.
        tokenizer_folder: the new tokenizer, whose files go along.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        Facts: sizes, rows of each origin, padding rows left out, bytes and digest of the weights.

    Raises:
        CheckpointError: the model is not a plain Llama, the plan was made for another vocabulary than the
            model's, or the methods differ while the model has one tied matrix.
        TokenizerError: `tokenizer_folder` is not the plan's new tokenizer.
    """
    source_hf, destination_hf, tokenizer_folder = Path(source_hf), Path(destination_hf), Path(tokenizer_folder)
    check_free(destination_hf, CheckpointError)
    reader = open_hf(source_hf)
    tokenizer = _new_tokenizer(plan, tokenizer_folder)
    padding = _check_fits(plan, source_hf, reader.vocab_size)
    tied = reader.llama.tied_embeddings
    if tied and not _same(plan.embedding, plan.head):
        raise CheckpointError(
            f"{source_hf} ties its head to its embedding, yet the plan makes them by {dict(plan.embedding.method)} and "
            f"{dict(plan.head.method)}: plan with one method for both"
        )
    mixes = {EMBEDDING: plan.embedding, HEAD: plan.head}
    entries = []
    for name in reader.names():
        shape, read = reader.shape(name), partial(reader.read, name)
        if name in mixes:
            shape, read = (plan.new_size, *shape[1:]), partial(_remade, mixes[name], read)
        entries.append((name, shape, reader.dtype(name), read))
    config = _adapted_config(reader.config, plan, tokenizer)
    with new_folder(destination_hf, CheckpointError) as folder:
        written = write_hf(folder, entries, config, on_progress=on_progress)
        copy_tokenizer(tokenizer_folder, folder)
        facts = {**plan.facts(), "tied": tied, "padding_rows_left_out": padding}
        write_checkpoint_manifest(
            folder,
            reader.llama,
            plan.new_size,
            plan.new_size,
            plan.new_sha256,
            {"old_tokenizer": plan.old_sha256, "config.json": sha256_file(source_hf / CONFIG)},
            format="hf",
            surgery=facts,
            weights_sha256=written["weights_sha256"],
        )
    return {"source": str(source_hf), "destination": str(destination_hf), **facts, **written}


def _remade(matrix: MatrixPlan, read: Callable[[], Tensor]) -> Any:
    """The blocks of a remade matrix; the old one is read when its turn comes."""
    return RowMaker(matrix, read()).blocks()


def _same(left: MatrixPlan, right: MatrixPlan) -> bool:
    ours, theirs = left.tensors(), right.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[part], theirs[part]) for part in ours)


def _new_tokenizer(plan: SurgeryPlan, folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    if tokenizer.sha256 != plan.new_sha256:
        raise TokenizerError(
            f"{folder} is not the tokenizer the plan was made for (got {tokenizer.sha256[:12]}, {tokenizer.vocab_size} "
            f"ids; expected {plan.new_sha256[:12]}, {plan.new_size} ids): give the right folder or plan again"
        )
    return tokenizer


def _check_fits(plan: SurgeryPlan, source: Path, vocab_size: int) -> int:
    """Check that the plan's old vocabulary is the model's; returns the number of padding rows."""
    recorded = recorded_tokenizer(source)
    if recorded is not None and recorded != plan.old_sha256:
        raise CheckpointError(
            f"the tokenizer of {source} ({recorded[:12]}) is not the one the plan starts from "
            f"({plan.old_sha256[:12]}): plan again with this model's tokenizer"
        )
    padding = vocab_size - plan.old_size
    if padding < 0 or (recorded is None and padding >= _MOST_PADDING):
        raise CheckpointError(
            f"the embedding of {source} has {vocab_size} rows, the plan starts from a vocabulary of {plan.old_size}: "
            "plan again with this model's tokenizer"
        )
    return padding


def _adapted_config(config: dict[str, Any], plan: SurgeryPlan, tokenizer: Tokenizer) -> dict[str, Any]:
    """The source's config.json with the new vocabulary's size and ids."""
    # New pieces may be copies too, of an old piece that the old tokenizer reads them as; they are not that piece.
    new_ids = {old: new for new, old in plan.kept().items()}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [new_ids[id] for id in value if id in new_ids] or None
        return new_ids.get(value)

    adapted = {**config, "vocab_size": plan.new_size}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(key) is not None:
            adapted[key] = moved(config[key])
    if tokenizer.bos_id is not None:
        adapted["bos_token_id"] = tokenizer.bos_id
    eos = adapted.get("eos_token_id")
    if tokenizer.eos_id is not None and not (isinstance(eos, list) and tokenizer.eos_id in eos):
        adapted["eos_token_id"] = tokenizer.eos_id
    return adapted
