"""Chunks cut anywhere, as tensor, pipeline and data parallel ranks leave them."""

from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_cpt.checkpoint import convert, open_torch_dist, verify
from megatron_cpt.checkpoint.manifest import SEALS

# Where each dimension is cut: over layers, rows and columns at once.
CUTS = {
    "rows": ((), (1, 40, 41, 100), ()),
    "columns": ((), (), (5, 17)),
    "boxes": ((2,), (7, 50, 143), (1, 20)),
}


def read_with_torch(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by torch's own reader."""
    described = pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
    tensors = {
        key: torch.zeros(tensor.size, dtype=tensor.properties.dtype)
        for key, tensor in described.items()
        if isinstance(tensor, parts.TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def boxes(shape: tuple[int, ...], cuts: tuple[tuple[int, ...], ...]) -> list[tuple[tuple[int, int], ...]]:
    """All boxes of a grid: for each dimension (start, stop)."""
    dimensions = [
        list(itertools.pairwise(sorted({0, size, *(at for at in where if at < size)})))
        for size, where in zip(shape, cuts, strict=True)
    ]
    return list(itertools.product(*dimensions))


def write_cut(folder: Path, tensors: dict[str, torch.Tensor], cuts: tuple[tuple[int, ...], ...]) -> None:
    described, places = {}, {}
    for number, (key, tensor) in enumerate(tensors.items()):
        chunks = []
        fitting = (
            cuts if tensor.dim() == 3 else cuts[1:] if key.startswith(("embedding", "output")) else cuts[: tensor.dim()]
        )
        for box in reversed(boxes(tuple(tensor.shape), fitting)):
            offset, size = torch.Size(a for a, _ in box), torch.Size(b - a for a, b in box)
            name = f"__{number % 3}_0.distcp"
            with open(folder / name, "ab") as file:
                start = file.tell()
                torch.save(tensor[tuple(slice(a, b) for a, b in box)].clone(), file)
                places[parts.MetadataIndex(key, offset)] = _StorageInfo(name, start, file.tell() - start)
            chunks.append(parts.ChunkStorageMetadata(offset, size))
        described[key] = parts.TensorStorageMetadata(parts.TensorProperties(tensor.dtype), tensor.shape, chunks)
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(parts.Metadata(described, storage_data=places), file)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_any_cut_is_the_same_model(cuts, tied: bool, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", tied_embeddings=tied)
    convert(source, tmp_path / "stored", "torch_dist")
    cut = tmp_path / "cut"
    cut.mkdir()
    manifest = json.loads((tmp_path / "stored" / "manifest.json").read_text())
    manifest = {key: value for key, value in manifest.items() if key not in SEALS}
    (cut / "manifest.json").write_text(json.dumps(manifest))
    write_cut(cut, read_with_torch(tmp_path / "stored"), cuts)
    verify(source, cut)
    reader, whole = open_torch_dist(cut), open_torch_dist(tmp_path / "stored")
    for name in reader.names():  # in another order than a conversion reads them
        rows = reader.shape(name)[0]
        assert torch.equal(reader.read_rows(name, rows // 3, rows - 1), whole.read(name)[rows // 3 : rows - 1]), name
    convert(cut, tmp_path / "back", "hf")
    verify(source, tmp_path / "back")
