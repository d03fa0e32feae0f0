"""The encoder against the libraries whose ids it has to give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_cpt.data import Document, _native
from megatron_cpt.data.encoder import check_encoder, open_encoder
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
