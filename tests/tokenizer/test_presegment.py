"""Word boundaries from outside: no trained piece crosses one, and texts are encoded as ever."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer import extend_tokenizer, load_tokenizer, train_tokenizer
from megatron_cpt.tokenizer.presegment import BOUNDARY, load_presegmenter

WORDS = ("静かな", "川が", "町を", "流れて", "いる")
LINES = ["静かな川が町を流れている"] * 30
# What a morphological analyser does, one line for each.
SCRIPT = """
import sys
for line in sys.stdin.buffer:
    line = line.decode()
    for word in ("静か", "川", "町", "流れ"):
        line = line.replace(word, " " + word + " ")
    sys.stdout.buffer.write((" ".join(line.split()) + "\\n").encode())
"""


def by_words(line: str) -> str:
    """Spaces around the content words."""
    for word in ("静か", "川", "町", "流れ"):
        line = line.replace(word, f" {word} ")
    return line


def wrong(line: str) -> str:
    """A presegmenter that changes the text."""
    return line.upper()


@pytest.fixture
def command(tmp_path: Path) -> str:
    (tmp_path / "words.py").write_text(SCRIPT, encoding="utf-8")
    return shlex.join([sys.executable, str(tmp_path / "words.py")])


def test_boundaries_are_projected_onto_the_line(command: str) -> None:
    lines = ["静かな川", "  a 静か\tb", "町", "x y"]
    expected = [f"静か{BOUNDARY}な{BOUNDARY}川", "  a 静か\tb", "町", "x y"]
    assert list(load_presegmenter(f"{__name__}:by_words")(lines)) == expected
    assert list(load_presegmenter(command)(lines)) == expected
    many = [f"静かな川{number}" for number in range(20000)]  # more than the pipes hold
    assert sum(1 for _ in load_presegmenter(command)(many)) == len(many)


def test_no_piece_crosses_a_boundary(tmp_path: Path, base: Path, command: str) -> None:
    plain = train_tokenizer(LINES, 300, tmp_path / "plain").vocab_size
    for number, name in enumerate((f"{__name__}:by_words", command)):
        train_tokenizer(LINES, 300, tmp_path / f"{number}", presegment=name)
        tokenizer = load_tokenizer(tmp_path / f"{number}")
        pieces = [tokenizer.piece(id).strip("\u2581") for id in range(259, tokenizer.vocab_size)]
        assert not [piece for piece in pieces if len(by_words(piece).split()) > 1]
        assert tokenizer.decode(tokenizer.encode(LINES[0])) == LINES[0]
        assert plain > tokenizer.vocab_size
    extend_tokenizer(base, LINES, 60, "ja", 1, tmp_path / "new", presegment=command)
    tokenizer = load_tokenizer(tmp_path / "new")
    cut = [tokenizer.piece(id).strip("\u2581") for id in tokenizer.encode(LINES[0])]
    assert "".join(cut) == LINES[0] and not [piece for piece in cut if len(by_words(piece).split()) > 1]


def test_what_goes_wrong_is_said(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "a line"
        raise OSError("the disk is gone")

    python = shlex.quote(sys.executable)
    cases = [
        (f"{__name__}:nothing", "no presegmenter"),
        (f"{__name__}:wrong", "expected the same characters"),
        ("no_such_program -Owakati", "cannot be started"),
        (f"{python} -c 'import sys; sys.exit(3)'", "code 3 and left"),
        (f"{python} -c 'print(1)'", "expected the same characters"),
        (f"{python} -c 'import sys; d = sys.stdin.read(); print(d + d)'", "more lines than it reads"),
        (" ", "is empty"),
    ]
    for name, message in cases:
        with pytest.raises(TokenizerError, match=message):
            train_tokenizer(["ab cd"] * 5, 300, tmp_path / "new", presegment=name)
        assert not (tmp_path / "new").exists()
    with pytest.raises(OSError, match="the disk is gone"):
        train_tokenizer(
            broken(), 300, tmp_path / "new", presegment=f"{python} -c 'import sys; sys.stdout.write(sys.stdin.read())'"
        )
