"""The core's own reader of model files: every damaged file is refused in words or read, never a crash."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data import _native
from megatron_cpt.data.encoder import check_encoder, open_encoder
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import load_tokenizer
from megatron_cpt.tokenizer.model_file import (
    ModelFile,
    Normalizer,
    Piece,
    PieceType,
    TrainingRules,
    without_prefix,
)


def test_damaged_models_are_refused_or_read(tokenizer: Path) -> None:
    sound, draw = tokenizer.read_bytes(), random.Random(2)
    block = _native.Block.from_texts(["the old river 古い川は 🙂"])
    refused = 0
    for _ in range(400):
        data = bytearray(sound[: draw.randrange(len(sound))] if draw.random() < 0.4 else sound)
        for _ in range(draw.randrange(4)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            _native.BpeEncoder(bytes(data)).encode(block, -1, -1, wide=True)
        except ValueError:
            refused += 1
    assert 100 < refused < 400
    for data in (b"", b"\x0a", b"\x0b", b"\x0a\x05", b"\x18" + b"\xff" * 11, b"\x08\x01", b"text of another kind"):
        with pytest.raises(ValueError):
            _native.BpeEncoder(data)


def test_the_later_of_two_settings_holds(tokenizer: Path, tmp_path: Path) -> None:
    other = tmp_path / "bare.model"
    other.write_bytes(without_prefix(tokenizer.read_bytes()))
    bare = load_tokenizer(other)
    encoder = open_encoder(bare, False, False, np.dtype("<u2"))
    assert encoder.name == "native"
    check_encoder(encoder, bare, ["old  river ", " 古い川は"])
    prefixed = load_tokenizer(tokenizer)
    assert bare.encode("old") != prefixed.encode("old")


def model_of(*pieces: Piece) -> bytes:
    """A BPE model file of an unknown piece and these."""
    bare = ModelFile(b"\x12\x02\x18\x02", (), TrainingRules(), Normalizer())  # trainer_spec: model_type BPE
    return bare.with_appended([Piece("<unk>", 0.0, PieceType.UNKNOWN), *pieces])


def test_a_long_run_of_letters_before_a_joined_character_is_looked_through_once(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(
        model_of(
            *(Piece(text, -k, PieceType.NORMAL) for k, text in enumerate(["t\u00e9", *"zqt\u00e9\u2581", "\u2581z"]))
        )
    )
    loaded = load_tokenizer(path)
    encoder = open_encoder(loaded, False, False, np.dtype("<u2"))
    assert encoder.name == "native"
    check_encoder(
        encoder, loaded, ["zq" * 99 + tail for tail in ("t\u00e9", "t\u00e9zqt\u00e9t z\u00e9", "\u00e9", "t")]
    )

    def cost(letters: int) -> float:
        block = _native.Block.from_texts(["zq" * (letters // 2) + "t\u00e9"])
        times = []
        for _ in range(3):
            start = time.process_time()
            encoder.encode(block)
            times.append(time.process_time() - start)
        return min(times)

    assert cost(400_000) < 24 * cost(50_000)


@pytest.mark.parametrize("kind", [PieceType.NORMAL, PieceType.UNUSED, PieceType.USER_DEFINED, PieceType.CONTROL])
def test_a_model_with_a_piece_twice_or_an_empty_one_is_refused(tmp_path: Path, kind: PieceType) -> None:
    letters = [Piece("a", -3.0, PieceType.NORMAL), Piece("b", -4.0, PieceType.NORMAL)]
    twice = model_of(*letters, Piece("ab", -1.0, kind), Piece("ab", -2.0, kind))
    empty = model_of(*letters, Piece("", -1.0, kind))
    for data, reason in ((twice, "its piece ab is there twice"), (empty, "its piece 3 is empty")):
        with pytest.raises(ValueError, match=reason):
            _native.BpeEncoder(data)
        path = tmp_path / "tokenizer.model"
        path.write_bytes(data)
        with pytest.raises(TokenizerError):
            load_tokenizer(path)
