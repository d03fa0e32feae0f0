"""The sweep: a smaller BPE model is the beginning of a larger one, and each row is what `extend` makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import extend_tokenizer, load_tokenizer, measure, sweep_sizes
from megatron_cpt.tokenizer.model_file import PieceType, read_model_file
from megatron_cpt.tokenizer.sweep import smaller_model
from megatron_cpt.tokenizer.training import train_model

SIZES = (200, 90, 140)


@pytest.mark.parametrize("language", ["japanese", "english"])
def test_a_smaller_model_is_the_beginning_of_a_larger_one(
    base: Path, request: pytest.FixtureRequest, language: str
) -> None:
    lines = request.getfixturevalue(language)
    model = read_model_file(base / "tokenizer.model")

    def pieces(size: int) -> list[object]:
        trained = train_model(lines, size + 259, model.rules, model.normalizer, 0.9995).model
        return [piece for piece in trained.pieces if piece.type is PieceType.NORMAL]

    largest = pieces(300)
    for size in (100, 101, 150, 299, 300):
        assert smaller_model(largest, size) == pieces(size)  # type: ignore[arg-type]


def test_rows_are_what_extend_makes(base: Path, tmp_path: Path, japanese: list[str], english: list[str]) -> None:
    texts = {"ja": japanese[:100], "en": english[:100]}
    sweep = sweep_sizes(base, iter(japanese), SIZES, texts, "ja", 8)
    assert [row.num_pieces for row in sweep.rows] == [0, *sorted(SIZES)]
    assert sweep.rows[0].bytes_per_token["ja"] == measure(load_tokenizer(base), texts["ja"])["bytes_per_token"]
    for row in sweep.rows[1:]:
        extend_tokenizer(base, japanese, row.num_pieces, "ja", 8, tmp_path / str(row.num_pieces))
        made = load_tokenizer(tmp_path / str(row.num_pieces))
        assert row.vocab_size == made.vocab_size
        for language, lines in texts.items():
            assert row.bytes_per_token[language] == measure(made, lines)["bytes_per_token"]
    sizes, ja = ([row.vocab_size for row in sweep.rows], [1 / row.bytes_per_token["ja"] for row in sweep.rows])
    below = [
        ja[0] + (ja[-1] - ja[0]) * (size - sizes[0]) / (sizes[-1] - sizes[0]) - y
        for size, y in zip(sizes, ja, strict=True)
    ]
    assert sweep.knee == sweep.rows[below.index(max(below))].num_pieces == 90


def test_what_cannot_be_swept(base: Path, japanese: list[str]) -> None:
    for sizes, texts, message in (
        ((), {"ja": japanese}, "expected sizes"),
        ((0, 100), {"ja": japanese}, "expected sizes"),
        ((100,), {}, "no language"),
        ((100,), {"ja": japanese, "en": [""]}, "empty: en"),
        ((20, 100), {"ja": japanese}, "sweep sizes above"),
    ):
        with pytest.raises(TokenizerError, match=message):
            sweep_sizes(base, japanese, sizes, texts, "ja", 8)
