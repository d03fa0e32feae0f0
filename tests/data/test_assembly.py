"""Finished parts to a dataset: what is shown meanwhile, the hashes, and parts that are not whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.data import DatasetBuild, Document, assembly, build_files
from megatron_cpt.errors import DataError


@pytest.fixture
def corpus(documents: list[Document], tmp_path: Path) -> tuple[Path, ...]:
    paths = []
    for k in range(3):
        paths.append(tmp_path / f"{k}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": one.text}) + "\n" for one in documents[k::3]))
    return tuple(paths)


def test_putting_files_together_shows_its_progress_and_hashes_what_is_there(
    corpus: tuple[Path, ...], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "_COPY_BYTES", 1000)
    monkeypatch.setattr(assembly, "_SYNC_BYTES", 4000)
    shown: list[tuple[int, int]] = []
    job = DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx")
    manifest = build_files(job, workers=2, on_joining=lambda done, total: shown.append((done, total)))
    size = (tmp_path / "x.bin").stat().st_size
    assert [done for done, _ in shown] == sorted({done for done, _ in shown}) and len(shown) >= size / 1000
    assert {total for _, total in shown} == {size} and shown[-1] == (size, size)
    for ending, output in manifest["outputs"].items():
        assert output["sha256"] == sha256_file(tmp_path / f"x.{ending}")
    shown.clear()
    job = DatasetBuild(corpus[:1], tokenizer, tmp_path / "y", "xx")
    build_files(job, on_joining=lambda done, total: shown.append((done, total)))
    assert not shown  # one file's tokens are taken as they are


def test_a_part_that_lost_bytes_is_not_put_together(corpus: tuple[Path, ...], tokenizer: Path, tmp_path: Path) -> None:
    job = DatasetBuild(corpus, tokenizer, tmp_path / "x", "xx")
    with job.parts().claimed():
        job.work(job.parts().pending())
    path = job.parts().read(1).path("tokens")
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(DataError, match=f"{path} has .* bytes, its journal counts "):
        job.assemble(workers=2)
    assert not (tmp_path / "x.manifest.json").exists()
