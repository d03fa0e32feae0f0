"""The same surgery on torch_dist folders and on the shards of legacy checkpoints: the Hugging Face result decides."""

from __future__ import annotations

import argparse
import enum
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_cpt.checkpoint import convert, open_hf, open_torch_dist, verify
from megatron_cpt.checkpoint.manifest import SEALS
from megatron_cpt.config.manifest import read_json, sha256_file
from megatron_cpt.config.surgery import parse_method
from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery import SurgeryPlan, apply_surgery, plan_surgery, undo_surgery
from megatron_cpt.tokenizer import Entry, VocabMap

Make = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@pytest.fixture
def plan(vocab_map: VocabMap) -> SurgeryPlan:
    """Some rows kept, some moved, some dropped, sums in the embedding and random rows in the head."""
    entries = list(vocab_map.entries)
    entries[300], entries[310] = entries[310], entries[300]
    entries[320] = Entry("new", None, (5, 6, 7))
    moved = VocabMap(vocab_map.old_size, vocab_map.new_size, vocab_map.old_sha256, vocab_map.new_sha256, tuple(entries))
    return plan_surgery(moved, head=parse_method({"method": "covariance"}))


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_torch_dist(
    plan: SurgeryPlan,
    make_model: Make,
    old_tokenizer: Path,
    new_tokenizer: Path,
    tmp_path: Path,
    dtype: torch.dtype,
) -> None:
    hf = make_model(plan.old_size, dtype=dtype)
    convert(hf, tmp_path / "old", "torch_dist", vocab_divisor=96, tokenizer=old_tokenizer)
    before = hashes(tmp_path / "old")
    facts = apply_surgery(plan, tmp_path / "old", tmp_path / "new", new_tokenizer)
    assert hashes(tmp_path / "old") == before
    reader = open_torch_dist(tmp_path / "new")
    assert (reader.vocab_size, reader.padded_vocab_size) == (plan.new_size, -(-plan.new_size // 96) * 96)
    assert reader.stated["tokenizer_sha256"] == plan.new_sha256 and reader.stated["vocab_divisor"] == 96
    for name in (EMBEDDING, HEAD):
        (padding,) = reader.padding_blocks(name)
        assert len(padding) and not padding.any()

    wanted = apply_surgery(plan, hf, tmp_path / "new_hf", new_tokenizer)
    assert facts["weights_sha256"] == wanted["weights_sha256"]
    assert verify(tmp_path / "new_hf", tmp_path / "new")["weights_sha256"] == facts["weights_sha256"]
    old = open_hf(hf)
    for name in (EMBEDDING, HEAD):
        for new_id, old_id in plan.kept().items():
            assert torch.equal(reader.read(name)[new_id], old.read(name)[old_id])

    undo_surgery(plan, tmp_path / "new", tmp_path / "back")
    assert verify(hf, tmp_path / "back")["padding_rows"] == 384 - 330
    manifest = read_json(tmp_path / "old" / "manifest.json")
    unsealed = {key: value for key, value in manifest.items() if key not in SEALS}  # the files are cut otherwise
    assert read_json(tmp_path / "back" / "manifest.json") == unsealed
    again = apply_surgery(plan, tmp_path / "back", tmp_path / "twice", new_tokenizer)
    assert again["weights_sha256"] == facts["weights_sha256"]


def test_torch_dist_of_another_size(plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path) -> None:
    convert(make_model(plan.old_size + 1), tmp_path / "old", "torch_dist")
    with pytest.raises(CheckpointError, match="384 rows and a vocabulary of 331, the plan starts from .* 330"):
        apply_surgery(plan, tmp_path / "old", tmp_path / "new", new_tokenizer)


class Legacy:
    """A legacy checkpoint by the documented layout, from a Hugging Face model."""

    def __init__(self, root: Path, hf: Path, tp: int, pp: int, padded: int, **forms: Any) -> None:
        self.root, self.tp, self.pp, self.padded = root, tp, pp, padded
        self.nested, self.tied = forms.get("nested", False), forms.get("tied", False)
        reader = open_hf(hf)
        for stage in range(pp):
            for rank in range(tp):
                model: dict[str, Any] = {f"decoder.layers.0.{stage}": torch.full((300, 300), float(stage))}
                if stage == 0:
                    model["embedding.word_embeddings.weight"] = self.shard(reader.read(EMBEDDING), rank)
                if stage == pp - 1 and (not self.tied or pp > 1):
                    model["output_layer.weight"] = self.shard(reader.read(EMBEDDING if self.tied else HEAD), rank)
                self._save(rank, stage, model, **forms)
        (root / "latest_checkpointed_iteration.txt").write_text("7\n")

    def shard(self, table: torch.Tensor, rank: int) -> torch.Tensor:
        whole = table.new_zeros(self.padded, table.shape[1])
        whole[: len(table)] = table
        return whole.chunk(self.tp)[rank].clone()

    def _save(self, rank: int, stage: int, model: dict[str, Any], **forms: Any) -> None:
        if self.nested:  # as before megatron-core
            for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
                if key in model:
                    place: dict[str, Any] = model.setdefault("language_model", {})
                    *folders, last = key.split(".")
                    for folder in folders:
                        place = place.setdefault(folder, {})
                    place[last] = model.pop(key)
        framework = types.ModuleType("some_framework")
        kind = enum.Enum("Kind", {"encoder": 1, "decoder": 2}, module="some_framework")
        framework.Kind = kind  # type: ignore[attr-defined]
        sys.modules["some_framework"] = framework
        value: dict[str, Any] = {
            "args": argparse.Namespace(kind=kind(2), lr=0.1, make_vocab_size_divisible_by=32, **forms.get("args", {})),
            "checkpoint_version": 3.0,
            "iteration": 7,
            "model": model,
            "rng_state": [{"np_rng_state": np.random.RandomState(rank).get_state()}],
        }
        if "optimizer" in forms:
            value["optimizer"] = forms["optimizer"]
        path = self.file(rank, stage)
        path.parent.mkdir(parents=True)
        try:
            torch.save(value, path)
        finally:
            del sys.modules["some_framework"]

    def file(self, rank: int, stage: int, root: Path | None = None) -> Path:
        name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if self.pp > 1 else "")
        return (root or self.root) / "iter_0000007" / name / "model_optim_rng.pt"

    def table(self, root: Path, key: str, stage: int) -> torch.Tensor:
        """A table of another root, its shards in order."""
        shards = []
        for rank in range(self.tp):
            found = load(self.file(rank, stage, root))["model"]
            for part in ["language_model", *key.split(".")] if self.nested else [key]:
                found = found[part]
            shards.append(found)
        return torch.cat(shards)


def load(path: Path) -> dict[str, Any]:
    """What torch itself reads, with the framework there."""
    framework = types.ModuleType("some_framework")
    framework.Kind = enum.Enum("Kind", {"encoder": 1, "decoder": 2}, module="some_framework")  # type: ignore[attr-defined]
    sys.modules["some_framework"] = framework
    try:
        value: dict[str, Any] = torch.load(path, weights_only=False)
    finally:
        del sys.modules["some_framework"]
    return value


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize(("pp", "nested"), [(1, False), (3, False), (2, True)])
def test_shards(
    plan: SurgeryPlan,
    make_model: Make,
    new_tokenizer: Path,
    tmp_path: Path,
    dtype: torch.dtype,
    pp: int,
    nested: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """TP = 4: each shard is its slice of the whole result; what is not ours is as it was."""
    monkeypatch.setattr("megatron_cpt.checkpoint.tables.SMALL_FILE_BYTES", 1000)
    hf = make_model(plan.old_size, dtype=dtype)
    args = {"padded_vocab_size": 384, "untie_embeddings_and_output_weights": True} if pp < 3 else {}
    legacy = Legacy(tmp_path / "old", hf, 4, pp, 384, nested=nested, args=args)
    before = hashes(tmp_path / "old")
    facts = apply_surgery(plan, tmp_path / "old", tmp_path / "new", new_tokenizer)
    assert hashes(tmp_path / "old") == before and facts["format"] == "mp_rank"
    apply_surgery(plan, hf, tmp_path / "hf", new_tokenizer)
    padded = -(-plan.new_size // 128) * 128  # 32 by the arguments, times 4 ranks
    for name, key, stage in ((EMBEDDING, "embedding.word_embeddings.weight", 0), (HEAD, "output_layer.weight", pp - 1)):
        table, wanted = legacy.table(tmp_path / "new", key, stage), open_hf(tmp_path / "hf").read(name)
        assert table.shape[0] == padded and table.dtype == dtype
        assert torch.equal(table[: plan.new_size], wanted) and (table[plan.new_size :] == 0).all()
    for stage in range(pp):
        old, new = legacy.file(2, stage), legacy.file(2, stage, tmp_path / "new")
        is_carried = pp == 3 and stage == 1  # no table, and no argument that states a size
        assert old.samefile(new) == is_carried
        held = load(new)
        assert torch.equal(held["model"][f"decoder.layers.0.{stage}"], torch.full((300, 300), float(stage)))
        assert held["args"].kind.name == "decoder" and held["args"].lr == 0.1
        assert getattr(held["args"], "padded_vocab_size", padded) == padded
        assert np.array_equal(held["rng_state"][0]["np_rng_state"][1], np.random.RandomState(2).get_state()[1])
    assert (tmp_path / "new" / "latest_checkpointed_iteration.txt").read_text() == "7\n"

    undo_surgery(plan, tmp_path / "new", tmp_path / "back")
    for key, stage in (("embedding.word_embeddings.weight", 0), ("output_layer.weight", pp - 1)):
        assert torch.equal(legacy.table(tmp_path / "back", key, stage), legacy.table(tmp_path / "old", key, stage))


def test_a_tied_legacy_model_keeps_its_copy(
    vocab_map: VocabMap, make_model: Make, new_tokenizer: Path, tmp_path: Path
) -> None:
    plan = plan_surgery(vocab_map)
    legacy = Legacy(tmp_path / "old", make_model(plan.old_size, tied=True), 2, 2, 384, tied=True)
    assert apply_surgery(plan, tmp_path / "old", tmp_path / "new", new_tokenizer)["tied"]
    tables = [
        legacy.table(tmp_path / "new", key, stage)
        for key, stage in (("embedding.word_embeddings.weight", 0), ("output_layer.weight", 1))
    ]
    assert torch.equal(*tables) and len(tables[0]) == 448


def test_legacy_checkpoints_that_are_refused(
    plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path
) -> None:
    hf = make_model(plan.old_size)
    old, new = tmp_path / "old", tmp_path / "new"
    legacy = Legacy(old, hf, 3, 1, 384)

    def refused(message: str, folder: Path = old, **options: Any) -> None:
        with pytest.raises(CheckpointError, match=message):
            apply_surgery(plan, folder, new, new_tokenizer, **options)
        assert not new.exists()

    refused("448 rows with --divisor 64, which 3 tensor-parallel ranks cannot .* --divisor 192", divisor=64)
    trained = Legacy(tmp_path / "trained", hf, 1, 1, 384, optimizer={"state": {0: {"exp_avg": torch.ones(3)}}})
    refused("state of an optimizer.*--no-optimizer", trained.root)
    apply_surgery(plan, trained.root, tmp_path / "dropped", new_tokenizer, with_optimizer=False)
    assert "optimizer" not in load(trained.file(0, 0, tmp_path / "dropped"))
    incomplete = shutil.copytree(old, tmp_path / "incomplete")
    shutil.rmtree(incomplete / "iter_0000007" / "mp_rank_01")
    refused("every tensor and pipeline rank", incomplete)
    (old / "latest_checkpointed_iteration.txt").write_text("../../etc")
    refused("expected 'release' or a number")
    (old / "latest_checkpointed_iteration.txt").write_text("7")
    legacy.file(0, 0).write_bytes(legacy.file(0, 0).read_bytes()[:2000])
    refused("is damaged or unsafe")


def test_a_legacy_file_runs_nothing(plan: SurgeryPlan, make_model: Make, new_tokenizer: Path, tmp_path: Path) -> None:
    """Whatever it names stays a name."""
    legacy = Legacy(tmp_path / "old", make_model(plan.old_size), 1, 1, 384)
    torch.save({"model": load(legacy.file(0, 0))["model"], "trap": Trap(tmp_path / "sprung")}, legacy.file(0, 0))
    apply_surgery(plan, tmp_path / "old", tmp_path / "new", new_tokenizer)
    assert not (tmp_path / "sprung").exists()
    load(legacy.file(0, 0, tmp_path / "new"))  # the trap went along as it was
    assert (tmp_path / "sprung").exists()


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")
