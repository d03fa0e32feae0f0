"""How the rows of new pieces are made: each method turns a vocabulary map into the plan of one matrix.

The settings of each stand in `config/surgery.py`. Kept, byte and special ids are copies of their old rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_cpt.config.surgery import (
    METHOD_NAMES,
    AlignedMethod,
    ClpMethod,
    CovarianceMethod,
    FocusMethod,
    InheritMethod,
    Method,
    NormalMethod,
    OmpMethod,
    PiecesMethod,
    SameMethod,
    WechselMethod,
)
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.methods.aligned import aligned
from megatron_cpt.surgery.methods.clp import clp
from megatron_cpt.surgery.methods.focus import focus
from megatron_cpt.surgery.methods.inputs import Inputs, ReadTexts, Side
from megatron_cpt.surgery.methods.pieces import drawn, inherited, of_pieces, same
from megatron_cpt.surgery.methods.pursuit import omp
from megatron_cpt.surgery.methods.rows import Task
from megatron_cpt.surgery.methods.wechsel import wechsel
from megatron_cpt.tokenizer import VocabMap

__all__ = ["METHOD_NAMES", "Inputs", "ReadTexts", "Side", "make_matrix"]

_MAKERS: dict[type[Method], Callable[[Task, Any], MatrixPlan]] = {
    PiecesMethod: of_pieces,
    SameMethod: same,
    InheritMethod: inherited,
    NormalMethod: drawn,
    CovarianceMethod: drawn,
    AlignedMethod: aligned,
    ClpMethod: clp,
    FocusMethod: focus,
    WechselMethod: wechsel,
    OmpMethod: omp,
}


def make_matrix(method: Method, vocab_map: VocabMap, matrix: int, inputs: Inputs | None = None) -> MatrixPlan:
    """The plan of one matrix.

    Args:
        method: which, with its settings.
        vocab_map: where each new id comes from.
        matrix: 0 for the embedding, 1 for the head.
        inputs: needed by the methods that read texts or pieces.

    Raises:
        CptError: what the method needs is missing or does not fit the map.
    """
    plan = _MAKERS[type(method)](Task(vocab_map, method, matrix, inputs), method)
    plan.check()
    return plan
