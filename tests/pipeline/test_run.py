"""The whole path, tiny: what it leaves, what it does a second time, what it refuses, how it goes on."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.cli.main import main
from megatron_cpt.data.world import World
from megatron_cpt.runtime.lock import lock_folder
from megatron_cpt.tokenizer import VocabMap, load_tokenizer
from megatron_cpt.training.folder import last_checkpoint
from megatron_cpt.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TINY = [
    "data.world_documents=120",
    "data.held_out_bytes=4000",
    "base.vocab_size=600",
    "base.shape.num_layers=2",
    "base.shape.hidden_size=32",
    "base.shape.ffn_hidden_size=64",
    "base.shape.num_attention_heads=4",
    "base.shape.head_dim=8",
    "base.train.train_steps=3",
    "base.train.num_processes=1",
    "base.train.optimizer.warmup_steps=0",
    "tokenizer.num_pieces=900",
    "surgery.embedding=aligned",
    "train.train_steps=4",
    "train.optimizer.warmup_steps=1",
    "train.eval_interval_steps=2",
    "train.log_interval_steps=1",
]


def words(output: Path, *changes: str) -> list[str]:
    settings = [f"output={output}", *TINY, *changes]
    return ["run", "quickstart", *(word for setting in settings for word in ("--set", setting))]


def report_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: base on one process, adaptation at TP2."""
    output = tmp_path_factory.mktemp("a run") / "out"
    assert main(words(output)) == 0
    return output


def test_report_has_every_field(run: Path) -> None:
    report = report_of(run)
    for language in ("en", "ja"):
        assert report["bits_per_byte"][language].keys() == {"base", "after_surgery", "adapted"}
        assert report["bytes_per_token"][language].keys() == {"base", "adapted"}
    assert report["logit_parity"]["max_abs_diff"] <= 1e-4
    assert report["tokenizer"]["source_lines_changed"]["changed"] == 0
    assert report["tokenizer"]["fast_slow_mismatches"]["mismatches"] == 0
    surgery = report["surgery"]
    assert (surgery["embedding"], surgery["head"]) == ("aligned", "mean") and surgery["new_rows"] > 100
    assert 15_000 < surgery["calibration"]["tokens"] <= 16_384
    train = report["train"]
    assert (train["world_size"], train["layout"], train["tokens"]) == (2, "TP2-PP1-DP1", 4 * 16 * 128)
    assert train["tokens_per_second"] > 0 and train["bytes_per_second"] > train["tokens_per_second"]
    assert report["versions"]["megatron-core"].startswith("0.16")
    assert len(report["config_hash"]) == 64
    assert report["bytes_per_token"]["ja"]["adapted"] > 2 * report["bytes_per_token"]["ja"]["base"]
    assert report["bytes_per_token"]["en"]["adapted"] == report["bytes_per_token"]["en"]["base"]
    assert {point["step"] for point in report["history"]} == {0, 2, 4}
    assert report["probe"]["ja"]["adapted"]["chance"] == 0.25
    text = (run / "report.md").read_text()
    assert f"| ja | {report['bits_per_byte']['ja']['base']:.4f} |" in text
    assert (run / "bits_per_byte.png").stat().st_size > 10_000


