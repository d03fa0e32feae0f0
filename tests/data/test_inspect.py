"""`data inspect` and `plan`: where a sample comes from, down to the document and its file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.config.manifest import read_json, write_json_atomic
from megatron_cpt.data import (
    DatasetBuild,
    Document,
    IndexedDataset,
    SamplePlan,
    build_dataset,
    build_files,
    describe_sample,
    pack_dataset,
    trace_document,
)
from megatron_cpt.data.indexed import manifest_path
from megatron_cpt.errors import VerificationError
from megatron_cpt.tokenizer import load_tokenizer

LENGTH = 48
STAGES = [
    {"name": "first", "tokens": 960, "shares": [{"sources": ["x"], "share": 1.0}]},
    {"name": "second", "tokens": 960, "shares": [{"sources": ["x", "y"], "share": 1.0}]},
]


@pytest.fixture
def job(documents: list[Document], tokenizer: Path, tmp_path: Path) -> Path:
    """The configuration of a job on two datasets; the second is packed and says which files it was made of."""
    build_dataset(documents[:70], tokenizer, tmp_path / "x", "xx")
    build_dataset(documents[70:], tokenizer, tmp_path / "y", "yy")
    manifest = read_json(manifest_path(tmp_path / "y"))
    files = [("one.jsonl", 0, 20), ("empty.jsonl", 20, 0), ("two.jsonl", 20, 30)]
    sources = [{"path": path, "first_document": first, "documents": count} for path, first, count in files]
    write_json_atomic(manifest_path(tmp_path / "y"), {**manifest, "sources": sources})
    pack_dataset(IndexedDataset(tmp_path / "y"), LENGTH)
    packed = {"prefix": str(tmp_path / "y"), "language": "yy", "packing": "best_fit"}
    shape = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "head_dim": 4}
    config = {
        "output": "run",
        "tokenizer": str(tokenizer),
        "shape": {**shape, "num_attention_heads": 2, "num_query_groups": 2},
        "train_steps": 10,
        "batch": {"seq_length": LENGTH, "global_batch_size": 4},
        "data": {"train": [{"prefix": str(tmp_path / "x"), "language": "xx"}, packed], "stages": STAGES},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(config))
    return tmp_path / "job.yaml"


def shown(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main([*map(str, words), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_sample_of_a_job_is_traced_to_its_documents(
    job: Path, documents: list[Document], capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = {name: IndexedDataset(job.parent / name) for name in "xy"}
    seen = set()
    for number in (0, 19, *range(20, 40)):
        sample = shown(capsys, "data", "inspect", "--plan", job, "--sample", number)["sample"]
        dataset = datasets[sample["source"]]
        assert sample["stage"] == ("first" if number < 20 else "second") and sample["number"] == number
        assert sample["language"] == dataset.language
        for piece in sample["pieces"]:
            ids = dataset.document(piece["document"]).tolist()
            offset = piece["start"] - int(dataset.document_starts[piece["document"]])
            assert ids[offset : offset + piece["tokens"]] == piece["ids"] and piece["tokens"]
            file = None if sample["source"] == "x" else "one.jsonl" if piece["document"] < 20 else "two.jsonl"
            assert piece["file"] == file
            if len(ids) == piece["tokens"]:
                assert piece["text"] == documents[piece["document"] + 70 * (sample["source"] == "y")].text
        seen |= {(sample["source"], piece["file"]) for piece in sample["pieces"]}
    assert seen == {("x", None), ("y", "one.jsonl"), ("y", "two.jsonl")}
    assert main(["data", "inspect", "--plan", str(job), "--sample", "30"]) == 0
    assert "of two.jsonl" in (out := capsys.readouterr().out) or "of one.jsonl" in out or "document" in out


def test_what_inspect_needs(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(job.parent / "x")
    plan = ["--plan", str(job)]
    for words, message in (
        ([], "got neither PREFIX nor --plan; expected PREFIX, or --plan CONFIG --sample NUMBER"),
        ([prefix, *plan], f"got both PREFIX {prefix} and --plan {job}; expected PREFIX, or"),
        (plan, "data inspect --plan: got no --sample; say which sample"),
        ([*plan, "--sample", "1", "--document", "1"], "--document is of a dataset; give PREFIX in place of --plan"),
    ):
        assert main(["data", "inspect", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["data", "inspect", "--plan", str(job), "--sample", "40"]) == 2
    assert "the stages hold 1,920 tokens (40 samples of 48), asked for was sample 41" in capsys.readouterr().err


def test_a_dataset_alone_is_a_plan_too(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx")
    plan = SamplePlan([(tmp_path / "x", "xx")], LENGTH, 1)
    value = describe_sample(plan, load_tokenizer(tokenizer), 5)
    assert sum(piece["tokens"] for piece in value["pieces"]) == LENGTH + 1
    assert (value["source"], value["stage"], value["epoch"], value["window"]) == ("x", "", 0, plan.place(5).window)


def test_plan_shows_the_stages(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = shown(capsys, "plan", job)["jobs"]["train"]["stages"]
    windows = {name: -(-(IndexedDataset(job.parent / name).num_tokens - 1) // LENGTH) for name in "x"}
    assert [(s["name"], s["samples"], s["tokens"]) for s in stages] == [("first", 20, 960), ("second", 20, 960)]
    row = {"name": "x", "share": [1.0, 1.0], "in_turn": False, "samples": 20, "tokens": 960}
    assert stages[0]["sources"] == [{**row, "epochs": 20 / windows["x"]}]
    assert [facts["samples"] for facts in stages[1]["sources"]] == [10, 10]
    assert main(["plan", str(job)]) == 0
    assert "50.00%" in capsys.readouterr().out
    endless = shown(capsys, "plan", job, "--set", "data.stages=[]")["jobs"]["train"]["stages"]
    assert [(s["name"], s["samples"]) for s in endless] == [("", 40)]
    origins = {"dataset", "dataset, not packed yet"}
    unpacked = shown(capsys, "plan", job, "--set", "batch.seq_length=24")["jobs"]["train"]
    assert {source["known_from"] for source in unpacked["sources"]} == origins and not unpacked["missing"]
    manifest_path(job.parent / "y").unlink()
    without = shown(capsys, "plan", job)["jobs"]["train"]
    assert [(each["what"], each["path"]) for each in without["missing"]] == [("dataset y", str(job.parent / "y"))]
    assert [row["epochs"] is None for row in without["stages"][1]["sources"]].count(True) == 1
    assert main(["plan", str(job)]) == 0
    assert "megatron-cpt data build FILE..." in capsys.readouterr().out


@pytest.mark.parametrize("other", ["x", "y"])
def test_plan_refuses_a_dataset_of_another_tokenizer(
    other: str, job: Path, documents: list[Document], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a source and of the validation, also where another dataset is not there yet; as `data inspect --plan` does."""
    config = json.loads(job.read_text())
    config["data"]["validation"] = [{"prefix": config["data"]["train"].pop()["prefix"], "language": "yy"}]
    config["data"]["train"].append({"prefix": str(tmp_path / "z"), "language": "zz"})
    job.write_text(json.dumps(config | {"data": config["data"] | {"stages": []}}))
    assert main(["plan", str(job)]) == 0
    capsys.readouterr()
    manifest = read_json(manifest_path(tmp_path / other))
    write_json_atomic(manifest_path(tmp_path / other), {**manifest, "tokenizer_sha256": "0" * 64})
    assert main(["plan", str(job)]) == 2
    assert f"{tmp_path / other} was built with tokenizer 000000000000, this one is" in capsys.readouterr().err
    assert main(["plan", str(job), "--set", f"tokenizer={tmp_path / 'none'}"]) == 0, "nothing to compare with yet"


