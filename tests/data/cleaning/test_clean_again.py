"""The same command after its end: it finds what it made, or says what differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.data.cleaning import clean_files, load_profile
from megatron_cpt.errors import DataError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_command_repeated_after_its_end_finds_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, out = [tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out"
    for path in files:
        path.write_text(f"A text of the file {path.name} that stays.\n\nA text that stands in both.\n")
    profile = load_profile("short").config
    made = clean_files(files, out, profile)
    assert made["totals"]["kept_documents"] == 3
    before = contents(out)
    (out / ".work.removed").mkdir()  # of a process killed in its last step
    (out / ".work.lock").touch()
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("megatron_cpt.data.cleaning.run._make", None)
        assert clean_files(files, out, profile, notice=said.append) == made
        judged = clean_files(files, out, profile, shard=(0, 2), notice=said.append)
    assert judged == {"judged_files": 2, "files_left": 0}
    assert len(said) == 2 and all("is already cleaned of these files with this profile" in text for text in said)
    with pytest.raises(DataError, match="finished cleaning that differs .it is of 2 files, now 2 or others"):
        clean_files(files[::-1], out, profile)
    with pytest.raises(DataError, match="finished cleaning that differs .text_field was 'text', is 'body'"):
        clean_files(files, out, profile, text_field="body")
    changed = profile.model_copy(update={"duplicates": None})
    with pytest.raises(DataError, match="finished cleaning that differs .profile.duplicates.threshold was"):
        clean_files(files, out, changed)
    files[1].write_text("An entirely different text.\n")
    with pytest.raises(DataError, match="b.txt has changed"):
        clean_files(files, out, profile)
    assert contents(out) == before and not list(out.glob(".*"))
