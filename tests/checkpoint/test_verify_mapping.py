"""Seven faults of a converter, each in a folder that is sound by its own manifest: the comparison finds them all."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint import (
    EMBEDDING,
    HEAD,
    convert,
    open_checkpoint,
    read_checkpoint_manifest,
    verify,
    write_checkpoint_manifest,
)
from megatron_cpt.checkpoint.llama import Placement, placements
from megatron_cpt.checkpoint.logits import check_logits, compare_logits
from megatron_cpt.checkpoint.reader import weights_sha256
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import VerificationError

# A square o_proj; at theta 5e5, heads of 8 have frequencies that the scaling leaves, bends and divides.
SQUARE = {"num_attention_heads": 4, "num_query_groups": 2, "head_dim": 8, "hidden_size": 32}
SHAPE = {**SQUARE, "rope_scaling": {"factor": 8.0}, "max_position_embeddings": 131072}
Fault = Callable[[pytest.MonkeyPatch], None]
PACKAGE = "megatron_cpt.checkpoint"


def faulty_runs(change: Callable[[str, Placement, LlamaShape], Placement]) -> Fault:
    """A converter that finds rows of a layer's stored matrix elsewhere."""

    def wrong(shape: LlamaShape, vocab_size: int) -> dict[str, Placement]:
        return {name: change(name, at, shape) for name, at in placements(shape, vocab_size).items()}

    return lambda patch: patch.setattr(f"{PACKAGE}.rank_parts.placements", wrong)


def flat_qkv(name: str, at: Placement, shape: LlamaShape) -> Placement:
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    starts = {"q_proj.weight": (0, query), "k_proj.weight": (query, key), "v_proj.weight": (query + key, key)}
    last = name.split(".", 4)[-1]
    return replace(at, runs=((0, *starts[last]),)) if last in starts else at


def up_on_gate(name: str, at: Placement, shape: LlamaShape) -> Placement:
    first = {"gate": shape.ffn_hidden_size, "up": 0}.get(name.split(".")[-2].removesuffix("_proj"))
    return at if first is None else replace(at, runs=((0, first, shape.ffn_hidden_size),))


def interleaved_rope(name: str, at: Placement, shape: LlamaShape) -> Placement:
    """Rows i and i + half of each head become rows 2 i and 2 i + 1, as Meta's own files have them."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return at
    half = shape.head_dim // 2
    single = [(row + i, stored + i) for row, stored, count in at.runs for i in range(count)]
    moved = []
    for row, stored in single:
        inside = row % shape.head_dim
        moved.append((row, stored - inside + 2 * (inside % half) + inside // half, 1))
    return replace(at, runs=tuple(moved))


def faulty_rows(names: tuple[str, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """A converter that changes whole tensors on their way."""
    from megatron_cpt.checkpoint import execute

    right = execute.blocks_of

    def wrong(model, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        if name.endswith(names):
            yield 0, change(model.read(name)).contiguous()
        else:
            yield from right(model, name)

    return lambda patch: patch.setattr(execute, "blocks_of", wrong)


def faulty_config(**changes: object) -> Fault:
    """A converter that writes another config than it has read."""
    module = importlib.import_module(f"{PACKAGE}.convert")
    hf_config, write_manifest = module.hf_config, module.write_checkpoint_manifest

    def fault(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(module, "hf_config", lambda shape, *rest: hf_config(shape.model_copy(update=changes), *rest))
        patch.setattr(
            module,
            "write_checkpoint_manifest",
            lambda folder, shape, *rest, **fields: write_manifest(
                folder, shape.model_copy(update=changes), *rest, **fields
            ),
        )

    return fault


PROJECTION = r"model\.layers\.\d\.self_attn\.[qkv]_proj\.weight differs in"
FAULTS: dict[str, tuple[Fault, str]] = {
    "flat QKV": (faulty_runs(flat_qkv), PROJECTION),
    "swapped gate and up": (faulty_runs(up_on_gate), r"mlp\.(gate|up)_proj\.weight differs in 2816 of 2816"),
    "interleaved rope": (faulty_runs(interleaved_rope), r"self_attn\.[qk]_proj\.weight differs in"),
    "rope theta": (faulty_config(rope_theta=10000.0), "rope_theta is 10000.0, not 500000.0"),
    "missing rope scaling": (faulty_config(rope_scaling=None), r"rope_scaling is None, not \{'factor': 8\.0"),
    "transposed square matrix": (
        faulty_rows(("o_proj.weight",), lambda matrix: matrix.T),
        r"self_attn\.o_proj\.weight differs in 992 of 1024",  # its diagonal stays
    ),
    "vocabulary shifted by one": (
        faulty_rows((EMBEDDING, HEAD), lambda rows: rows.roll(1, 0)),
        r"model\.embed_tokens\.weight differs in 4256 of 4256 elements; lm_head\.weight differs in 4256",
    ),
}


@pytest.fixture(scope="module")
def folders(make_model, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as a Hugging Face folder and as torch_dist."""
    base = tmp_path_factory.mktemp("mapping")
    source = make_model(base / "hf", **SHAPE)
    convert(source, base / "torch_dist", "torch_dist")
    return {"hf": source, "torch_dist": base / "torch_dist"}


def seal_again(folder: Path) -> None:
    """Record the hashes of what the folder holds by the true mapping."""
    model = open_checkpoint(folder)
    fields = read_checkpoint_manifest(folder)
    digests = {name: hashlib.sha256(model.read(name).numpy().tobytes()).hexdigest() for name in model.names()}
    listed = {name: ("float32", model.shape(name), digest) for name, digest in digests.items()}
    for name in ("kind", "megatron_cpt", "manifest_sha256"):
        fields.pop(name)
    fields |= {"tensors": digests, "weights_sha256": weights_sha256(listed)}
    write_checkpoint_manifest(folder, **fields)


@pytest.mark.parametrize("to", ["torch_dist", "hf"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named(
    fault: str, to: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, wrong = folders["torch_dist" if to == "hf" else "hf"], tmp_path / "wrong"
    patch, message = FAULTS[fault]
    with monkeypatch.context() as faulty:
        patch(faulty)
        convert(source, wrong, to)
    seal_again(wrong)
    assert verify(wrong)["intact"]  # its manifest tells of these very bytes: only a comparison can find the fault
    with pytest.raises(VerificationError, match=message):
        verify(source, wrong)
    right = open_checkpoint(source)
    facts = compare_logits(right, open_checkpoint(wrong))
    assert facts["far_relative_diff"] > 1000 * facts["bound"], facts
    if fault != "missing rope scaling":  # it is small where distances are
        assert facts["near_relative_diff"] > 1000 * facts["bound"], facts
    with pytest.raises(VerificationError, match="at positions .* its logits differ by .* expected at most"):
        check_logits(right, open_checkpoint(wrong))


def test_without_a_fault_nothing_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["torch_dist"], tmp_path / "back", "hf")
    for source, target in ((folders["hf"], folders["torch_dist"]), (folders["torch_dist"], tmp_path / "back")):
        facts = verify(source, target, logits=True)["logits"]
        assert facts["near_relative_diff"] == facts["far_relative_diff"] == 0.0
        assert facts["std"] > 0.3 and facts["near_positions"] == "0-63"
        assert facts["far_positions"].startswith("0-7, 2040-2047, 4088-4095,")
        assert facts["far_positions"].endswith("65528-65535, 131064-131071")
