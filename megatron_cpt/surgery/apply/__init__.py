"""Carry a model over to its new vocabulary, in whatever format it is, and back.

source --open_tables--> tables (embedding, head, masters, moments) and the rest
tables --plan--> new tables; rows that are lost --> surgery/removed_rows.safetensors
the rest --> hard links
"""

from megatron_cpt.surgery.apply.forth import apply_surgery
from megatron_cpt.surgery.apply.undo import undo_surgery

__all__ = ["apply_surgery", "undo_surgery"]
