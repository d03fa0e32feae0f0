"""Prove that a checkpoint holds the model of another one, or what was once written; and show what one holds."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.checkpoint.carried_state import masters_as_weights
from megatron_cpt.checkpoint.described import UNKNOWN_VOCAB, Hints, check_hints
from megatron_cpt.checkpoint.execute import Tally, blocks_of, num_workers
from megatron_cpt.checkpoint.files import new_tensor
from megatron_cpt.checkpoint.logits import check_logits
from megatron_cpt.checkpoint.opening import newest_checkpoint, open_checkpoint
from megatron_cpt.checkpoint.reader import bits, num_bytes, raw_bytes, weights_sha256
from megatron_cpt.checkpoint.runs import STATES, StoredModel, total_bytes
from megatron_cpt.checkpoint.seal import broken_seals, check_manifest, unlisted_files
from megatron_cpt.errors import CheckpointError, VerificationError

Progress = Callable[[int, int], None]
_LAYER = re.compile(r"\.\d+\.")
_SHOWN = ("assumed", "step", "tokenizer_sha256", "weights_sha256", "cast", "converted_from", "megatron_cpt")


@dataclass
class _Found:
    """What was seen of a tensor."""

    sha256: str
    problem: str | None = None
    zero_rows: int = 0
    finite: bool = True


def verify(
    src: str | Path,
    dst: str | Path | None = None,
    on_progress: Progress | None = None,
    *,
    logits: bool = False,
    workers: int | None = None,
    hints: Hints | None = None,
) -> dict[str, Any]:
    """Compare two checkpoints of any format: the config field by field, every tensor bit for bit.

    Both are read through their own mapping to HF names, so a conversion is checked by its inverse. A cast that the
    destination's manifest states is applied to the source first; any other difference of dtype is a failure. NaN and
    infinity are failures wherever they are, and so is any byte of the destination's files that is not as its manifest
    says. One checkpoint alone is compared with the hashes of its own manifest.

    Args:
        src: what it was made from; without `dst`: what is proved.
        dst: what is proved.
        on_progress: called with (bytes done, bytes in all).
        logits: compute both in fp32 and compare their logits too, see `logits.compare_logits`.
        workers: tensors that are compared at once; None: two for each core, eight at most.
        hints: what a checkpoint does not say of itself.

    Returns:
        {"equal": True with two checkpoints, "intact": True with one, "tensors" that are so, "unpaired": tensors of an
        optimizer that only what is proved has, read and found to be of its weights, "bytes", "cast", "weights_sha256",
        "zero_rows": rows of what is proved that are all zero, by tensor (a fact: many models have unused rows),
        "padding_rows", "files": number of files whose every byte the manifest vouches for, "unlisted": files beside
        them that no loader looks for,
        "logits": what `compare_logits` gives, where they were asked for}.

    Raises:
        VerificationError: something differs, or is not as the manifest of what is proved says; the message names it.
        CheckpointError: one of the two is none that can be read, or a single one has no hashes to be compared with.
    """
    target = _open(src if dst is None else dst, hints)
    source = None
    if dst is None:
        _require_hashes(target, logits)
    else:
        masters = bool(target.stated.get("masters"))
        source = open_checkpoint(src, with_optimizer=masters or bool(target.state_names()), hints=hints)
        source = masters_as_weights(source) if masters else source
        _compare_configs(source, target)
    _fail_as_changed(target, broken_seals(target))
    names = [*target.names(), *target.state_names()]
    total, cast = total_bytes(target, names), target.stated.get("cast")
    found = _compare_all(source, target, names, Tally(total, on_progress), num_workers(workers))
    if failures := [f"{name} {seen.problem}" for name, seen in found.items() if seen.problem is not None]:
        told = "is damaged" if source is None else f"is not the model of {source.folder}"
        raise VerificationError(f"{target.folder} {told}: {_first(failures, '; ')}; convert it again")
    digests = {name: seen.sha256 for name, seen in found.items()}
    _check_recorded(target, digests)
    _check_finite(source, target, found)
    unpaired = [] if source is None else [name for name in names if name not in source.tensors]
    facts = {
        "intact" if source is None else "equal": True,
        "tensors": len(names) - len(unpaired),
        "unpaired": len(unpaired),
        "bytes": total,
        "cast": cast,
        "weights_sha256": _root(target, digests),
        "zero_rows": {name: seen.zero_rows for name, seen in found.items() if seen.zero_rows},
        "padding_rows": _check_padding(target),
        "files": len(target.stated.get("files", ())),
        "unlisted": unlisted_files(target),
    }
    return facts if source is None or not logits else facts | {"logits": check_logits(source, target)}


def show(path: str | Path, hints: Hints | None = None) -> dict[str, Any]:
    """What a checkpoint holds, from its headers and its manifest alone."""
    model = open_checkpoint(path, hints=replace(hints or Hints(), vocab_known=False))
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
        "vocab_size": None if model.stated.get(UNKNOWN_VOCAB) else model.vocab_size,
        "padded_vocab_size": model.padded_vocab_size,
        "optimizer": model.holds_optimizer,
        "layout": model.layout,
        "shape": model.llama.model_dump(),
        "weights": _kinds(model),
    }
    return facts | {key: model.stated[key] for key in _SHOWN if model.stated.get(key) is not None}


def _kinds(model: StoredModel) -> dict[str, str]:
    """Shape, dtype and number of the tensors of each kind, the same module of all layers being one."""
    kinds: dict[str, Counter[str]] = {}
    for name in model.names():
        told = f"{list(model.shape(name))} {str(model.dtype(name)).removeprefix('torch.')}"
        kinds.setdefault(_LAYER.sub(".*.", name), Counter())[told] += 1
    return {
        kind: ", ".join(told if number == 1 else f"{number} x {told}" for told, number in found.items())
        for kind, found in kinds.items()
    }


def _open(folder: str | Path, hints: Hints | None) -> StoredModel:
    """What is to be proved, with the state of its optimizer where its manifest records that."""
    path = newest_checkpoint(Path(folder))
    try:
        recorded = check_manifest(path)
    except CheckpointError as caught:  # it is there, and no manifest of a checkpoint any more
        raise VerificationError(str(caught)) from caught
    with_optimizer = any(name.split("/", 1)[0] in STATES for name in recorded.get("tensors", ()))
    sealed = "files" in recorded
    try:
        target = open_checkpoint(path, with_optimizer, None if sealed else hints)
    except CheckpointError as caught:
        if sealed:  # it could be read when that was written
            raise VerificationError(str(caught)) from caught
        raise
    if target.folder != path:  # one above it
        check_manifest(target.folder)
    check_hints(hints or Hints(), target.folder, target.llama, target.vocab_size)
    return target


def _require_hashes(target: StoredModel, logits: bool) -> None:
    if logits:
        raise CheckpointError(f"got {target.folder} alone; logits are compared with those of a second checkpoint")
    missing = [name for name in target.names() if name not in target.stated.get("tensors", ())]
    if missing or not target.stated.get("files"):
        raise CheckpointError(
            f"{target.folder} has no manifest that records the hashes of its tensors and files, so nothing can be "
            "proved of it alone; give what it was made from as well: `checkpoint verify SOURCE FOLDER`"
        )


def _compare_configs(source: StoredModel, target: StoredModel) -> None:
    ours = source.llama.model_dump() | {"vocab_size": source.vocab_size}
    theirs = target.llama.model_dump() | {"vocab_size": target.vocab_size}
    tokenizers = [model.stated.get("tokenizer_sha256") for model in (source, target)]
    if all(tokenizers):
        ours["tokenizer_sha256"], theirs["tokenizer_sha256"] = tokenizers
    different = [f"{key} is {theirs[key]!r}, not {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
    if different:
        raise VerificationError(f"{target.folder} is not the model of {source.folder}: {'; '.join(different)}")


def _compare_all(
    source: StoredModel | None, target: StoredModel, names: Sequence[str], tally: Tally, workers: int
) -> dict[str, _Found]:
    """Stream all tensors; the first that cannot be read ends it."""
    largest_first = sorted(names, key=lambda name: -total_bytes(target, [name]))
    with ThreadPoolExecutor(workers) as pool:
        futures = {name: pool.submit(_compare, source, target, name, tally) for name in largest_first}
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return {name: futures[name].result() for name in names}


def _compare(source: StoredModel | None, target: StoredModel, name: str, tally: Tally) -> _Found:
    """Stream one tensor of both, or of the target where the source has none of that name."""
    dtype, shape = target.dtype(name), target.shape(name)
    if source is not None and name not in source.tensors:
        source = None
    if source is not None and source.shape(name) != shape:
        return _Found("", f"has shape {shape}, not {source.shape(name)}")
    if source is not None and dtype != source.dtype(name) and f"torch.{target.stated.get('cast')}" != str(dtype):
        return _Found("", f"is {dtype} instead of {source.dtype(name)}, and the manifest states no such cast")
    digest, different, zeros, finite = hashlib.sha256(), 0, 0, True
    held: Tensor | None = None
    for start, theirs in blocks_of(target, name):
        try:
            target.check_copies(name, start, theirs)
            target.check_rounded(name, start, theirs)
        except CheckpointError as caught:
            return _Found("", f"has two versions ({caught})")
        digest.update(raw_bytes(theirs))
        if source is not None:
            if held is None:  # the first block is the largest
                held = new_tensor(tuple(theirs.shape), source.dtype(name))
            ours = held[: len(theirs)]
            source.read_into(name, start, ours)
            source.check_copies(name, start, ours)
            different += _num_different(ours.to(dtype), theirs)
        smallest, largest = theirs.aminmax()  # NaN is both of them where there is one
        finite = finite and bool(smallest.isfinite() & largest.isfinite())
        zeros += _num_zero_rows(theirs)
        tally.add(num_bytes(tuple(theirs.shape), dtype))
    problem = f"differs in {different} of {num_bytes(shape, torch.uint8)} elements" if different else None
    return _Found(digest.hexdigest(), problem, zeros, finite)


def _num_different(ours: Tensor, theirs: Tensor) -> int:
    """Number of elements that are not the same bit for bit."""
    left, right = (tensor.reshape(-1).view(torch.uint8) for tensor in (ours, theirs))
    even = len(left) // 8 * 8  # words of eight bytes are compared several times faster than what they are made of
    if torch.equal(left[:even].view(torch.int64), right[:even].view(torch.int64)) and torch.equal(
        left[even:], right[even:]
    ):
        return 0
    return int((bits(ours) != bits(theirs)).sum())


def _num_zero_rows(block: Tensor) -> int:
    """Number of a matrix's rows that are all zero; 0 for a vector."""
    if block.dim() != 2:
        return 0
    # One quick pass finds the few rows that may be.
    rows = (block.sum(dim=1) == 0).nonzero()[:, 0]
    return len(rows) - int(block[rows].any(dim=1).sum()) if len(rows) else 0


