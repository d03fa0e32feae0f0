"""What an interrupted conversion leaves: gone on with by the same one, and by no other."""

from __future__ import annotations

import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from megatron_cpt.checkpoint import Hints, convert, open_hf, verify
from megatron_cpt.checkpoint import execute as executing
from megatron_cpt.errors import CheckpointError, ConfigError
from megatron_cpt.runtime.lock import lock_folder


def halfway(done: int, total: int) -> None:
    if done * 2 > total:
        raise KeyboardInterrupt


def interrupt(*arguments, **named) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(*arguments, **named, workers=1, on_progress=halfway)


def same(one: Path, other: Path) -> bool:
    first, second = open_hf(one), open_hf(other)
    return all(torch.equal(first.read(name), second.read(name)) for name in first.names())


def test_another_model_in_files_of_the_same_size_and_time(make_model, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        for path in make_model(tmp_path / name, seed=seed).iterdir():
            os.utime(path, ns=(0, 0))  # as an archive with fixed times is unpacked
    interrupt(tmp_path / "a", tmp_path / "out", "torch_dist")
    assert convert(tmp_path / "b", tmp_path / "out", "torch_dist")["resumed"] == 0
    verify(tmp_path / "b", tmp_path / "out")


def test_another_description_of_the_same_files(make_model, tmp_path: Path) -> None:
    """Heads of other sizes in weights of the same shapes."""
    right = make_model(tmp_path / "right", num_attention_heads=4, num_query_groups=2, head_dim=8)
    wrong = make_model(tmp_path / "wrong", num_attention_heads=8, num_query_groups=4, head_dim=4)
    convert(right, tmp_path / "legacy", "mp_rank")
    (tmp_path / "legacy" / "manifest.json").unlink()
    interrupt(tmp_path / "legacy", tmp_path / "out", "hf", hints=Hints(config=wrong))
    facts = convert(tmp_path / "legacy", tmp_path / "out", "hf", hints=Hints(config=right))
    assert facts["resumed"] == 0 and same(right, tmp_path / "out")


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
