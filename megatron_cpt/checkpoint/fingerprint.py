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
_END_BYTES = 1 << 20


def fingerprint(folder: str | Path) -> str:
    """Hex SHA-256 over names, sizes and both ends of the files that describe and hold a model's weights.

    Other weights have another fingerprint, as training or surgery changes every tensor; a copy or a
    moved folder has the same. At most 2 MiB of each file are read. It is no proof against tampering.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        names = [path.name for path in Path(folder).iterdir()]
        paths = [Path(folder, name) for name in sorted(names) if name in _DESCRIPTIONS or name.endswith(_WEIGHTS)]
        return sha256_json([[path.name, path.stat().st_size, _ends(path)] for path in paths])
    except OSError as caught:
        raise CheckpointError(f"cannot read {folder}: {caught.strerror or caught}; give a model's folder") from None


def _ends(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(_END_BYTES)
        file.seek(max(0, os.fstat(file.fileno()).st_size - _END_BYTES))
        return sha256_bytes(head + file.read(_END_BYTES))
