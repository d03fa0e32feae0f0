"""Which pieces join a base: score policies, frequency, and lists a person wrote."""

from __future__ import annotations

import json
import random
from collections import Counter
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
    read_piece_list,
    source_lines_changed,
)
from megatron_cpt.tokenizer.model_file import read_model_file, without_prefix

GERMAN = "der die das und Straße grüßt läuft schöner Bär früher Morgen Wasser there stand rivers market bread"


def german_lines() -> list[str]:
    draw = random.Random(4)
    return [" ".join(draw.choices(GERMAN.split(), k=8)) for _ in range(300)]


def test_own_ranks_lie_between_the_ranks_of_the_base(base: Path, tmp_path: Path, english: list[str]) -> None:
    german = german_lines()
    tail = extend_tokenizer(base, german, 80, "any", 1, tmp_path / "tail")
    own = extend_tokenizer(base, german, 80, "any", 1, tmp_path / "own", scores="own-rank")
    pieces = read_model_file(tmp_path / "own" / "tokenizer.model").pieces
    scores = [piece.score for piece in pieces[259:]]
    assert len(set(scores)) == len(scores)
    added = scores[own.old_size - 259 :]
    assert added == sorted(added, reverse=True) and max(added) > min(scores[: own.old_size - 259])
    assert fast_slow_mismatches(tmp_path / "own", [*german, *english])["mismatches"] == 0
    old = load_tokenizer(base)
    recut = {name: source_lines_changed(old, load_tokenizer(tmp_path / name), english) for name in ("tail", "own")}
    assert recut["own"]["changed"] > recut["tail"]["changed"]
    assert tail.lost == 0
    extend_tokenizer(tmp_path / "own", german_lines()[:50], 90, "any", 1, tmp_path / "again", scores="own-rank")
    assert fast_slow_mismatches(tmp_path / "again", [*german, *english])["mismatches"] == 0


def test_lost_pieces_are_those_that_are_no_longer_produced(base: Path, tmp_path: Path) -> None:
    report = extend_tokenizer(base, german_lines(), 120, "any", 1, tmp_path / "own", scores="own-rank")
    before, after = (
        sentencepiece.SentencePieceProcessor(model_proto=without_prefix((folder / "tokenizer.model").read_bytes()))
        for folder in (base, tmp_path / "own")
    )
    produced = [id for id in range(259, report.old_size) if before.encode(before.id_to_piece(id)) == [id]]
    assert report.lost == sum(after.encode(before.id_to_piece(id)) != [id] for id in produced)


def test_zero_is_a_control_without_a_fast_file(base: Path, tmp_path: Path, japanese: list[str]) -> None:
    report = extend_tokenizer(base, japanese, 200, "ja", 8, tmp_path / "zero", scores="zero")
    assert not report.fast_file and report.scores == "zero"
    assert {path.name for path in (tmp_path / "zero").iterdir()} == {
        "tokenizer.model",
        "vocab_map.json",
        "manifest.json",
    }
    model = read_model_file(tmp_path / "zero" / "tokenizer.model")
    assert {piece.score for piece in model.pieces[report.old_size :]} == {0.0}
    manifest = json.loads((tmp_path / "zero" / "manifest.json").read_text())
    assert manifest["scores"] == "zero" and list(manifest["outputs"]) == ["tokenizer.model"]
    assert VocabMap.load(tmp_path / "zero").new_size == report.new_size
    with pytest.raises(TokenizerError, match="equal scores"):
        extend_tokenizer(tmp_path / "zero", japanese, 200, "ja", 8, tmp_path / "more")


