"""Descriptions from strangers: manifests, configs, headers, tokenizers and links that ask for too much."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint import convert, open_checkpoint, opening, read_checkpoint_manifest, verify
from megatron_cpt.checkpoint.manifest import SEALS
from megatron_cpt.checkpoint.optimizer_state import facts_of
from megatron_cpt.checkpoint.runs import number_of
from megatron_cpt.config.manifest import read_json, write_sealed_manifest
from megatron_cpt.errors import CheckpointError, InputError, VerificationError
from tests.checkpoint.conftest import write_model

EMBEDDING = "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several formats; only copies of it are changed."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "hf", head_dim=4)
    for form in ("torch_dist", "mp_rank", "nxd"):
        convert(folder / "hf", folder / form, form)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda form: Path(shutil.copytree(made / form, tmp_path / form))


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(folder: Path, message: str) -> None:
    """Asserts that opening a folder ends in one line that names it."""
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


# The size of the model


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_hidden_layers", 10**9, "got num_layers 1000000000, expected at most 10000"),
        ("num_hidden_layers", 9_999, "missing model.layers"),
        ("num_attention_heads", 2 * 10**9, "got num_attention_heads 2000000000, expected at most 10000"),
        ("hidden_size", 10**30, "got hidden_size 1"),
        ("intermediate_size", 2**31, "got ffn_hidden_size 2147483648"),
        ("vocab_size", 10**12, "got vocab_size 1000000000000"),
        ("rope_parameters", {"rope_theta": float("inf")}, "contradict"),
        ("rms_norm_eps", float("inf"), "got norm_epsilon inf"),
        ("rms_norm_eps", float("nan"), "not what a Llama's config holds"),
        ("model_type", "x" * 10**6, "got model_type 'xxx"),
        ("attention_bias", ["x" * 10**6], "got attention_bias list"),
    ],
)
def test_a_config_of_sizes_that_no_model_has(field: str, value: Any, message: str, copy: Callable[[str], Path]) -> None:
    folder = copy("hf")
    change(folder / "config.json", **{field: value})
    refused(folder, message)


def test_layers_that_only_a_description_has(copy: Callable[[str], Path]) -> None:
    folder = copy("torch_dist")
    shape = json.loads((folder / "manifest.json").read_text())["shape"]
    for layers, message in ((10**9, "expected at most 10000"), (9_999, "the manifest says")):
        change(folder / "manifest.json", shape={**shape, "num_layers": layers})
        refused(folder, message)
    folder = copy("nxd")
    change(folder / "config.json", num_hidden_layers=10**9)
    refused(folder, "expected at most 10000")


@pytest.mark.parametrize("shape", [[2**62] * 200_000, [1] * 9, [2**63, 0], [-1], [True], "ab", 3])
def test_a_header_of_many_dimensions(shape: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("hf")
    header = json.dumps({"x": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(folder, "the header is not safetensors'")


# Files of settings


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("hf", "config.json"),
        ("hf", "generation_config.json"),
        ("hf", "model.safetensors.index.json"),
        ("torch_dist", "manifest.json"),
        ("mp_rank", "manifest.json"),
        ("mp_rank", "latest_checkpointed_iteration.txt"),
        ("nxd", "config.json"),
        ("nxd", "manifest.json"),
    ],
)
def test_settings_that_are_no_file_or_without_end(form: str, name: str, copy: Callable[[str], Path]) -> None:
    folder = copy(form)
    content = (folder / name).read_bytes()
    (folder / name).write_text("[" * 200_000)
    refused(folder, "nested too deep" if name.endswith("json") else "has 200,000 bytes, expected at most")
    with open(folder / name, "wb") as file:
        file.truncate(65 << 20)
    refused(folder, "has 68,157,440 bytes, expected at most")
    (folder.parent / "elsewhere").write_bytes(content)
    for target in (folder.parent / "elsewhere", Path("/dev/zero")):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
        if name.endswith("json") or target.is_file():  # a tracker that is a device is none
            refused(folder, "is a link to")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name.endswith("json"):
        refused(folder, "not a regular file")


def test_json_that_is_nested_too_deep_for_any_reader(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a":' * 100_000)
    with pytest.raises(InputError, match=r"a.json is nested too deep"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "x"),
        ("step", -1),
        ("step", 1.5),
        ("step", 10**400),
        ("huggingface", [1]),
        ("huggingface", {"config": [1], "generation_config": None}),
        ("huggingface", {"generation_config": [1]}),
        ("tokenizer_sha256", [1]),
        ("tokenizer_sha256", "` | <script>"),
        ("weights_sha256", 3),
        ("files", {"common.pt": 3}),
        ("files", {"common.pt": {"bytes": "3", "sha256": "0" * 64}}),
        ("files", {"../hf/config.json": {"bytes": 3, "sha256": "0" * 64}}),
        ("files", {"/etc/passwd": {"bytes": 3, "sha256": "0" * 64}}),
        ("tensors", 5),
        ("tensors", {"lm_head.weight": 5}),
        ("cast", ["float16"]),
        ("bos_token_id", {}),
        ("eos_token_id", [2, "3"]),
        ("vocab_divisor", 0),
        ("assumed", 3),
    ],
)
def test_a_manifest_of_other_types(field: str, value: Any, copy: Callable[[str], Path]) -> None:
    folder = copy("torch_dist")
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = {key: manifest[key] for key in manifest if key not in ("kind", "megatron_cpt", "inputs", "manifest_sha256")}
    write_sealed_manifest(folder / "manifest.json", "checkpoint", {}, **{**facts, field: value})
    refused(folder, f"got {field} ")
    with pytest.raises(VerificationError, match=f"got {field} "):
        verify(folder)
    with pytest.raises(CheckpointError, match=f"got {field} "):
        convert(folder, folder.parent / "new", "mp_rank")
    write_sealed_manifest(folder / "manifest.json", "checkpoint", {}, **{**facts, field: None})
    assert read_checkpoint_manifest(folder)[field] is None


def test_fields_that_would_load_code(copy: Callable[[str], Path]) -> None:
    folder = copy("torch_dist")
    own = {"auto_map": {"AutoModelForCausalLM": "a/b--c.D"}, "quantization_config": {"a": 1}, "pad_token_id": 3}
    path = folder / "manifest.json"
    change(path, huggingface={"config": own, "generation_config": None})
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in manifest.items() if name not in SEALS}))
    for form in ("hf", "nxd"):
        convert(folder, folder.parent / f"new_{form}", form)
        config = json.loads((folder.parent / f"new_{form}" / "config.json").read_text())
        assert config["pad_token_id"] == 3 and not {"auto_map", "quantization_config"} & config.keys()


# Tokenizers


def test_a_tokenizer_that_lies_elsewhere(copy: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("private")
    for name in ("chat_template.jinja", "tokenizer.model", "tokenizer_config.json"):
        folder = copy("hf")
        (folder / "tokenizer.model").write_text("a tokenizer")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "secret")
        with pytest.raises(CheckpointError, match=f"{name} is a link to"):
            convert(folder, tmp_path / "new")
        assert not (tmp_path / "new").exists()
        shutil.rmtree(folder)


def test_a_tokenizer_that_is_given_by_a_link(copy: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "kept.model").write_text("a tokenizer")
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.model").symlink_to(tmp_path / "kept.model")
    (tmp_path / "given" / "chat_template.jinja").write_text("beside")
    convert(copy("hf"), tmp_path / "new", tokenizer=tmp_path / "given" / "tokenizer.model")
    assert (tmp_path / "new" / "tokenizer.model").read_text() == "a tokenizer"
    assert not (tmp_path / "new" / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("settings", "tokenizer", "message"),
    [
        ([], {}, "tokenizer_config.json holds list"),
        ({}, [], "tokenizer.json holds list"),
        ({}, {"added_tokens": [1]}, "added_tokens holds 1"),
        ({}, {"added_tokens": 3}, "added_tokens holds 3"),
        ({}, {"added_tokens": [{"content": ["x"], "id": 1}]}, "added_tokens holds dict"),
        ({"bos_token": "<s>"}, {"added_tokens": [{"content": "<s>", "id": "1"}]}, "no integer"),
        ({"bos_token": ["<s>"]}, {"model": 3}, None),
    ],
)
def test_a_tokenizer_of_other_types(
    settings: Any, tokenizer: Any, message: str | None, copy: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copy("hf")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if message is None:
        convert(folder, tmp_path / "new")
        return
    with pytest.raises(InputError, match=message):
        convert(folder, tmp_path / "new")


# Legacy files and links of folders


def llama_args(**values: Any) -> Namespace:
    plain = {"normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "position_embedding_type": "rope"}
    sizes = {"num_layers": 3, "hidden_size": 32, "ffn_hidden_size": 88, "num_attention_heads": 8, "kv_channels": 4}
    return Namespace(**{**plain, **sizes, "max_position_embeddings": 64, "vocab_size": 133, **values})


def doubled(value: Any) -> Any:
    for _ in range(40):
        value = (value, value)
    return value


TABLE = torch.zeros(256, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_version": "3"}, "has version '3', expected 3.0"),
        ({"checkpoint_version": float("nan")}, "has version nan"),
        ({"model": 3}, "a model is int"),
        ({"model": {EMBEDDING: TABLE, 3: TABLE}}, "a model is dict, expected a dict of tensors by name"),
        ({"model": {EMBEDDING: torch.zeros(())}}, "holds no embedding"),
        ({"model": {EMBEDDING: 3}}, "holds no embedding"),
        ({"model0": {EMBEDDING: TABLE}}, "holds model, model0; expected `model`, or"),
        ({"model00": {EMBEDDING: TABLE}}, "holds model, model00; expected `model`, or"),
        ({"model2": {}}, "holds model, model2; expected `model`, or"),
        ({"args": llama_args(iteration="x")}, "iteration='x', expected an integer"),
        ({"args": llama_args(iteration=2**40)}, "iteration=1099511627776, expected an integer"),
        ({"args": llama_args(num_layers=10**9)}, "got num_layers 1000000000, expected at most 10000"),
        ({"args": llama_args(num_layers=9_999)}, "is missing"),
        ({"args": llama_args(num_query_groups=5 * 10**8, group_query_attention=True)}, "expected at most 10000"),
        ({"args": llama_args(rotary_base=10**400)}, "impossible size"),
        ({"args": llama_args(vocab_size=2**40)}, "fewer than the 1099511627776 that"),
        ({"args": llama_args(normalization=doubled("RMSNorm"))}, "the same parts again and again"),
    ],
)
def test_a_legacy_file_of_other_types(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    value = {"checkpoint_version": 3.0, "args": llama_args(), "model": {EMBEDDING: TABLE}}
    torch.save({**value, **changes}, tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")
    refused(tmp_path, message)


@pytest.mark.parametrize(("form", "name"), [("mp_rank", "release"), ("nxd", "model")])
def test_folders_that_are_links(form: str, name: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy(form)
    (tmp_path / "link").symlink_to(folder)  # the user's own
    assert open_checkpoint(tmp_path / "link").read("model.norm.weight").shape == (32,)
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    refused(folder, f"{name} is a link; a checkpoint may only use files of its own folder")


def test_a_tag_that_is_a_link(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder, tags = copy("nxd"), tmp_path / "tags"
    (folder / "done").touch()
    tags.mkdir()
    shutil.copy(folder / "config.json", tags)
    (tags / "step_1").symlink_to(folder)
    refused(tags, "step_1 is a link")


# What is left


def test_what_no_reader_foresees(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("hf")

    def fails(*_: Any) -> None:
        raise KeyError("a\x1b[2J\nb" * 1000)

    monkeypatch.setattr(opening, "open_hf", fails)
    with pytest.raises(CheckpointError, match=r"damaged or unsafe \(KeyError\('a") as caught:
        open_checkpoint(folder)
    assert isinstance(caught.value.__cause__, KeyError) and len(str(caught.value)) < 700

    def system(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(opening, "open_hf", system)
    with pytest.raises(OSError, match="No space left"):
        open_checkpoint(folder)


def test_names_that_a_terminal_would_obey(copy: Callable[[str], Path]) -> None:
    folder = copy("hf")
    (folder / "model.safetensors.index.json").unlink()
    header = json.dumps({"\x1b[2J\n" * 1000: {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"not expected \?\[2J\?") as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) <= 2000


# The state of an optimizer


@pytest.mark.parametrize(("name", "value"), [("weight_decay", "x"), ("lr", (1,)), ("weight_decay", 10**400)])
def test_rates_that_are_no_numbers(name: str, value: Any) -> None:
    groups = [{"wd_mult": 1.0, "lr": 1e-4}, {"wd_mult": 0.0, "lr": 1e-4}]
    state = facts_of([{**group, name: value} for group in groups], [3], None, None, "here").scheduler_state()
    assert all(type(held) in (int, float, str, type(None)) for held in state.values())


@pytest.mark.parametrize("value", [10**400, "3", None])
def test_a_number_that_is_none(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a number or a tensor of one element"):
        number_of(tmp_path, value)


@pytest.mark.parametrize("step", [10.0**300, float("nan"), float("inf"), -1.0])
def test_a_step_that_no_run_makes(step: float) -> None:
    with pytest.raises(CheckpointError, match="of the number of its updates, expected one number"):
        facts_of([{"wd_mult": 1.0}, {"wd_mult": 0.0}], [step], None, None, "here")


def test_surgery_reads_no_linked_rank_either(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("mp_rank")
    file = folder / "release" / "mp_rank_00" / "model_optim_rng.pt"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="model_optim_rng.pt is a link to"):
        opening.open_tables(folder)
