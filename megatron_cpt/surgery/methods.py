"""How the rows of new pieces are made: each method turns a vocabulary map into a row mix.

Kept, byte and special ids are copies of their old rows in every method.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_cpt.errors import ConfigError
from megatron_cpt.surgery.row_mix import RowMix
from megatron_cpt.tokenizer import VocabMap


def mean_of_pieces(vocab_map: VocabMap) -> RowMix:
    """A new piece's row is the mean of the rows of the old pieces it was cut into.

    row(v) = (1 / n) * sum of old_row(s_i), where s_1 ... s_n is the old tokenizer's cut of the surface of v.

    Source: Fujii et al. 2024 (arXiv 2404.17790), vocabulary expansion.
    """

    def sources(id: int) -> tuple[tuple[int, ...], list[float]]:
        entry = vocab_map.entries[id]
        pieces = entry.old_pieces if entry.old_id is None else (entry.old_id,)
        return pieces, [1.0 / len(pieces)] * len(pieces)

    return RowMix.from_rows(map(sources, range(vocab_map.new_size)), vocab_map.old_size)


METHODS: dict[str, Callable[[VocabMap], RowMix]] = {"mean": mean_of_pieces}


def make_mix(method: str, vocab_map: VocabMap) -> RowMix:
    """The row mix of a method by its name.

    Raises:
        ConfigError: there is no such method.
    """
    if method not in METHODS:
        raise ConfigError(f"surgery method {method!r} is unknown: expected one of {', '.join(METHODS)}")
    return METHODS[method](vocab_map)
