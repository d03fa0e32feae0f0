"""`plan` and `run --dry-run`: refused is what could not run, before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.checkpoint.random import write_random_hf
from megatron_cpt.cli.main import main
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.data import IndexedDataset, pack_dataset
from tests.data.test_windows import write_dataset

CURRICULA = Path(__file__).parents[2] / "examples" / "curricula"


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """The words that put a base of 64 positions under the quickstart."""
    shape = LlamaShape(
        num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, head_dim=8,
        max_position_embeddings=64,
    )  # fmt: skip
    write_random_hf(shape, 256, 1, tmp_path / "base", 1, 2)
    settings = [f"base.path={tmp_path / 'base'}", "base.shape=null", "base.train=null", f"output={tmp_path / 'run'}"]
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.parametrize("verb", [["plan"], ["run", "--dry-run"]])
def test_samples_longer_than_the_base_can_read(
    verb: list[str], base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [verb[0], "quickstart", *verb[1:], *base, "--set"]
    assert main([*words, "train.batch.seq_length=128"]) == 2
    message = "error: train: batch.seq_length=128 is longer than the model's max_position_embeddings=64; shorten it"
    printed = capsys.readouterr()
    assert printed.err.strip() == message and not printed.out
    assert main([*words, "train.batch.seq_length=64"]) == 0
    assert not (tmp_path / "run").exists()


KERNELS = pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("train.kernels.norm=triton", "train.kernels.norm: rms_norm: 'triton' cannot run here: "),
        ("base.train.kernels.attention=triton", "base.train.kernels.attention: attention: 'triton' cannot run here: "),
    ],
)


@pytest.mark.parametrize("verb", [["run", "--dry-run"], ["run"]])
@KERNELS
def test_kernels_that_cannot_run(
    setting: str, told: str, verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MEGATRON_CPT_DEVICE", "cpu")
    run = tmp_path / "run"
    assert main([verb[0], "quickstart", *verb[1:], "--set", f"output={run}", "--set", setting]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {told}") and not printed.out and not run.exists()
    assert "use 'auto' to let the op choose" in printed.err


@pytest.mark.parametrize("verb", [["plan"], ["run", "--dry-run"]])
def test_one_table_is_made_by_one_method(verb: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"output={tmp_path / 'run'}", "base.shape.tied_embeddings=true", "surgery.embedding=aligned"]
    words = [verb[0], "quickstart", *verb[1:], *(word for setting in settings for word in ("--set", setting))]
    assert main([*words, "--set", "surgery.head=mean"]) == 2
    told = "error: surgery.embedding makes rows by 'aligned' and surgery.head by 'mean', but the base ties its head to"
    assert capsys.readouterr().err.startswith(told)
    assert main([*words, "--set", "surgery.head=aligned"]) == 0


@KERNELS
def test_kernels_of_another_machine_are_planned(
    setting: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MEGATRON_CPT_DEVICE", "cpu")
    words = ["plan", "quickstart", "--set", f"output={tmp_path / 'run'}", "--set", setting]
    assert main(words) == 0
    assert f"not on this machine: {told}"[:60] in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    jobs = json.loads(capsys.readouterr().out)["jobs"]
    found = [job["kernels"] for job in jobs.values()]
    assert sorted(message is None for message in found) == [False, True]
    assert any(message is not None and message.startswith(told) for message in found)


def test_texts_that_are_not_there(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The dry run of `run` looks for them; `plan` needs no data."""
    there, missing = tmp_path / "there.txt", tmp_path / "missing.txt"
    there.write_text("text\n")
    texts = ["data.builtin=null", f"data.source={there}", f"data.target={missing}", "train.batch.seq_length=64"]
    words = ["quickstart", *base, *(word for text in texts for word in ("--set", text))]
    assert main(["plan", *words]) == 0
    capsys.readouterr()
    assert main(["run", "--dry-run", *words]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {missing} does not exist") and not printed.out
    missing.write_text("text\n")
    assert main(["run", "--dry-run", *words]) == 0
    assert not (tmp_path / "run").exists()


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == 0
    job: dict[str, Any] = json.loads(capsys.readouterr().out)["jobs"]["train"]
    return job


def test_the_curricula_are_planned_before_anything_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shares, samples and epochs from the sizes that they state, and for all that is missing how it is made."""
    monkeypatch.chdir(tmp_path)
    job = planned(capsys, str(CURRICULA / "ricoh.yaml"))
    assert job["layout"] is None and job["tokens"]["total"] == 16290 * 1024 * 4096
    assert [[(row["name"], row["share"][0]) for row in stage["sources"]] for stage in job["stages"]] == [
        [("en", 0.75), ("wiki", 0.25), ("cc100", 0.25), ("oscar", 0.25)],
        [("en", 0.25), ("oscar", 0.75), ("cc100", 0.75), ("wiki", 0.75)],
    ]
    assert {round(source["epochs"], 1) for source in job["sources"]} == {0.9, 1.0}
    assert [(each["what"], each["path"]) for each in job["missing"]] == [
        ("tokenizer", "tokenizer"),
        ("base", "base"),
        *((f"dataset {name}", f"data/{path}") for name, path in
          [("wiki", "ja.wiki"), ("cc100", "ja.cc100"), ("oscar", "ja.oscar"), ("en", "en")]),
    ]  # fmt: skip
    build = "megatron-cpt data build FILE... --tokenizer tokenizer --output data/ja.wiki --language ja"
    assert job["missing"][2]["make"] == build
    assert main(["plan", str(CURRICULA / "swallow.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "dataset cc.5: data/cc.5\n    megatron-cpt data build" in shown and "unknown, tokenizer or base" in shown
    assert main(["train", str(CURRICULA / "ricoh.yaml"), "--dry-run"]) == 2, "what train would refuse"
    assert "base" in capsys.readouterr().err


def test_what_is_not_known_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One dataset is built, one is built and not packed, one has a stated size, one has none."""
    monkeypatch.chdir(tmp_path)
    write_dataset(tmp_path / "built", [100, 200])
    write_dataset(tmp_path / "unpacked", [90, 91])
    train = [
        {"prefix": "built", "language": "a"},
        {"prefix": "unpacked", "language": "a", "packing": "best_fit"},
        {"prefix": "stated", "language": "b", "tokens": 641, "max_epochs": 1},
        {"prefix": "nothing", "language": "b", "max_epochs": 1},
    ]
    turns = {"sources": ["stated", "nothing"], "share": 1, "in_turn": True}
    stages = [
        {"name": "mixed", "tokens": 640, "shares": [{"sources": [name], "share": 1} for name in
                                                    ("built", "unpacked", "stated", "nothing")]},
        {"name": "turns", "tokens": 640, "shares": [turns]},
        {"name": "parts", "tokens": 640, "shares": [{**turns, "parts": [1, 1]}]},
    ]  # fmt: skip
    job = {
        "output": "run", "tokenizer": "none", "initial_checkpoint": "none", "train_steps": 60,
        "batch": {"seq_length": 32, "global_batch_size": 1}, "data": {"train": train, "stages": stages},
    }  # fmt: skip
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(job))
    found = planned(capsys, str(path))
    rows = [{row["name"]: (row["samples"], row["epochs"]) for row in stage["sources"]} for stage in found["stages"]]
    assert rows == [
        {"built": (5, 0.5), "unpacked": (5, 5 / 6), "stated": (5, 0.25), "nothing": (5, None)},
        {"stated": (None, None), "nothing": (None, None)},
        {"stated": (10, 0.5), "nothing": (10, None)},
    ]
    assert [(source["samples"], source["known_from"], source["epochs"]) for source in found["sources"]] == [
        (10, "dataset", 0.5),
        (6, "dataset, not packed yet", 5 / 6),
        (20, "tokens in the configuration", None),
        (None, None, None),
    ]
    assert main(["plan", str(path)]) == 0
    assert "nothing: not built, and no `tokens` stated" in capsys.readouterr().out
    path.write_text(
        json.dumps({**job, "data": {"train": train, "stages": [*stages[:1], {**stages[2], "tokens": 1280}]}})
    )
    assert main(["plan", str(path)]) == 2
    assert "source 'stated' runs out in stage 'parts' at token" in capsys.readouterr().err
    pack_dataset(IndexedDataset(tmp_path / "unpacked"), 32)
    write_dataset(tmp_path / "stated", [300, 400])
    write_dataset(tmp_path / "nothing", [700, 701])
    path.write_text(json.dumps(job))
    found = planned(capsys, str(path))
    assert {source["known_from"] for source in found["sources"]} == {"dataset"} and len(found["missing"]) == 2
    assert None not in [source["epochs"] for source in found["sources"]]
