"""What the operating system refuses is told in one line, with an exit code that says whose fault it is."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import typer

from megatron_cpt.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def verb_that_raises(error: OSError) -> ModuleType:
    app, module = typer.Typer(), ModuleType("megatron_cpt.cli.doctor")

    @app.command()
    def command() -> None:
        raise error

    module.__dict__["app"] = app
    return module


@pytest.mark.parametrize(
    ("number", "code", "advice"),
    [
        (errno.EACCES, 2, "choose a path that you may use, or change its permissions"),
        (errno.EPERM, 2, "choose a path that you may use, or change its permissions"),
        (errno.EROFS, 2, "choose a path on a file system that can be written"),
        (errno.ENOTDIR, 2, "a file stands where a folder is needed; choose another path"),
        (errno.EISDIR, 2, "a folder stands where a file is needed; choose another path"),
        (errno.EEXIST, 2, "choose another path, or move away what is there"),
        (errno.ENOENT, 1, "check the path and the folders above it"),
        (errno.ENOSPC, 1, "free some space, or choose another disk"),
        (errno.EIO, 1, "see whether the file or device is in order"),
    ],
)
def test_a_refusal_of_the_system(
    number: int, code: int, advice: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = OSError(number, os.strerror(number), "/some/where")
    monkeypatch.setitem(sys.modules, "megatron_cpt.cli.doctor", verb_that_raises(refusal))
    assert main(["doctor"]) == code
    assert capsys.readouterr().err == f"error: /some/where: {os.strerror(number)}; {advice}\n"


def test_an_error_that_is_not_of_the_system_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_cpt.cli.doctor", verb_that_raises(OSError("a defect")))
    with pytest.raises(OSError, match="a defect"):
        main(["doctor"])


def test_an_output_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("a file")
    text, output = tmp_path / "text.txt", tmp_path / "file" / "tokenizer"
    text.write_text("some words to read\n" * 50)
    assert main(["tokenizer", "train", "--corpus", str(text), "--vocab-size", "270", "--output", str(output)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / 'file'}") and error.endswith("choose another path")


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "quickstart"], ["plan", "quickstart", "--json"]])
def test_a_full_disk_and_a_reader_that_has_gone(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "megatron_cpt.cli.main", *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device; free some space, or choose another disk\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("size", ["abc", "0", "-1", ""])
def test_a_world_size_that_is_no_number(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setattr("megatron_cpt.tokenizer.load_tokenizer", lambda path: SimpleNamespace(vocab_size=300))
    job = {
        "output": str(tmp_path),
        "tokenizer": "any",
        "shape": {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 88,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
        },
        "train_steps": 2,
        "batch": {"seq_length": 32, "micro_batch_size": 2, "global_batch_size": 16},
        "data": {"train": [{"prefix": "any", "language": "a", "weight": 1.0}], "validation": []},
        "optimizer": {"learning_rate": 0.1, "min_learning_rate": 0.01},
    }
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    assert main(["plan", str(tmp_path / "job.yaml")]) == 2
    error = capsys.readouterr().err
    assert error == f"error: the variable WORLD_SIZE is {size!r}, expected a number from 1; unset it or give --nproc\n"
    assert main(["plan", str(tmp_path / "job.yaml"), "--nproc", "1"]) == 0
