"""The encoder of `data build` as one more reader of a tokenizer, to be compared with the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_cpt.data import _native
from megatron_cpt.data.encoder import open_encoder
from megatron_cpt.tokenizer import Peer, Tokenizer


def encoder_peer(tokenizer: Tokenizer) -> tuple[Peer | None, str]:
    """The encoder in C++ for a tokenizer.

    Returns:
        The reader, or None where `data build` reads this tokenizer with its own library; and the reason for that.
    """
    encoder = open_encoder(tokenizer, False, False, np.dtype(np.int32))
    if encoder.name != "native":
        return None, f"reads it with {encoder.name} itself ({encoder.reason})"

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        encoded = encoder.encode(_native.Block.from_texts(list(texts)))
        borders = np.cumsum(encoded.lengths)[:-1]
        return [ids.tolist() for ids in np.split(encoded.tokens, borders)]

    return Peer("megatron_cpt.data", encode_batch), ""
