"""Three encoders, one answer: SentencePiece, tokenizer.json and the C++ encoder, on texts that part tokenizers."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_cpt.data import _native
from megatron_cpt.data.encoder import open_encoder
from megatron_cpt.tokenizer import extend_tokenizer, load_tokenizer
from megatron_cpt.tokenizer.verify import HARD_TEXTS

SPACES = (" ", "  ", "\u2581", "\t", "\r\n", "\u3000", "\u00a0", "\u2028", "\ufeff", "\x00")
PARTS = (
    "静かな",
    "川",
    "river",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1ef\U0001f1f5",
    "\u2764\ufe0f",
    "ＡＢ１２！",
    "ｶﾞﾊﾟ",
    "か\u3099",
    "\x80",
    "\xff",
    "\ufffd",
    "\U00020bb7",
    "12345",
)


def hostile_texts() -> list[str]:
    draw = random.Random(7)
    mixed = [
        "".join(
            draw.choice((*PARTS, *(draw.choice(SPACES) * draw.randint(1, 20),) * 6)) for _ in range(draw.randint(1, 9))
        )
        for _ in range(400)
    ]
    edges = [edge for space in SPACES for part in PARTS for edge in (space + part, part + space, space + part + space)]
    return [*HARD_TEXTS, *edges, *mixed]


@pytest.fixture(scope="module")
def any_script(
    tmp_path_factory: pytest.TempPathFactory, with_runs: Path, japanese: list[str], english: list[str]
) -> Path:
    """A base with runs of spaces, extended without a filter by pieces at their own ranks."""
    folder = tmp_path_factory.mktemp("tokenizers") / "any"
    extend_tokenizer(with_runs, japanese + english[::2], 250, "any", 8, folder, scores="own-rank")
    return folder


@pytest.mark.parametrize("name", ["extended", "any_script", "replaced"])
def test_three_encoders_agree(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    slow = load_tokenizer(folder)
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    native = open_encoder(slow, False, False, np.dtype(np.uint16))
    assert native.name == "native"
    texts = hostile_texts()
    encoded = native.encode(_native.Block.from_texts(texts))
    ends = np.cumsum(encoded.lengths)
    own = [part.tolist() for part in np.split(encoded.tokens, ends[:-1])]
    for text, ids, other in zip(texts, slow.encode_batch(texts), own, strict=True):
        assert fast.encode(text, add_special_tokens=False).ids == ids == other, repr(text)
        assert fast.decode(ids) == slow.decode(ids), repr(text)


@pytest.mark.parametrize("name", ["extended", "replaced"])
def test_lone_bytes_are_decoded_alike(name: str, request: pytest.FixtureRequest) -> None:
    """Byte ids as a model may write them: alone, as a character, and cut off behind one.

    A run of byte ids that holds valid and invalid parts is where the two files part: SentencePiece keeps the
    valid ones, the `tokenizers` library puts U+FFFD for every byte of the run.
    """
    folder = request.getfixturevalue(name)
    slow = load_tokenizer(folder)
    fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = slow.encode("静かな river")
    runs = [[byte] for byte in range(256)] + [list(text.encode()) for text in ("鬱", "𠮷𠮷", "\x80é", "\x00\n")]
    runs += [[0xE3, 0x81], [0xFF, 0xFE], [0x80, 0x80, 0x80]]
    for run in runs:
        for word in words:
            ids = [word, *(3 + byte for byte in run), word, *(3 + byte for byte in run)]
            assert fast.decode(ids) == slow.decode(ids), ids
