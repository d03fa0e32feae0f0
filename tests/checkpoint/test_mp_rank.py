"""The legacy layout: cut as Megatron cuts, read whatever the cut, and never guessed."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint import Hints, convert, open_checkpoint, open_hf, show, verify
from megatron_cpt.errors import CheckpointError, InputError

# The last with fewer key-value heads (2) than ranks.
LAYOUTS = [
    (1, 1, 1, "te"),
    (2, 1, 1, "local"),
    (2, 2, 1, "te"),
    (2, 2, 2, "local"),
    (1, 4, 1, "local"),
    (8, 2, 1, "te"),
]
NORMS = {"te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")}
NORMS["local"] = ("input_layernorm.weight", "pre_mlp_layernorm.weight")


def load(folder: Path, tensor: int, stage: int | None) -> dict[str, Any]:
    name = f"mp_rank_{tensor:02d}" + ("" if stage is None else f"_{stage:03d}")
    # args is a Namespace, which is not among the plain types that weights_only allows
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(folder / "release" / name / "model_optim_rng.pt", weights_only=True)


def save(value: dict[str, Any], folder: Path, tensor: int, stage: int) -> None:
    torch.save(value, folder / "release" / f"mp_rank_{tensor:02d}_{stage:03d}" / "model_optim_rng.pt")


def expected_rank(hf: Path, tp: int, pp: int, vpp: int, spec: str, rows: int, tensor: int, stage: int) -> dict:
    """What a rank holds, cut from whole tensors as Megatron's parallel layers cut them."""
    reader = open_hf(hf)
    llama = reader.llama

    def piece(whole: torch.Tensor, dim: int) -> torch.Tensor:
        return whole.chunk(tp, dim)[tensor]

    def table(name: str) -> torch.Tensor:
        held = reader.read(name)
        return piece(torch.cat([held, held.new_zeros(rows - len(held), held.shape[1])]), 0)

    groups, each = llama.num_query_groups, llama.num_layers // pp // vpp
    chunks: dict[str, dict[str, torch.Tensor]] = {}
    for chunk in range(vpp):
        held = chunks["model" if vpp == 1 else f"model{chunk}"] = {}
        if stage == chunk == 0:
            held["embedding.word_embeddings.weight"] = table("model.embed_tokens.weight")
        for local in range(each):
            source = f"model.layers.{(chunk * pp + stage) * each + local}."
            q, k, v = (reader.read(f"{source}self_attn.{kind}_proj.weight") for kind in "qkv")
            parts = [w.view(groups, -1, llama.head_dim, llama.hidden_size) for w in (q, k, v)]
            qkv = torch.cat(parts, 1).flatten(0, 2)
            gate, up = (reader.read(f"{source}mlp.{kind}_proj.weight") for kind in ("gate", "up"))
            here = f"decoder.layers.{local}."
            held |= {
                here + "self_attention.linear_proj.weight": piece(reader.read(source + "self_attn.o_proj.weight"), 1),
                here + NORMS[spec][0]: reader.read(source + "input_layernorm.weight"),
                here + "self_attention.linear_qkv.weight": piece(qkv, 0),
                here + NORMS[spec][1]: reader.read(source + "post_attention_layernorm.weight"),
                here + "mlp.linear_fc1.weight": torch.cat([piece(gate, 0), piece(up, 0)]),
                here + "mlp.linear_fc2.weight": piece(reader.read(source + "mlp.down_proj.weight"), 1),
            }
        if stage == pp - 1 and chunk == vpp - 1:
            held["decoder.final_layernorm.weight"] = reader.read("model.norm.weight")
            if not llama.tied_embeddings:
                held["output_layer.weight"] = table("lm_head.weight")
            elif pp > 1:
                held["output_layer.weight"] = table("model.embed_tokens.weight")
    return chunks


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tp", "pp", "vpp", "spec"), LAYOUTS)
def test_every_rank_holds_its_part(tp, pp, vpp, spec, tied: bool, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", num_layers=4, tied_embeddings=tied)
    facts = convert(source, tmp_path / "legacy", "mp_rank", 16, tp=tp, pp=pp, vpp=vpp, spec=spec)
    assert (tmp_path / "legacy" / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    for stage in range(pp):
        for tensor in range(tp):
            held = load(tmp_path / "legacy", tensor, stage if pp > 1 else None)
            wanted = expected_rank(source, tp, pp, vpp, spec, facts["padded_vocab_size"], tensor, stage)
            assert {name for name in held if name.startswith("model")} == wanted.keys()
            for name, chunk in wanted.items():
                weights = [key for key in held[name] if not key.endswith("_extra_state")]
                assert sorted(weights) == sorted(chunk)
                assert len(held[name]) - len(weights) == 4 * 4 // pp // vpp
                for key, value in chunk.items():
                    assert torch.equal(held[name][key], value), key
    proof = verify(source, tmp_path / "legacy")
    assert proof["padding_rows"] == 144 - 133 and proof["files"] == tp * pp + 1
    assert show(tmp_path / "legacy")["layout"] == {
        "tensor_parallel": tp,
        "pipeline_parallel": pp,
        "virtual_pipeline": vpp,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_every_layout_and_back(dtype: torch.dtype, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", num_layers=8, num_attention_heads=8, num_query_groups=8, dtype=dtype)
    convert(source, tmp_path / "a", "mp_rank", tp=8, pp=2)
    convert(tmp_path / "a", tmp_path / "b", "torch_dist")
    convert(tmp_path / "b", tmp_path / "c", "mp_rank", tp=2, pp=4, vpp=2, spec="local")
    convert(tmp_path / "c", tmp_path / "d", "mp_rank", tp=4, pp=1, vocab_divisor=8)
    convert(tmp_path / "d", tmp_path / "back", "hf")
    there, back = open_hf(source), open_hf(tmp_path / "back")
    for name in there.names():
        assert there.dtype(name) == back.dtype(name) == dtype
        assert torch.equal(there.read(name), back.read(name)), name


@pytest.fixture
def legacy(make_model, tmp_path: Path) -> Path:
    """Two stages of two ranks, without a manifest, as Megatron leaves them."""
    convert(make_model(tmp_path / "hf", num_layers=2), tmp_path / "legacy", "mp_rank", 16, tp=2, pp=2)
    (tmp_path / "legacy" / "manifest.json").unlink()
    return tmp_path / "legacy"


def test_megatrons_arguments_say_what_it_is(legacy: Path, tmp_path: Path) -> None:
    model = open_checkpoint(legacy)
    assert model.llama == open_hf(tmp_path / "hf").llama and (model.vocab_size, model.padded_vocab_size) == (133, 144)
    convert(legacy, tmp_path / "out", "hf")
    verify(tmp_path / "hf", tmp_path / "out")

    for tensor in range(2):
        for stage in range(2):
            value = load(legacy, tensor, stage)
            del value["args"].vocab_size  # Megatron knows it from the tokenizer alone
            value["iteration"] = value["args"].iteration = 70
            # What Transformer Engine's modules leave there, and a class that only Megatron has.
            value["model"]["decoder.layers.0.self_attention._extra_state"] = None
            value["rng_state"] = [{"random": (3, (1, 2), None)}]
            save(value, legacy, tensor, stage)
    with pytest.raises(CheckpointError, match="stores 144 rows .* says nothing of how many .* --vocab-size"):
        open_checkpoint(legacy)
    convert(legacy, tmp_path / "told", "hf", hints=Hints(vocab_size=133))
    verify(tmp_path / "hf", tmp_path / "told")
    assert open_checkpoint(legacy, hints=Hints(config=tmp_path / "hf")).vocab_size == 133
    assert open_checkpoint(legacy, hints=Hints(vocab_size=140)).stated["step"] == 70


ARGUMENTS = {
    "layernorm": ({"normalization": "LayerNorm"}, "normalization='LayerNorm'"),
    "bias": ({"add_bias_linear": True}, "add_bias_linear=True"),
    "interleaved": ({"rotary_interleaved": True}, "rotary_interleaved=True"),
    "experts": ({"num_experts": 8}, "num_experts=8"),
    "other heads": ({"num_query_groups": 4}, "two models"),
    "too many layers": ({"num_layers": 3}, "is missing"),
    "too few layers": ({"num_layers": 1}, "does not belong"),
    "nonsense": ({"num_layers": "many"}, "impossible size"),
}


@pytest.mark.parametrize(("change", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_arguments_that_are_no_llamas(change: dict, message: str, legacy: Path) -> None:
    value = load(legacy, 0, 0)
    vars(value["args"]).update(change)
    save(value, legacy, 0, 0)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(legacy)


def test_uneven_stages(legacy: Path, tmp_path: Path) -> None:
    """Layers are counted, not computed: both of them on the first stage."""
    for tensor in range(2):
        first, last = load(legacy, tensor, 0), load(legacy, tensor, 1)
        for name in [name for name in last["model"] if ".layers.0." in name]:
            first["model"][name.replace(".layers.0.", ".layers.1.")] = last["model"].pop(name)
        save(first, legacy, tensor, 0)
        save(last, legacy, tensor, 1)
    convert(legacy, tmp_path / "out", "hf")
    verify(tmp_path / "hf", tmp_path / "out")


def test_what_is_damaged_or_mixed_up_is_refused(legacy: Path, make_model, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", num_layers=2, seed=1)
    convert(other, tmp_path / "mixed", "mp_rank", 16, tp=2, pp=2)
    norm = "decoder.final_layernorm.weight"

    def spoil(edit, tensor: int, stage: int) -> None:
        value = load(legacy, tensor, stage)
        edit(value["model"])
        save(value, legacy, tensor, stage)

    # A rank of another model: the norms that both ranks hold are not the same.
    value = load(legacy, 1, 1)
    save(load(tmp_path / "mixed", 1, 1), legacy, 1, 1)
    with pytest.raises(CheckpointError, match="differs from its copy .* two models"):
        convert(legacy, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
    save(value, legacy, 1, 1)

    spoil(lambda model: model.update({"decoder.layers.0.mlp.router.weight": torch.zeros(2)}), 0, 1)
    with pytest.raises(CheckpointError, match="router.weight does not belong"):
        open_checkpoint(legacy)
    save(load(legacy, 0, 1) | {"model": {k: v for k, v in value["model"].items() if k != norm}}, legacy, 0, 1)
    open_checkpoint(legacy)  # the other rank has the norm
    spoil(lambda model: model.pop("decoder.layers.0.mlp.linear_fc2.weight"), 0, 1)
    with pytest.raises(CheckpointError, match="a part of the checkpoint is missing"):
        open_checkpoint(legacy)
    (legacy / "release" / "mp_rank_01_001").rename(tmp_path / "elsewhere")
    (legacy / "release" / "mp_rank_01_001").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(legacy)
    (legacy / "release" / "mp_rank_01_001").unlink()
    (tmp_path / "elsewhere").rename(legacy / "release" / "mp_rank_01_001")
    (legacy / "release" / "mp_rank_01_001" / "model_optim_rng.pt").unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        open_checkpoint(legacy)
    (legacy / "release" / "mp_rank_01_001").rmdir()
    with pytest.raises(CheckpointError, match="every tensor and pipeline rank"):
        open_checkpoint(legacy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tp": 3}, "got --tp 3 for 2 key-value heads"),
        ({"tp": 16}, "attention heads 8 to be cut into 16"),
        ({"pp": 2}, "layers 3 to be cut into 2"),
        ({"vpp": 2}, "virtual stages with a pipeline"),
        ({"tp": 0}, "expected 1 or more"),
        ({"tp": 2, "vocab_divisor": 3}, "padded vocabulary 135 to be cut into 2"),
        ({"spec": "apex"}, "expected 'te' or 'local'"),
    ],
)
def test_impossible_cuts(arguments: dict, message: str, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "out", "mp_rank", **arguments)
    assert not (tmp_path / "out").exists()
