"""SentencePiece files read and grown byte by byte, against SentencePiece itself."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.model_file import Piece, PieceType, TrainingRules, read_model_file, without_prefix


def test_pieces_and_settings(base: Path) -> None:
    model = read_model_file(base / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    ids = range(reference.vocab_size())
    assert [piece.text for piece in model.pieces] == [reference.id_to_piece(id) for id in ids]
    assert [piece.score for piece in model.pieces] == [reference.get_score(id) for id in ids]
    assert [piece.type is PieceType.BYTE for piece in model.pieces] == [reference.is_byte(id) for id in ids]
    assert [piece.type is PieceType.CONTROL for piece in model.pieces] == [reference.is_control(id) for id in ids]
    assert model.rules == TrainingRules(split_digits=True, allow_whitespace_only_pieces=True, byte_fallback=True)
    assert model.normalizer.identity and not model.normalizer.remove_extra_whitespaces


def test_appended_pieces_are_sentencepiece_s(base: Path) -> None:
    model = read_model_file(base / "tokenizer.model")
    pieces = [Piece("静" * length, -1000.25 - length, PieceType.NORMAL) for length in (1, 2, 60)]
    pieces.append(Piece("<extra>", 0.0, PieceType.CONTROL))
    grown = sentencepiece.SentencePieceProcessor(model_proto=model.with_appended(pieces))
    first = len(model.pieces)
    assert [grown.id_to_piece(first + place) for place in range(4)] == [piece.text for piece in pieces]
    assert [grown.get_score(first + place) for place in range(4)] == [piece.score for piece in pieces]
    assert grown.is_control(first + 3)
    assert grown.encode("静静") == [reference_space(grown), first + 1]


def reference_space(processor: sentencepiece.SentencePieceProcessor) -> int:
    return int(processor.piece_to_id("\u2581"))


def test_without_prefix(base: Path) -> None:
    data = without_prefix((base / "tokenizer.model").read_bytes())
    bare = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert bare.encode("river", out_type=str)[0][0] == "r"
    assert bare.decode(bare.encode(" river")) == " river"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(
    data: st.DataObject, base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the damage, the only exception is the family's."""
    whole = (base / "tokenizer.model").read_bytes()
    kind = data.draw(st.sampled_from(["cut", "changed", "other"]))
    if kind == "cut":
        damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "changed":
        at = data.draw(st.integers(0, len(whole) - 1))
        damaged = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    else:
        damaged = data.draw(st.binary(max_size=40))
    path = tmp_path_factory.getbasetemp() / "damaged.model"
    path.write_bytes(damaged)
    try:
        model = read_model_file(path)
    except TokenizerError as caught:
        assert "damaged.model" in str(caught)
    else:
        assert kind != "cut" or len(model.pieces) <= 450


def test_other_kinds_of_model(tmp_path: Path, english: list[str]) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(english),
        model_writer=written,
        model_type="word",
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    (tmp_path / "unigram.model").write_bytes(written.getvalue())
    with pytest.raises(TokenizerError, match="expected 2 .BPE."):
        read_model_file(tmp_path / "unigram.model")
    with pytest.raises(TokenizerError, match="cannot read"):
        read_model_file(tmp_path / "missing.model")