def test_rare_pieces_are_left_out(base: Path, tmp_path: Path, japanese: list[str]) -> None:
    seldom = "滅多"
    texts = [*japanese, *[f"{seldom}に"] * 3]
    every = extend_tokenizer(base, texts, 300, "ja", 1, tmp_path / "all", character_coverage=1.0)
    some = extend_tokenizer(base, texts, 300, "ja", 1, tmp_path / "some", character_coverage=1.0, min_count=20)
    assert some.dropped["rare"] == every.num_new - some.num_new > 0 and "rare" not in every.dropped
    assert some.examples["rare"] and set(some.examples["rare"]) <= set(
        map(load_tokenizer(tmp_path / "all").piece, range(every.old_size, every.new_size))
    )
    new = load_tokenizer(tmp_path / "some")
    added = {new.piece(id): id for id in range(some.old_size, some.new_size)}
    assert seldom not in added and "滅" not in added
    counts = Counter(id for ids in new.encode_batch(texts) for id in ids)
    bare = sentencepiece.SentencePieceProcessor(
        model_proto=without_prefix((tmp_path / "some" / "tokenizer.model").read_bytes())
    )
    often = {piece for piece, id in added.items() if counts[id] >= 20}
    for piece, id in added.items():
        assert bare.encode(piece) == [id], "what is left is still reached"
        assert piece in often or any(piece in longer for longer in often if longer != piece)
    with pytest.raises(TypeError, match="read twice"):
        extend_tokenizer(base, iter(texts), 300, "ja", 1, tmp_path / "once", min_count=2)


def test_a_list_of_pieces(base: Path, tmp_path: Path, japanese: list[str]) -> None:
    listed = ["日", "本", "語", "日本", "日本語", " 日本", "▁静か", "静", "か", "the", "川辺", "学校"]
    (tmp_path / "pieces.txt").write_text("\ufeff" + "\n".join(listed) + "\n\n", encoding="utf-8")
    read = read_piece_list(tmp_path / "pieces.txt")
    assert read == listed
    (tmp_path / "crlf.txt").write_bytes("日\u2028\r\n\x0b本\r\n".encode())
    assert read_piece_list(tmp_path / "crlf.txt") == ["日\u2028", "\x0b本"]
    report = extend_tokenizer(base, (), 1, "ja", 1, tmp_path / "new", pieces=read)
    assert report.offered == report.requested == 12 and report.lines == 0
    assert report.examples == {"script": ["the"], "unreachable": ["▁静か", "川辺", "学校"]}
    new = load_tokenizer(tmp_path / "new")
    first = report.old_size
    assert [new.piece(id) for id in range(first, report.new_size)] == [
        "日",
        "本",
        "語",
        "日本",
        "日本語",
        "▁日本",
        "静",
        "か",
    ]
    assert new.encode("\n日本語日本")[-2:] == [first + 4, first + 3]
    assert fast_slow_mismatches(tmp_path / "new", [*japanese, "日本 日本語 静か"])["mismatches"] == 0
    inputs = json.loads((tmp_path / "new" / "manifest.json").read_text())["inputs"]
    assert set(inputs) == {"base", "pieces"}
    extend_tokenizer(base, japanese, 1, "ja", 1, tmp_path / "often", pieces=["静", "か", "川", "鬱"], min_count=1)
    assert load_tokenizer(tmp_path / "often").vocab_size == first + 3
    assert measure(new, ["日本語"])["tokens"] == 2


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (["日", "本", "日"], "pieces 1 and 3 .* the same after NFKC"),
        ([" 日", "▁日"], "pieces 1 and 2"),
        (["ガ", "日", "ｶﾞ"], "pieces 1 and 3"),
        (["が", "か\u3099"], "pieces 1 and 2"),
        ([], "list of pieces is empty"),
        (["日本"], "no piece is left"),
    ],
)
def test_lists_that_are_refused(base: Path, tmp_path: Path, listed: list[str], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        extend_tokenizer(base, (), 1, "ja", 1, tmp_path / "new", pieces=listed)
    assert not (tmp_path / "new").exists()


def test_lists_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot read"):
        read_piece_list(tmp_path / "none.txt")
    (tmp_path / "sjis.txt").write_bytes("日本".encode("shift_jis"))
    with pytest.raises(TokenizerError, match="not UTF-8"):
        read_piece_list(tmp_path / "sjis.txt")


def test_unknown_scores(base: Path, tmp_path: Path, japanese: list[str]) -> None:
    with pytest.raises(TokenizerError, match="expected one of rank-tail, own-rank, zero"):
        extend_tokenizer(base, japanese, 200, "ja", 8, tmp_path / "new", scores="top")
