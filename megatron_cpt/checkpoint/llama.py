"""The tensors of a Llama: their Hugging Face names, and where each lies in a `torch_dist` checkpoint.

Hugging Face names are the one language of this package: every format is read and written through
them. A `Placement` says which rows of which stored tensor an HF tensor is made of; that one idea
covers plain copies, the interleaving of q, k and v by query group, the stacking of gate on up, and
the padding of the vocabulary (stored rows that no HF row claims). Rotary embeddings need no
permutation: both sides rotate the two halves of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cpt.config.schema import LlamaShape, RopeScaling
from megatron_cpt.errors import CheckpointError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
STORED_EMBEDDING = "embedding.word_embeddings.weight"
STORED_HEAD = "output_layer.weight"
STORED_FINAL_NORM = "decoder.final_layernorm.weight"
LAYERS = "decoder.layers."
MAX_SIZE = 2**31 - 1  # of any dimension of a Llama

# Modules whose (empty) Transformer Engine state megatron-core asks for when it loads.
EXTRA_STATE_MODULES = (
    "self_attention.core_attention",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


# What is taken for a Llama: others would only be a description that keeps the reader busy.
_LIMITS = {
    "num_layers": 10_000,
    **dict.fromkeys(("num_attention_heads", "num_query_groups"), 10_000),
    **dict.fromkeys(("hidden_size", "ffn_hidden_size", "head_dim", "max_position_embeddings"), MAX_SIZE),
    **dict.fromkeys(("norm_epsilon", "rope_theta"), 1e30),
}


@dataclass(frozen=True)
class Placement:
    """Where an HF tensor lies in a stored one.

    Attributes:
        key: name of the stored tensor.
        layer: index into the stored tensor's first dimension (layers are stacked), or None.
        runs: (first row in the HF tensor, first row in the stored tensor's layer, number of rows);
            a norm's elements count as rows.
    """

    key: str
    layer: int | None
    runs: tuple[tuple[int, int, int], ...]


def hf_shapes(shape: LlamaShape, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model, in the order of a forward pass."""
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    query, kv = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab_size, hidden)}
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (hidden,),
            prefix + "self_attn.q_proj.weight": (query, hidden),
            prefix + "self_attn.k_proj.weight": (kv, hidden),
            prefix + "self_attn.v_proj.weight": (kv, hidden),
            prefix + "self_attn.o_proj.weight": (hidden, query),
            prefix + "post_attention_layernorm.weight": (hidden,),
            prefix + "mlp.gate_proj.weight": (ffn, hidden),
            prefix + "mlp.up_proj.weight": (ffn, hidden),
            prefix + "mlp.down_proj.weight": (hidden, ffn),
        }
    shapes[FINAL_NORM] = (hidden,)
    if not shape.tied_embeddings:
        shapes[HEAD] = (vocab_size, hidden)
    return shapes


def stored_shapes(shape: LlamaShape, padded_size: int) -> dict[str, tuple[int, ...]]:
    """Key -> global shape of every tensor of a `torch_dist` checkpoint, layers stacked."""
    layers, hidden, ffn = shape.num_layers, shape.hidden_size, shape.ffn_hidden_size
    query, kv = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        STORED_EMBEDDING: (padded_size, hidden),
        LAYERS + "self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        LAYERS + "self_attention.linear_qkv.weight": (layers, query + 2 * kv, hidden),
        LAYERS + "self_attention.linear_proj.weight": (layers, hidden, query),
        LAYERS + "mlp.linear_fc1.layer_norm_weight": (layers, hidden),
        LAYERS + "mlp.linear_fc1.weight": (layers, 2 * ffn, hidden),
        LAYERS + "mlp.linear_fc2.weight": (layers, hidden, ffn),
        STORED_FINAL_NORM: (hidden,),
    }
    if not shape.tied_embeddings:
        shapes[STORED_HEAD] = (padded_size, hidden)
    return shapes


def placements(shape: LlamaShape, vocab_size: int) -> dict[str, Placement]:
    """Where each HF tensor lies in a `torch_dist` checkpoint (same keys as `hf_shapes`)."""
    hidden, ffn, head = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    per_group = shape.num_attention_heads // shape.num_query_groups * head  # query rows of one group

    def grouped(first: int, rows: int) -> tuple[tuple[int, int, int], ...]:
        group_rows = per_group + 2 * head
        return tuple((g * rows, g * group_rows + first, rows) for g in range(shape.num_query_groups))

    inside = {
        "input_layernorm.weight": ("self_attention.linear_qkv.layer_norm_weight", ((0, 0, hidden),)),
        "self_attn.q_proj.weight": ("self_attention.linear_qkv.weight", grouped(0, per_group)),
        "self_attn.k_proj.weight": ("self_attention.linear_qkv.weight", grouped(per_group, head)),
        "self_attn.v_proj.weight": ("self_attention.linear_qkv.weight", grouped(per_group + head, head)),
        "self_attn.o_proj.weight": ("self_attention.linear_proj.weight", ((0, 0, hidden),)),
        "post_attention_layernorm.weight": ("mlp.linear_fc1.layer_norm_weight", ((0, 0, hidden),)),
        "mlp.gate_proj.weight": ("mlp.linear_fc1.weight", ((0, 0, ffn),)),
        "mlp.up_proj.weight": ("mlp.linear_fc1.weight", ((0, ffn, ffn),)),
        "mlp.down_proj.weight": ("mlp.linear_fc2.weight", ((0, 0, hidden),)),
    }
    table = {EMBEDDING: Placement(STORED_EMBEDDING, None, ((0, 0, vocab_size),))}
    for layer in range(shape.num_layers):
        for name, (key, runs) in inside.items():
            table[f"model.layers.{layer}.{name}"] = Placement(LAYERS + key, layer, runs)
    table[FINAL_NORM] = Placement(STORED_FINAL_NORM, None, ((0, 0, hidden),))
    if not shape.tied_embeddings:
        table[HEAD] = Placement(STORED_HEAD, None, ((0, 0, vocab_size),))
    return table


def check_supported(shape: LlamaShape, where: str) -> LlamaShape:
    """Return the shape; raises CheckpointError where megatron-core could not compute the same model, or no machine."""
    for name, limit in _LIMITS.items():
        if not getattr(shape, name) <= limit:  # also not a number
            raise CheckpointError(f"{where}: got {name} {getattr(shape, name)}, expected at most {limit:g}")
    if shape.num_attention_heads % shape.num_query_groups:
        raise CheckpointError(
            f"{where}: got {shape.num_attention_heads} attention heads over {shape.num_query_groups} key-value heads, "
            "expected a multiple"
        )
    if shape.head_dim % 2:
        raise CheckpointError(f"{where}: got head_dim {shape.head_dim}, expected an even number (rotary halves)")
    scaling = shape.rope_scaling
    if scaling is not None and scaling != RopeScaling(factor=scaling.factor):
        raise CheckpointError(
            f"{where}: got llama3 rope scaling with low_freq_factor {scaling.low_freq_factor}, high_freq_factor "
            f"{scaling.high_freq_factor}, original_max_position_embeddings {scaling.original_max_position_embeddings}; "
            "megatron-core has 1, 4 and 8192 built in and would compute another model, so only `factor` may differ"
        )
    return shape
