"""A model's short identity changes with its weights and description, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_cpt.checkpoint.fingerprint import fingerprint
from megatron_cpt.errors import CheckpointError
from tests.checkpoint.conftest import ModelMaker


def test_a_copy_is_the_same_model(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    before = fingerprint(model)
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a note")
    assert fingerprint(tmp_path / "copy") == before
    assert fingerprint(make_model(tmp_path / "same")) == before


def test_other_weights_are_another_model(make_model: ModelMaker, tmp_path: Path) -> None:
    assert fingerprint(make_model(tmp_path / "model")) != fingerprint(make_model(tmp_path / "other", seed=1))


@pytest.mark.parametrize(("place", "seen"), [(0, True), (-1, True), (3 << 19, False)])
def test_both_ends_of_a_large_file_are_read(place: int, seen: bool, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    data = bytearray(3 << 20)
    weights.write_bytes(data)
    before = fingerprint(tmp_path)
    data[place] ^= 1
    weights.write_bytes(data)
    assert (fingerprint(tmp_path) != before) is seen


def test_another_description_is_another_model(make_model: ModelMaker, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    before = fingerprint(model)
    (model / "config.json").write_text((model / "config.json").read_text().replace("500000", "10000"))
    assert fingerprint(model) != before


def test_what_is_not_there_has_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read .*missing"):
        fingerprint(tmp_path / "missing")
