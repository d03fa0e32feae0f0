"""What replaces megatron-core's own modules: layer, norm, rotation, attention over packed documents, activation.

Shape letters: N tokens of a micro-batch, D hidden, H heads, G KV groups, K head size, R = K / 2, F FFN size; on a
TP rank H, G and F are the local ones.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_cpt.kernels import add_rms_norm, attention, packed_swiglu, rms_norm, rope


@dataclass(frozen=True)
class PackedDocuments:
    """Where the documents of a packed row begin and end.

    It travels through megatron-core in place of its `PackedSeqParams`. `qkv_format` is deliberately
    not "thd": the engine then leaves the tensors alone and hands this object to the core attention.

    Attributes:
        cu_seqlens: (documents + 1,) int32 on the host; first 0, last N.
        position_ids_N: int64 on the device, counted from the start of each document.
        logit_positions: where logits are wanted when there are no labels; None: everywhere.
        num_scored: number of labels that are scored; None where it is not known, and then the head computes ignored
            tokens too.
    """

    cu_seqlens: Tensor
    position_ids_N: Tensor
    logit_positions: Tensor | None = None
    num_scored: int | None = None
    qkv_format: str = "packed"


class RMSNorm(torch.nn.Module):
    """Llama's RMSNorm, aware of sequence parallelism.

    With sequence parallelism each TP rank sees a part of the tokens, so the weight's gradient has to
    be summed over the TP group: megatron-core does it for parameters marked `sequence_parallel`.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.epsilon = eps
        self.implementation = config.norm_implementation
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=config.parameter_device)
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Normalise (..., D), statistics in fp32; with a residual their sum, which is returned too."""
        if residual is None:
            return rms_norm(hidden, self.weight, self.epsilon, implementation=self.implementation)
        return add_rms_norm(hidden, residual, self.weight, self.epsilon, implementation=self.implementation)


class LlamaLayer(TransformerLayer):
    """megatron-core's layer, in which the residual sum after attention and the norm behind it are one op.

    The engine asks for the sum first and for the norm later; it gets of the second what the first has made. The
    sum is made under the grad mode of the pass: the engine's `enable_grad` would have a pass that is to be
    recomputed keep what it computes.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.bias_dropout_add_exec_handler = nullcontext
        self.self_attn_bda = self._choose_sum
        self._made: tuple[Tensor, Tensor] | None = None  # the normalised sum, and the sum

    def _choose_sum(self, training: bool, fused: bool) -> Callable[..., Tensor]:
        """The engine's way to its sum; Llama has neither bias nor dropout."""
        return self._add_and_normalise

    def _add_and_normalise(
        self, output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
    ) -> Tensor:
        self._made = self.pre_mlp_layernorm(output_with_bias[0], residual)
        return self._made[1]

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        assert self._made is not None and hidden_states is self._made[1]
        normalized, self._made = self._made[0], None
        return normalized


class RotatedSelfAttention(SelfAttention):
    """megatron-core's self-attention, with query and key rotated as they leave the projection.

    The engine would make cosines and sines anew for query and key of every layer, and copy the query out of the
    projection before it rotates it. Here the table comes with the hidden states, [2, N, R] in fp32, in the place of
    the engine's angles, and one op does both.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.implementation = self.config.rope_implementation
        self._table_2NR: Tensor | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, rotary_pos_emb: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; hidden (N or a TP rank's part of it, 1, D) -> the same shape."""
        self._table_2NR = rotary_pos_emb
        result: tuple[Tensor, Tensor | None] = super().forward(hidden_states, attention_mask, **options)
        self._table_2NR = None
        return result

    def get_query_key_value_tensors(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Project and rotate: query (N, 1, H, K), key and value (N, 1, G, K)."""
        assert self._table_2NR is not None
        if self.config.num_query_groups < self.world_size:
            # Ranks share a group: the engine gathers it and takes this rank's heads.
            query, key, value = (heads.squeeze(1) for heads in super().get_query_key_value_tensors(hidden_states))
        else:
            packed, _bias = self.linear_qkv(hidden_states)
            groups_NGMK = packed.view(
                packed.shape[0], self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head
            )
            query, key, value = groups_NGMK.split([groups_NGMK.shape[2] - 2, 1, 1], dim=2)
            key, value = key.squeeze(2), value.squeeze(2)
        cos_NR, sin_NR = self._table_2NR
        query, key = rope(query, key, cos_NR, sin_NR, implementation=self.implementation)
        return query.flatten(1, -2).unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)


class SwiGLU(MegatronModule):
    """The MLP's activation; stands where megatron-core has a module of transformer-engine."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.implementation = config.swiglu_implementation

    def forward(self, gate_up: Tensor) -> Tensor:
        """Gate and up projection side by side (N, 1, 2 F) -> (N, 1, F)."""
        return packed_swiglu(gate_up, implementation=self.implementation)


class PackedAttention(MegatronModule):
    """Causal attention inside each document of a packed row; KV groups are not expanded."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, *_: Any, **options: Any
    ) -> None:
        super().__init__(config=config)
        self.scale = options.get("softmax_scale") or config.kv_channels**-0.5
        self.implementation = config.attention_implementation

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedDocuments,
        **_: Any,
    ) -> Tensor:
        """Attend; query (N, 1, H, K), key and value (N, 1, G, K) -> (N, 1, H * K)."""
        out_NHK = attention(
            query.squeeze(1),
            key.squeeze(1),
            value.squeeze(1),
            packed_seq_params.cu_seqlens,
            scale=self.scale,
            implementation=self.implementation,
        )
        return out_NHK.reshape(out_NHK.shape[0], 1, -1)
