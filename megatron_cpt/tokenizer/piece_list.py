"""Pieces that a person names instead of having them trained."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path

from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.model_file import SPACE, Piece, PieceType


def read_piece_list(path: str | Path) -> list[str]:
    """The lines of a text file, one piece a line; empty lines are left out.

    Raises:
        TokenizerError: the file cannot be read, or is not UTF-8.
    """
    try:
        # Lines end at LF or CR LF alone: the other separators that Python knows may be in a piece.
        return [line for line in Path(path).read_text(encoding="utf-8-sig").split("\n") if line]
    except OSError as caught:
        raise TokenizerError(f"cannot read {path}: {caught.strerror or caught}") from None
    except UnicodeDecodeError as caught:
        raise TokenizerError(f"{path} is not UTF-8 ({caught}): save the list of pieces as UTF-8") from None


def offered_pieces(texts: Iterable[str]) -> list[Piece]:
    """The pieces of a list, the first with the best rank; a space may be written as such or as U+2581.

    Raises:
        TokenizerError: the list is empty, or two of its pieces are the same after NFKC normalisation.
    """
    listed = [text.replace(" ", SPACE) for text in texts]
    if not listed:
        raise TokenizerError("the list of pieces is empty: expected one piece a line")
    places: dict[str, int] = {}
    for place, text in enumerate(listed):
        first = places.setdefault(unicodedata.normalize("NFKC", text), place)
        if first != place:
            raise TokenizerError(
                f"pieces {first + 1} and {place + 1} of the list ({listed[first]!r} and {text!r}) are the same after "
                "NFKC normalisation: remove one of them, or the texts would be cut into both without a rule"
            )
    return [Piece(text, -float(place), PieceType.NORMAL) for place, text in enumerate(listed)]
