"""A run may grow: what it has read stays what it was, and a configuration that would change that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.config.manifest import read_json
from megatron_cpt.errors import ConfigError, InputError
from megatron_cpt.training.folder import RECORD, claim_run_folder, last_checkpoint, refuse_other_run, run_identity
from megatron_cpt.training.inputs import read_inputs
from tests.training.conftest import GLOBAL_BATCH, Tiny

TOKENS_PER_STEP = GLOBAL_BATCH * 32
FLAT = {"learning_rate": 1e-3, "min_learning_rate": 1e-3, "warmup_steps": 0}  # does not know the number of steps


def stage(name: str, steps: int, **shares: float | tuple[float, float]) -> dict[str, Any]:
    listed = [{"sources": [source], "share": share} for source, share in shares.items()]
    return {"name": name, "tokens": steps * TOKENS_PER_STEP, "shares": listed}


def changes(tiny: Tiny, steps: int, *stages: dict[str, Any], **others: Any) -> dict[str, Any]:
    """A job of `steps` steps through these stages."""
    train = [{"prefix": str(tiny.root / name), "language": name, **others.get(name, {})} for name in ("b", "a")]
    data = {"train": train, "stages": stages, "validation": [], "loader_workers": 0}
    return {"train_steps": steps, "optimizer": FLAT, "data": data}


FIRST = stage("first", 2, a=3.0, b=1.0)


def test_a_grown_run_is_the_run_that_was_long_from_the_start(tiny: Tiny) -> None:
    """Four steps, then two more of a stage that was not there; as good as six steps at once."""
    short = changes(tiny, 4, FIRST, stage("second", 2, a=1.0, b=1.0))
    long = changes(tiny, 6, FIRST, stage("second", 3, a=1.0, b=1.0), stage("third", 1, b=1.0))
    found = tiny.train_many({"grown": short, "long": long}, 1)
    again = tiny.train_many({"grown": long}, 1)["grown"]
    losses, wanted = ([record["loss"] for record in metrics] for metrics in (again, found["long"]))
    assert losses == wanted and len(losses) == 6
    assert [record["loss"] for record in found["grown"]] == losses[:4]
    orders = [read_json(last_checkpoint(tiny.root / name) / "manifest.json")["inputs"] for name in ("grown", "long")]
    inputs = read_inputs(tiny.config(tiny.root / "long", **long), 1)
    assert orders == [{"data_order": inputs.plan.order_hash(6 * GLOBAL_BATCH)}] * 2


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Path:
    """The folder of a run of eight steps that has done three: one of them in its second stage."""
    config = tiny.config(tmp_path / "run", **changes(tiny, 8, FIRST, stage("second", 6, a=1.0, b=1.0)))
    claim_run_folder(tmp_path / "run", run_identity(config, read_inputs(config, 1)))
    checkpoint = tmp_path / "run" / "checkpoints" / "iter_0000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    return tmp_path / "run"


def test_what_was_read_may_not_change(tiny: Tiny, run: Path) -> None:
    second = stage("second", 6, a=1.0, b=1.0)
    after_two, after_three = 2 * GLOBAL_BATCH, 3 * GLOBAL_BATCH
    cases = {
        "'first', which began at sample 0: it was a 0.75, b 0.25 and is now a 0.8": (
            stage("first", 2, a=4.0, b=1.0),
            second,
        ),
        f"'first', which began at sample 0: it had {after_two} samples and has {after_three}": (
            stage("first", 3, a=3.0, b=1.0),
            second,
        ),
        f"'second', which began at sample {after_two}: it was a 0.5, b 0.5 and is now a 1": (
            FIRST,
            stage("second", 6, a=1.0),
        ),
    }
    for reason, stages in cases.items():
        config = tiny.config(run, **changes(tiny, 8, *stages, stage("last", 8, a=1.0)))
        with pytest.raises(ConfigError) as caught:
            refuse_other_run(run, run_identity(config, read_inputs(config, 1)))
        assert f"holds a run that has read {after_three} samples in 3 steps" in str(caught.value)
        assert reason in str(caught.value)


def test_what_is_to_come_may_change(tiny: Tiny, run: Path) -> None:
    """The record follows, so that the next change is measured by it."""
    stages = (FIRST, stage("second", 2, a=1.0, b=1.0), stage("third", 9, a=(1.0, 0.0), b=(0.0, 1.0)))
    grown = tiny.config(run, **changes(tiny, 12, *stages))
    identity = run_identity(grown, read_inputs(grown, 1))
    claim_run_folder(run, identity)
    assert read_json(run / RECORD) == identity
    fewer = tiny.config(run, **changes(tiny, 8, *stages))
    with pytest.raises(ConfigError, match="train_steps was 12 and is now 8"):
        refuse_other_run(run, run_identity(fewer, read_inputs(fewer, 1)))


def test_a_run_of_an_earlier_order_is_refused(tiny: Tiny, run: Path) -> None:
    config = tiny.config(run, **changes(tiny, 8, FIRST, stage("second", 6, a=1.0, b=1.0)))
    identity = run_identity(config, read_inputs(config, 1))
    record = run / RECORD
    record.write_text(record.read_text().replace('"version": 2', '"version": 1'))
    with pytest.raises(ConfigError, match="the order's version was 1 and is now 2"):
        refuse_other_run(run, identity)


def test_a_plan_that_is_too_short_or_exhausted_is_refused_before_anything_starts(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny.config(tmp_path / "run", **changes(tiny, 9, FIRST))
    with pytest.raises(InputError, match=rf"the stages hold {2 * TOKENS_PER_STEP} tokens .* sample {9 * GLOBAL_BATCH}"):
        read_inputs(config, 1)
    endless = changes(tiny, 5000, a={"max_epochs": 2.0})
    with pytest.raises(InputError, match=r"source 'a' runs out at token [\d,]+: max_epochs=2 of its"):
        read_inputs(tiny.config(tmp_path / "run", **endless), 1)
