"""Prove that two checkpoints hold the same model, and show what one holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest
from megatron_cpt.checkpoint.opening import open_checkpoint
from megatron_cpt.checkpoint.reader import ModelReader, WeightsDigest, bits, num_bytes, read_blocks
from megatron_cpt.checkpoint.torch_dist import TorchDistReader
from megatron_cpt.config.manifest import MANIFEST
from megatron_cpt.errors import VerificationError


def verify(src: str | Path, dst: str | Path, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Compare two checkpoints of any format: the config field by field, every tensor bit for bit.

    Both are read through their own mapping to HF names, so a conversion is checked by its inverse.
    A cast that the destination's manifest states is applied to the source first; any other
    difference of dtype is a failure. NaN and infinity are failures wherever they are.

    Returns:
        {"equal": True, "tensors", "bytes", "cast", "weights_sha256", "zero_rows": rows of the
        destination that are all zero, by tensor (a fact: many models have unused rows),
        "padding_rows"}.

    Raises:
        VerificationError: something differs; the message names it.
        CheckpointError: one of the two cannot be read.
    """
    source, target = open_checkpoint(src), open_checkpoint(dst)
    stated = _manifest(target)
    _compare_configs(source, target)
    digest, failures, zero_rows = WeightsDigest(), [], {}
    total = sum(num_bytes(target.shape(name), target.dtype(name)) for name in target.names())
    done = 0
    for name in target.names():
        problem, zeros = _compare_tensor(source, target, name, stated.get("cast"), digest)
        if problem is not None:
            failures.append(problem)
        if zeros:
            zero_rows[name] = zeros
        done += num_bytes(target.shape(name), target.dtype(name))
        if on_progress is not None:
            on_progress(done, total)
    if failures:
        more = f" (and {len(failures) - 3} more tensors)" if len(failures) > 3 else ""
        raise VerificationError(f"{dst} is not the model of {src}: {'; '.join(failures[:3])}{more}; convert it again")
    if stated.get("weights_sha256") not in (None, digest.hexdigest()):
        raise VerificationError(f"{dst} changed after it was written: its weights do not have the hash of its manifest")
    return {
        "equal": True,
        "tensors": len(target.names()),
        "bytes": total,
        "cast": stated.get("cast"),
        "weights_sha256": digest.hexdigest(),
        "zero_rows": zero_rows,
        "padding_rows": _check_padding(target),
    }


def show(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, from its headers and its manifest alone."""
    reader = open_checkpoint(path)
    stated = _manifest(reader)
    sizes: Counter[str] = Counter()
    for name in reader.names():
        sizes[str(reader.dtype(name)).removeprefix("torch.")] += num_bytes(reader.shape(name), reader.dtype(name))
    facts: dict[str, Any] = {
        "path": str(path),
        "format": "torch_dist" if isinstance(reader, TorchDistReader) else "hf",
        "parameters": sum(num_bytes(reader.shape(name), torch.uint8) for name in reader.names()),
        "tensors": len(reader.names()),
        "bytes": sum(sizes.values()),
        "dtype": sizes.most_common(1)[0][0],
        "vocab_size": reader.vocab_size,
        "padded_vocab_size": reader.padded_vocab_size if isinstance(reader, TorchDistReader) else reader.vocab_size,
        "shape": reader.llama.model_dump(),
    }
    return facts | {key: stated[key] for key in ("step", "tokenizer_sha256", "weights_sha256", "cast") if key in stated}


def _manifest(reader: ModelReader) -> dict[str, Any]:
    if isinstance(reader, TorchDistReader) or (reader.folder / MANIFEST).exists():
        return read_checkpoint_manifest(reader.folder)
    return {}


def _compare_configs(source: ModelReader, target: ModelReader) -> None:
    ours = source.llama.model_dump() | {"vocab_size": source.vocab_size}
    theirs = target.llama.model_dump() | {"vocab_size": target.vocab_size}
    tokenizers = [_manifest(reader).get("tokenizer_sha256") for reader in (source, target)]
    if all(tokenizers):
        ours["tokenizer_sha256"], theirs["tokenizer_sha256"] = tokenizers
    different = [f"{key} is {theirs[key]!r}, not {ours[key]!r}" for key in ours if ours[key] != theirs[key]]
    if different:
        raise VerificationError(f"{target.folder} is not the model of {source.folder}: {'; '.join(different)}")


def _compare_tensor(
    source: ModelReader, target: ModelReader, name: str, cast: str | None, digest: WeightsDigest
) -> tuple[str | None, int]:
    """(what is wrong or None, number of all-zero rows) for one tensor."""
    dtype = target.dtype(name)
    if dtype != source.dtype(name) and f"torch.{cast}" != str(dtype):
        return f"{name} is {dtype} instead of {source.dtype(name)}, and the manifest states no such cast", 0
    different, zeros, finite = 0, 0, True
    for ours, theirs in zip(read_blocks(source, name), read_blocks(target, name), strict=True):
        digest.update(name, dtype, target.shape(name), theirs)
        ours_bits, theirs_bits = bits(ours.to(dtype)), bits(theirs)
        if not torch.equal(ours_bits, theirs_bits):
            different += int((ours_bits != theirs_bits).sum())
        finite = finite and bool(torch.isfinite(theirs).all())
        if theirs.dim() == 2:
            zeros += int((theirs == 0).all(dim=1).sum())
    if different:
        return f"{name} differs in {different} of {num_bytes(target.shape(name), torch.uint8)} elements", zeros
    return (None if finite else f"{name} holds NaN or infinity"), zeros


def _check_padding(target: ModelReader) -> int:
    """Number of padding rows of the vocabulary tables; they too have to be finite."""
    if not isinstance(target, TorchDistReader):
        return 0
    for name in {EMBEDDING, HEAD} & set(target.names()):
        if not torch.isfinite(target.padding(name)).all():
            raise VerificationError(
                f"{target.folder}: the padding rows of {name} hold NaN or infinity; convert it again"
            )
    return target.padded_vocab_size - target.vocab_size
