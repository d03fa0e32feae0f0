"""A short identity of a model on disk, whatever its size and wherever it lies."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_cpt.checkpoint.hf_config import CONFIG
from megatron_cpt.checkpoint.metadata import METADATA
from megatron_cpt.config.manifest import MANIFEST, sha256_bytes, sha256_json
from megatron_cpt.errors import CheckpointError

_DESCRIPTIONS = (CONFIG, MANIFEST, METADATA)
_WEIGHTS = (".safetensors", ".distcp")
_PICKLED = (".bin", ".pt", ".pth", ".json")
_END_BYTES = 1 << 20


def fingerprint(folder: str | Path) -> str:
    """Hex SHA-256 over names, sizes and both ends of the files that describe and hold a model's weights.

    Other weights have another fingerprint, as training or surgery changes every tensor; a copy or a
    moved folder has the same. At most 2 MiB of each file are read. It is no proof against tampering.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        folder = Path(folder)
        names = sorted(path.name for path in folder.iterdir())
        found = [name for name in names if name in _DESCRIPTIONS or name.endswith(_WEIGHTS)]
        if not any(name.endswith(_WEIGHTS) for name in found):  # of another tool: all that may be weights, at any depth
            found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in _PICKLED)
        return sha256_json([[name, (folder / name).stat().st_size, _ends(folder / name)] for name in found])
    except OSError as caught:
        raise CheckpointError(f"cannot read {folder}: {caught.strerror or caught}; give a model's folder") from None


def _ends(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(_END_BYTES)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
        return sha256_bytes(head + file.read(_END_BYTES))
