"""Shapes and precisions beside the plain one: tied tables, Llama 3's rotary scaling, odd TP sizes, bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from megatron_cpt.checkpoint import hf_config, hf_shapes, write_hf
from megatron_cpt.checkpoint.convert import convert
from megatron_cpt.checkpoint.torch_dist import open_torch_dist
from megatron_cpt.config.schema import LlamaShape, RopeScaling
from megatron_cpt.training.folder import last_checkpoint
from tests.training.conftest import GLOBAL_BATCH, SHAPE, STEPS, Tiny

VOCAB_SIZE = 250
# As Llama 3.2 has it, with heads that are wider together than the hidden size.
LLAMA_3 = SHAPE.model_copy(
    update={
        "num_layers": 4,
        "head_dim": 12,
        "rope_theta": 500000.0,
        "rope_scaling": RopeScaling(factor=32.0),
        "tied_embeddings": True,
    }
)
THREES = SHAPE.model_copy(
    update={"num_layers": 2, "hidden_size": 48, "num_attention_heads": 6, "num_query_groups": 3, "ffn_hidden_size": 96}
)
TENSOR_2, PIPELINE_2 = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


def write_model(folder: Path, shape: LlamaShape) -> Path:
    """Random weights large enough that positions matter."""
    draw = torch.Generator().manual_seed(1)
    entries = [
        (name, size, torch.float32, lambda size=size: torch.randn(size, generator=draw) * 0.1 + (len(size) == 1))
        for name, size in hf_shapes(shape, VOCAB_SIZE).items()
    ]
    write_hf(folder, entries, hf_config(shape, VOCAB_SIZE, "float32", 1, 2))
    return folder


@pytest.fixture(scope="module")
def runs(tiny: Tiny) -> dict[str, list[dict[str, Any]]]:
    """Metrics of every run."""
    shapes = {"llama3": LLAMA_3, "threes": THREES}
    given = {name: {"initial_checkpoint": str(write_model(tiny.root / f"{name}-hf", s))} for name, s in shapes.items()}
    data = tiny.config(tiny.root / "unused").model_dump(mode="json")["data"]
    one_language = {"data": {**data, "train": [{**source, "language": "a"} for source in data["train"]]}}
    # Ranks find nothing packed here: the first of them packs while the others wait.
    packed = {
        "data": {**data, "loader_workers": 1, "train": [{**source, "packing": "best_fit"} for source in data["train"]]}
    }
    # The first update of Adam is the learning rate times the sign of the gradient.
    optimizer = {"learning_rate": 1e-3, "weight_decay": 0.0, "clip_grad": 0.0, "vocabulary_learning_rate_factor": 3.0}
    factor = {**given["llama3"], "optimizer": optimizer, "train_steps": 1}
    slow = {"train_steps": 3, "eval_interval_steps": 1}
    one = {
        "llama3-one": given["llama3"],
        "threes-one": given["threes"],
        "one-language": one_language,
        "slow-start": slow,
        "factor": {**factor, **given["threes"]},
    }
    two = {
        "packed-DP2": packed,
        "bf16": {"precision": "bf16", "parallel": {**TENSOR_2, "sequence_parallel": True}},
        "llama3-TP2": {**given["llama3"], "parallel": {**TENSOR_2, "sequence_parallel": True}},
        "llama3-PP2": {**given["llama3"], "parallel": PIPELINE_2},
        "factor-PP2": {**factor, "parallel": PIPELINE_2},
    }
    return {
        **tiny.train_many(one, 1),
        **tiny.train_many(two, 2),
        **tiny.train_many({"packed-one": {**packed, "data": {**packed["data"], "loader_workers": 0}}}, 1),
        **tiny.train_many({"threes-TP3": {**given["threes"], "parallel": {"tensor_model_parallel_size": 3}}}, 3),
    }


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    found = [record["loss"] for record in metrics if "loss" in record]
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("llama3-TP2", "llama3-one"),
        ("llama3-PP2", "llama3-one"),
        ("threes-TP3", "threes-one"),
        ("packed-DP2", "packed-one"),
    ],
)
def test_layout_equals_one_process(name: str, one: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    difference = max(abs(a - b) for a, b in zip(losses(runs[name]), losses(runs[one]), strict=True))
    norms = [[record["grad_norm"] for record in runs[run] if "loss" in record] for run in (name, one)]
    norm = max(abs(a / b - 1) for a, b in zip(*norms, strict=True))
    print(f"{name}: loss {difference:.1e}, gradient norm {norm:.1e}")
    assert difference <= 2e-6 and norm <= 1e-4
    assert losses(runs[one])[-1] < losses(runs[one])[0]


@pytest.mark.parametrize("name", ["llama3-one", "llama3-TP2", "llama3-PP2", "threes-TP3"])
def test_export_equals_the_trained_model(name: str, runs: dict[str, list[dict[str, Any]]], tiny: Tiny) -> None:
    """The engine's own logits, in its layout, against transformers on the exported folder, at every position."""
    checkpoint = last_checkpoint(tiny.root / name)
    exported = tiny.root / f"{name}-exported"
    convert(checkpoint, exported, "hf", tokenizer=tiny.tokenizer)
    proof = load_file(checkpoint / "proof.safetensors")
    length = SHAPE.max_position_embeddings - (1 if name == "threes-TP3" else 0)  # a multiple of TP
    assert proof["positions"].tolist() == list(range(length))
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(exported)(proof["tokens"][None]).logits[0]
    difference = (logits - proof["logits"]).abs().max().item()
    print(f"{name}: {difference:.1e} of {logits.abs().max().item():.1f}")
    assert difference <= 1e-4


