"""Extension: what the base does is untouched, what is added is reachable, sizes and map are right."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import (
    VocabMap,
    extend_tokenizer,
    fast_slow_mismatches,
    load_tokenizer,
    measure,
    source_lines_changed,
)
from megatron_cpt.tokenizer.model_file import read_model_file, without_prefix


def test_the_base_is_a_prefix(base: Path, extended: Path) -> None:
    old, new = (folder / "tokenizer.model" for folder in (base, extended))
    assert new.read_bytes().startswith(old.read_bytes())
    before, after = read_model_file(old), read_model_file(new)
    added = after.pieces[len(before.pieces) :]
    lowest = min(piece.score for piece in before.pieces if piece.score > -1e9)
    assert [piece.score for piece in added] == [lowest - rank for rank in range(1, len(added) + 1)]
    assert len({piece.text for piece in after.pieces}) == len(after.pieces)


def test_text_without_the_script_is_cut_as_before(
    base: Path, extended: Path, english: list[str], korean: list[str], japanese: list[str]
) -> None:
    old, new = load_tokenizer(base), load_tokenizer(extended)
    draw = random.Random(0)
    noise = ["".join(draw.choices(" \t\u2581ethrin0123.,<>/éß한강", k=60)) for _ in range(500)]
    for line in (*english, *korean, *noise):
        assert new.encode(line) == old.encode(line)
    assert source_lines_changed(old, new, japanese)["changed"] == len(japanese)
    assert measure(new, japanese)["bytes_per_token"] > 4 * measure(old, japanese)["bytes_per_token"]
    assert measure(old, japanese)["byte_fallback_share"] > 0.9
    assert measure(new, japanese)["byte_fallback_share"] == 0.0


def test_with_runs_of_equal_score(with_runs: Path, tmp_path: Path, english: list[str], japanese: list[str]) -> None:
    """Llama 2's -1e9 is not the bottom of its ranking; scores below it would come after every run."""
    extend_tokenizer(with_runs, japanese, 200, "ja", 8, tmp_path / "new")
    model = read_model_file(tmp_path / "new" / "tokenizer.model")
    first = load_tokenizer(with_runs).vocab_size
    assert all(-2000 < piece.score < -100 for piece in model.pieces[first:])
    lines = [*english, *japanese, *(" " * length + "静かな" + " " * length + "川" for length in range(40))]
    assert fast_slow_mismatches(tmp_path / "new", lines)["mismatches"] == 0
    assert source_lines_changed(load_tokenizer(with_runs), load_tokenizer(tmp_path / "new"), english)["changed"] == 0


@pytest.mark.parametrize("divisor", [1, 7, 8, 64, 128])
def test_sizes_and_reachability(base: Path, tmp_path: Path, japanese: list[str], divisor: int) -> None:
    report = extend_tokenizer(base, japanese, 190, "ja", divisor, tmp_path / "new")
    data = (tmp_path / "new" / "tokenizer.model").read_bytes()
    bare = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(data))
    assert report.new_size == bare.vocab_size() == load_tokenizer(tmp_path / "new" / "tokenizer.json").vocab_size
    assert report.new_size % divisor == 0
    assert report.num_new == report.new_size - report.old_size > 0
    assert report.offered - report.num_new == sum(report.dropped.values())
    assert report.dropped["divisor"] < divisor
    for id in range(report.old_size, report.new_size):
        assert bare.encode(bare.id_to_piece(id)) == [id]
    assert fast_slow_mismatches(tmp_path / "new", japanese)["mismatches"] == 0
    first = {bare.id_to_piece(id) for id in range(report.old_size, report.new_size)}
    if divisor < 100:
        assert {character for line in japanese for character in line} <= first | {" "}, "characters go last"


def test_map(base: Path, extended: Path) -> None:
    """Old pieces of a new one are what the old tokenizer gives inside a text, without a dummy prefix."""
    vocab_map = VocabMap.load(extended)
    old, new = load_tokenizer(base), load_tokenizer(extended)
    assert (vocab_map.old_size, vocab_map.new_size) == (old.vocab_size, new.vocab_size)
    assert (vocab_map.old_sha256, vocab_map.new_sha256) == (old.sha256, new.sha256)
    assert vocab_map.counts() == {
        "kept": old.vocab_size - 259,
        "new": new.vocab_size - old.vocab_size,
        "byte": 256,
        "special": 3,
        "padding": 0,
    }
    prefixed = 0
    for id, entry in enumerate(vocab_map.entries):
        if id < old.vocab_size:
            assert (entry.old_id, entry.old_pieces) == (id, ())
            assert entry.origin == ("special" if id < 3 else "byte" if id < 259 else "kept")
            continue
        piece = new.piece(id)
        assert entry.origin == "new" and entry.old_id is None
        # "\n" is a byte piece that nothing merges with, so what follows is cut as inside a text.
        after_line_end = old.encode("\n" + piece.replace("\u2581", " "))
        line_end = old.encode("\n")
        assert after_line_end[: len(line_end)] == line_end
        assert list(entry.old_pieces) == after_line_end[len(line_end) :]
        prefixed += piece.startswith("\u2581")
    assert prefixed, "pieces with a leading space are part of the test"


