"""The modules that replace megatron-core's own: norm and core attention over packed documents.

Shape letters: N tokens of a micro-batch, D hidden, H heads, G KV groups, K head size; on a TP rank
H and G are the local ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_cpt.kernels import attention, rms_norm


@dataclass(frozen=True)
class PackedDocuments:
    """Where the documents of a packed row begin and end.

    It travels through megatron-core in place of its `PackedSeqParams`. `qkv_format` is deliberately
    not "thd": the engine then leaves the tensors alone, applies the rotary table per token as it is
    given (positions restart in it) and hands this object to the core attention.

    Attributes:
        cu_seqlens: (documents + 1,) int32 on the host; first 0, last N.
        position_ids_N: int64 on the device, counted from the start of each document.
        max_seqlen: longest document, tokens.
        logit_positions: where logits are wanted when there are no labels; None: everywhere.
    """

    cu_seqlens: Tensor
    position_ids_N: Tensor
    max_seqlen: int
    logit_positions: Tensor | None = None
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

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise (..., D); statistics in fp32."""
        return rms_norm(hidden, self.weight, self.epsilon, implementation=self.implementation)


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
            max_seqlen=packed_seq_params.max_seqlen,
            scale=self.scale,
            implementation=self.implementation,
        )
        return out_NHK.reshape(out_NHK.shape[0], 1, -1)
