"""Checkpoints of a Llama: read, written, converted and verified without building a model."""

from megatron_cpt.checkpoint.belonging import check_belongs
from megatron_cpt.checkpoint.convert import convert
from megatron_cpt.checkpoint.described import Hints
from megatron_cpt.checkpoint.forward import LlamaForward
from megatron_cpt.checkpoint.hf_config import hf_config, parse_hf_config
from megatron_cpt.checkpoint.hf_writer import write_hf
from megatron_cpt.checkpoint.huggingface import open_hf
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD, hf_shapes
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest, write_checkpoint_manifest
from megatron_cpt.checkpoint.opening import open_checkpoint, open_tables, read_shape
from megatron_cpt.checkpoint.reader import ModelReader, read_blocks
from megatron_cpt.checkpoint.runs import StoredModel
from megatron_cpt.checkpoint.torch_dist import open_torch_dist
from megatron_cpt.checkpoint.verify import show, verify

__all__ = [
    "EMBEDDING",
    "HEAD",
    "Hints",
    "LlamaForward",
    "ModelReader",
    "StoredModel",
    "check_belongs",
    "convert",
    "hf_config",
    "hf_shapes",
    "open_checkpoint",
    "open_hf",
    "open_tables",
    "open_torch_dist",
    "parse_hf_config",
    "read_blocks",
    "read_checkpoint_manifest",
    "read_shape",
    "show",
    "verify",
    "write_checkpoint_manifest",
    "write_hf",
]
