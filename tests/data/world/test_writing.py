"""The world as files."""

import json

import pytest

from megatron_cpt.config.manifest import read_manifest, sha256_file
from megatron_cpt.data.documents import read_documents
from megatron_cpt.data.world import World, write_world, writing
from megatron_cpt.errors import DataError


def test_files_hold_the_world_and_a_manifest_describes_them(tmp_path):
    fields = write_world(tmp_path / "world", seed=2, documents_per_language=120, held_out_documents=30)
    manifest = read_manifest(tmp_path / "world" / "manifest.json", "world")
    assert {key: manifest[key] for key in fields} == fields
    for name, described in fields["files"].items():
        assert sha256_file(tmp_path / "world" / name) == described["sha256"]
    for language in ("en", "ja"):
        for split, count in (("train", 120), ("held_out", 30)):
            path = tmp_path / "world" / f"{language}.{split}.jsonl"
            read = list(read_documents(path, language=language))
            expected = list(World(2).documents(language, count, split))
            assert [(document.id, document.text) for document in read] == [(d.id, d.text) for d in expected]
            assert fields["files"][path.name]["text_bytes"] == sum(len(d.text.encode()) for d in expected)
            assert set(json.loads(path.read_text(encoding="utf-8").splitlines()[0])) == {"id", "text"}
    probe = json.loads((tmp_path / "world" / "probe.json").read_text(encoding="utf-8"))
    assert len(probe) == fields["files"]["probe.json"]["items"] == len(World(2).probe())
    assert {"prompt", "answer", "distractors", "fact"} <= set(probe[0])


def test_the_same_call_writes_the_same_bytes(tmp_path):
    one, other = (write_world(tmp_path / name, 5, 20, probe_items=10) for name in ("one", "other"))
    assert one == other
    assert (tmp_path / "one/manifest.json").read_bytes() == (tmp_path / "other/manifest.json").read_bytes()


def test_an_interrupted_rewrite_leaves_no_manifest(tmp_path, monkeypatch):
    write_world(tmp_path, 5, 20)

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_write_corpus", fail)
    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path, 6, 20)
    with pytest.raises(Exception, match="is missing"):
        read_manifest(tmp_path / "manifest.json", "world")


def test_wrong_input_writes_nothing(tmp_path):
    with pytest.raises(DataError, match="'en' to 'ko'"):
        write_world(tmp_path / "world", 1, 10, target_language="ko")
    with pytest.raises(DataError, match="at least 1"):
        write_world(tmp_path / "world", 1, 0)
    with pytest.raises(DataError, match="English-only"):
        write_world(tmp_path / "world", 1, 10, probe_items=10**6)
    assert not (tmp_path / "world").exists()
