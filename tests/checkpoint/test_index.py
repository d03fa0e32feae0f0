"""The index of a `torch_dist` checkpoint is the object that torch itself would have written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from megatron_cpt.checkpoint.metadata import Chunk, StoredObject, StoredTensor, read_index, write_index

CHUNKS = (Chunk((0, 0), (3, 4), "__0_0.distcp", 0, 900), Chunk((3, 0), (2, 4), "__0_1.distcp", 64, 800))
OBJECT = StoredObject("__0_1.distcp", 1000, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_field_is_as_torch_writes_it(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, objects = {"weight": StoredTensor(dtype, (5, 4), CHUNKS)}, {"state": OBJECT}
    for name in ("__0_0.distcp", "__0_1.distcp"):
        (tmp_path / name).write_bytes(bytes(2000))
    write_index(tmp_path, tensors, objects)
    boxes = [dcp.ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.size)) for chunk in CHUNKS]
    properties = dcp.TensorProperties(dtype=dtype)
    places = {
        dcp.MetadataIndex("weight", torch.Size(chunk.offset), number): _StorageInfo(
            chunk.file, chunk.start, chunk.length
        )
        for number, chunk in enumerate(CHUNKS)
    }
    places[dcp.MetadataIndex("state")] = _StorageInfo(OBJECT.file, OBJECT.start, OBJECT.length)
    described = {
        "weight": dcp.TensorStorageMetadata(properties, torch.Size((5, 4)), boxes),
        "state": dcp.BytesStorageMetadata(),
    }
    found = FileSystemReader(tmp_path).read_metadata()
    assert found.state_dict_metadata == described and found.storage_data == places
    assert (found.planner_data, found.version) == (None, dcp.Metadata({}).version)
    ours, torchs = list(found.storage_data), list(places)
    assert [vars(index) for index in ours] == [vars(index) for index in torchs]  # `==` leaves a field out
    assert type(found.state_dict_metadata["weight"].size) is type(ours[0].offset) is torch.Size
    assert read_index(tmp_path, lambda key: True) == (tensors, objects)
