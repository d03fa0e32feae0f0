"""The manifest of a checkpoint folder: what the weights are and what they were made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_cpt.config.manifest import MANIFEST, read_manifest, write_manifest, write_sealed_manifest
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

KIND = "checkpoint"
SEALS = ("tensors", "files", "manifest_sha256")  # fields that hold for the folder's very bytes


def write_checkpoint_manifest(
    folder: str | Path,
    shape: LlamaShape,
    vocab_size: int,
    padded_vocab_size: int,
    tokenizer_sha256: str | None,
    inputs: Mapping[str, str],
    *,
    format: str = "torch_dist",
    **fields: Any,
) -> None:
    """Write `<folder>/manifest.json`: the last file of a finished checkpoint.

    Args:
        folder: the checkpoint folder; everything else in it is already in place.
        shape: the architecture.
        vocab_size: the true number of vocabulary rows, those a token id can reach.
        padded_vocab_size: rows stored in the embedding and the head, >= vocab_size.
        tokenizer_sha256: hash of the tokenizer's model file; None when it is not known.
        inputs: name -> SHA-256 of what the checkpoint was made from.
        format: one of those that `convert` writes.
        fields: whatever else the next step needs (`step`, `dtype`, `bos_token_id`, ...).
    """
    write = write_sealed_manifest if "files" in fields else write_manifest
    write(
        Path(folder) / MANIFEST,
        KIND,
        inputs,
        format=format,
        shape=shape.model_dump(),
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        tokenizer_sha256=tokenizer_sha256,
        **fields,
    )


def carried_settings(folder: Path) -> dict[str, Any]:
    """Fields of a checkpoint's manifest that what is made of it hands on: settings of Hugging Face's configs."""
    manifest = read_checkpoint_manifest(folder) if (folder / MANIFEST).exists() else {}
    return {key: manifest[key] for key in ("huggingface",) if key in manifest}


def read_checkpoint_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check `<folder>/manifest.json`.

    Returns:
        the manifest, with `shape` as a `LlamaShape`, and `vocab_size` and `padded_vocab_size` as
        integers that fit together.

    Raises:
        CheckpointError: the manifest is missing, is not a checkpoint's, or holds impossible values.
    """
    path = Path(folder) / MANIFEST
    manifest = read_manifest(path, KIND, CheckpointError)
    try:
        manifest["shape"] = LlamaShape.model_validate(manifest.get("shape"))
    except ValidationError as caught:
        first = caught.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "shape"
        raise CheckpointError(
            f"{path}: field shape is not a Llama's ({where}: {first['msg']}); make it again"
        ) from None
    sizes = manifest.get("vocab_size"), manifest.get("padded_vocab_size")
    if not all(type(size) is int for size in sizes) or not 0 < sizes[0] <= sizes[1]:  # type: ignore[operator]
        raise CheckpointError(
            f"{path}: got vocab_size {sizes[0]!r} and padded_vocab_size {sizes[1]!r}, expected two integers with "
            "0 < vocab_size <= padded_vocab_size; make the checkpoint again"
        )
    return manifest
