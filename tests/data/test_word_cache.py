"""The cache of words is switched by how much of a text it knows, and never changes an id."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from megatron_cpt.data import Document, _native
from megatron_cpt.data.encoder import open_encoder
from megatron_cpt.tokenizer import load_tokenizer


def test_ids_do_not_depend_on_what_was_met_before(tokenizer: Path, documents: list[Document]) -> None:
    loaded = load_tokenizer(tokenizer)
    draw = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    strange = [" ".join("".join(draw.choices(letters, k=9)) for _ in range(10_000)) for _ in range(12)]  # 1.2 MB
    known = [" ".join(["the same few words again"] * 4_000) for _ in range(12)]
    texts = [*strange, *known, *(document.text for document in documents[:20]), *strange[:3], *known[:3]]
    encoder = open_encoder(loaded, False, False, np.dtype(np.int32))
    for text, expected in zip(texts, loaded.encode_batch(texts), strict=True):
        assert encoder.encode(_native.Block.from_texts([text])).tokens.tolist() == expected
