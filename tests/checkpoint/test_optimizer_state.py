"""The optimizer's state goes along: megatron-core goes on as if nothing had happened, and so does a run of our own.

What is written is loaded by megatron-core; what is read is compared with what each rank's live optimizer said of its
parameters, cut from the whole tensors by plain slicing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpt.checkpoint import convert, open_checkpoint, verify
from megatron_cpt.checkpoint.metadata import StoredTensor, read_index, write_index
from megatron_cpt.checkpoint.runs import STATES
from megatron_cpt.cli.main import main
from megatron_cpt.config.manifest import read_json
from megatron_cpt.errors import CheckpointError
from megatron_cpt.training.folder import INITIAL
from tests.checkpoint.conftest import tiny_shape
from tests.checkpoint.megatron_slices import Layout, rank_slices
from tests.training.conftest import make_tiny

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = Layout(2, 2, 2)
STORED = {"weight": "", "param": "master/", "exp_avg": "exp_avg/", "exp_avg_sq": "exp_avg_sq/"}
SMALL = {"num_layers": 4, "num_attention_heads": 4, "head_dim": 8, "max_position_embeddings": 64}
CASES = {
    "plain": (False, ["plain"], 128, tiny_shape(**SMALL)),
    # Sizes that leave gaps between the parameters of a buffer, and a tied table that is a bucket of its own.
    "distributed": (
        True,
        ["dp_reshardable", "dp_zero_gather_scatter", "fully_reshardable"],
        134,
        tiny_shape(**SMALL, ffn_hidden_size=90, tied_embeddings=True),
    ),
}


def write_own(folder: Path) -> None:
    folder.mkdir()
    run = make_tiny(folder, 250, tiny_shape(**SMALL))
    settings = {"train_steps": 4, "precision": "bf16", "checkpoint": {"save_interval_steps": 2, "keep_last": 9}}
    initial = {"initial_checkpoint": str(folder / "converted"), "initial_optimizer": True, "train_steps": 1}
    ranked = {"initial_checkpoint": str(folder / "ranks"), "train_steps": 1}
    for name, changes in {"whole": {}, "again": {}, "begun": initial, "ranked": ranked}.items():
        config = run.config(folder / name, **{**settings, **changes})
        (folder / f"{name}.json").write_text(config.model_dump_json())


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizer")
    cases = {
        name: {
            "layout": [LAYOUT.tensor, LAYOUT.pipeline, LAYOUT.virtual],
            "distributed": distributed,
            "forms": forms,
            "padded_vocab_size": rows,
            "shape": shape.model_dump(),
        }
        for name, (distributed, forms, rows, shape) in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    write_own(folder / "own")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.checkpoint.optimizer_job", str(folder)]
    subprocess.run(command, env=environment, check=True, timeout=300, stdout=subprocess.DEVNULL)
    return folder


def held(folder: Path, point: str, rank: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    return torch.load(folder / f"{point}_{rank}.pt")


def check_equal(left: list[dict[str, dict[str, torch.Tensor]]], right: list[dict[str, dict[str, torch.Tensor]]]) -> int:
    assert [chunk.keys() for chunk in left] == [chunk.keys() for chunk in right]
    for ours, theirs in zip(left, right, strict=True):
        for name in ours:
            for kind in STORED:
                assert torch.equal(ours[name][kind], theirs[name][kind]), (name, kind)
    return sum(map(len, left))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, its weights and the state of its optimizer."""
    model = open_checkpoint(folder, with_optimizer=True)
    assert len(model.tensors) == 4 * len(model.names())
    return {name: model.read(name) for name in model.tensors}


@pytest.mark.parametrize("case", CASES)
def test_megatron_goes_on_bit_for_bit(case: str, job: Path) -> None:
    """Through two other layouts and back: loaded, and after two more steps, as the run that never stopped."""
    for rank in range(LAYOUT.world_size):
        assert check_equal(held(job / case, "loaded", rank), held(job / case, "saved", rank)) > 10
        assert check_equal(held(job / case, "continued", rank), held(job / case, "uninterrupted", rank)) > 10
        changed = zip(held(job / case, "saved", rank), held(job / case, "continued", rank), strict=True)
        assert all(not torch.equal(a[name]["param"], b[name]["param"]) for a, b in changed for name in a)


