"""Plans: made from a map alone, the same bytes every time, refused when they were touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_cpt.config.surgery import parse_method
from megatron_cpt.errors import ConfigError, InputError
from megatron_cpt.surgery import RowMaker, SurgeryPlan, plan_surgery
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
    made = RowMaker(plan.head, old_VD.float()).rows(new.vocab_size - 1, new.vocab_size)[0]
    torch.testing.assert_close(made, old_VD[last].mean(0).float(), rtol=1e-6, atol=1e-6)


def test_permuted_vocabulary() -> None:
    """A map that moves kept ids and drops some is followed as it stands."""
    entries = (Entry("special", 2), Entry("kept", 0), Entry("new", None, (1, 1, 3)))
    plan = plan_surgery(VocabMap(4, 3, "old", "new", entries))
    old_VD = torch.arange(8.0).reshape(4, 2)
    expected = torch.stack([old_VD[2], old_VD[0], (2 * old_VD[1] + old_VD[3]) / 3])
    torch.testing.assert_close(RowMaker(plan.embedding, old_VD).rows(0, 3), expected)
    rows = {origin: count for origin, count in plan.facts()["rows"].items() if count}
    assert rows == {"kept": 1, "new": 1, "special": 1}
    assert plan.kept() == {0: 2, 1: 0} and plan.removed() == [1, 3]


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
    for name in ("embedding", "head"):
        left, right = loaded.matrix(name).tensors(), plan.matrix(name).tensors()
        assert left.keys() == right.keys() and all(torch.equal(left[part], right[part]) for part in left)
    with pytest.raises(InputError, match="already holds files"):
        plan.save(tmp_path / "plan")


def test_unknown_method_and_row(vocab_map: VocabMap) -> None:
    for value, message in (
        ("median", "'median' is unknown: expected one of mean, "),
        ({"method": "clp"}, "clp needs helper"),
        ({"method": "mean", "top_k": 3}, "mean has no setting top_k"),
        ({"method": "normal", "std": -1.0}, "std is -1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_method(value)
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
