"""Hugging Face folders written tensor by tensor as the tensors are made, for those that are not copied from files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint.files import PARTIAL, require_space, write_at
from megatron_cpt.checkpoint.hf_config import CONFIG
from megatron_cpt.checkpoint.huggingface import (
    MAX_SHARD_BYTES,
    shard_header,
    shard_names,
    split_into_shards,
    write_descriptions,
)
from megatron_cpt.checkpoint.reader import WeightsDigest, num_bytes
from megatron_cpt.errors import CheckpointError

Entry = tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor | Iterable[Tensor]]]


def write_hf(
    folder: str | Path,
    entries: Iterable[Entry],
    config: dict[str, Any],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write weights, config.json and generation_config.json of a Hugging Face model, tensor by tensor.

    Files are written under temporary names and renamed once all are complete; the index and then
    config.json come last, so an unfinished folder cannot be loaded.

    Args:
        folder: destination; may exist (with tokenizer files, say) but must not hold a model.
        entries: (name, shape, dtype, thunk) in the order of writing. The thunk is called when the
            tensor's turn comes and returns it, or an iterable of its row blocks in order.
        config: content of config.json.
        max_shard_bytes: largest weights file; a single tensor may exceed it.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        {"files": number of weight files, "bytes": bytes of weights, "weights_sha256": digest}.

    Raises:
        CheckpointError: the folder holds a model, the disk is too small, a name appears twice, or a
            thunk returns another shape or dtype than it announced.
    """
    folder, entries = Path(folder), list(entries)
    shards = _plan_shards(folder, entries, max_shard_bytes)
    total = sum(num_bytes(shape, dtype) for _, shape, dtype, _ in entries)
    require_space(folder, total)
    folder.mkdir(parents=True, exist_ok=True)
    digest, done, weight_map = WeightsDigest(), 0, {}
    names = shard_names(len(shards))
    try:
        for file_name, shard in zip(names, shards, strict=True):
            for name, written in write_shard(folder / (file_name + PARTIAL), shard, digest):
                done += written
                weight_map[name] = file_name
                if on_progress is not None:
                    on_progress(done, total)
        for file_name in names:
            os.replace(folder / (file_name + PARTIAL), folder / file_name)
    finally:
        for file_name in names:
            (folder / (file_name + PARTIAL)).unlink(missing_ok=True)
    write_descriptions(folder, config, weight_map if len(shards) > 1 else None, total)
    return {"files": len(shards), "bytes": total, "weights_sha256": digest.hexdigest()}


def _plan_shards(folder: Path, entries: list[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    """Entries in order, cut into files of at most `max_shard_bytes`."""
    held = [path.name for path in folder.glob("*") if path.name == CONFIG or path.suffix == ".safetensors"]
    if held:
        raise CheckpointError(
            f"{folder} already holds a model ({held[0]}); choose another destination or remove it first"
        )
    if not entries or len({entry[0] for entry in entries}) != len(entries):
        raise CheckpointError(f"{folder}: nothing to write, or a tensor's name appears twice")
    return split_into_shards(entries, [num_bytes(entry[1], entry[2]) for entry in entries], max_shard_bytes)


def write_shard(path: Path, shard: list[Entry], digest: WeightsDigest) -> Iterator[tuple[str, int]]:
    """Write one safetensors file, each block hashed as it is written; yields (name, bytes) after each tensor."""
    raw, _ = shard_header([(name, shape, dtype) for name, shape, dtype, _ in shard])
    with open(path, "wb", buffering=0) as file, ThreadPoolExecutor(1) as beside:
        file.write(raw)
        for name, shape, dtype, thunk in shard:
            made = thunk()
            written = 0
            for block in [made] if isinstance(made, Tensor) else made:
                if block.dtype != dtype or tuple(block.shape[1:]) != tuple(shape[1:]):
                    raise CheckpointError(
                        f"{name}: got {tuple(block.shape)} {block.dtype}, announced {tuple(shape)} {dtype}"
                    )
                hashed = beside.submit(digest.update, name, dtype, shape, block)
                written += write_at(file, block)
                hashed.result()  # before the next block: they come in order, and one is in memory at a time
            if written != num_bytes(shape, dtype):
                raise CheckpointError(f"{name}: got {written} bytes, announced {num_bytes(shape, dtype)}")
            yield name, written
        os.fsync(file.fileno())