READ = [("plain", "plain"), ("plain", "legacy"), ("plain", "torch_dist"), ("plain", "alone")]
READ += [("distributed", folder) for folder in ("dp_reshardable", "dp_zero_gather_scatter", "legacy", "torch_dist")]
READ += [("distributed", "alone"), ("distributed", "elsewhere")]  # the latter: loaded by megatron-core at PP2, DP2


@pytest.mark.parametrize(("case", "folder"), READ)
def test_every_form_is_what_the_live_optimizer_held(case: str, folder: str, job: Path) -> None:
    _, _, rows, shape = CASES[case]
    tensors = state_of(job / case / folder)
    for rank in range(LAYOUT.world_size):
        found = held(job / case, "saved", rank)
        for kind, prefix in STORED.items():
            whole = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix or "model.")}
            whole |= (
                {"lm_head.weight": tensors["lm_head.weight"]} if kind == "weight" and not shape.tied_embeddings else {}
            )
            slices = rank_slices(whole, shape, rows, LAYOUT, rank)
            assert [chunk.keys() for chunk in slices] == [chunk.keys() for chunk in found]
            for mine, theirs in zip(slices, found, strict=True):
                for name in mine:
                    assert torch.equal(mine[name], theirs[name][kind]), (name, kind)
    facts = open_checkpoint(job / case / folder, with_optimizer=True).optimizer
    assert facts is not None and facts.step == 2 and [group["wd_mult"] for group in facts.groups] == [1.0, 0.0]
    assert facts.scheduler["num_steps"] == 2 and facts.groups[0]["betas"] == (0.9, 0.999)
    assert facts.progress["consumed_train_samples"] == 64


def test_a_state_that_is_not_of_the_weights_is_refused(job: Path, tmp_path: Path) -> None:
    """megatron-core itself saves a damaged one where a bucket before the last is padded, as that of the tied table."""
    damaged = job / "distributed" / "fully_reshardable"
    with pytest.raises(CheckpointError, match="state is not that of these weights .*--no-optimizer"):
        convert(damaged, tmp_path / "out", "torch_dist")
    assert not (tmp_path / "out").exists()
    facts = convert(damaged, tmp_path / "out", "torch_dist", optimizer=False)
    assert facts["optimizer"] == "left behind" and not open_checkpoint(tmp_path / "out").holds_optimizer
    assert facts["weights_sha256"] == verify(job / "distributed" / "torch_dist", tmp_path / "out")["weights_sha256"]


