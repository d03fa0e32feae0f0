"""Meta's own checkpoints: read and written for any number of files, against what Meta's code computes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_cpt.checkpoint import Hints, convert, open_checkpoint, runs, show, verify
from megatron_cpt.checkpoint.archive import Array, lay_out_archive
from megatron_cpt.checkpoint.meta_params import ffn_fields
from megatron_cpt.errors import CheckpointError
from tests.checkpoint import meta_reference as reference
from tests.checkpoint.llama_kinds import random_tokens, relative_error, transformers_logits
from tests.checkpoint.meta_reference import FFN, PARAMS, SIZES, VOCAB_SIZE, change

LENGTH = 300
KINDS: dict[str, dict[str, Any]] = {
    "llama-2": {**SIZES, "num_query_groups": 8, "rope_theta": 1e4, "max_position_embeddings": 4096},
    "llama-3": {**SIZES, "max_position_embeddings": 8192},
    "llama-3.1": {**SIZES, "rope_scaling": {"factor": 8.0}, "rope_theta": 1e4, "max_position_embeddings": 131072},
    "llama-3.2": {
        **SIZES,
        "rope_scaling": {"factor": 32.0},
        "tied_embeddings": True,
        "max_position_embeddings": 131072,
    },
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def params_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "params.json").read_text())


@pytest.mark.parametrize(
    ("kind", "count"),
    [("llama-2", 1), ("llama-2", 4), ("llama-3", 2), ("llama-3.1", 1), ("llama-3.1", 4), ("llama-3.2", 2)],
)
def test_what_is_written_is_the_model_to_metas_code(kind: str, count: int, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", VOCAB_SIZE, **KINDS[kind])
    there = convert(source, tmp_path / "meta", "meta", tp=count)
    assert there["padded_vocab_size"] == VOCAB_SIZE
    assert len(list((tmp_path / "meta").glob("consolidated.*.pth"))) == count == there["files"]
    weights = reference.read(tmp_path / "meta", table=1 if kind == "llama-2" else 0)
    tokens = random_tokens(1, LENGTH)
    factor = KINDS[kind].get("rope_scaling", {}).get("factor")
    got = reference.logits(weights, params_of(tmp_path / "meta"), tokens[0], factor)
    assert relative_error(got[None], transformers_logits(source, tokens).double()) < 1e-5
    assert show(tmp_path / "meta")["layout"] == {"tensor_parallel": count}
    verify(source, tmp_path / "meta")
    back = convert(tmp_path / "meta", tmp_path / "back", "hf")
    assert back["weights_sha256"] == there["weights_sha256"]
    before, after = weights_of(source), weights_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    for name in ("config.json", "generation_config.json"):
        assert (source / name).read_text() == (tmp_path / "back" / name).read_text()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("table", [0, 1])
def test_what_metas_code_saves_is_read(table: int, count: int, tmp_path: Path) -> None:
    weights = reference.random_weights(PARAMS, VOCAB_SIZE, FFN)
    constants = {"rope.freqs": torch.ones(4)}
    folder = reference.write(tmp_path / "meta", {"model": PARAMS}, weights | constants, count, table)
    convert(folder, tmp_path / "hf", "hf")
    tokens = random_tokens(1, LENGTH)
    got = transformers_logits(tmp_path / "hf", tokens).double()
    assert relative_error(got, reference.logits(weights, PARAMS, tokens[0])[None]) < 1e-5
    verify(folder, tmp_path / "hf")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("form", ["left out", "shared", "stored twice"])
def test_a_tied_head_is_recognised(form: str, count: int, tmp_path: Path) -> None:
    params = {**PARAMS, "use_scaled_rope": True, "rope_theta": 500000.0, "vocab_size": VOCAB_SIZE}
    weights = reference.random_weights(params, VOCAB_SIZE, FFN)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    folder = reference.write(tmp_path / "meta", params, weights, count, 0)

    def edit(held: dict[str, torch.Tensor]) -> None:
        if form == "shared":
            held["output.weight"] = held["tok_embeddings.weight"]
        elif form == "left out":
            del held["output.weight"]

    for rank in range(count):
        change(folder, rank, edit)
    reader = open_checkpoint(folder)
    assert reader.llama.tied_embeddings and "lm_head.weight" not in reader.tensors
    assert reader.llama.rope_scaling.factor == 32 and "Llama 3.2" in reader.stated["assumed"]
    convert(folder, tmp_path / "hf", "hf")
    tokens = random_tokens(1, LENGTH)
    got = transformers_logits(tmp_path / "hf", tokens).double()
    assert relative_error(got, reference.logits(weights, params, tokens[0], 32.0)[None]) < 1e-5


def test_files_of_tied_heads_are_not_larger(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", VOCAB_SIZE, **{**KINDS["llama-2"], "tied_embeddings": True})
    facts = convert(source, tmp_path / "meta", "meta", tp=2, dtype="bfloat16")
    held = torch.load(tmp_path / "meta" / "consolidated.01.pth", weights_only=True)
    assert held["output.weight"].data_ptr() == held["tok_embeddings.weight"].data_ptr()
    assert held["norm.weight"].dtype == torch.bfloat16 and facts["cast"] == "bfloat16"
    verify(source, tmp_path / "meta")


# Sizes of the published models, from their params.json and config.json; layers where the release shows in nothing else.
_3 = {"n_kv_heads": 8, "norm_eps": 1e-5, "vocab_size": 128256, "rope_theta": 5e5}
_SCALED = {**_3, "use_scaled_rope": True}
PUBLISHED = [
    ("Llama 1", 1, 32000, 11008, {"dim": 4096, "n_heads": 32, "norm_eps": 1e-6, "multiple_of": 256}, 2048, None),
    ("Llama 1", 4, 32000, 17920, {"dim": 6656, "n_heads": 52, "norm_eps": 1e-6, "multiple_of": 256}, 2048, None),
    (
        "Llama 1",
        1,
        32000,
        22016,
        {"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5, "multiple_of": 256},
        2048,
        None,
    ),
    ("Llama 2", 1, 32000, 11008, {"dim": 4096, "n_heads": 32, "norm_eps": 1e-5, "multiple_of": 256}, 4096, None),
    (
        "Llama 2",
        1,
        32000,
        28672,
        {
            "dim": 8192,
            "n_heads": 64,
            "n_layers": 80,
            "n_kv_heads": 8,
            "norm_eps": 1e-5,
            "multiple_of": 4096,
            "ffn_dim_multiplier": 1.3,
        },
        4096,
        None,
    ),
    (
        "Code Llama",
        1,
        32016,
        11008,
        {
            "dim": 4096,
            "n_heads": 32,
            "norm_eps": 1e-5,
            "multiple_of": 256,
            "ffn_dim_multiplier": 1.0,
            "rope_theta": 1e6,
        },
        16384,
        None,
    ),
    (
        "Llama 3",
        1,
        128256,
        14336,
        {"dim": 4096, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **_3},
        8192,
        None,
    ),
    (
        "Llama 3.1",
        8,
        128256,
        53248,
        {"dim": 16384, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2, **_SCALED},
        131072,
        8.0,
    ),
    (
        "Llama 3.2",
        1,
        128256,
        8192,
        {"dim": 2048, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.5, **_SCALED},
        131072,
        32.0,
    ),
]


@pytest.mark.parametrize(("release", "count", "vocab_size", "ffn", "params", "length", "factor"), PUBLISHED)
def test_the_release_is_told_by_the_files(
    release, count, vocab_size, ffn, params, length, factor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "BLOCK_BYTES", 1 << 16)  # the tables differ at once
    params = {"n_layers": 2, **params}
    tied = release == "Llama 3.2"
    dim, head = params["dim"], params["dim"] // params["n_heads"]
    kv = params.get("n_kv_heads", params["n_heads"]) * head
    table = 0 if vocab_size > 100000 else 1
    shapes = {"norm": (dim,), "tok_embeddings": (vocab_size, dim), "output": (vocab_size, dim)}
    for at in (f"layers.{layer}." for layer in range(params["n_layers"])):
        shapes |= {f"{at}attention.{n}": size for n, size in [("wq", (dim, dim)), ("wo", (dim, dim))]}
        shapes |= {f"{at}attention.{n}": (kv, dim) for n in ("wk", "wv")}
        shapes |= {f"{at}feed_forward.{n}": size for n, size in [("w1", (ffn, dim)), ("w2", (dim, ffn))]}
        shapes |= {f"{at}feed_forward.w3": (ffn, dim), f"{at}attention_norm": (dim,), f"{at}ffn_norm": (dim,)}
    held = {}
    for name, shape in shapes.items():
        axis = reference.cut_dimension(f"{name}.weight", table)
        part = tuple(size // count if i == axis else size for i, size in enumerate(shape))
        held[f"{name}.weight"] = Array(-1, part, (part[-1], 1)[-len(part) :], torch.bfloat16)
    if tied:
        held["output.weight"] = held["tok_embeddings.weight"]
    size, parts, offsets = lay_out_archive(held)
    for rank in range(count):  # nothing but headers, and a number that tells the head from the embedding
        with open(tmp_path / f"consolidated.{rank:02d}.pth", "wb") as file:
            file.truncate(size)
            for offset, data in [*parts, *([] if tied else [(offsets[2], b"\1")])]:
                os.pwrite(file.fileno(), data, offset)
    (tmp_path / "params.json").write_text(json.dumps(params))
    reader = open_checkpoint(tmp_path)
    assert reader.llama.max_position_embeddings == length and reader.llama.tied_embeddings == tied
    assert (reader.llama.rope_scaling.factor if reader.llama.rope_scaling else None) == factor
    assert reader.llama.ffn_hidden_size == ffn and reader.vocab_size == vocab_size
    assert f"as of {release};" in reader.stated["assumed"]


def test_a_config_decides_and_has_to_agree(tmp_path: Path) -> None:
    model = reference.small(tmp_path / "meta")
    convert(model, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 4096
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config, "max_position_embeddings": 777, "rope_theta": 2e4, "rope_parameters": None}))
    for place in (path, tmp_path):
        reader = open_checkpoint(model, hints=Hints(config=place))
        assert (reader.llama.max_position_embeddings, reader.llama.rope_theta) == (777, 2e4)
        assert "assumed" not in reader.stated
    for field, value, message in [
        ("rms_norm_eps", 1e-6, "rms_norm_eps 1e-06"),
        ("vocab_size", 99, "vocabulary of 99"),
        ("tie_word_embeddings", True, "output.weight of .* differs"),
        ("num_key_value_heads", 2, "num_key_value_heads 2"),
        (
            "rope_scaling",
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            | {"original_max_position_embeddings": 8192},
            "scaled rope True",
        ),
    ]:
        path.write_text(json.dumps({**config, "rope_parameters": None, field: value}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(model, hints=Hints(config=path))
    for wrong in (VOCAB_SIZE - 1, VOCAB_SIZE + 1):
        with pytest.raises(CheckpointError, match=f"itself says a vocabulary of {VOCAB_SIZE}, not {wrong}"):
            open_checkpoint(model, hints=Hints(vocab_size=wrong))
    assert open_checkpoint(model, hints=Hints(tokenizer_size=VOCAB_SIZE - 1)).vocab_size == VOCAB_SIZE
    with pytest.raises(CheckpointError, match="the tokenizer has 137 ids"):
        open_checkpoint(model, hints=Hints(tokenizer_size=VOCAB_SIZE + 1))
    for rank in range(2):
        change(model, rank, lambda held: held.pop("output.weight"))
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="output.weight is missing, and .*config.json does not tie"):
        open_checkpoint(model, hints=Hints(config=path))


def test_equal_tables_that_are_two_stay_two(tmp_path: Path) -> None:
    weights = reference.random_weights(PARAMS, VOCAB_SIZE, FFN)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    folder = reference.write(tmp_path / "meta", PARAMS, weights, 2, 1)
    assert open_checkpoint(folder).llama.tied_embeddings
    convert(folder, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    reader = open_checkpoint(folder, hints=Hints(config=tmp_path / "hf"))
    assert torch.equal(reader.read("lm_head.weight"), weights["output.weight"])


def metas_ffn(dim: int, multiple_of: int, ffn_dim_multiplier: float | None = None) -> int:
    hidden = int(2 * (dim * 4) / 3)
    hidden = hidden if ffn_dim_multiplier is None else int(ffn_dim_multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of


@settings(max_examples=200, deadline=None)
@given(st.integers(8, 20000), st.integers(8, 80000))
def test_params_lead_to_any_ffn(dim: int, ffn: int) -> None:
    assert metas_ffn(dim, **ffn_fields(dim, ffn)) == ffn


@pytest.mark.parametrize(
    ("dim", "ffn", "multiplier"),
    [(4096, 11008, None), (5120, 13824, None), (8192, 28672, 1.3), (4096, 14336, 1.3), (2048, 8192, 1.5)],
)
def test_params_are_those_of_published_models(dim: int, ffn: int, multiplier: float | None) -> None:
    assert ffn_fields(dim, ffn).get("ffn_dim_multiplier") == multiplier


def test_only_fields_that_older_code_knows(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", VOCAB_SIZE, **KINDS["llama-2"], norm_epsilon=1e-6)
    convert(source, tmp_path / "meta", "meta")
    names = {"dim", "n_layers", "n_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "vocab_size"}
    assert params_of(tmp_path / "meta").keys() <= names
    third = make_model(tmp_path / "hf-3", VOCAB_SIZE, **KINDS["llama-3.1"])
    convert(third, tmp_path / "meta-3", "meta")
    written = params_of(tmp_path / "meta-3")
    assert written["use_scaled_rope"] is True and written["rope_theta"] == 1e4 and written["n_kv_heads"] == 4


def test_changes_after_writing_are_noticed(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", VOCAB_SIZE, **KINDS["llama-3"])
    convert(source, tmp_path / "meta", "meta", tp=2)
    assert verify(source, tmp_path / "meta")["files"] == 3
    params = params_of(tmp_path / "meta")
    (tmp_path / "meta" / "params.json").write_text(json.dumps({**params, "norm_eps": 1e-6}))
    with pytest.raises(CheckpointError, match="manifest.json: it says rms_norm_eps"):
        open_checkpoint(tmp_path / "meta")


def test_an_interrupted_conversion_goes_on(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", VOCAB_SIZE, **KINDS["llama-3.2"])

    def stop(done: int, total: int) -> None:
        if done * 2 > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "meta", "meta", tp=2, workers=1, on_progress=stop)
    assert not (tmp_path / ".meta.partial" / "params.json").exists()
    assert 0 < convert(source, tmp_path / "meta", "meta", tp=2)["resumed"] < 20
    verify(source, tmp_path / "meta")
