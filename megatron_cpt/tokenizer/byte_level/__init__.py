"""Byte-level BPE, the kind of tokenizer that Llama 3 has: train, extend and replace.

Its file is a `tokenizer.json` (`json_model`). A word of text is written in 256 characters, one for each byte,
and merged by a list of pairs in the order of their ranks. `learning` continues such a list on a new corpus.
"""

from __future__ import annotations

from megatron_cpt.tokenizer.byte_level.extending import ByteLevelExtendReport, extend_byte_level
from megatron_cpt.tokenizer.byte_level.replacing import ByteLevelReplaceReport, replace_byte_level
from megatron_cpt.tokenizer.byte_level.training import train_byte_level

__all__ = [
    "ByteLevelExtendReport",
    "ByteLevelReplaceReport",
    "extend_byte_level",
    "replace_byte_level",
    "train_byte_level",
]
