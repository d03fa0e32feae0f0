"""Plans: made from a map alone, the same bytes every time, refused when they were touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cpt.errors import ConfigError, InputError
from megatron_cpt.surgery import SurgeryPlan, plan_surgery
from megatron_cpt.tokenizer import Entry, VocabMap, load_tokenizer


def test_mean_of_pieces(vocab_map: VocabMap, old_tokenizer: Path, new_tokenizer: Path) -> None:
    plan = plan_surgery(vocab_map)
    old, new = load_tokenizer(old_tokenizer), load_tokenizer(new_tokenizer)
    line_end = old.encode("\n")
    for id in range(new.vocab_size):
        described = plan.row(id)
        if id < old.vocab_size:
            assert described["embedding"] == described["head"] == {"old_ids": [id], "weights": [1.0]}
            continue
        cut = old.encode("\n" + new.piece(id).replace("\u2581", " "))[len(line_end) :]
        assert described["origin"] == "new"
        assert described["embedding"]["old_ids"] == described["head"]["old_ids"] == cut
        assert described["embedding"]["weights"] == pytest.approx([1 / len(cut)] * len(cut))
    old_VD = torch.randn(old.vocab_size, 5, dtype=torch.float64)
    last = plan.row(new.vocab_size - 1)["head"]["old_ids"]
    made = plan.head.apply(old_VD.float())[-1]
    torch.testing.assert_close(made, old_VD[last].mean(0).float(), rtol=1e-6, atol=1e-6)


def test_permuted_vocabulary() -> None:
    """A map that moves kept ids and drops some is followed as it stands."""
    entries = (Entry("special", 2), Entry("kept", 0), Entry("new", None, (1, 1, 3)))
    plan = plan_surgery(VocabMap(4, 3, "old", "new", entries))
    old_VD = torch.arange(8.0).reshape(4, 2)
    expected = torch.stack([old_VD[2], old_VD[0], (2 * old_VD[1] + old_VD[3]) / 3])
    torch.testing.assert_close(plan.embedding.apply(old_VD), expected)
    assert plan.facts()["rows"] == {"kept": 1, "new": 1, "byte": 0, "special": 1}


def test_saved_and_read(vocab_map: VocabMap, new_tokenizer: Path, tmp_path: Path) -> None:
    plan = plan_surgery(vocab_map)
    plan.save(tmp_path / "plan", new_tokenizer)
    plan_surgery(vocab_map).save(tmp_path / "again", new_tokenizer)
    names = [path.relative_to(tmp_path / "plan") for path in (tmp_path / "plan").rglob("*") if path.is_file()]
    assert len(names) > 5
    for name in names:
        assert (tmp_path / "plan" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    loaded = SurgeryPlan.load(tmp_path / "plan")
    assert loaded.facts() == plan.facts() and loaded.origins == plan.origins
    for left, right in ((loaded.embedding, plan.embedding), (loaded.head, plan.head)):
        assert left.num_old_rows == right.num_old_rows
        assert torch.equal(left.indptr, right.indptr)
        assert torch.equal(left.indices, right.indices)
        assert torch.equal(left.weights, right.weights)
    with pytest.raises(InputError, match="already holds files"):
        plan.save(tmp_path / "plan")


def test_unknown_method_and_row(vocab_map: VocabMap) -> None:
    with pytest.raises(ConfigError, match="expected one of mean"):
        plan_surgery(vocab_map, "mean", "median")
    with pytest.raises(InputError, match="expected 0 to"):
        plan_surgery(vocab_map).row(vocab_map.new_size)


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_touched_plans(vocab_map: VocabMap, tmp_path: Path, name: str) -> None:
    plan_surgery(vocab_map).save(tmp_path / "plan")
    file = tmp_path / "plan" / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=name):
        SurgeryPlan.load(tmp_path / "plan")
    file.unlink()
    with pytest.raises(InputError, match=name):
        SurgeryPlan.load(tmp_path / "plan")
    (tmp_path / "plan" / "manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        SurgeryPlan.load(tmp_path / "plan")


def test_plans_that_contradict_themselves(vocab_map: VocabMap, tmp_path: Path) -> None:
    """Files whose hashes are right, written by something else."""
    plan = plan_surgery(vocab_map)
    replace(plan, new_size=plan.new_size + 1).save(tmp_path / "larger")
    with pytest.raises(InputError, match="other sizes"):
        SurgeryPlan.load(tmp_path / "larger")
    replace(plan, old_size=5).save(tmp_path / "smaller")
    with pytest.raises(InputError, match="row mix"):
        SurgeryPlan.load(tmp_path / "smaller")
