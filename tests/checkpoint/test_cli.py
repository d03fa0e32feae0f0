"""`megatron-cpt checkpoint` from the outside."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_cpt.checkpoint import execute as executing
from megatron_cpt.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, Any, str]:
    """Exit code, JSON of stdout (or its text) and stderr."""
    code = main(["checkpoint", *map(str, words)])
    printed = capsys.readouterr()
    return code, json.loads(printed.out) if "--json" in words else printed.out, printed.err


def test_convert_verify_and_show(make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, stored = make_model(tmp_path / "hf"), tmp_path / "stored"
    words = ["convert", source, stored, "--to", "torch_dist", "--vocab-divisor", 16, "--dtype", "bfloat16", "--json"]
    code, planned, _ = run(capsys, *words, "--dry-run")
    assert code == 0 and planned["padded_vocab_size"] == 144 and not stored.exists()
    code, facts, _ = run(capsys, *words)
    assert code == 0 and facts["padded_vocab_size"] == 144 and facts["bytes"] == planned["bytes"]
    code, proof, _ = run(capsys, "verify", source, stored, "--json")
    assert code == 0 and proof["equal"] and proof["cast"] == "bfloat16" and proof["padding_rows"] == 11
    code, text, _ = run(capsys, "show", stored)
    assert code == 0 and "shape.num_layers" in text and "torch_dist" in text
    code, _, _ = run(capsys, "convert", stored, tmp_path / "back", "--to", "hf", "--bos", 4, "--json")
    assert code == 0 and json.loads((tmp_path / "back" / "config.json").read_text())["bos_token_id"] == 4
    code, _, error = run(capsys, "verify", source, tmp_path / "back")
    assert code == 1 and "manifest states no such cast" in error


def test_an_interruption_says_what_stays(
    make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, empty = make_model(tmp_path / "hf"), tmp_path / "empty"
    empty.mkdir()

    def stopped(self: executing.Tally, size: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executing.Tally, "add", stopped)
        monkeypatch.chdir(empty)
        code, _, error = run(capsys, "convert", source, ".")
        assert code == 130 and f"kept in {tmp_path / '.empty.partial'}; the same" in error
        code, _, error = run(capsys, "convert", source, tmp_path / "out")
    assert code == 130 and "stopped with Ctrl-C" in error
    assert f"What is done is kept in {tmp_path / '.out.partial'}; the same command goes on" in error
    assert run(capsys, "convert", source, tmp_path / "out")[0] == 0


def test_a_legacy_checkpoint_is_shown_though_nothing_says_its_vocabulary(
    make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, legacy = make_model(tmp_path / "hf"), tmp_path / "legacy"
    assert run(capsys, "convert", source, legacy, "--to", "mp_rank")[0] == 0
    (legacy / "manifest.json").unlink()
    rank = next(legacy.rglob("model_optim_rng.pt"))
    held = torch.load(rank, weights_only=False)
    held["args"].vocab_size = None
    torch.save(held, rank)
    code, facts, _ = run(capsys, "show", legacy, "--json")
    assert code == 0 and facts["vocab_size"] is None and facts["padded_vocab_size"] == 256
    assert facts["optimizer"] is False and facts["weights"]["model.embed_tokens.weight"].startswith("[256, ")
    assert facts["weights"]["model.layers.*.mlp.up_proj.weight"].startswith(f"{facts['shape']['num_layers']} x [")
    code, _, error = run(capsys, "convert", legacy, tmp_path / "out")
    assert code == 2 and "--vocab-size" in error
    code, facts, _ = run(capsys, "verify", source, legacy, "--vocab-size", 133, "--json")
    assert code == 0 and facts["equal"]


def test_a_folder_above_a_checkpoint_is_answered_with_its_place(
    make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = make_model(tmp_path / "models--a--b" / "snapshots" / "main")
    code, _, error = run(capsys, "show", tmp_path / "models--a--b")
    assert code == 2 and f"give the folder of the checkpoint itself, such as {snapshot}" in error
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    code, _, error = run(capsys, "show", tmp_path / "link")
    assert code == 2 and f"is a link to {tmp_path / 'nowhere'}, which does not exist" in error


def test_a_legacy_checkpoint_without_a_rank_of_rows(
    make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    legacy = tmp_path / "legacy"
    assert run(capsys, "convert", make_model(tmp_path / "hf"), legacy, "--to", "mp_rank", "--tp", 2)[0] == 0
    (legacy / "manifest.json").unlink()
    shutil.rmtree(legacy / "release" / "mp_rank_01")
    code, _, error = run(capsys, "show", legacy)
    assert code == 2 and "128 rows of vocabulary, fewer than the 133" in error and "a rank's file is missing" in error


def test_damage_of_what_is_proved_is_a_failed_proof(
    make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it shows in a header or in a tensor."""
    source, stored = make_model(tmp_path / "hf"), tmp_path / "stored"
    assert run(capsys, "convert", source, stored)[0] == 0
    manifest = (stored / "manifest.json").read_text()
    for damaged in (
        "",
        manifest[:100],
        manifest.replace('"checkpoint"', '"checkqoint"'),
        manifest.replace("133", "933"),
    ):
        (stored / "manifest.json").write_text(damaged)
        assert run(capsys, "verify", source, stored)[0] == run(capsys, "verify", stored)[0] == 1
    (stored / "manifest.json").write_text(manifest)
    (stored / ".metadata").write_bytes(b"")
    code, _, error = run(capsys, "verify", source, stored)
    assert code == 1 and "cannot be read as a checkpoint's index: it is cut short" in error
    assert run(capsys, "verify", stored)[0] == 1
    assert run(capsys, "verify", stored, source)[0] == 2  # what cannot be read is not what is proved


