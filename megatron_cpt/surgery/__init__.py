"""Vocabulary surgery: the embedding and the head of a model follow its tokenizer.

A `SurgeryPlan` holds one `RowMix` for each matrix, made by a method from a vocabulary map without any
model; `apply_surgery` carries a model over.
"""

from __future__ import annotations

from megatron_cpt.surgery.apply import apply_surgery
from megatron_cpt.surgery.methods import METHODS
from megatron_cpt.surgery.plan import SurgeryPlan, plan_surgery
from megatron_cpt.surgery.row_mix import RowMix

__all__ = ["METHODS", "RowMix", "SurgeryPlan", "apply_surgery", "plan_surgery"]
