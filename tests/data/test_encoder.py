"""The encoder against the libraries whose ids it has to give."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron_cpt.data import Document, _native
from megatron_cpt.data.encoder import check_block, check_encoder, open_encoder
from megatron_cpt.errors import DataError, VerificationError
from megatron_cpt.tokenizer import load_tokenizer


def test_ids_of_a_block(tokenizer: Path, documents: list[Document]) -> None:
    loaded = load_tokenizer(tokenizer)
    texts = [document.text for document in documents] + ["a parrot: \U0001f99c"]
    encoder = open_encoder(loaded, append_bos=True, append_eos=True, dtype=np.dtype(np.uint16))
    assert (encoder.name, encoder.reason) == ("native", "")
    encoded = encoder.encode(_native.Block.from_texts(texts))
    expected = [[1, *ids, 2] for ids in loaded.encode_batch(texts)]
    assert encoded.tokens.dtype == np.uint16
    assert encoded.tokens.tolist() == [id for ids in expected for id in ids]
    assert encoded.lengths.tolist() == [len(ids) for ids in expected]
    byte_ids = [id for id in range(400) if loaded.piece(id).startswith("<0x")]
    assert encoded.byte_tokens == np.isin(encoded.tokens, byte_ids).sum() > 0
    assert encoded.unknown_tokens == 0
    check_encoder(encoder, loaded, texts)


def test_the_cut_into_blocks_does_not_matter(tokenizer: Path, documents: list[Document]) -> None:
    encoder = open_encoder(load_tokenizer(tokenizer), append_bos=False, append_eos=True, dtype=np.dtype(np.int32))
    texts = [document.text for document in documents]
    whole = encoder.encode(_native.Block.from_texts(texts)).tokens
    parts = [encoder.encode(_native.Block.from_texts(texts[k : k + 7])).tokens for k in range(0, len(texts), 7)]
    assert whole.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_text_without_tokens_has_no_borders(tokenizer: Path) -> None:
    encoder = open_encoder(load_tokenizer(tokenizer), append_bos=True, append_eos=True, dtype=np.dtype(np.uint16))
    encoded = encoder.encode(_native.Block.from_texts(["", "a", ""]))
    assert encoded.lengths[[0, 2]].tolist() == [0, 0]
    assert encoded.lengths[1] == len(encoded.tokens) >= 3


def test_a_difference_is_refused(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_tokenizer(tokenizer)
    encoder = open_encoder(loaded, append_bos=True, append_eos=False, dtype=np.dtype(np.uint16))
    texts = ["", "a", "the old river"]
    expected = loaded.encode_batch(texts)
    changed = [expected[0], expected[1], [*expected[2][:-1], 0]]
    monkeypatch.setattr(loaded, "encode_batch", lambda texts: changed)
    with pytest.raises(VerificationError, match=f"text 2 .*around token {len(expected[2]) - 1}"):
        check_encoder(encoder, loaded, texts)


def test_wrong_types_and_missing_pieces_are_refused(tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    with pytest.raises(DataError, match="expected uint16 or int32"):
        open_encoder(loaded, False, False, np.dtype(np.int64))
    loaded.bos_id = None
    with pytest.raises(DataError, match="no bos piece"):
        open_encoder(loaded, True, False, np.dtype(np.uint16))


def test_threads_share_an_encoder(tokenizer: Path, documents: list[Document]) -> None:
    encoder = open_encoder(load_tokenizer(tokenizer), append_bos=True, append_eos=True, dtype=np.dtype(np.uint16))
    texts = [document.text for document in documents]
    blocks = [_native.Block.from_texts(texts[k:] + texts[:k]) for k in range(40)]
    alone = [encoder.encode(block).tokens for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        for ours, expected in zip(pool.map(encoder.encode, blocks), alone, strict=True):
            np.testing.assert_array_equal(ours.tokens, expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "model of type 1, not BPE"),
        ({"model_type": "bpe", "control_symbols": ["!"]}, "text can spell its control piece !"),
    ],
)
def test_other_models_go_through_sentencepiece(
    tmp_path: Path, documents: list[Document], options: dict[str, object], reason: str
) -> None:
    texts = [document.text for document in documents]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=90,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    loaded = load_tokenizer(tmp_path)
    encoder = open_encoder(loaded, append_bos=True, append_eos=True, dtype=np.dtype(np.uint16))
    assert encoder.name == "sentencepiece" and reason in encoder.reason
    texts = ["", "the \U0001f99c\U0001f99d river", *texts]
    check_encoder(encoder, loaded, texts)
    encoded = encoder.encode(_native.Block.from_texts(texts))
    assert encoded.tokens.dtype == np.uint16
    assert encoded.lengths[0] == 0 and encoded.lengths[1] > 2 and encoded.unknown_tokens > 0
    assert check_block(encoder, loaded, _native.Block.from_texts(texts), "x", 0) == 0  # nothing is proved by itself


def test_a_tokenizer_json_goes_through_tokenizers(tmp_path: Path, documents: list[Document]) -> None:
    texts = [document.text for document in documents]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    encoder = open_encoder(loaded, append_bos=True, append_eos=True, dtype=np.dtype(np.int32))
    assert encoder.name == "tokenizers" and encoder.reason
    texts = ["a<|end_of_text|>b", "", *texts]
    check_encoder(encoder, loaded, texts)
    encoded = encoder.encode(_native.Block.from_texts(texts))
    assert encoded.lengths[1] == 0
    assert np.count_nonzero(encoded.tokens == loaded.eos_id) == len(texts) - 1  # its spelling in a text is text


def test_a_changed_file_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.read_bytes())
    loaded = load_tokenizer(path)
    path.write_bytes(tokenizer.read_bytes() + b"\x1a\x02\x18\x00")
    with pytest.raises(DataError, match="was changed while it was in use"):
        open_encoder(loaded, True, True, np.dtype(np.uint16))


def test_a_long_stretch_without_a_cut(tokenizer: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    encoder = open_encoder(loaded, append_bos=False, append_eos=False, dtype=np.dtype(np.uint16))
    letters = "".join(random.Random(1).choices("theriv", k=150_000))
    check_encoder(encoder, loaded, ["river" * 30_000, "the" * 17 + "\u6d41\u308c\u3066" * 20_000, letters])


def test_blocks_are_checked_by_a_fixed_draw(tokenizer: Path, documents: list[Document]) -> None:
    loaded = load_tokenizer(tokenizer)
    encoder = open_encoder(loaded, append_bos=False, append_eos=False, dtype=np.dtype(np.uint16))
    seen: list[list[str]] = []
    plain = loaded.encode_batch
    loaded.encode_batch = lambda texts: (seen.append(list(texts)), plain(texts))[1]  # type: ignore[method-assign]
    block = _native.Block.from_texts([document.text for document in documents])
    counts = [check_block(encoder, loaded, block, "x", number) for number in range(130)]
    assert {number: count for number, count in enumerate(counts) if count} == dict.fromkeys(
        (0, 1, 2, 4, 8, 16, 32, 64, 128), 4
    )
    first = seen[:]
    seen.clear()
    assert [check_block(encoder, loaded, block, "x", number) for number in range(130)] == counts and seen == first
    assert len({text for texts in seen for text in texts}) > 20
    seen.clear()
    long = "\u6d41\u308c the " * 100_000
    assert check_block(encoder, loaded, _native.Block.from_texts([long, long]), "x", 64) == 1
    assert len(seen) == 1 and 16_000 < len(seen[0][0].encode()) <= 16 << 10 and seen[0][0] in long
    assert check_block(encoder, loaded, _native.Block.from_texts([]), "x", 0) == 0