@pytest.mark.parametrize("to", ["torch_dist", "mp_rank"])
def test_what_megatrons_arguments_say_is_not_overruled(
    to: str, make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, stored, out = make_model(tmp_path / "hf"), tmp_path / "stored", tmp_path / "out"
    assert run(capsys, "convert", source, stored, "--to", to)[0] == 0
    (stored / "manifest.json").unlink()
    config = json.loads((source / "config.json").read_text())
    for change, told in (
        ({"vocab_size": 99}, "vocab_size 99, not 133"),
        ({"rope_theta": 123.0, "rope_parameters": None}, "rope_theta 123.0, not "),
    ):
        (tmp_path / "other.json").write_text(json.dumps(config | change))
        code, _, error = run(capsys, "convert", stored, out, "--to", "hf", "--config", tmp_path / "other.json")
        assert code == 2 and told in error
    code, _, error = run(capsys, "convert", stored, out, "--to", "hf", "--vocab-size", 99)
    assert code == 2 and "itself says a vocabulary of 133, not 99" in error
    (tmp_path / "other.json").write_text(json.dumps(config | {"max_position_embeddings": 77}))
    code, _, error = run(capsys, "convert", stored, out, "--to", "hf", "--config", tmp_path / "other.json")
    assert code == 0, error
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 77


def test_a_place_that_may_not_be_written_is_told_before(
    make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model(tmp_path / "hf")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write everywhere
    code, _, error = run(capsys, "convert", source, tmp_path / "deep" / "out", "--dry-run")
    assert code == 2 and f"{tmp_path / 'deep' / 'out'} cannot be made: {tmp_path} may not be written" in error


def test_wrong_input_is_answered_with_code_2(make_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_model(tmp_path / "hf")
    for words, message in (
        (("show", tmp_path / "nothing"), "does not exist"),
        (("show", tmp_path), "neither config.json"),
        (("show", source / "config.json"), "is a file"),
        (("convert", source, source, "--to", "torch_dist"), "already holds files"),
        (("convert", source, tmp_path / "out", "--to", "zip"), "'hf', 'torch_dist'"),
        (("convert", source, tmp_path / "out", "--to", "torch_dist", "--tokenizer", tmp_path), "holds neither"),
    ):
        code, _, error = run(capsys, *words)
        assert code == 2 and message in error
    assert not (tmp_path / "out").exists()
