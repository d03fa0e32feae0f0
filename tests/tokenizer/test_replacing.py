"""Replacement: shared pieces at the base's ids, texts cut as the trained model cuts them, a map that fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import (
    TextMixture,
    VocabMap,
    fast_slow_mismatches,
    load_tokenizer,
    replace_tokenizer,
    verify_tokenizer,
)
from megatron_cpt.tokenizer.model_file import PieceType, parse_model, read_model_file, without_prefix
from megatron_cpt.tokenizer.training import train_model
from megatron_cpt.tokenizer.verify import HARD_TEXTS


@pytest.fixture(scope="module")
def mixture(english: list[str], japanese: list[str]) -> TextMixture:
    return TextMixture({"en": english, "ja": japanese}, {"en": 1, "ja": 2})


@pytest.mark.parametrize("size", [384, 464, 560])  # smaller than the base, as large, larger
def test_every_shared_piece_keeps_its_id(
    with_runs: Path, mixture: TextMixture, tmp_path: Path, size: int, english: list[str], japanese: list[str]
) -> None:
    report = replace_tokenizer(with_runs, mixture, size, 8, tmp_path / "new")
    old, new = (read_model_file(folder / "tokenizer.model") for folder in (with_runs, tmp_path / "new"))
    assert report.new_size == len(new.pieces) == size and report.old_size == len(old.pieces) == 465
    assert len({piece.text for piece in new.pieces}) == size
    assert new.pieces[:259] == old.pieces[:259], "special and byte pieces stay where they are"
    ids = {piece.text: id for id, piece in enumerate(new.pieces)}
    shared = {id: ids[piece.text] for id, piece in enumerate(old.pieces) if id >= 259 and piece.text in ids}
    assert report.num_shared == sum(id == place for id, place in shared.items())
    assert [id for id, place in shared.items() if place != id] == [id for id in shared if id >= size]
    assert report.num_moved == sum(id >= size for id in shared) and (report.num_moved > 0) == (size == 384)
    assert report.num_new == size - 259 - len(shared) > 50 and report.num_shared > 20
    # The segmentation is that of the model the trainer gives, piece by piece and score by score.
    trained = train_model(mixture, size, old.rules, old.normalizer, 0.9995).model
    scores = {piece.text: piece.score for piece in trained.pieces}
    assert {piece.text: piece.score for piece in new.pieces} == scores
    reference = sentencepiece.SentencePieceProcessor(model_proto=trained.data)
    made = load_tokenizer(tmp_path / "new")
    for line in (*english, *japanese, *HARD_TEXTS):
        assert [made.piece(id) for id in made.encode(line)] == reference.encode(line, out_type=str)
    assert fast_slow_mismatches(tmp_path / "new", [*english, *japanese, *HARD_TEXTS])["mismatches"] == 0


def test_map_and_manifest(with_runs: Path, mixture: TextMixture, tmp_path: Path, japanese: list[str]) -> None:
    for size in (384, 464):
        folder = tmp_path / str(size)
        report = replace_tokenizer(with_runs, mixture, size, 16, folder, "en,ja")
        vocab_map, old, new = VocabMap.load(folder), load_tokenizer(with_runs), load_tokenizer(folder)
        bare = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(old.path.read_bytes()))
        assert (vocab_map.old_sha256, vocab_map.new_sha256) == (old.sha256, new.sha256)
        counts = vocab_map.counts()
        assert counts["special"] + counts["byte"] == report.num_kept == 259
        assert counts["kept"] == report.num_shared + report.num_moved and counts["new"] == report.num_new
        for id, entry in enumerate(vocab_map.entries):
            if entry.origin == "new":
                assert list(entry.old_pieces) == bare.encode(new.piece(id))
            else:
                assert entry.old_id is not None and old.piece(entry.old_id) == new.piece(id)
        assert verify_tokenizer(folder, japanese)["mismatches"] == 0
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["vocab_size"] == size and manifest["language"] == "en,ja"
        assert manifest["languages"]["ja"]["share"] == pytest.approx(2 / 3)


def test_same_bytes(with_runs: Path, replaced: Path, mixture: TextMixture, tmp_path: Path) -> None:
    replace_tokenizer(with_runs / "tokenizer.model", mixture, 464, 8, tmp_path / "again", "en,ja")
    for path in replaced.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_base_with_specials_elsewhere(
    with_runs: Path, mixture: TextMixture, tmp_path: Path, rebuild: object, japanese: list[str]
) -> None:
    """The ids of special pieces are the base's, wherever they are; its self-test is not carried over."""
    model = read_model_file(with_runs / "tokenizer.model")
    moved = [*model.pieces[3:300], *model.pieces[:3], *model.pieces[300:]]
    (tmp_path / "base").mkdir()
    # field 4, one sample: the text "a" is said to be cut into "a"
    self_test = b"\x22\x08\x0a\x06\x0a\x01a\x12\x01a"
    (tmp_path / "base" / "tokenizer.model").write_bytes(model.with_pieces(moved) + self_test)
    replace_tokenizer(tmp_path / "base", mixture, 464, 8, tmp_path / "new")
    new = load_tokenizer(tmp_path / "new")
    assert (new.unk_id, new.bos_id, new.eos_id) == (297, 298, 299)
    assert self_test not in (tmp_path / "new" / "tokenizer.model").read_bytes()
    assert fast_slow_mismatches(tmp_path / "new", [*japanese, *HARD_TEXTS])["mismatches"] == 0
    made = parse_model((tmp_path / "new" / "tokenizer.model").read_bytes())
    assert [piece.type for piece in made.pieces[297:300]] == [PieceType.UNKNOWN, PieceType.CONTROL, PieceType.CONTROL]


def test_less_text_than_asked_for(with_runs: Path, tmp_path: Path) -> None:
    report = replace_tokenizer(with_runs, ["日本語 日本語 the river"] * 3, 800, 8, tmp_path / "new")
    assert report.requested == 800 and report.new_size % 8 == 0 and report.new_size < 320
    assert fast_slow_mismatches(tmp_path / "new", ["日本語 the river", *HARD_TEXTS])["mismatches"] == 0


@pytest.mark.parametrize(
    ("size", "divisor", "message"),
    [
        (465, 8, "take 464 or 472"),
        (464, 0, "multiple of the divisor 0"),
        (256, 8, "expected more than 2"),
        (264, 8, "alphabet of"),
    ],
)
def test_what_cannot_be_replaced(
    with_runs: Path, mixture: TextMixture, tmp_path: Path, size: int, divisor: int, message: str
) -> None:
    with pytest.raises(TokenizerError, match=message):
        replace_tokenizer(with_runs, mixture, size, divisor, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_other_bases(unigram: Path, base: Path, tmp_path: Path, mixture: TextMixture) -> None:
    with pytest.raises(TokenizerError, match="of type unigram"):
        replace_tokenizer(unigram, mixture, 464, 8, tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    with pytest.raises(TokenizerError, match="already holds files"):
        replace_tokenizer(base, mixture, 464, 8, tmp_path / "new")
