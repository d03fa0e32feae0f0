"""Vocabulary surgery: the embedding and the head of a model follow its tokenizer.

A `SurgeryPlan` holds one `MatrixPlan` for each matrix, made by a method from a vocabulary map; a `RowMaker`
makes the rows of one matrix from the old table, `calibrate` finds what all new rows lack together, and
`apply_surgery` carries a model over.
"""

from __future__ import annotations

from megatron_cpt.surgery.apply import apply_surgery, undo_surgery
from megatron_cpt.surgery.calibration import calibrate
from megatron_cpt.surgery.matrix import MatrixPlan, RowMaker
from megatron_cpt.surgery.methods import METHOD_NAMES, Inputs
from megatron_cpt.surgery.plan import SurgeryPlan, plan_surgery
from megatron_cpt.surgery.row_mix import RowMix

__all__ = [
    "METHOD_NAMES",
    "Inputs",
    "MatrixPlan",
    "RowMaker",
    "RowMix",
    "SurgeryPlan",
    "apply_surgery",
    "calibrate",
    "plan_surgery",
    "undo_surgery",
]
