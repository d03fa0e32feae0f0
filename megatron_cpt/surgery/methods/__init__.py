"""How the rows of new pieces are made: each method turns a vocabulary map into the plan of one matrix.

The settings of each stand in `config/surgery.py`. Kept, byte and special ids are copies of their old rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_cpt.config.surgery import (
    METHOD_NAMES,
    ClpMethod,
    CovarianceMethod,
    InheritMethod,
    Method,
    NormalMethod,
    PiecesMethod,
    SameMethod,
)
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.methods.pieces import drawn, inherited, of_pieces, same
from megatron_cpt.surgery.methods.rows import Task
from megatron_cpt.surgery.methods.similarity import clp
from megatron_cpt.tokenizer import Tokenizer, VocabMap

__all__ = ["METHOD_NAMES", "Tokenizers", "make_matrix"]

_MAKERS: dict[type[Method], Callable[[Task, Any], MatrixPlan]] = {
    PiecesMethod: of_pieces,
    SameMethod: same,
    InheritMethod: inherited,
    NormalMethod: drawn,
    CovarianceMethod: drawn,
    ClpMethod: clp,
}


@dataclass(frozen=True)
class Tokenizers:
    """Both tokenizers, for the methods that read text."""

    old: Tokenizer
    new: Tokenizer


def make_matrix(method: Method, vocab_map: VocabMap, matrix: int, tokenizers: Tokenizers | None = None) -> MatrixPlan:
    """The plan of one matrix.

    Args:
        method: which, with its settings.
        vocab_map: where each new id comes from.
        matrix: 0 for the embedding, 1 for the head.
        tokenizers: needed by the methods that read text.

    Raises:
        CptError: what the method needs is missing or does not fit the map.
    """
    plan = _MAKERS[type(method)](Task(vocab_map, method, matrix, tokenizers), method)
    plan.check()
    return plan
