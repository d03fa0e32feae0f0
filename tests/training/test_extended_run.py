"""A run whose vocabulary is extended mid-way: trained, operated on with its optimizer's state, and trained on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint import open_tables, open_torch_dist
from megatron_cpt.data import build_dataset
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.surgery import SurgeryPlan, apply_surgery, plan_surgery, undo_surgery
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.vocab_map import map_vocabularies
from megatron_cpt.training.folder import last_checkpoint
from megatron_cpt.training.inputs import read_inputs
from tests.training.conftest import Tiny, change_stored, write_documents, write_tokenizer

STILL = {
    "learning_rate": 1e-12,
    "min_learning_rate": 1e-12,
    "adam_beta1": 1 - 1e-8,
    "adam_beta2": 1 - 1e-8,
}  # nothing moves
STEPS = {"train_steps": 2, "precision": "bf16"}
SHIFTED = {"table": "embedding.word_embeddings.weight", "norm": "decoder.final_layernorm.weight"}


@dataclass(frozen=True)
class Extended:
    """A run, its checkpoint after surgery, and the configuration it goes on with."""

    plan: SurgeryPlan
    run: Path
    operated: Path
    tokenizer: Path
    changes: dict[str, Any]


@pytest.fixture(scope="module")
def extended(tiny: Tiny) -> Extended:
    tiny.train_many({"before": STEPS}, 1)
    tokenizer = tiny.root / "extended"
    write_tokenizer(tokenizer, write_documents(77, 300), 300)
    build_dataset(write_documents(8, 60), tokenizer, tiny.root / "extended-a", "a")
    plan = plan_surgery(map_vocabularies(load_tokenizer(tiny.tokenizer), load_tokenizer(tokenizer)))
    run = last_checkpoint(tiny.root / "before")
    apply_surgery(plan, run, tiny.root / "operated", tokenizer)
    data = {"train": [{"prefix": str(tiny.root / "extended-a"), "language": "a"}], "validation": []}
    changes = {
        **STEPS,
        "tokenizer": str(tokenizer),
        "initial_checkpoint": str(tiny.root / "operated"),
        "initial_optimizer": True,
        "optimizer": STILL,
        "data": data,
        "parallel": {"tensor_model_parallel_size": 2},
    }
    return Extended(plan, run, tiny.root / "operated", tokenizer, changes)


def state(folder: Path) -> dict[str, torch.Tensor]:
    """All tables of a checkpoint, those of the optimizer too."""
    tables = open_tables(folder)
    return {table.name: tables.read(table) for table in tables.tables}


def places(plan: SurgeryPlan) -> tuple[dict[int, int], list[int]]:
    """New id -> old id of kept rows, and the new ids of made ones."""
    return plan.kept(), [id for id, origin in enumerate(plan.origins) if origin == "new"]


def test_the_state_follows(extended: Extended) -> None:
    plan, before, after = extended.plan, state(extended.run), state(extended.operated)
    assert len(before) == 8 and before.keys() == after.keys() and (plan.old_size, plan.new_size) == (250, 300)
    kept, made = places(plan)
    assert len(made) > 20 and plan.removed() and len(kept) > 100 and any(new != old for new, old in kept.items())
    for name, old in before.items():
        new = after[name]
        assert new.dtype == old.dtype == (torch.float32 if "optimizer" in name else torch.bfloat16)
        assert torch.equal(new[list(kept)], old[list(kept.values())]) and (new[300:] == 0).all() and len(new) == 384
        if "exp_avg" in name:
            assert (new[made] == 0).all() and (old[list(kept.values())] != 0).any()
            continue
        if "optimizer" in name:  # masters: a weight is its master rounded, of new rows too
            assert torch.equal(new[made], after[name.removeprefix("optimizer.state.param.")][made].float())
            continue
        for id in made:
            mean = old[plan.row(id)["embedding"]["old_ids"]].double().mean(0)
            assert (new[id].double() - mean).abs().max() <= torch.finfo(new.dtype).eps * mean.abs().max()
    assert not (extended.operated / "proof.safetensors").exists()  # logits of the old vocabulary
    manifest = open_torch_dist(extended.operated).stated
    assert (manifest["step"], manifest["surgery"]["optimizer"]) == (2, True)


def test_undone_with_its_state(extended: Extended, tmp_path: Path) -> None:
    undo_surgery(extended.plan, extended.operated, tmp_path / "back")
    before, back = state(extended.run), state(tmp_path / "back")
    assert before.keys() == back.keys() and all(torch.equal(before[name], back[name]) for name in before)


def test_training_goes_on_at_another_layout(tiny: Tiny, extended: Extended) -> None:
    """Kept moments are there still, after two steps in which nothing moves by more than a few millionths."""
    jobs = {"after": extended.changes}
    for name, change in SHIFTED.items():
        shutil.copytree(extended.operated, tiny.root / f"shifted-{name}")
        change_stored(tiny.root / f"shifted-{name}", f"optimizer.state.param.{change}", lambda values: values.roll(1))
        jobs[f"failing-{name}"] = {**extended.changes, "initial_checkpoint": str(tiny.root / f"shifted-{name}")}
    found = tiny.train_many(jobs, 2)["after"]
    for name in SHIFTED:
        error = (tiny.root / f"failing-{name}.error").read_text()
        assert f"shifted-{name} holds an optimizer's state that is not of its weights" in error
    assert len(found) == 2 and all(torch.tensor(record["loss"]).isfinite() for record in found)
    before, rows = state(extended.operated), list(extended.plan.kept())
    after = state(last_checkpoint(tiny.root / "after"))
    for name in before:
        if "exp_avg" in name:
            kept = before[name][rows]
            assert (after[name][rows] - kept).abs().max() <= 1e-4 * kept.abs().max()
    (group, _) = torch.load(last_checkpoint(tiny.root / "after") / "common.pt")["optimizer"]["optimizer"][
        "param_groups"
    ]
    assert (group["step"], group["betas"], group["lr"]) == (4, (1 - 1e-8, 1 - 1e-8), pytest.approx(1e-12))


def test_what_was_not_extended_is_refused(tiny: Tiny, extended: Extended, tmp_path: Path) -> None:
    unextended = tiny.config(tmp_path, **{**extended.changes, "initial_checkpoint": str(extended.run)})
    with pytest.raises(CheckpointError, match="250 vocabulary rows but the tokenizer .* run surgery first"):
        read_inputs(unextended, 2)
    apply_surgery(extended.plan, extended.run, tmp_path / "bare", extended.tokenizer, with_optimizer=False)
    assert all("optimizer" not in name for name in state(tmp_path / "bare"))
    bare = {**extended.changes, "initial_checkpoint": str(tmp_path / "bare")}
    with pytest.raises(ConfigError, match="holds no optimizer state"):
        read_inputs(tiny.config(tmp_path, **bare), 2)
    read_inputs(tiny.config(tmp_path, **{**bare, "initial_optimizer": False}), 2)
    assert load_tokenizer(extended.tokenizer).vocab_size == extended.plan.new_size
