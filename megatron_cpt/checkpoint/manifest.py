"""The manifest of a checkpoint folder: what the weights are and what they were made from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_cpt.checkpoint.files import brief, json_inside
from megatron_cpt.checkpoint.llama import MAX_SIZE
from megatron_cpt.config.manifest import MANIFEST, read_json, read_manifest, write_manifest, write_sealed_manifest
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


def own_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that describes itself; empty where it has none, or another tool's.

    Raises:
        CheckpointError: a field is of another type than this tool writes; `shape` and sizes are not looked at.
    """
    if not (folder / MANIFEST).exists():
        return {}
    found = read_json(json_inside(folder, MANIFEST), CheckpointError)
    if not isinstance(found, dict) or found.get("kind") != KIND:
        return {}
    _check_fields(folder / MANIFEST, found)
    return found


def read_checkpoint_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check `<folder>/manifest.json`.

    Returns:
        the manifest, with `shape` as a `LlamaShape`, `vocab_size` and `padded_vocab_size` as
        integers that fit together, and every other field that this tool reads of the type it writes, or None.

    Raises:
        CheckpointError: the manifest is missing, is not a checkpoint's, or holds impossible values.
    """
    path = Path(folder) / MANIFEST
    if path.exists():  # what it says of a missing one
        json_inside(path.parent, MANIFEST)
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
    if not all(map(_is_size, sizes)) or not 0 < sizes[0] <= sizes[1]:  # type: ignore[operator]
        raise CheckpointError(
            f"{path}: got vocab_size {brief(sizes[0])} and padded_vocab_size {brief(sizes[1])}, expected two integers "
            f"with 0 < vocab_size <= padded_vocab_size <= {MAX_SIZE}; make the checkpoint again"
        )
    _check_fields(path, manifest)
    return manifest


def _check_fields(path: Path, manifest: Mapping[str, Any]) -> None:
    for name, (is_right, expected) in _FIELDS.items():
        if manifest.get(name) is not None and not is_right(manifest[name]):
            raise CheckpointError(
                f"{path}: got {name} {brief(manifest[name])}, expected {expected}; it was changed by hand or by "
                "another tool, make the checkpoint again"
            )


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return _is_size(value) or isinstance(value, list) and all(map(_is_size, value))


def _is_settings(value: Any) -> bool:
    """Settings of config.json and generation_config.json."""
    named = isinstance(value, dict) and {name: value.get(name) for name in ("config", "generation_config")}
    return named == value and all(isinstance(held, (dict, type(None))) for held in value.values())


def _is_files(value: Any) -> bool:
    """By file of this folder, its size and a hash."""
    return isinstance(value, dict) and all(
        isinstance(said, dict)
        and said.keys() == {"bytes", "sha256"}
        and type(said["bytes"]) is int
        and _is_hash(said["sha256"])
        and not {"", "..", "."} & set(name.split("/"))
        and "\0" not in name
        for name, said in value.items()
    )


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_hash, value.values()))


# Field of the manifest -> whether a value is what this tool writes there, and that in words.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_size, f"an integer of 0 to {MAX_SIZE}"),
    "vocab_divisor": (lambda value: _is_size(value) and value > 0, f"an integer of 1 to {MAX_SIZE}"),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), (_is_token, "the number of a token, or a list of them")),
    **dict.fromkeys(("tokenizer_sha256", "weights_sha256"), (_is_hash, "64 hexadecimal digits")),
    **dict.fromkeys(("dtype", "cast", "assumed", "format", "converted_from"), (_is_text, "a text")),
    "huggingface": (_is_settings, "an object of the objects config and generation_config"),
    "tensors": (_is_hashes, "an object of SHA-256 by name"),
    "files": (_is_files, "an object of bytes and sha256 by the name of a file inside the folder"),
}