def test_masters_are_the_weights_that_are_asked_for(job: Path, tmp_path: Path, capsys: Any) -> None:
    source = job / "distributed" / "dp_reshardable"
    facts = convert(source, tmp_path / "hf", "hf", masters=True)
    assert facts["masters"] and facts["dtype"] == "float32" and facts["optimizer"] == "left behind"
    tensors = state_of(source)
    exported = {name: t for file in (tmp_path / "hf").glob("*.safetensors") for name, t in load_file(file).items()}
    assert all(torch.equal(t, tensors[f"master/{name}"]) for name, t in exported.items())
    assert verify(source, tmp_path / "hf")["equal"]
    # float32 weights, whose masters are themselves, go along with their state, into each form and back.
    convert(source, tmp_path / "wide", "mp_rank", 2, tp=2, optimizer_form="plain", masters=True)
    assert not any(name.startswith("master/") for name in open_checkpoint(tmp_path / "wide", True).tensors)
    convert(tmp_path / "wide", tmp_path / "back", "torch_dist", 2)
    for name, tensor in state_of(tmp_path / "back").items():
        assert torch.equal(tensor, tensors[name if "/" in name else f"master/{name}"]), name
    verify(tmp_path / "wide", tmp_path / "back")
    words = ["checkpoint", "convert", str(source), str(tmp_path / "cli"), "--to", "mp_rank", "--json", "--dry-run"]
    told = []
    for more in (["--masters"], ["--no-optimizer"], ["--optimizer-form", "plain"]):
        assert main([*words, *more]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["masters"] and told[0]["dtype"] == "float32" and told[0]["optimizer"] == "carried"
    assert told[1]["optimizer"] == "left behind" and told[2]["step"] == 2 and told[2]["files"] == 1
    with pytest.raises(CheckpointError, match="holds no float32 masters .*--masters"):
        convert(tmp_path / "wide", tmp_path / "none", "hf", masters=True)
    with pytest.raises(CheckpointError, match="would be cast .*--masters.*--no-optimizer"):
        convert(source, tmp_path / "none", "torch_dist", dtype="float16")
    assert convert(source, tmp_path / "half", "torch_dist", dtype="float16", masters=True)["optimizer"] == "carried"


def as_flat_ranges(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    key = "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    (chunk,) = tensors[key].chunks
    flat = replace(chunk, offset=(0, 0), size=(1, *chunk.size))
    return {**tensors, key: replace(tensors[key], size=(1, *tensors[key].size), chunks=(flat,))}


FORMS = {
    "flat ranges": ("torch_dist", as_flat_ranges, r"flat ranges .*--dist-ckpt-optim-fully-reshardable.*--no-optimizer"),
    "another optimizer": (
        "torch_dist",
        lambda tensors: {key.replace("exp_avg_sq", "momentum_buffer"): held for key, held in tensors.items()},
        "momentum_buffer.* is of no form that is known",
    ),
    "a master less": (
        "torch_dist",
        lambda tensors: {key: held for key, held in tensors.items() if ".param.decoder.final" not in key},
        "master of decoder.final_layernorm.weight is missing",
    ),
    "several optimizers": (
        "dp_reshardable",
        lambda tensors: {re.sub("^optimizer.dist", "chained_1.optimizer.dist", key): h for key, h in tensors.items()},
        "of several optimizers",
    ),
    "a rank less": (
        "dp_reshardable",
        lambda tensors: {key: held for key, held in tensors.items() if "dp_group_idx_3" not in key},
        "it is of 3 ranks, .*tensor_model_parallel_size=2",
    ),
    "a bucket less": (
        "dp_reshardable",
        lambda tensors: {k: h for k, h in tensors.items() if "dp_group_idx_2.gbuf_idx_1" not in k or "idx_0." in k},
        "no whole number of this model's layers",
    ),
}


@pytest.mark.parametrize(("folder", "edit", "message"), FORMS.values(), ids=FORMS)
def test_forms_that_do_not_tell_the_parameter(folder: str, edit: Callable, message: str, job: Path, tmp_path) -> None:
    source = job / "distributed" / folder
    copy = tmp_path / "edited"
    shutil.copytree(source, copy)
    tensors, objects = read_index(source, lambda key: True)
    write_index(copy, edit(tensors), objects)
    with pytest.raises(CheckpointError, match=message):
        convert(copy, tmp_path / "out", "mp_rank", 2)
    convert(copy, tmp_path / "out", "mp_rank", 2, optimizer=False)


def edit_ranks(source: Path, folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a legacy checkpoint whose files are changed."""
    shutil.copytree(source, folder)
    (folder / "manifest.json").unlink(missing_ok=True)
    with torch.serialization.safe_globals([Namespace]):
        for path in folder.rglob("model_optim_rng.pt"):
            value = torch.load(path, weights_only=True)
            edit(value)
            torch.save(value, path)
    return folder


def swap_norms(value: dict[str, Any]) -> None:
    masters = value["optimizer"]["fp32_from_fp16_params"][1]
    masters[0], masters[1] = masters[1], masters[0] + 1


PLAIN = {
    "another's masters": (swap_norms, "not that of these weights"),
    "no step": (lambda value: [g.pop("step") for g in value["optimizer"]["optimizer"]["param_groups"]], "says nothing"),
    "a third group": (
        lambda value: value["optimizer"]["optimizer"]["param_groups"].append({"wd_mult": 0.0, "params": []}),
        "2 of others",
    ),
    "a parameter more": (
        lambda value: value["optimizer"]["optimizer"]["param_groups"][0]["params"].append(99),
        "group 0 of the optimizer's parameters",
    ),
    "a moment less": (lambda value: value["optimizer"]["optimizer"]["state"].pop(0), "missing"),
    "no moments": (lambda value: value["optimizer"]["optimizer"].pop("state"), "distrib_optim.pt may have held"),
    "two optimizers": (lambda value: value.update(optimizer=[value["optimizer"]] * 2), "2 optimizers"),
}


@pytest.mark.parametrize(("edit", "message"), PLAIN.values(), ids=PLAIN)
def test_what_cannot_be_told_by_parameter(edit: Callable, message: str, job: Path, tmp_path: Path) -> None:
    folder = edit_ranks(job / "plain" / "alone", tmp_path / "edited", edit)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", "torch_dist", 2)
    convert(folder, tmp_path / "out", "torch_dist", 2, optimizer=False)


def test_orders_and_steps_of_other_versions(job: Path, tmp_path: Path) -> None:
    """Norms first, NeMo's names, and torch's AdamW, which counts the steps of each parameter."""

    def edit(value: dict[str, Any]) -> None:
        inner, masters = value["optimizer"]["optimizer"], value["optimizer"]["fp32_from_fp16_params"]
        inner["param_groups"].reverse()
        masters.reverse()
        for group in inner["param_groups"]:
            group["pre_wd_mult"], group["pre_lr_mult"] = group.pop("wd_mult"), group.pop("lr_mult")
            step = group.pop("step")
            for number in group["params"]:
                inner["state"][number]["step"] = torch.tensor(float(step))

    folder = edit_ranks(job / "plain" / "alone", tmp_path / "edited", edit)
    convert(folder, tmp_path / "out", "torch_dist", 2)
    found = state_of(tmp_path / "out")
    for name, tensor in state_of(job / "plain" / "torch_dist").items():
        assert torch.equal(tensor, found[name]), name


def test_the_distributed_file_has_to_be_the_models(job: Path, tmp_path: Path) -> None:
    for name, spoil, message in [
        ("mixed", lambda world: {key: value[:-64] for key, value in world.items() if key != "numel_unpadded"}, "not"),
        ("moments", lambda world: {key: value for key, value in world.items() if key != "exp_avg"}, "of one size"),
        ("remainders", lambda world: world | {"param": world["param"] * 0 + 7}, "not that of these weights"),
    ]:
        folder = tmp_path / name
        shutil.copytree(job / "distributed" / "alone", folder)
        (path,) = folder.rglob("distrib_optim.pt")
        value = torch.load(path, weights_only=True)
        value[0] = {key: spoil(world) for key, world in value[0].items()}
        torch.save(value, path)
        with pytest.raises(CheckpointError, match=message):
            convert(folder, tmp_path / "out", "torch_dist", 2)


def test_a_run_of_our_own_goes_on_bit_for_bit(job: Path) -> None:
    """Its checkpoint, through ranks of Megatron's and back, is resumed as if it were its own; and begun from."""
    folder = job / "own"
    assert not list(folder.glob("*.error"))
    expected, found = (state_of(folder / name / "checkpoints" / "iter_0000004") for name in ("whole", "again"))
    assert state_of(folder / "converted").keys() == expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert not open_checkpoint(folder / "ranked" / INITIAL).holds_optimizer  # begun from the weights alone
    begun = open_checkpoint(folder / "begun", with_optimizer=True).optimizer
    assert begun is not None and begun.step == 3
    manifest = read_json(folder / "converted" / "manifest.json", CheckpointError)
    assert manifest["optimizer"] == "carried" and manifest["step"] == 2
    assert {name.split("/")[0] for name in manifest["tensors"] if "/" in name} == set(STATES)
