"""Tokenizers: read, train and extend them, and prove what was made.

The way through: `loading` reads any tokenizer; `training` and `extending` make SentencePiece models,
whose bytes `model_file` knows and whose Hugging Face files `hf_files` writes; `vocab_map` says where each
new id comes from; `measure` and `report` say what that does to text, `verify` proves that all readers of
a folder agree, `convert` writes the right files of a model that has none.
"""

from __future__ import annotations

from megatron_cpt.tokenizer.convert import convert_tokenizer
from megatron_cpt.tokenizer.extending import ExtendReport, extend_tokenizer
from megatron_cpt.tokenizer.loading import Tokenizer, load_tokenizer
from megatron_cpt.tokenizer.measure import measure, source_lines_changed
from megatron_cpt.tokenizer.report import compare_tokenizers
from megatron_cpt.tokenizer.scripts import SCRIPTS
from megatron_cpt.tokenizer.training import TrainReport, train_tokenizer
from megatron_cpt.tokenizer.verify import Peer, compare_peers, fast_slow_mismatches, verify_tokenizer
from megatron_cpt.tokenizer.vocab_map import Entry, VocabMap, map_vocabularies

__all__ = [
    "SCRIPTS",
    "Entry",
    "ExtendReport",
    "Peer",
    "Tokenizer",
    "TrainReport",
    "VocabMap",
    "compare_peers",
    "compare_tokenizers",
    "convert_tokenizer",
    "extend_tokenizer",
    "fast_slow_mismatches",
    "load_tokenizer",
    "map_vocabularies",
    "measure",
    "source_lines_changed",
    "train_tokenizer",
    "verify_tokenizer",
]