def test_a_document_is_traced_to_its_line(
    documents: list[Document], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": d.id, "text": d.text}) + "\n\n" for d in documents))
    build = ["data", "build", path, "--tokenizer", tokenizer, "--language", "xx"]
    shown(capsys, *build, "--output", tmp_path / "x")
    document = shown(capsys, "data", "inspect", tmp_path / "x", "--document", 9, "--trace")["document"]
    assert document["text"] == documents[9].text and document["file"] == str(path)
    assert document["origin"] == {"path": str(path), "line": 19, "id": documents[9].id}
    assert main(["data", "inspect", str(tmp_path / "x"), "--document", "9", "--trace"]) == 0
    assert "corpus.jsonl:19" in capsys.readouterr().out.replace("\n", "")


def test_a_document_of_changed_files_has_no_line(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    path, model = tmp_path / "corpus.jsonl", tmp_path / "tokenizer.model"
    model.write_bytes(tokenizer.read_bytes())
    lines = [json.dumps({"id": d.id, "text": d.text}) + "\n" for d in documents]
    path.write_text("".join(lines))
    build_files(DatasetBuild([path], model, tmp_path / "x", "xx"))
    dataset = IndexedDataset(tmp_path / "x")
    assert trace_document(dataset, 9)["line"] == 10
    path.write_text(lines[0] + "".join(lines))
    with pytest.raises(VerificationError, match=r"corpus\.jsonl is not the file .*: it has [\d,]+ bytes and had"):
        trace_document(dataset, 9)
    path.write_text("".join(lines[1:] + lines[:1]))
    with pytest.raises(VerificationError, match=r"corpus\.jsonl is not the file .*: its SHA-256 differs"):
        trace_document(dataset, 9)
    path.write_text("".join(lines))
    model.write_bytes(tokenizer.read_bytes() + b"\0")
    with pytest.raises(VerificationError, match=r"tokenizer\.model is not the file"):
        trace_document(dataset, 9)
    model.write_bytes(tokenizer.read_bytes())
    stream = bytearray((tmp_path / "x.bin").read_bytes())
    stream[2 * int(dataset.document_starts[9]) + 2] ^= 1
    (tmp_path / "x.bin").write_bytes(stream)
    changed = IndexedDataset(tmp_path / "x")
    assert trace_document(changed, 8)["line"] == 9
    with pytest.raises(VerificationError, match=r"corpus\.jsonl:10 gives other tokens than document 9"):
        trace_document(changed, 9)
