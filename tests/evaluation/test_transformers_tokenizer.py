"""What transformers reads: the right files as they are, a bare model with merges ranked by id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_cpt.errors import InputError, TokenizerError
from megatron_cpt.evaluation.transformers_tokenizer import transformers_peer
from megatron_cpt.tokenizer import compare_peers, convert_tokenizer, load_tokenizer, verify_tokenizer
from megatron_cpt.tokenizer.model_file import Piece, PieceType
from megatron_cpt.tokenizer.training import LLAMA_NORMALIZER, LLAMA_RULES, train_model
from megatron_cpt.tokenizer.verify import HARD_TEXTS

TEXTS = [*HARD_TEXTS, "the  river   runs", "</s> and <s>", *(f"x{' ' * count}river" for count in range(2, 20))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model like Llama 2's: the run of two spaces has a low id and the lowest score."""
    file = tmp_path_factory.mktemp("bare") / "tokenizer.model"
    rules = replace(LLAMA_RULES, allow_whitespace_only_pieces=False)
    lines = ["the river runs past a quiet town", "nobody asks where the river goes in winter"] * 20
    trained = train_model(lines, 330, rules, LLAMA_NORMALIZER, 0.9995).model
    empty = replace(trained, data=b"")
    rest = trained.data[len(empty.with_appended(trained.pieces)) :]
    run = Piece("\u2581\u2581", -1e9, PieceType.NORMAL)
    file.write_bytes(empty.with_appended([*trained.pieces[:259], run, *trained.pieces[259:]]) + rest)
    return file


def test_bare_model_and_right_files(model: Path, tmp_path: Path) -> None:
    reference = load_tokenizer(model)
    mismatches = []
    with transformers_peer(model, "LlamaTokenizer") as peer:
        result = compare_peers(reference, [peer], TEXTS, mismatches.append)
    assert result["mismatches"][peer.name] == len(mismatches) > 0
    assert "the  river   runs" in {mismatch["text"] for mismatch in mismatches}
    convert_tokenizer(model, tmp_path / "right")
    with transformers_peer(tmp_path / "right") as peer:
        assert compare_peers(reference, [peer], TEXTS)["mismatches"] == {peer.name: 0}


def test_byte_level_folder(tmp_path: Path) -> None:
    """A tokenizer.json alone, as Llama 3's: read by transformers as by `tokenizers`."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(TEXTS * 3, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    with transformers_peer(tmp_path) as peer:
        result = verify_tokenizer(tmp_path, TEXTS, [peer])
    assert result["reference"] == "tokenizer.json" and result["readers"] == {peer.name: 0}


def test_refusals(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer class 'Nothing'"), transformers_peer(model, "Nothing"):
        pass
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="cannot read"), transformers_peer(tmp_path):
        pass