def _root(target: StoredModel, digests: dict[str, str]) -> str:
    named = {
        name: (str(target.dtype(name)).removeprefix("torch."), target.shape(name), digests[name])
        for name in target.names()
    }
    return weights_sha256(named)


def _check_recorded(target: StoredModel, digests: dict[str, str]) -> None:
    """Raise VerificationError unless the tensors have the hashes that the manifest records."""
    recorded = target.stated.get("tensors") or digests
    wrong = [f"{name} is not there" for name in recorded if name not in digests]
    wrong += [f"{name} does not have its recorded hash" for name in digests if recorded.get(name) != digests[name]]
    if not wrong and target.stated.get("weights_sha256") not in (None, _root(target, digests)):
        wrong = ["its weights do not have the hash of its manifest"]
    _fail_as_changed(target, wrong)


def _fail_as_changed(target: StoredModel, wrong: Sequence[str]) -> None:
    if wrong:
        raise VerificationError(
            f"{target.folder} changed after it was written: {_first(wrong, '; ')}; convert it again, or restore the "
            "file"
        )


def _check_finite(source: StoredModel | None, target: StoredModel, found: Mapping[str, _Found]) -> None:
    """Raise VerificationError where a tensor that is as it has to be holds NaN or infinity."""
    broken = [name for name, seen in found.items() if not seen.finite]
    if broken:
        both = source is not None and all(name in source.tensors for name in broken)
        raise VerificationError(
            f"{target.folder} holds NaN or infinity{f', as does {source.folder}' if source and both else ''}: "
            f"{_first(broken, ', ')}; nothing can be computed with it: take a checkpoint from before that"
        )


def _first(told: Sequence[str], between: str) -> str:
    """The first three of many, and how many more there are."""
    return between.join(told[:3]) + (f" (and {len(told) - 3} more)" if len(told) > 3 else "")


def _check_padding(target: StoredModel) -> int:
    """Number of padding rows of the vocabulary tables; they too have to be finite, and zero where we wrote them."""
    made_here = "files" in target.stated and "converted_from" in target.stated
    for name in target.padding:
        for block in target.padding_blocks(name):
            if not block.isfinite().all():
                raise VerificationError(
                    f"{target.folder}: the padding rows of {name} hold NaN or infinity; convert it again"
                )
            if made_here and block.any():
                raise VerificationError(f"{target.folder}: the padding rows of {name} are not zero; convert it again")
    return target.padded_vocab_size - target.vocab_size
