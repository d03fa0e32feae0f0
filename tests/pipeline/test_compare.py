"""A comparison end to end: what its arms are, what is shared, how it goes on, and what an arm that fails leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.checkpoint.random import write_random_hf
from megatron_cpt.cli.main import main
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.data.world import World
from megatron_cpt.surgery import SurgeryPlan
from megatron_cpt.tokenizer import train_tokenizer
from megatron_cpt.training.metrics import read_metrics

SHAPE = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LEARN: dict[str, Any] = {
    "train_steps": 4,
    "precision": "fp32",
    "batch": {"seq_length": 64, "micro_batch_size": 8, "global_batch_size": 8},
    "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4},
}
CLP = {"method": "clp", "helper": "trained"}
NORMAL = {"embedding": "normal", "head": "normal"}
CALIBRATION = {"prior_tokens": 0, "steps": 2, "step_tokens": 128, "seq_length": 64}
ARMS: dict[str, Any] = {
    "scratch": {"scratch": True},
    "normal": {"surgery": NORMAL},
    "clp": {"surgery": {"embedding": CLP, "head": CLP, "calibration": CALIBRATION}},
    "plain": {"tokenizer": "base"},
}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A comparison of one seed on a base with random weights."""
    folder = tmp_path_factory.mktemp("compare")
    texts = {}
    for language in ("en", "ja"):
        texts[language] = folder / f"{language}.jsonl"
        lines = [json.dumps({"id": d.id, "text": d.text}) for d in World(3).documents(language, 120)]
        texts[language].write_text("\n".join(lines) + "\n")
    train_tokenizer((d.text for d in World(3).documents("en", 120)), 500, folder / "base")
    write_random_hf(LlamaShape(**SHAPE), 500, 7, folder / "base", 1, 2)
    return {
        "name": "tiny",
        "output": str(folder / "out"),
        "num_seeds": 1,
        "control": ["scratch", "normal"],
        "data": {
            "source": str(texts["en"]),
            "target": str(texts["ja"]),
            "held_out_fraction": 0.2,
            "held_out_bytes": 3000,
        },
        "base": {"path": str(folder / "base")},
        "tokenizer": {"num_pieces": 700},
        "helper": {"shape": {**SHAPE, "num_layers": 1}, "train": {**LEARN, "train_steps": 2}},
        "train": {**LEARN, "replay": 0.25, "eval_interval_steps": 2, "log_interval_steps": 1},
        "arms": ARMS,
    }


def compare(document: dict[str, Any], *words: str, **changes: Any) -> int:
    path = Path(document["output"]).with_name("comparison.yaml")
    path.write_text(json.dumps({**document, **changes}))
    return main(["surgery", "compare", str(path), *words])


@pytest.fixture(scope="module")
def done(document: dict[str, Any]) -> Path:
    assert compare(document) == 0
    return Path(document["output"])


def report_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "comparison.json").read_text())
    return found


def test_plan_of_the_arms(document: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(document, "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    # Two steps and their size read two samples each: 384 of the 512 tokens of a training step.
    assert {name: (arm["steps_of_calibration"], arm["train_steps"]) for name, arm in plan["arms"].items()} == {
        "scratch": (0, 4),
        "normal": (0, 4),
        "clp": (1, 3),
        "plain": (0, 4),
    }
    assert plan["shared_tokens"] == {"base": 0, "helper": 2 * 512}
    assert plan["tokens_in_all"] == 4 * 4 * 512 + 2 * 512


def test_curves(done: Path, document: dict[str, Any]) -> None:
    report = report_of(done)
    arms = report["arms"]
    steps = {name: [step for step, _ in arm["curves"]["ja"]["1"]] for name, arm in arms.items()}
    assert steps == {"scratch": [0, 2, 4], "normal": [0, 2, 4], "clp": [1, 3, 4], "plain": [0, 2, 4]}
    for language in ("en", "ja"):  # the engine's score of the base is that of the certificate's forward pass
        start = arms["plain"]["curves"][language]["1"][0][1]
        assert start == pytest.approx(report["base"][language]["mean"], abs=1e-5)
    record = json.loads((done / "seed1" / "steps" / "clp.surgery.json").read_text())["facts"]
    assert record["calibration"]["tokens"] == 384
    after = record["certificate"]["bits_per_byte"]
    for language in ("en", "ja"):
        assert arms["clp"]["curves"][language]["1"][0][1] == pytest.approx(after[language]["after"], abs=1e-5)
    assert record["certificate"]["plan"]["methods"]["head"]["helper"] == str(done / "seed1" / "helper" / "hf")
    against = arms["normal"]["against"]
    assert against.keys() == {"scratch"} and arms["clp"]["against"].keys() == {"scratch", "normal"}
    ends = [arms[name]["curves"]["ja"]["1"][-1][1] for name in ("normal", "scratch")]
    assert against["scratch"]["difference"]["ja"]["mean"] == pytest.approx(ends[0] - ends[1], abs=1e-12)
    assert "| scratch | random weights | 0 |" in (done / "comparison.md").read_text()


def test_it_grows_and_what_fails_stops_nothing_else(
    done: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """One more seed and an arm that cannot be, three left out: what was done stays, the rest is done."""
    metrics = done / "seed1" / "arms" / "normal" / "train" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    other = {"method": "clp", "helper": document["base"]["path"]}  # a model of another vocabulary
    starved = {"calibration": {"prior_tokens": 130, "seq_length": 64}}  # told too little to be calibrated
    arms = {
        "broken": {"surgery": {"embedding": other, "head": other}},
        "starved": {"surgery": starved},
        "normal": ARMS["normal"],
    }
    assert compare(document, num_seeds=2, control="normal", arms=arms) == 1
    out, error = capsys.readouterr()
    assert "4 of 6 trainings have failed" in error and "seed 2, broken: " in error
    assert "seed 1, starved: of the" in error and "expected at least 200" in error
    assert out.count("normal: continue pre-training on ja with 25% en: done before") == 1
    assert metrics.stat().st_mtime_ns == before
    report = report_of(done)
    assert list(report["arms"]["normal"]["curves"]["ja"]) == ["1", "2"]
    assert report["arms"]["normal"]["bits_per_byte"]["ja"]["4"]["low"] is not None
    assert report["arms"]["broken"]["curves"]["ja"] == {} and list(report["failed"]) == [
        "seed 1, broken",
        "seed 1, starved",
        "seed 2, broken",
        "seed 2, starved",
    ]
    plans = [SurgeryPlan.load(done / f"seed{seed}" / "arms" / "normal" / "surgery" / "plan") for seed in (1, 2)]
    assert [plan.head.method["seed"] for plan in plans] == [1, 2]
    # A finished arm leaves its curve and its plan; the weights are not kept.
    arm = done / "seed2" / "arms" / "normal"
    assert sum("loss" in record for record in read_metrics(arm / "train")) == 4
    assert not (arm / "surgery" / "hf").exists() and not (arm / "train" / "checkpoints").exists()


def test_another_comparison_is_refused(
    done: Path, document: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "config.yaml").read_text()
    assert compare(document, "--set", "train.replay=0.5") == 2
    assert "holds another run (tiny" in capsys.readouterr().err
    assert (done / "config.yaml").read_text() == before
