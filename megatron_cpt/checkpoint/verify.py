"""Prove that a checkpoint holds the model of another one, or what was once written; and show what one holds."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.execute import Tally, blocks_of, num_workers
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest
from megatron_cpt.checkpoint.opening import Hints, open_checkpoint
from megatron_cpt.checkpoint.reader import bits, num_bytes, raw_bytes, weights_sha256
from megatron_cpt.checkpoint.runs import STATES, StoredModel
from megatron_cpt.checkpoint.seal import broken_seals
from megatron_cpt.config.manifest import MANIFEST
from megatron_cpt.errors import CheckpointError, VerificationError

Progress = Callable[[int, int], None]
_SHOWN = ("assumed", "step", "tokenizer_sha256", "weights_sha256", "cast", "converted_from", "megatron_cpt")


@dataclass
class _Found:
    """What was seen of a tensor."""

    sha256: str
    problem: str | None
    zero_rows: int


def verify(
    src: str | Path,
    dst: str | Path,
    on_progress: Progress | None = None,
    *,
    workers: int | None = None,
    hints: Hints | None = None,
) -> dict[str, Any]:
    """Compare two checkpoints of any format: the config field by field, every tensor bit for bit.

    Both are read through their own mapping to HF names, so a conversion is checked by its inverse.
    A cast that the destination's manifest states is applied to the source first; any other
    difference of dtype is a failure. NaN and infinity are failures wherever they are, and so is any byte of the
    destination's files that is not as its manifest says.

    Args:
        src: what it was made from.
        dst: what is proved.
        on_progress: called with (bytes done, bytes in all).
        workers: tensors that are compared at once; None: one for each core, eight at most.
        hints: what the source does not say of itself.

    Returns:
        {"equal": True, "tensors", "bytes", "cast", "weights_sha256", "zero_rows": rows of the
        destination that are all zero, by tensor (a fact: many models have unused rows),
        "padding_rows", "files": number of files whose every byte the manifest vouches for}.

    Raises:
        VerificationError: something differs; the message names it.
        CheckpointError: one of the two cannot be read.
    """
    target = open_checkpoint(dst, with_optimizer=False)
    if (target.folder / MANIFEST).exists():
        read_checkpoint_manifest(target.folder)  # whatever is wrong with it
    if any(name.split("/", 1)[0] in STATES for name in target.stated.get("tensors", ())):
        target = open_checkpoint(dst, with_optimizer=True)
    source = open_checkpoint(src, with_optimizer=bool(target.state_names()), hints=hints)
    _compare_configs(source, target)
    names = [*target.names(), *(name for name in target.state_names() if name in source.tensors)]
    total = sum(num_bytes(target.shape(name), target.dtype(name)) for name in names)
    tally, cast = Tally(total, on_progress), target.stated.get("cast")
    with ThreadPoolExecutor(num_workers(workers)) as pool:
        found = dict(zip(names, pool.map(lambda name: _compare(source, target, name, cast, tally), names), strict=True))
    failures = [f"{name} {seen.problem}" for name, seen in found.items() if seen.problem is not None]
    if failures:
        more = f" (and {len(failures) - 3} more tensors)" if len(failures) > 3 else ""
        raise VerificationError(f"{dst} is not the model of {src}: {'; '.join(failures[:3])}{more}; convert it again")
    digests = {name: seen.sha256 for name, seen in found.items()}
    _check_recorded(target, digests)
    return {
        "equal": True,
        "tensors": len(names),
        "bytes": total,
        "cast": cast,
        "weights_sha256": _root(target, digests),
        "zero_rows": {name: seen.zero_rows for name, seen in found.items() if seen.zero_rows},
        "padding_rows": _check_padding(target),
        "files": len(target.stated.get("files", ())),
    }


def show(path: str | Path, hints: Hints | None = None) -> dict[str, Any]:
    """What a checkpoint holds, from its headers and its manifest alone."""
    model = open_checkpoint(path, hints=hints)
    sizes: Counter[str] = Counter()
    for name in model.names():
        sizes[str(model.dtype(name)).removeprefix("torch.")] += num_bytes(model.shape(name), model.dtype(name))
    facts: dict[str, Any] = {
        "path": str(model.folder),
        "format": model.format,
        "parameters": sum(num_bytes(model.shape(name), torch.uint8) for name in model.names()),
        "tensors": len(model.names()),
        "files": len({run.file for placed in model.tensors.values() for run in placed.runs}),
        "bytes": sum(sizes.values()),
        "dtype": sizes.most_common(1)[0][0],
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "layout": model.layout,
        "shape": model.llama.model_dump(),
    }
    return facts | {key: model.stated[key] for key in _SHOWN if model.stated.get(key) is not None}


def _compare_configs(source: StoredModel, target: StoredModel) -> None:
    ours = source.llama.model_dump() | {"vocab_size": source.vocab_size}
    theirs = target.llama.model_dump() | {"vocab_size": target.vocab_size}
    tokenizers = [model.stated.get("tokenizer_sha256") for model in (source, target)]
    if all(tokenizers):
        ours["tokenizer_sha256"], theirs["tokenizer_sha256"] = tokenizers
    different = [f"{key} is {theirs[key]!r}, not {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
    if different:
        raise VerificationError(f"{target.folder} is not the model of {source.folder}: {'; '.join(different)}")


def _compare(source: StoredModel, target: StoredModel, name: str, cast: str | None, tally: Tally) -> _Found:
    """Stream one tensor of both."""
    dtype = target.dtype(name)
    if source.shape(name) != target.shape(name):
        return _Found("", f"has shape {target.shape(name)}, not {source.shape(name)}", 0)
    if dtype != source.dtype(name) and f"torch.{cast}" != str(dtype):
        return _Found("", f"is {dtype} instead of {source.dtype(name)}, and the manifest states no such cast", 0)
    digest, different, zeros, finite = hashlib.sha256(), 0, 0, True
    for start, theirs in blocks_of(target, name):
        try:
            target.check_copies(name, start, theirs)
        except CheckpointError as caught:
            return _Found("", f"has two versions ({caught})", 0)
        digest.update(raw_bytes(theirs))
        ours = source.read_rows(name, start, start + len(theirs)).to(dtype)
        if not torch.equal(bits(ours), bits(theirs)):
            different += int((bits(ours) != bits(theirs)).sum())
        finite = finite and bool(torch.isfinite(theirs).all())
        if theirs.dim() == 2:
            zeros += int((~theirs.any(dim=1)).sum())
        tally.add(num_bytes(tuple(theirs.shape), dtype))
    problem = None if finite else "holds NaN or infinity"
    if different:
        problem = f"differs in {different} of {num_bytes(target.shape(name), torch.uint8)} elements"
    return _Found(digest.hexdigest(), problem, zeros)


def _root(target: StoredModel, digests: dict[str, str]) -> str:
    named = {
        name: (str(target.dtype(name)).removeprefix("torch."), target.shape(name), digests[name])
        for name in target.names()
    }
    return weights_sha256(named)


def _check_recorded(target: StoredModel, digests: dict[str, str]) -> None:
    """Raise VerificationError unless the destination is byte for byte what its manifest describes."""
    recorded = target.stated.get("tensors") or {}
    changed = [name for name, sha256 in digests.items() if recorded.get(name, sha256) != sha256]
    wrong = [f"{name} does not have its recorded hash" for name in changed]
    if not wrong and target.stated.get("weights_sha256") not in (None, _root(target, digests)):
        wrong = ["its weights do not have the hash of its manifest"]
    wrong += broken_seals(target)
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise VerificationError(
            f"{target.folder} changed after it was written: {'; '.join(wrong[:3])}{more}; convert it again, or restore "
            "the file"
        )


def _check_padding(target: StoredModel) -> int:
    """Number of padding rows of the vocabulary tables; they too have to be finite."""
    for name in target.padding:
        if not torch.isfinite(target.read_padding(name)).all():
            raise VerificationError(
                f"{target.folder}: the padding rows of {name} hold NaN or infinity; convert it again"
            )
    return target.padded_vocab_size - target.vocab_size
