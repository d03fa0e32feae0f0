"""NeuronX Distributed's checkpoints: what is written computes the same on every rank, what is read is bit-exact."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpt.checkpoint import convert, show, verify
from megatron_cpt.checkpoint.described import Hints
from megatron_cpt.checkpoint.opening import open_checkpoint
from megatron_cpt.errors import CheckpointError, VerificationError
from tests.checkpoint.llama_kinds import relative_error, transformers_logits
from tests.checkpoint.nxd_rank import cut, load_ranks, rank_logits, save_ranks, save_ranks_xser

VOCAB_SIZE = 136
PLAIN = {"vocab_size": VOCAB_SIZE, "head_dim": 4}  # heads that add up to the hidden size
KINDS: dict[str, dict[str, Any]] = {
    "grouped": {**PLAIN, "num_query_groups": 2},
    "alike": {**PLAIN, "num_query_groups": 8},
    "grouped, tied": {**PLAIN, "num_query_groups": 2, "tied_embeddings": True},
    "alike, tied": {**PLAIN, "num_query_groups": 8, "tied_embeddings": True, "dtype": torch.bfloat16},
}
CUTS = [("grouped", 1, 1), ("grouped", 2, 2), ("grouped", 8, 1), ("alike", 2, 2)]
CUTS += [("grouped, tied", 1, 1), ("grouped, tied", 2, 2), ("alike, tied", 8, 1)]
QKV = "model.layers.{}.self_attn.qkv_proj.weight"


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def rank_file(tag: Path, tp: int, pp: int = 0) -> Path:
    return tag / "model" / f"dp_rank_00_tp_rank_{tp:02d}_pp_rank_{pp:02d}.pt"


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    held = torch.load(path, weights_only=True)
    change(held)
    torch.save(held, path)


@pytest.fixture
def hf(make_model, tmp_path: Path) -> Path:
    return make_model(tmp_path / "hf", **KINDS["grouped"])


@pytest.fixture
def tag(hf: Path, tmp_path: Path) -> Path:
    convert(hf, tmp_path / "tag", "nxd", tp=2, pp=2)
    return tmp_path / "tag"


@pytest.mark.parametrize(("kind", "tp", "pp"), CUTS)
def test_there_and_back(kind: str, tp: int, pp: int, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", **KINDS[kind])
    (source / "config.json").write_text(json.dumps(config_of(source) | {"pad_token_id": 3, "initializer_range": 0.02}))
    facts = convert(source, tmp_path / "tag", "nxd", tp=tp, pp=pp)
    assert facts["padded_vocab_size"] == VOCAB_SIZE and facts["files"] == tp * pp
    assert verify(source, tmp_path / "tag")["files"] == tp * pp + 3  # checkpoint, config.json and done
    back = convert(tmp_path / "tag", tmp_path / "back", "hf")
    assert back["weights_sha256"] == facts["weights_sha256"]
    assert_same(weights_of(source), weights_of(tmp_path / "back"))
    assert config_of(source) == config_of(tmp_path / "tag") == config_of(tmp_path / "back")
    (tmp_path / "tag" / "manifest.json").unlink()  # as in a tag that NxD has written
    assert convert(tmp_path / "tag", tmp_path / "foreign", "hf")["weights_sha256"] == facts["weights_sha256"]
    assert config_of(source) == config_of(tmp_path / "foreign")
    again = convert(tmp_path / "tag", tmp_path / "again", "nxd", tp=4, pp=3)  # from any layout to any other
    assert again["weights_sha256"] == facts["weights_sha256"]


@pytest.mark.parametrize(("kind", "tp", "pp"), CUTS)
def test_the_ranks_compute_what_transformers_computes(kind: str, tp: int, pp: int, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", **KINDS[kind])
    convert(source, tmp_path / "tag", "nxd", tp=tp, pp=pp)
    ranks, config = load_ranks(tmp_path / "tag"), config_of(source)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = transformers_logits(source, tokens)
    assert len(ranks) == tp and expected.std() > 0.3
    assert relative_error(rank_logits(ranks, config, tokens), expected) < 1e-5
    if tp > 1:  # and this sees it when queries stand with the keys of others, or outputs with the queries of others
        name = "model.layers.1.self_attn.o_proj.weight"
        ranks[0][name], ranks[1][name] = ranks[1][name], ranks[0][name]
        assert relative_error(rank_logits(ranks, config, tokens), expected) > 1e-2


def test_files_and_names(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", **KINDS["grouped, tied"])
    convert(source, tmp_path / "tag", "nxd", tp=8, pp=2)
    tag = tmp_path / "tag"
    assert (tag / "checkpoint").read_text() == (tag / "done").read_text() == "1"
    assert (tag / "done").stat().st_mtime_ns >= (tag / "config.json").stat().st_mtime_ns
    first, last = (torch.load(rank_file(tag, 5, pp), weights_only=True) for pp in (0, 1))
    inside = "self_attn.qkv_proj.weight_qkv", "self_attn.o_proj.weight", "mlp.gate_up_proj.weight"
    inside += "mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"
    layers = [{f"model.layers.{number}.{name}" for name in inside} for number in range(3)]
    assert first.keys() == {"model.embed_tokens.weight"} | layers[0]  # what layers do not divide is in the last stages
    assert last.keys() == layers[1] | layers[2] | {"model.norm.weight", "lm_head.weight"}
    weights = weights_of(source)
    assert torch.equal(last["lm_head.weight"], weights["model.embed_tokens.weight"].chunk(8)[5])
    for rank, expected in enumerate(cut(weights, config_of(source), 8, "B", times=4)):  # trn1's order of heads
        held = torch.load(rank_file(tag, rank), weights_only=True)
        assert_same(held, {name: expected[name] for name in held})


FORMS = [
    ("grouped", "A", 2, 1, "trn1"),
    ("grouped", "A", 8, 4, "trn1"),
    ("grouped", "A", 8, 4, "trn2"),
    ("grouped", "A", 4, 4, "trn1"),  # two copies on a rank
    ("grouped", "A", 4, 4, "trn2"),
    ("grouped", "B", 4, 2, "trn2"),
    ("grouped", "B", 4, 4, "trn1"),
    ("grouped, tied", "B", 1, 1, "trn1"),
    ("alike", "B", 2, 1, "trn1"),
    ("alike", "C", 4, 1, "trn1"),
    ("alike, tied", "D", 8, 1, "trn1"),
    ("grouped", "D", 2, 1, "trn1"),
]


# A tensor in a file of its own is read alike, whatever it holds: each form once.
@pytest.mark.parametrize(
    ("kind", "form", "tp", "times", "order", "xser"),
    [(*form, False) for form in FORMS] + [(*FORMS[number], True) for number in (4, 6, 9, 10)],
)
def test_reads_every_form(
    kind: str, form: str, tp: int, times: int, order: str, xser: bool, make_model, tmp_path: Path, monkeypatch
) -> None:
    source = make_model(tmp_path / "hf", **KINDS[kind])
    ranks = cut(weights_of(source), config_of(source), tp, form, times, order)
    folder = tmp_path / "tags" / "step_7" / "model"
    save_ranks_xser(folder, ranks, monkeypatch) if xser else save_ranks(folder, ranks)
    shutil.copy(source / "config.json", tmp_path / "tags")
    layout = show(folder.parent)["layout"]
    assert (layout["tensor_parallel"], layout.get("kv_replication", 1)) == (tp, times)
    assert layout.get("order_of_heads", order) == order
    convert(folder.parent, tmp_path / "back", "hf")
    assert_same(weights_of(source), weights_of(tmp_path / "back"))


def test_head_of_a_tied_model_may_be_missing_but_not_another(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf", **KINDS["grouped, tied"])
    convert(source, tmp_path / "tag", "nxd", tp=2)
    for rank in range(2):
        edit(rank_file(tmp_path / "tag", rank), lambda held: held["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match="embed_tokens.weight in .* differs from its copy"):
        convert(tmp_path / "tag", tmp_path / "back", "hf")
    for rank in range(2):
        edit(rank_file(tmp_path / "tag", rank), lambda held: held.pop("lm_head.weight"))
    convert(tmp_path / "tag", tmp_path / "back", "hf")
    assert_same(weights_of(source), weights_of(tmp_path / "back"))


def test_what_training_leaves_in_a_file(tag: Path, hf: Path, tmp_path: Path) -> None:
    def change(held: dict[str, Any]) -> None:
        for name in [name for name in held if ".layers." in name]:
            held[name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn.")] = held.pop(name)
        held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)

    for rank in range(2):
        edit(rank_file(tag, rank), change)
    (tag / "optim").mkdir()
    (tag / "user_content.pt").write_bytes(b"not read")
    convert(tag, tmp_path / "back", "hf")
    assert_same(weights_of(hf), weights_of(tmp_path / "back"))


def test_folders_that_can_be_given(hf: Path, tag: Path, make_model, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name, time in (("step_10", 3), ("step_9", 5), ("step_11", 9)):
        shutil.copytree(tag, run / name)
        os.utime(run / name / "done", ns=(time, time))
    (run / "step_11" / "done").unlink()  # was not finished
    assert open_checkpoint(run).folder == run / "step_9"
    assert open_checkpoint(run / "step_11").folder == run / "step_11"
    assert open_checkpoint(run / "step_10" / "model").folder == run / "step_10"
    (run / "step_10" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json in it or above it"):
        open_checkpoint(run / "step_10")
    for hint in (hf, hf / "config.json"):
        assert open_checkpoint(run / "step_10", hints=Hints(config=hint)).format == "nxd"
    shutil.copytree(run / "step_9", hf / "pretrained_weight")
    assert open_checkpoint(hf).format == "hf"
    other = make_model(tmp_path / "other", **{**PLAIN, "num_query_groups": 8})
    with pytest.raises(CheckpointError, match="two models"):
        open_checkpoint(run / "step_10", hints=Hints(config=other))


def test_a_padded_table_needs_the_vocabulary_size(hf: Path, tag: Path, tmp_path: Path) -> None:
    assert open_checkpoint(tag, hints=Hints(tokenizer_size=60)).vocab_size == 136  # config.json counts what is stored
    with pytest.raises(CheckpointError, match="itself says a vocabulary of 136, not 60"):
        open_checkpoint(tag, hints=Hints(vocab_size=60))
    config = config_of(tag) | {"vocab_size": 133}
    (tag / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="136 rows on all ranks, config.json says 133"):
        open_checkpoint(tag)
    for wrong in (137, 0):
        with pytest.raises(CheckpointError, match=r"config\.json says 133"):
            open_checkpoint(tag, hints=Hints(vocab_size=wrong))
    for true_size in (133, 60):  # 60: all the rows of rank 1 are padding
        hints, weights = Hints(vocab_size=true_size), weights_of(hf)
        padding = torch.cat(list(open_checkpoint(tag, hints=hints).padding_blocks("lm_head.weight")))
        assert torch.equal(padding, weights["lm_head.weight"][true_size:])
        convert(tag, tmp_path / f"back{true_size}", "hf", hints=hints)
        tables = ("lm_head.weight", "model.embed_tokens.weight")
        cut_off = {name: weights[name][:true_size] for name in tables}
        assert_same(weights | cut_off, weights_of(tmp_path / f"back{true_size}"))


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ({}, {"tp": 2, "vpp": 2}, "got --vpp for nxd"),
        ({"vocab_size": 133}, {"tp": 2}, "tp 2 for a vocabulary of 133"),
        ({"ffn_hidden_size": 84}, {"tp": 8}, "tp 8 for 84 ffn rows"),
        ({"vocab_size": 128}, {"tp": 16}, "tp 16 for 8 attention heads"),
        ({"num_attention_heads": 12, "num_query_groups": 4, "hidden_size": 48}, {"tp": 3}, "for 4 key-value heads"),
        ({"head_dim": 12}, {"tp": 2}, "8 heads of 12 in a hidden size of 32"),
        ({}, {"pp": 4}, "a layer for each stage"),
    ],
)
def test_what_cannot_be_cut(model, arguments, message, make_model, tmp_path: Path) -> None:
    model = {**KINDS["grouped"], "ffn_hidden_size": 96, **({"vocab_size": 144} if "tp" in arguments else {}), **model}
    with pytest.raises(CheckpointError, match=message):
        convert(make_model(tmp_path / "hf", **model), tmp_path / "tag", "nxd", **arguments)
    assert not (tmp_path / "tag").exists()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_a_malicious_pickle_does_nothing(tag: Path, tmp_path: Path) -> None:
    path = rank_file(tag, 0)
    torch.save(torch.load(path, weights_only=True) | {"model.norm.weight": Payload(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \w+\.mkdir, expected a tensor"):
        open_checkpoint(tag)
    torch.save(Payload(tmp_path / "ran"), path)
    with pytest.raises(CheckpointError, match="expected a dict of tensors by name"):
        open_checkpoint(tag)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="damaged or unsafe"):
        open_checkpoint(tag)
    assert not (tmp_path / "ran").exists()


def test_references_to_what_is_not_there(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = cut(weights_of(hf), config_of(hf), 2, "B")
    save_ranks_xser(tmp_path / "tag" / "model", ranks, monkeypatch)
    shutil.copy(hf / "config.json", tmp_path / "tag")
    tensors = tmp_path / "tag" / "model" / (rank_file(tmp_path, 1).name + ".tensors")
    assert open_checkpoint(tmp_path / "tag").format == "nxd"
    held = tensors / "tensor_3.pt"
    held.rename(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match=r"tensor_3\.pt, which is missing"):
        open_checkpoint(tmp_path / "tag")
    held.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(tmp_path / "tag")
    held.unlink()
    (tmp_path / "elsewhere.pt").rename(held)
    tensors.rename(tmp_path / "elsewhere")
    tensors.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(tmp_path / "tag")


def test_ranks_that_are_missing_or_too_many(tag: Path, hf: Path, tmp_path: Path) -> None:
    shutil.copy(rank_file(tag, 1), rank_file(tag, 1).with_name("dp_rank_00_ep_rank_01_tp_rank_01_pp_rank_00.pt"))
    with pytest.raises(CheckpointError, match="experts"):
        open_checkpoint(tag)
    rank_file(tag, 1).with_name("dp_rank_00_ep_rank_01_tp_rank_01_pp_rank_00.pt").unlink()
    shutil.copy(rank_file(tag, 1), rank_file(tag, 1, 2))
    with pytest.raises(CheckpointError, match="tp_rank_00_pp_rank_02.pt is missing of tp 2 x pp 3"):
        open_checkpoint(tag)
    rank_file(tag, 1, 2).unlink()
    rank_file(tag, 1).rename(tmp_path / "rank")
    with pytest.raises(CheckpointError, match="tp_rank_01_pp_rank_00.pt is missing of tp 2 x pp 2"):
        open_checkpoint(tag)
    rank_file(tag, 1, 1).unlink()  # all of the last: nothing tells of it but the sizes
    with pytest.raises(CheckpointError, match="a rank's file is missing"):
        open_checkpoint(tag)
    convert(hf, tmp_path / "one", "nxd", pp=3)
    rank_file(tmp_path / "one", 0, 2).unlink()
    with pytest.raises(CheckpointError, match=r"missing lm_head\.weight, model\.layers\.2"):
        open_checkpoint(tmp_path / "one")
    shutil.copy(rank_file(tmp_path / "one", 0, 1), rank_file(tmp_path / "one", 0, 2))
    with pytest.raises(CheckpointError, match="two pipeline ranks hold model.layers.1"):
        open_checkpoint(tmp_path / "one")


def test_ranks_of_two_models(hf: Path, make_model, tmp_path: Path) -> None:
    convert(hf, tmp_path / "tag", "nxd", tp=8)
    other = make_model(tmp_path / "other", seed=1, **KINDS["grouped"])
    convert(other, tmp_path / "second", "nxd", tp=8)
    shutil.copy(rank_file(tmp_path / "second", 3), rank_file(tmp_path / "tag", 3))
    with pytest.raises(CheckpointError, match="neither the order of trn1 nor that of trn2"):
        open_checkpoint(tmp_path / "tag")
    convert(hf, tmp_path / "two", "nxd", tp=2)
    convert(other, tmp_path / "two of the second", "nxd", tp=2)
    shutil.copy(rank_file(tmp_path / "two of the second", 1), rank_file(tmp_path / "two", 1))
    with pytest.raises(CheckpointError, match="norm.weight in .*tp_rank_01_.* differs from its copy in .*tp_rank_00_"):
        convert(tmp_path / "two", tmp_path / "back", "hf")
    with pytest.raises(VerificationError, match="two versions"):
        verify(hf, tmp_path / "two")
    edit(rank_file(tmp_path / "two", 1), lambda held: held.update({"model.norm.weight": torch.ones(16)}))
    with pytest.raises(CheckpointError, match=r"tp_rank_01_pp_rank_00.pt: model.norm.weight has shape \(16,\)"):
        open_checkpoint(tmp_path / "two")
    edit(rank_file(tmp_path / "two", 1), lambda held: held.update({"model.norm.weight": torch.ones(32).half()}))
    with pytest.raises(CheckpointError, match="different dtypes"):
        open_checkpoint(tmp_path / "two")


def to_megatron(held: dict[str, Any]) -> None:
    for name in [name for name in held if "qkv" in name]:
        held[name.replace("model.", "language_model.encoder.").replace("qkv_proj.weight_qkv", "query.weight")] = (
            held.pop(name)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.update(extra=torch.ones(2)), "missing nothing, not expected extra"),
        (lambda held: held.update({(QKV + "_q").format(0): torch.ones(2)}), "in 2 forms"),
        (lambda held: held.pop("model.layers.0.mlp.gate_up_proj.weight"), "missing model.layers.0.mlp.gate_up_proj"),
        (lambda held: held.pop("model.embed_tokens.weight"), "embed_tokens.weight is missing"),
        (to_megatron, "in the form of Megatron"),
        (
            lambda held: held.update({(QKV + "_qkv").format(0): torch.ones(25, 32)}),
            "no multiple of what config.json says",
        ),
        (lambda held: held.update({(QKV + "_qkv").format(0): [1]}), "is list, expected a tensor"),
        (lambda held: held.update({(QKV + "_qkv").format(0): torch.ones(32, 24).t()}), "strides"),
        (lambda held: held.update({"model.layers.0.input_layernorm.weight": torch.tensor(1.0)}), r"has shape \(\)"),
        (lambda held: held.update({"model.embed_tokens.weight": torch.tensor(1.0)}), "0 rows on all ranks"),
    ],
)
def test_tensors_that_do_not_belong(change, message, hf: Path, tmp_path: Path) -> None:
    convert(hf, tmp_path / "tag", "nxd")
    edit(rank_file(tmp_path / "tag", 0), change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "tag")


def test_tensors_that_only_one_rank_has(tag: Path) -> None:
    edit(rank_file(tag, 1), lambda held: held.update(extra=torch.ones(2)))
    with pytest.raises(CheckpointError, match="only one of .*tp_rank_00.* and .*tp_rank_01.* has extra"):
        open_checkpoint(tag)
