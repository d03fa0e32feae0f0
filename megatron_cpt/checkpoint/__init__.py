"""Checkpoints of a Llama: read, written, converted and verified without building a model."""

from megatron_cpt.checkpoint.hf_config import hf_config, parse_hf_config, read_shape
from megatron_cpt.checkpoint.llama import padded_vocab_size
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest, write_checkpoint_manifest

__all__ = [
    "hf_config",
    "padded_vocab_size",
    "parse_hf_config",
    "read_checkpoint_manifest",
    "read_shape",
    "write_checkpoint_manifest",
]
