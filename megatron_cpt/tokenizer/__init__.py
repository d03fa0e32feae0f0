"""Tokenizers: read, train and extend them, and prove what was made.

The way through: `loading` reads any tokenizer; `training` (on a `mixture` of languages), `extending` and
`replacing` make SentencePiece models, whose bytes `model_file` knows and whose Hugging Face files `hf_files`
writes; `byte_level` does the same for Llama 3's kind, by the same functions. `sweep` helps to choose a size;
`vocab_map` says where each new id comes from; `measure` and `report` say what that does to text, `verify` proves
that all readers of a folder agree, `convert` writes the right files of a model that has none.
"""

from __future__ import annotations

from megatron_cpt.tokenizer.choosing import SCORES
from megatron_cpt.tokenizer.convert import convert_tokenizer
from megatron_cpt.tokenizer.extending import ExtendReport, extend_tokenizer
from megatron_cpt.tokenizer.loading import Tokenizer, load_tokenizer
from megatron_cpt.tokenizer.measure import measure, source_lines_changed
from megatron_cpt.tokenizer.mixture import TextMixture
from megatron_cpt.tokenizer.piece_list import read_piece_list
from megatron_cpt.tokenizer.replacing import ReplaceReport, replace_tokenizer
from megatron_cpt.tokenizer.report import compare_tokenizers
from megatron_cpt.tokenizer.scripts import SCRIPTS
from megatron_cpt.tokenizer.sweep import Sweep, sweep_sizes
from megatron_cpt.tokenizer.training import MODEL_TYPES, NORMALIZATIONS, TrainReport, train_tokenizer
from megatron_cpt.tokenizer.verify import Peer, compare_peers, fast_slow_mismatches, verify_tokenizer
from megatron_cpt.tokenizer.vocab_map import Entry, VocabMap, map_vocabularies

__all__ = [
    "MODEL_TYPES",
    "NORMALIZATIONS",
    "SCORES",
    "SCRIPTS",
    "Entry",
    "ExtendReport",
    "Peer",
    "ReplaceReport",
    "Sweep",
    "TextMixture",
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
    "read_piece_list",
    "replace_tokenizer",
    "source_lines_changed",
    "sweep_sizes",
    "train_tokenizer",
    "verify_tokenizer",
]
