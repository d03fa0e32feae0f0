"""Proof that no byte of a folder has changed: hashes of its tensors, and of all that lies between and beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.checkpoint.layout import NewLayout, gaps, tensor_extents
from megatron_cpt.checkpoint.manifest import SEALS, read_checkpoint_manifest
from megatron_cpt.checkpoint.metadata import METADATA
from megatron_cpt.checkpoint.mp_rank_files import TRACKER
from megatron_cpt.checkpoint.runs import StoredModel
from megatron_cpt.config.manifest import MANIFEST, is_intact
from megatron_cpt.errors import CheckpointError, VerificationError

_BLOCK_BYTES = 1 << 20
# Weights, pickles, configs and indexes, code, and what tokenizers are made of.
_LOADED_SUFFIXES = frozenset(
    ".safetensors .bin .pt .pth .ckpt .distcp .h5 .msgpack .gguf .pkl .pickle .json .index .py .so .model .tiktoken "
    ".jinja".split()
)
_LOADED_NAMES = frozenset((METADATA, TRACKER, "vocab.txt", "merges.txt"))


def seal_files(folder: Path, made: NewLayout | StoredModel) -> dict[str, dict[str, Any]]:
    """By file, its size, and the SHA-256 of its bytes that belong to no tensor.

    Tensors are hashed one by one while they are written; headers, padding, and files without tensors are here. Hidden
    files and the manifest are left out, `.metadata` is not.
    """
    extents = tensor_extents([made.tensors], made.copies)
    sealed = {}
    for name, path in _files_of(folder):
        size = path.stat().st_size
        sealed[name] = {"bytes": size, "sha256": _rest_sha256(path, size, extents.get(name))}
    return sealed


def _files_of(folder: Path) -> Iterator[tuple[str, Path]]:
    """What a seal is about, by name: files, and links to folders, which are never made here."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts[:-1])
        hidden |= name.name.startswith(".") and name.name != METADATA
        if not hidden and (path.is_file() or path.is_symlink()) and name != Path(MANIFEST):
            yield name.as_posix(), path


def check_manifest(folder: Path) -> Mapping[str, Any]:
    """The fields of a folder's manifest after a look at the file itself; empty where it has none.

    Raises:
        CheckpointError: it is none of a checkpoint, or holds impossible values.
        VerificationError: it is sealed and not byte for byte as it was written.
    """
    path = folder / MANIFEST
    if not path.exists():
        return {}
    manifest = read_checkpoint_manifest(folder)
    # Any one field of a seal asks for all of it: a damaged name must not make the others worthless.
    if any(name in SEALS for name in manifest) and not is_intact(path):
        raise VerificationError(
            f"{path} was changed after it was written, so it proves nothing; restore it, or convert again"
        )
    return manifest


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
    folders = {Path(name).parent for name in sealed} - {Path()}
    for name in unlisted_files(model):
        if _may_be_loaded(Path(name)) or not folders.isdisjoint(Path(name).parents):
            wrong.append(f"{name} was added and may be loaded with the rest, remove it")
    return wrong


def unlisted_files(model: StoredModel) -> list[str]:
    """Files of a folder that its manifest does not list, hidden ones left out; a licence or a picture may be one."""
    sealed = model.stated.get("files")
    return [name for name, _ in _files_of(model.folder) if name not in sealed] if isinstance(sealed, Mapping) else []


def _may_be_loaded(name: Path) -> bool:
    """Whether loaders of any format look for a file of this name: some before those that a manifest lists."""
    return name.suffix.lower() in _LOADED_SUFFIXES or name.name in _LOADED_NAMES


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
