"""A Llama 3 style base with reserved special tokens, and its extensions."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_cpt.tokenizer.byte_level import extend_byte_level, train_byte_level

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{number}|>" for number in range(5)))

HARD = (
    "",
    " ",
    "   a  b   c" + " " * 20 + "d",
    "\tif x:\n\t\treturn  1\r\n\r\n",
    "\u2581 caf\u00e9 \u2014 \u201cna\u00efve\u201d \u2603 \u20ac",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ef\U0001f1f5 \U0010ffff",
    "\u0440\u0435\u043a\u0430 \u03c0\u03bf\u03c4\u03b1\u03bc\u03cc\u03c2 \u0e41\u0e21\u0e48",
    "\uac15\uc774 \ud750\ub974\ub2e4",
    "1234567890 3.14 0x1F \x00 \x7f \ufffd",
    "a<|end_of_text|>b <|reserved_3|>",
)


@pytest.fixture(scope="session")
def llama3(tmp_path_factory: pytest.TempPathFactory, english: list[str]) -> Path:
    """An English base of 407 ids, of which the last seven are special."""
    folder = tmp_path_factory.mktemp("byte_level") / "base"
    train_byte_level(english, 407, folder, specials=SPECIALS, language="en")
    return folder


@pytest.fixture(scope="session")
def extended3(tmp_path_factory: pytest.TempPathFactory, llama3: Path, japanese: list[str]) -> Path:
    """The base with Japanese merges, its size a multiple of 16."""
    folder = tmp_path_factory.mktemp("byte_level") / "extended"
    extend_byte_level(llama3, japanese, 200, "ja", 16, folder, "ja")
    return folder
