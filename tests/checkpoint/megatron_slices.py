"""What each rank of megatron-core has to hold, cut from the tensors of the Hugging Face model by plain slicing.

Independent of the package's own tables: written from megatron-core's documented layout alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cpt.config.schema import LlamaShape


@dataclass(frozen=True)
class Layout:
    """TP x PP with VPP chunks of layers on each stage (None: one chunk, not interleaved), without data parallelism."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline

    @property
    def name(self) -> str:
        return f"TP{self.tensor}-PP{self.pipeline}" + (f"-VPP{self.virtual}" if self.virtual else "")

    def coordinates(self, rank: int) -> tuple[int, int]:
        """Tensor rank and pipeline rank of a global rank: tensor-parallel neighbours are next to each other."""
        return rank % self.tensor, rank // self.tensor


def rank_slices(
    hf: Mapping[str, Tensor], shape: LlamaShape, padded_vocab_size: int, layout: Layout, rank: int
) -> list[dict[str, Tensor]]:
    """Name -> weight of each chunk of a rank, layers spread evenly; chunk c of stage s comes at place c * PP + s."""
    tensor_rank, stage = layout.coordinates(rank)
    num_chunks = layout.virtual or 1
    per_chunk = shape.num_layers // (layout.pipeline * num_chunks)
    places = [chunk * layout.pipeline + stage for chunk in range(num_chunks)]
    last = layout.pipeline * num_chunks - 1
    return [
        chunk_slices(
            hf,
            shape,
            padded_vocab_size,
            (layout.tensor, tensor_rank),
            range(place * per_chunk, (place + 1) * per_chunk),
            first=place == 0,
            last=place == last,
        )
        for place in places
    ]


def chunk_slices(
    hf: Mapping[str, Tensor],
    shape: LlamaShape,
    padded_vocab_size: int,
    tensor: tuple[int, int],
    layers: range,
    first: bool,
    last: bool,
) -> dict[str, Tensor]:
    """Name -> weight (local spec) of a chunk that holds `layers`, for (size, rank) of tensor parallelism.

    `first`: with the embedding; `last`: with the final norm and the head.
    """
    size, rank = tensor

    def part(matrix: Tensor, dim: int = 0) -> Tensor:
        assert matrix.shape[dim] % size == 0
        return matrix.chunk(size, dim)[rank]

    def table(name: str) -> Tensor:
        padded = torch.zeros(padded_vocab_size, shape.hidden_size, dtype=hf[name].dtype)
        padded[: len(hf[name])] = hf[name]
        return part(padded)

    found: dict[str, Tensor] = {}
    if first:
        found["embedding.word_embeddings.weight"] = table("model.embed_tokens.weight")
    for local, layer in enumerate(layers):
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{local}."
        query, key, value = (hf[f"{theirs}self_attn.{kind}_proj.weight"] for kind in "qkv")
        groups = [
            torch.cat(group)
            for group in zip(*(rows.chunk(shape.num_query_groups) for rows in (query, key, value)), strict=True)
        ]
        found |= {
            ours + "input_layernorm.weight": hf[theirs + "input_layernorm.weight"],
            ours + "self_attention.linear_qkv.weight": part(torch.cat(groups)),
            ours + "self_attention.linear_proj.weight": part(hf[theirs + "self_attn.o_proj.weight"], 1),
            ours + "pre_mlp_layernorm.weight": hf[theirs + "post_attention_layernorm.weight"],
            ours + "mlp.linear_fc1.weight": torch.cat(
                [part(hf[theirs + "mlp.gate_proj.weight"]), part(hf[theirs + "mlp.up_proj.weight"])]
            ),
            ours + "mlp.linear_fc2.weight": part(hf[theirs + "mlp.down_proj.weight"], 1),
        }
    if last:
        found["decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not shape.tied_embeddings:
            found["output_layer.weight"] = table("lm_head.weight")
        elif not first:  # a stage of its own keeps a second copy of the tied table
            found["output_layer.weight"] = table("model.embed_tokens.weight")
    return found