def test_surgery_reads_the_texts_that_are_trained_on(run: Path) -> None:
    methods = json.loads((run / "surgery" / "plan" / "plan.json").read_text())["methods"]
    texts = [json.loads(line)["text"] for line in (run / "text" / "ja.train.jsonl").read_text().splitlines()]
    assert methods["embedding"]["method"] == "aligned" and methods["head"]["method"] == "mean"
    read = methods["embedding"]["target_corpus"]
    assert (read["texts"], read["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))


def test_scores_are_those_of_training(run: Path) -> None:
    """The exported model, scored on its own, equals the engine's last validation."""
    for difference in report_of(run)["export"]["bits_per_byte_minus_trained"].values():
        assert abs(difference) <= 1e-6


def test_export_is_the_trained_model_in_transformers(run: Path) -> None:
    ids = load_tokenizer(run / "tokenizer").encode((run / "text" / "ja.held_out.jsonl").read_text())[:128]
    assert len(ids) == 128  # the full context
    tokens = torch.tensor([ids])
    with torch.no_grad():
        exported = LlamaForCausalLM.from_pretrained(run / "hf")(tokens).logits
    trained = LlamaForward(last_checkpoint(run / "train")).logits(tokens)
    assert (exported - trained).abs().max() <= 1e-4
    config = json.loads((run / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    assert config["vocab_size"] == load_tokenizer(run / "hf").vocab_size == exported.shape[-1]


def test_exported_tokenizer_is_the_one_trained_with(run: Path) -> None:
    text = next(World(5).documents("ja", 1, "held_out")).text
    fast = AutoTokenizer.from_pretrained(run / "hf")
    assert fast(text)["input_ids"] == [1, *load_tokenizer(run / "tokenizer").encode(text)]


def test_second_call_does_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten = ("config.yaml", "run.json", ".lock")
    watched = [path for path in run.rglob("*") if path.is_file() and path.name not in rewritten]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in watched}
    assert main(words(run)) == 0
    assert capsys.readouterr().out.count("done before") == 9
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in watched} == before


def test_second_call_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(run), "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["config_hash"] == report_of(run)["config_hash"] and "done before" in error


def contents(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


def test_what_is_missing_is_made_again_where_it_is_wanted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a finished run the model and the report are wanted; the rest may be deleted."""
    output = tmp_path / "moved"
    shutil.copytree(run, output)
    for intermediate in ("surgery", "shards", "base"):
        shutil.rmtree(output / intermediate)
    assert main(words(output)) == 0
    assert capsys.readouterr().out.count("done before") == 9
    shutil.rmtree(output / "hf")
    assert main(words(output)) == 0
    assert capsys.readouterr().out.count("done before") == 8
    assert contents(output / "hf") == contents(run / "hf")


def test_a_base_that_was_cut_off_at_its_end_goes_on(run: Path, tmp_path: Path) -> None:
    """Exported but not recorded: it is not trained again, and its folder is no obstacle."""
    output = tmp_path / "moved"
    shutil.copytree(run, output)
    record = output / "steps" / "base.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "done": False}))
    metrics = (output / "base" / "train" / "metrics.jsonl").stat()
    assert main(words(output)) == 0
    assert json.loads(record.read_text())["done"]
    assert (output / "base" / "train" / "metrics.jsonl").stat().st_mtime_ns == metrics.st_mtime_ns
    assert contents(output / "base" / "hf") == contents(run / "base" / "hf")


def test_two_runs_in_one_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_folder(run):
        assert main(words(run)) == 2
    assert "another job is running in" in capsys.readouterr().err


def test_changed_configuration_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "config.yaml").read_text()
    assert main(words(run, "train.replay=0.3")) == 2
    assert "holds another run" in capsys.readouterr().err
    assert (run / "config.yaml").read_text() == before


def test_foreign_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(words(tmp_path)) == 2
    assert "is not empty (thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert main(words(tmp_path / "thesis.tex")) == 2
    assert "thesis.tex is a file" in capsys.readouterr().err


def test_impossible_layout_is_refused_before_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path / "out", "train.parallel.tensor_model_parallel_size=3", "train.num_processes=3")) == 2
    assert "tensor_model_parallel_size=3 does not divide num_attention_heads=4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two corpora as a user has them: compressed jsonl, several documents of a work."""
    folder = tmp_path_factory.mktemp("corpora")
    paths = {}
    for language in ("en", "ja"):
        paths[language] = folder / f"{language}.jsonl.gz"
        with gzip.open(paths[language], "wt", encoding="utf-8") as file:
            for number, document in enumerate(World(2).documents(language, 120)):
                file.write(json.dumps({"id": f"book{number // 4}#{number % 4}", "text": document.text}) + "\n")
    return paths


def own_files_words(output: Path, own_files: dict[str, Path], *changes: str) -> list[str]:
    files = ("data.builtin=null", f"data.source={own_files['en']}", f"data.target={own_files['ja']}")
    return words(output, *files, "data.held_out_fraction=0.2", *changes)


def test_own_files_on_an_existing_base(run: Path, own_files: dict[str, Path], tmp_path: Path) -> None:
    """Extended, replaced and left alone, from the base model of the run above."""
    base = (f"base.path={run / 'base' / 'hf'}", "base.shape=null", "base.train=null")
    one = ("train.parallel.tensor_model_parallel_size=1", "train.num_processes=1", "train.train_steps=2")
    reports = {}
    for method in ("extend", "replace", "none"):
        output = tmp_path / method
        more = {
            "extend": ("surgery.calibration.prior_tokens=256",),
            "replace": ("tokenizer.vocab_size=1200", "tokenizer.source_share=0.4"),
            "none": (),
        }[method]
        assert main(own_files_words(output, own_files, *base, *one, f"tokenizer.method={method}", *more)) == 0
        reports[method] = report_of(output)
    assert "probe" not in reports["none"] and "surgery" not in reports["none"]
    assert "expected at least 200" in reports["extend"]["surgery"]["calibration"]["left_out"]
    assert reports["replace"]["surgery"]["calibration"]["prior"]["nats_after"] > 0
    plain = reports["none"]["bits_per_byte"]["ja"]
    assert plain["after_surgery"] == plain["base"]
    sizes = {method: report["tokenizer"]["vocab_size"] for method, report in reports.items()}
    assert sizes["none"]["adapted"] == 600 < sizes["extend"]["adapted"]
    assert sizes["replace"]["adapted"] == load_tokenizer(tmp_path / "replace" / "hf").vocab_size == 1200
    assert reports["replace"]["tokenizer"]["fast_slow_mismatches"]["mismatches"] == 0
    replaced = reports["replace"]["bits_per_byte"]["ja"]
    assert replaced["after_surgery"] < replaced["base"], "a base that spells Japanese in bytes"
    vocab_map = VocabMap.load(tmp_path / "replace" / "tokenizer")
    kept = [id for id, entry in enumerate(vocab_map.entries) if entry.origin == "kept" and entry.old_id == id]
    assert len(kept) > 100
    old, new = (
        load_file(folder / "model.safetensors")
        for folder in (run / "base" / "hf", tmp_path / "replace" / "surgery" / "hf")
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(new[name][kept], old[name][kept])
    assert reports["extend"]["bits_per_byte"]["ja"]["base"] == plain["base"]


STAGES = [
    {
        "name": "one",
        "tokens": 2 * 16 * 128,
        "shares": [{"sources": ["en"], "share": 3}, {"sources": ["first"], "share": 1}],
    },
    {
        "name": "two",
        "tokens": 2 * 16 * 128,
        "shares": [{"sources": ["first", "second"], "share": 1, "in_turn": True}],
        "replay": {"sources": ["en"], "share": 0.25},
    },
]


def test_a_recipe_with_stages(
    run: Path, own_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two stages of texts with names: planned before anything is built, run to the end, told in report and record."""
    with gzip.open(own_files["ja"], "rt") as file:
        lines = file.readlines()
    target = {}
    for name, part, options in (("first", lines[:60], {}), ("second", lines[60:], {"max_epochs": 4, "tokens": 9000})):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
        target[name] = {"files": str(tmp_path / f"{name}.jsonl"), **options}
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    changes = {"train": {"stages": STAGES, "replay": None}, "data": {"builtin": None, "target": target}}
    recipe.write_text(json.dumps({"extends": "quickstart", **changes}))
    settings = [
        *(setting for setting in TINY if not setting.startswith("base.")),
        *(f"output={output}", f"data.source={own_files['en']}", "data.held_out_fraction=0.2"),
        *(f"base.path={run / 'base' / 'hf'}", "base.shape=null", "base.train=null"),
        *("train.parallel.tensor_model_parallel_size=1", "train.num_processes=1", "tokenizer.method=none"),
    ]
    words = [str(recipe), *(word for setting in settings for word in ("--set", setting)), "--json"]
    shares = [{"en": 0.75, "first": 0.25}, {"en": 0.25, "first": 0.75, "second": 0.75}]

    def shares_of(stages: list[dict[str, Any]]) -> list[dict[str, float]]:
        return [{row["name"]: row["share"][0] for row in stage["sources"]} for stage in stages]

    assert main(["plan", *words]) == 0
    job = json.loads(capsys.readouterr().out)["jobs"]["adapt"]
    assert shares_of(job["stages"]) == shares
    known = {source["name"]: (source["samples"], source["known_from"]) for source in job["sources"]}
    assert known == {"en": (None, None), "first": (None, None), "second": (71, "tokens in the configuration")}
    assert main(["run", *words]) == 0
    report = report_of(output)
    assert shares_of(report["stages"]) == shares and [stage["samples"] for stage in report["stages"]] == [32, 32]
    assert "| two | second | 75.00% |" in (output / "report.md").read_text()
    order = json.loads((output / "train" / "run.json").read_text())["content.data"]
    assert [stage["name"] for stage in order["stages"]] == ["one", "two"]
    assert sorted(source["name"] for source in order["sources"]) == ["en", "first", "second"]
    assert sum("loss" in record for record in read_metrics(output / "train")) == 4
    capsys.readouterr()
    assert main(["plan", *words]) == 0
    job = json.loads(capsys.readouterr().out)["jobs"]["adapt"]
    assert job["stages"] == report["stages"], "once all is built, epochs are known"


def test_malformed_line_is_refused_before_training(
    own_files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "thr\n')
    assert main(own_files_words(tmp_path / "out", {**own_files, "ja": broken})) == 2
    assert f"{broken}:3" in capsys.readouterr().err
    assert not (tmp_path / "out" / "base").exists()
    assert main(own_files_words(tmp_path / "none", {**own_files, "ja": tmp_path / "missing.jsonl"})) == 2
    assert "missing.jsonl does not exist" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    corpus = f"surgery.head={{method: focus, target_corpus: {tmp_path / 'missing.txt'}}}"
    assert main(words(tmp_path / "out2", corpus)) == 2
    assert "missing.txt does not exist; surgery names it" in capsys.readouterr().err


def test_killed_in_the_middle_it_goes_on(run: Path, tmp_path: Path) -> None:
    """Killed while it adapts and called again, it ends with the same numbers as the undisturbed run."""
    output = tmp_path / "out"
    shutil.copytree(run, output)
    for record in ("train", "export", "report"):
        (output / "steps" / f"{record}.json").unlink()
    (output / "report.json").unlink()
    for made in ("train", "hf"):
        shutil.rmtree(output / made)
    command = [sys.executable, "-m", "megatron_cpt.cli.main", *words(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = output / "train" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and '"step": 2, "loss"' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (output / "report.json").exists()
    assert subprocess.run(command, env=environment, stdout=subprocess.DEVNULL).returncode == 0
    losses = [
        [record["loss"] for record in read_metrics(folder / "train") if "loss" in record] for folder in (output, run)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    for language, wanted in report_of(run)["bits_per_byte"].items():
        assert report_of(output)["bits_per_byte"][language] == pytest.approx(wanted, abs=1e-7)