def test_other_scripts(base: Path, tmp_path: Path, korean: list[str], japanese: list[str], english: list[str]) -> None:
    mixed = [*korean, *japanese]
    extend_tokenizer(base, mixed, 300, "ko", 1, tmp_path / "ko")
    old, new = load_tokenizer(base), load_tokenizer(tmp_path / "ko")
    assert source_lines_changed(old, new, [*english, *japanese])["changed"] == 0
    assert source_lines_changed(old, new, korean)["changed"] == len(korean)
    german = ["der große Bär läuft über die Straße und grüßt schön"] * 50
    reports = [extend_tokenizer(base, german, 60, script, 1, tmp_path / script) for script in ("de", "any")]
    german_only = load_tokenizer(tmp_path / "de")
    added = [german_only.piece(id) for id in range(old.vocab_size, german_only.vocab_size)]
    assert all(set(piece) & set("äöüß") for piece in added)
    assert source_lines_changed(old, german_only, english)["changed"] == 0
    both = load_tokenizer(tmp_path / "any")
    pieces = [both.piece(id) for id in range(old.vocab_size, both.vocab_size)]
    num_ascii = sum(piece.lstrip("▁").isascii() for piece in pieces)
    assert 0 < num_ascii < len(pieces)
    assert [report.num_ascii for report in reports] == [0, num_ascii]  # type: ignore[union-attr]


def test_same_bytes(base: Path, extended: Path, tmp_path: Path, japanese: list[str]) -> None:
    extend_tokenizer(base / "tokenizer.model", iter(japanese), 200, "ja", 8, tmp_path / "again", "ja")
    names = {path.name for path in extended.iterdir()}
    assert "vocab_map.json" in names and names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (extended / name).read_bytes(), name


def test_twice(extended: Path, tmp_path: Path, korean: list[str], english: list[str], japanese: list[str]) -> None:
    """An extended tokenizer is a base like any other."""
    extend_tokenizer(extended, korean, 150, "ko", 8, tmp_path / "both")
    before, after = load_tokenizer(extended), load_tokenizer(tmp_path / "both")
    assert source_lines_changed(before, after, [*english, *japanese])["changed"] == 0
    assert fast_slow_mismatches(tmp_path / "both", [*english, *japanese, *korean])["mismatches"] == 0


def test_fewer_pieces_than_asked(base: Path, tmp_path: Path) -> None:
    report = extend_tokenizer(base, ["日本語 日本語"], 5000, "ja", 1, tmp_path / "new")
    assert report.requested == 5000 and report.offered < 20
    assert load_tokenizer(tmp_path / "new").encode("日本語日本語")[-1] >= report.old_size


def test_what_cannot_be_extended(
    base: Path, extended: Path, tmp_path: Path, english: list[str], japanese: list[str]
) -> None:
    added = tmp_path / "added"
    shutil.copytree(base, added)
    (added / "added_tokens.json").write_text(json.dumps({"<pad>": 450}))
    only_json = tmp_path / "only_json"
    only_json.mkdir()
    shutil.copy(base / "tokenizer.json", only_json)
    cases = [
        (base, [], 100, "ja", 8, "empty"),
        (base, english, 100, "ja", 8, "no piece is left"),
        (extended, japanese, 60, "ja", 1, "are in the base"),
        (base, japanese, 100, "ja", 100000, "multiple of 100000"),
        (base, japanese, 10, "ja", 8, "alphabet of"),
        (base, japanese, 0, "ja", 8, "at least 1"),
        (base, japanese, 100, "ja", 0, "at least 1"),
        (base, japanese, 100, "xx", 8, "expected one of ja, ko, de, any"),
        (added, japanese, 100, "ja", 8, "adds 1 tokens"),
        (only_json, japanese, 100, "ja", 8, "only SentencePiece"),
        (tmp_path / "nothing", japanese, 100, "ja", 8, "does not exist"),
    ]
    for folder, texts, num_pieces, script, divisor, message in cases:
        with pytest.raises(TokenizerError, match=message):
            extend_tokenizer(folder, texts, num_pieces, script, divisor, tmp_path / "new")
        assert not (tmp_path / "new").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"added", "only_json"}, "nothing may be left behind"
