"""Vocabulary tables that are stored twice, or with padding: opened by headers, compared and checked in blocks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import LlamaForward, convert, open_checkpoint, open_hf, runs, verify
from megatron_cpt.checkpoint.opening import open_tables
from megatron_cpt.errors import CheckpointError, VerificationError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tied(make_model, tmp_path: Path) -> Path:
    """A tied model in one file."""
    folder = make_model(tmp_path / "tied", tied_embeddings=True)
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_head(folder: Path, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Store the embedding again under the head's name, edited."""
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, HEAD: edit(tensors[EMBEDDING].clone())}, folder / "model.safetensors")


def test_a_stored_head_is_the_embedding(tied: Path, tmp_path: Path) -> None:
    convert(tied, tmp_path / "plain", "torch_dist")
    logits = LlamaForward(tied).logits(torch.arange(5)[None])
    with_head(tied, lambda table: table)
    assert HEAD not in open_hf(tied).names()
    convert(tied, tmp_path / "stored", "torch_dist")
    assert verify(tied, tmp_path / "stored")["weights_sha256"] == verify(tmp_path / "plain")["weights_sha256"]
    assert verify(tmp_path / "stored", tied)["equal"]
    assert torch.equal(LlamaForward(tied).logits(torch.arange(5)[None]), logits)
    assert open_tables(tied).tied


def last_bit(table: torch.Tensor) -> torch.Tensor:
    table[-1:].view(torch.int32)[0, -1] ^= 1
    return table


def test_a_stored_head_that_differs_is_used_by_nothing(tied: Path, tmp_path: Path) -> None:
    convert(tied, tmp_path / "stored", "torch_dist")
    with_head(tied, last_bit)
    tokens = torch.arange(5)[None]
    uses: list[Callable[[], Any]] = [
        lambda: convert(tied, tmp_path / "out", "torch_dist"),
        lambda: verify(tmp_path / "stored", tied),
        lambda: verify(tied, tmp_path / "stored"),
        lambda: LlamaForward(tied).logits(tokens),
        lambda: LlamaForward(open_checkpoint(tied), cache=True).logits(tokens),
        lambda: open_tables(tied),
    ]
    for use in uses:
        with pytest.raises((CheckpointError, VerificationError), match=r"differs from its copy in .*head of its own"):
            use()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("edit", [lambda table: table.half(), lambda table: table[1:]])
def test_a_stored_head_of_another_form(edit: Callable[[torch.Tensor], torch.Tensor], tied: Path) -> None:
    with_head(tied, edit)
    with pytest.raises(CheckpointError, match="ties the embeddings, yet lm_head.weight is"):
        open_hf(tied)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every read of a tensor."""
    sizes: list[int] = []
    preadv = os.preadv

    def noted(file: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(len(each) for each in buffers))
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    return sizes


def test_opening_reads_no_rows(tied: Path, read: list[int]) -> None:
    with_head(tied, lambda table: table)
    open_hf(tied)
    assert not read


def test_padding_and_copies_are_read_in_blocks(
    make_model, tied: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows a wrong size of the vocabulary makes padding."""
    convert(make_model(tmp_path / "hf"), tmp_path / "stored", "torch_dist")
    manifest = json.loads((tmp_path / "stored" / "manifest.json").read_text())
    for seal in ("tensors", "files", "manifest_sha256"):
        del manifest[seal]
    (tmp_path / "stored" / "manifest.json").write_text(
        json.dumps({**manifest, "vocab_size": 3, "weights_sha256": None})
    )
    monkeypatch.setattr(runs, "BLOCK_BYTES", 1000)
    blocks = list(open_checkpoint(tmp_path / "stored").padding_blocks(HEAD))
    assert torch.cat(blocks)[:130].equal(open_hf(tmp_path / "hf").read(HEAD)[3:])
    assert max(block.nbytes for block in blocks) <= 1000 and len(torch.cat(blocks)) == 253
    with_head(tied, lambda table: table)
    read.clear()
    open_hf(tied).read(EMBEDDING)
    assert read[0] == 133 * 32 * 4 and sum(read) == 2 * read[0] and max(read[1:]) <= 1000
    # A number behind the first block is seen too.
    run = open_checkpoint(tmp_path / "stored").padding[HEAD].runs[-1]
    file = tmp_path / "stored" / run.file
    raw = bytearray(file.read_bytes())
    last = run.offset + (run.rows - 1) * run.pitch
    raw[last : last + 4] = b"\0\0\xc0\x7f"
    file.write_bytes(raw)
    with pytest.raises(VerificationError, match="the padding rows of lm_head.weight hold NaN"):
        verify(tmp_path / "stored", tmp_path / "stored")
