"""Proof that no byte of a folder has changed: hashes of its tensors, and of all that lies between and beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.checkpoint.layout import NewLayout, gaps, tensor_extents
from megatron_cpt.checkpoint.manifest import SEALS, read_checkpoint_manifest
from megatron_cpt.checkpoint.runs import StoredModel
from megatron_cpt.config.manifest import MANIFEST, is_intact
from megatron_cpt.errors import CheckpointError, VerificationError

_BLOCK_BYTES = 1 << 20


def seal_files(folder: Path, made: NewLayout | StoredModel) -> dict[str, dict[str, Any]]:
    """By file, its size, and the SHA-256 of its bytes that belong to no tensor.

    Tensors are hashed one by one while they are written; headers, padding, and files without tensors are here. Hidden
    files and the manifest are left out, `.metadata` is not.
    """
    extents = tensor_extents([made.tensors], made.copies)
    sealed = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and (not path.name.startswith(".") or path.name == ".metadata"):
            size = path.stat().st_size
            digest = _rest_sha256(path, size, extents.get(name))
            sealed[name] = {"bytes": size, "sha256": digest}
    return sealed


def check_manifest(folder: Path) -> None:
    """Look at a folder's manifest itself, if it has one.

    Raises:
        CheckpointError: it is none of a checkpoint, or holds impossible values.
        VerificationError: it is sealed and not byte for byte as it was written.
    """
    path = folder / MANIFEST
    # Any one field of a seal asks for all of it: a damaged name must not make the others worthless.
    if path.exists() and any(name in SEALS for name in read_checkpoint_manifest(folder)) and not is_intact(path):
        raise VerificationError(
            f"{path} was changed after it was written, so it proves nothing; restore it, or convert again"
        )


def broken_seals(model: StoredModel) -> list[str]:
    """What of a folder's files is not as its manifest says; empty where all is, or the manifest has no seals.

    The tensors are not looked at. The model has to be open with all that its files hold, and its manifest checked.
    """
    sealed = model.stated.get("files")
    if not isinstance(sealed, Mapping):
        return []
    wrong = []
    extents = tensor_extents([model.tensors], model.copies)
    for name, said in sealed.items():
        path = model.folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != said["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes, not {said['bytes']}")
        elif _rest_sha256(path, said["bytes"], extents.get(name)) != said["sha256"]:
            wrong.append(f"{name} was changed after it was written, outside of its tensors")
    return wrong


def _rest_sha256(path: Path, size: int, extents: np.ndarray | None) -> str:
    """SHA-256 of the bytes of a file that no extent covers."""
    digest = hashlib.sha256()
    try:
        borders = np.array([[0, size]]) if extents is None else gaps(path.name, size, extents)
    except CheckpointError:  # a damaged header may lead to any extents
        return "none"
    with open(path, "rb") as file:
        for first, last in borders.tolist():
            file.seek(first)
            while first < last and (block := file.read(min(_BLOCK_BYTES, last - first))):
                digest.update(block)
                first += len(block)
    return digest.hexdigest()