def test_tied_tables_stay_one(runs: dict[str, list[dict[str, Any]]], tiny: Tiny) -> None:
    """On two stages the table lies twice; both copies get the sum of both gradients."""
    one, two = (open_torch_dist(last_checkpoint(tiny.root / f"llama3-{name}")) for name in ("one", "PP2"))
    assert "lm_head.weight" not in one.names() and one.names() == two.names()
    for name in one.names():
        torch.testing.assert_close(two.read(name), one.read(name), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "start"), [("factor", "threes"), ("factor-PP2", "llama3")])
def test_embedding_and_head_learn_at_their_own_rate(
    name: str, start: str, runs: dict[str, list[dict[str, Any]]], tiny: Tiny
) -> None:
    """Three times that of the body, tied on two stages as well."""
    before = load_file(tiny.root / f"{start}-hf" / "model.safetensors")
    after = open_torch_dist(last_checkpoint(tiny.root / name))
    moved = {key: (after.read(key)[:VOCAB_SIZE] - before[key][:VOCAB_SIZE]).abs().max().item() for key in before}
    expected = {key: 3e-3 if key in ("model.embed_tokens.weight", "lm_head.weight") else 1e-3 for key in before}
    assert moved == pytest.approx(expected, rel=1e-3)


def test_bf16_stays_near_fp32(
    runs: dict[str, list[dict[str, Any]]], reference: list[dict[str, Any]], tiny: Tiny
) -> None:
    difference = max(abs(a - b) for a, b in zip(losses(runs["bf16"]), losses(reference), strict=True))
    print(f"bf16 at TP2 with sequence parallelism: {difference:.1e}")
    assert 0 < difference <= 0.05
    reader = open_torch_dist(last_checkpoint(tiny.root / "bf16"))
    assert {reader.dtype(name) for name in reader.names()} == {torch.bfloat16}


def test_two_sources_of_a_language_are_scored_together(
    runs: dict[str, list[dict[str, Any]]], reference: list[dict[str, Any]]
) -> None:
    """The order does not depend on the languages' names, so the steps are those of the reference."""
    for together, apart in zip(runs["one-language"], reference, strict=True):
        if "loss" in together:
            assert together["loss"] == apart["loss"]
            assert together["train_bits_per_byte"].keys() == {"a"}
            low, high = sorted(apart["train_bits_per_byte"].values())
            assert low < together["train_bits_per_byte"]["a"] < high


def test_the_rate_of_steps_is_that_of_steps_alone(runs: dict[str, list[dict[str, Any]]]) -> None:
    """What surrounds them (validation, waiting for the first batch) lasts hours here and does not count."""
    rates = [record["tokens_per_second"] for record in runs["slow-start"] if "loss" in record]
    assert len(rates) == 3 and min(rates) > GLOBAL_BATCH * 32 / 3600
