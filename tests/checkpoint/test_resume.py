"""What an interrupted conversion leaves: gone on with by the same one, and by no other."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint import Hints, convert, open_checkpoint, open_hf, verify
from megatron_cpt.checkpoint import execute as executing
from megatron_cpt.checkpoint.seal import seal_files
from megatron_cpt.config.manifest import write_sealed_manifest
from megatron_cpt.errors import CheckpointError, ConfigError, VerificationError
from megatron_cpt.runtime.lock import lock_folder


def halfway(done: int, total: int) -> None:
    if done * 2 > total:
        raise KeyboardInterrupt


def interrupt(*arguments, **named) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(*arguments, **named, workers=1, on_progress=halfway)


def refused(*arguments, **named) -> None:
    with pytest.raises(CheckpointError, match="holds an unfinished conversion to .*, not this one"):
        convert(*arguments, **named)


def same(one: Path, other: Path) -> bool:
    first, second = open_hf(one), open_hf(other)
    return all(torch.equal(first.read(name), second.read(name)) for name in first.names())


def test_another_model_in_files_of_the_same_size_and_time(make_model, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        for path in make_model(tmp_path / name, seed=seed).iterdir():
            os.utime(path, ns=(0, 0))  # as an archive with fixed times is unpacked
    interrupt(tmp_path / "a", tmp_path / "out", "torch_dist")
    refused(tmp_path / "b", tmp_path / "out", "torch_dist")
    assert convert(tmp_path / "a", tmp_path / "out", "torch_dist")["resumed"] > 0
    verify(tmp_path / "a", tmp_path / "out")


def test_another_description_of_the_same_files(make_model, tmp_path: Path) -> None:
    """Heads of other sizes in weights of the same shapes."""
    right = make_model(tmp_path / "right", num_attention_heads=4, num_query_groups=2, head_dim=8)
    wrong = make_model(tmp_path / "wrong", num_attention_heads=8, num_query_groups=4, head_dim=4)
    convert(right, tmp_path / "legacy", "mp_rank")
    (tmp_path / "legacy" / "manifest.json").unlink()
    for rank in (tmp_path / "legacy").rglob("model_optim_rng.pt"):
        torch.save(torch.load(rank, weights_only=False) | {"args": None}, rank)  # else they say how many heads
    interrupt(tmp_path / "legacy", tmp_path / "out", "hf", hints=Hints(config=wrong))
    refused(tmp_path / "legacy", tmp_path / "out", "hf", hints=Hints(config=right))
    shutil.rmtree(tmp_path / ".out.partial")
    convert(tmp_path / "legacy", tmp_path / "out", "hf", hints=Hints(config=right))
    assert same(right, tmp_path / "out")


def test_files_of_somebody_else_in_its_place(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    (tmp_path / ".out.partial").mkdir()
    convert(source, tmp_path / "out", "torch_dist")  # empty, as a process killed at once leaves it
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds files of something else, not this one"):
        convert(source, tmp_path / "new", "torch_dist")
    assert (tmp_path / ".new.partial" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("to", ["torch_dist", "mp_rank"])
def test_padding_of_a_file_that_was_left_is_not_believed(to: str, make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    convert(source, tmp_path / "undisturbed", to)
    interrupt(source, tmp_path / "out", to)
    for path in (tmp_path / ".out.partial").rglob("*"):
        if path.suffix in (".pt", ".distcp"):
            path.write_bytes(b"?" * path.stat().st_size)  # as blocks of a disk that lost power may hold
    convert(source, tmp_path / "out", to)
    verify(source, tmp_path / "out")
    for path in (tmp_path / "undisturbed").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "undisturbed")).read_bytes()


def test_padding_that_is_not_zero_is_no_result_of_a_conversion(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    convert(source, tmp_path / "out", "torch_dist")
    model = open_checkpoint(tmp_path / "out")
    at = model.padding["lm_head.weight"].runs[0]
    with open(tmp_path / "out" / at.file, "r+b") as file:
        file.seek(at.offset)
        file.write(b"?" * 4)
    manifest = tmp_path / "out" / "manifest.json"
    fields = json.loads(manifest.read_text()) | {"files": seal_files(tmp_path / "out", model)}
    for name in ("kind", "inputs", "megatron_cpt", "manifest_sha256"):
        fields.pop(name)
    write_sealed_manifest(manifest, "checkpoint", {}, **fields)  # else the seals tell of any change
    with pytest.raises(VerificationError, match=r"padding rows of lm_head.weight are not zero"):
        verify(source, tmp_path / "out")


def test_a_second_process_is_turned_away_and_takes_nothing(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    interrupt(source, tmp_path / "out", "torch_dist")
    with (
        lock_folder(tmp_path, ".out.lock"),
        pytest.raises(ConfigError, match=f"another job is running in {tmp_path / 'out'}"),
    ):
        convert(source, tmp_path / "out", "torch_dist")
    assert convert(source, tmp_path / "out", "torch_dist")["resumed"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


def test_what_was_put_into_an_unfinished_folder_is_not_in_the_finished_one(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    interrupt(source, tmp_path / "out", "torch_dist")
    staged = tmp_path / ".out.partial"
    (staged / "note.txt").write_text("of another")
    (staged / "code").mkdir()
    (staged / "code" / "model.py").write_text("raise SystemExit")
    (staged / "link").symlink_to(tmp_path)
    assert convert(source, tmp_path / "out", "torch_dist")["resumed"] > 0
    assert not {"note.txt", "code", "link"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert verify(source, tmp_path / "out")["unlisted"] == [] and source.exists()


def test_a_full_disk_costs_nothing_that_is_done(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "hf")
    interrupt(source, tmp_path / "out", "torch_dist")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
        with pytest.raises(CheckpointError, match="1 are free; free some space"):
            convert(source, tmp_path / "out", "torch_dist")
    assert convert(source, tmp_path / "out", "torch_dist")["resumed"] > 0


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("checkpoint.convert", "seal_files"),
        ("checkpoint.convert", "write_checkpoint_manifest"),
        ("config.folders", "sync_path"),
    ],
)
def test_interrupted_at_its_end(
    module: str, name: str, make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_model(tmp_path / "hf")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[f"megatron_cpt.{module}"], name, stop)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", "torch_dist")
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", "torch_dist")["resumed"] == 30  # nothing is written twice
    verify(source, tmp_path / "out")
    assert not (tmp_path / "out" / executing.JOURNAL).exists()


def test_a_link_in_the_place_of_what_is_left_is_not_followed(make_model, tmp_path: Path) -> None:
    source = make_model(tmp_path / "hf")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious").write_text("kept")
    (tmp_path / ".out.partial").symlink_to(tmp_path / "other")
    convert(source, tmp_path / "out", "torch_dist")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["precious"]
    assert not (tmp_path / "out").is_symlink()
    verify(source, tmp_path / "out")


def test_places_that_cannot_take_the_name(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_model(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="is a link or a mount"):
        convert(source, tmp_path / "link", "torch_dist")
    with pytest.raises(CheckpointError, match="is a link or a mount"):
        convert(source, "/proc", "torch_dist")
    monkeypatch.chdir(tmp_path / "empty")
    convert(source, "out", "torch_dist")  # a relative name, and an existing empty folder
    (tmp_path / "empty" / "made").mkdir()
    convert(source, Path("made"), "torch_dist")
    verify(source, tmp_path / "empty" / "made")
