"""Cleaning of files that change while the work goes on, or between two commands."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.data import read_documents
from megatron_cpt.data.cleaning import Profile, clean_files, load_profile, run
from megatron_cpt.errors import DataError

WORDS = ["river", "town", "quiet", "old", "goes", "nobody", "asks", "where", "runs", "past", "winter", "water", "snow"]


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    path = tmp_path / "profile.yaml"
    path.write_text("about: texts of this test\nrules: {}\nduplicates: {threshold: 0.8}\n")
    return load_profile(path).config


@pytest.mark.parametrize("left", [0, 2])
def test_an_input_that_lost_texts_before_the_search_drops_no_other_file_s(
    left: int, profile: Profile, tmp_path: Path
) -> None:
    draw = random.Random(3)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) + "\n" for _ in range(5)]
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for file in files:
        file.write_text("".join(lines))
    clean_files(files, tmp_path / "out", profile, shard=(0, 1))
    files[0].write_text("".join(lines[:left]))
    report = clean_files(files, tmp_path / "out", profile)
    assert report["totals"] == clean_files(files, tmp_path / "fresh", profile)["totals"]
    assert sum(1 for name in ("a", "b") for _ in cleaned(tmp_path / "out" / f"{name}.jsonl.zst")) == 5


def cleaned(path: Path) -> list[str]:
    return [document.text for document in read_documents(path)] if path.exists() else []


def test_an_input_that_shrinks_between_the_walks_is_told(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(4)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) + "\n" for _ in range(5)))
    decide = run._decide

    def shrink(*arguments: Any) -> Any:
        found = decide(*arguments)
        file.write_text("")
        return found

    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"a\.jsonl has changed since it was judged"):
        patch.setattr(run, "_decide", shrink)
        clean_files([file], tmp_path / "out", profile)
    assert clean_files([file], tmp_path / "out", profile)["totals"]["documents"] == 0


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_a_cleaning_is_not_written_over_its_own_input(
    overwrite: bool, linked: bool, profile: Profile, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "the river runs past a quiet town"}) + "\n")
    clean_files([tmp_path / "a.jsonl"], tmp_path / "out", profile)
    made = tmp_path / "out" / "a.jsonl.zst"
    before = made.read_bytes()
    (tmp_path / "link.jsonl.zst").symlink_to(made)
    with pytest.raises(DataError, match="lies in .*out, whose files a cleaning replaces"):
        again = tmp_path / "link.jsonl.zst" if linked else made
        clean_files([again], tmp_path / "out", profile, overwrite=overwrite)
    assert made.read_bytes() == before and not (tmp_path / "out" / ".work").exists()
