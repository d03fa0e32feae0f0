"""A plain Llama forward pass straight from a checkpoint, one layer in memory at a time.

It is the yardstick: used to verify conversions, to score text and to calibrate, never to train. Its backward
pass gives the gradient of the embedded tokens alone, layer by layer as well.
Shape letters: B rows, S positions, N = B*S tokens, D hidden, H heads, G key-value heads, K head size,
F feed-forward, V true vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpt.checkpoint.llama import EMBEDDING, FINAL_NORM, HEAD
from megatron_cpt.checkpoint.opening import open_checkpoint
from megatron_cpt.checkpoint.reader import ModelReader, read_blocks
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import DataError

LOGITS_BLOCK_ELEMENTS = 1 << 25  # largest block of logits that token_nats holds at once


@dataclass(frozen=True)
class Layout:
    """Documents among N tokens: the rotary angles of each, and (length, starts) of those of one length."""

    cos_NK: Tensor
    sin_NK: Tensor
    groups: tuple[tuple[int, Tensor], ...]


class LlamaForward:
    """Hidden states, logits and losses of a Llama on disk.

    Args:
        source: an open checkpoint, or the folder of one (Hugging Face or torch_dist).
        dtype: dtype of the weights and activations; norms, softmax and losses are at least float32.
        cache: keep the weights after the first pass instead of reading them again in the next.
        device: where to compute; None: in host memory.

    Attributes:
        shape: the architecture.
        vocab_size: true size V.
        device: where it computes.
    """

    def __init__(
        self,
        source: ModelReader | str | Path,
        dtype: torch.dtype = torch.float32,
        *,
        cache: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.reader: ModelReader = open_checkpoint(source) if isinstance(source, str | Path) else source
        self.shape: LlamaShape = self.reader.llama
        self.vocab_size = self.reader.vocab_size
        self._dtype, self._wide, self.device = (
            dtype,
            torch.promote_types(dtype, torch.float32),
            device or torch.empty(0).device,
        )
        self._cache: dict[str, list[Tensor]] | None = {} if cache else None

    @torch.no_grad()
    def hidden(self, tokens_BS: Tensor, cu_seqlens: Tensor | Sequence[int] | None = None) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens_BS: token ids in [0, V).
            cu_seqlens: where documents begin in the flattened tokens, 0 first and N last; a document
                sees only itself and its positions count from 0. None: every row is one document.

        Returns:
            hidden_BSD in `dtype`.
        """
        batch, length = tokens_BS.shape
        hidden_ND = self.embed(tokens_BS.reshape(-1))
        return self.body(hidden_ND, self.layout(batch, length, cu_seqlens)).view(batch, length, -1)

    def layout(
        self,
        batch: int,
        length: int,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        position_N: Tensor | None = None,
    ) -> Layout:
        """Where documents lie among B rows of S tokens, for `body` and `body_gradient`.

        Args:
            batch: B.
            length: S.
            cu_seqlens: see `hidden`.
            position_N: of every token, rising in each document; gaps put tokens far from each other without the
                tokens between. None: they count from 0.
        """
        borders = self._borders(batch, length, cu_seqlens)
        starts, lengths = borders[:-1], borders[1:] - borders[:-1]
        if position_N is None:
            position_N = torch.arange(batch * length) - torch.repeat_interleave(starts, lengths)
        groups = tuple((int(size), starts[lengths == size]) for size in lengths.unique())
        return Layout(*self._rotary(position_N.to(self.device)), groups)

    @torch.no_grad()
    def body(self, embedded_ND: Tensor, layout: Layout, tape: list[Tensor] | None = None) -> Tensor:
        """Hidden states after the final norm, from rows of the embedding.

        Args:
            embedded_ND: what the first layer gets.
            layout: of the documents.
            tape: takes the input of each layer and of the final norm, for `body_gradient`.
        """
        hidden_ND = embedded_ND
        for layer in range(self.shape.num_layers):
            if tape is not None:
                tape.append(hidden_ND)
            hidden_ND = self._layer(layer, hidden_ND, layout)
        if tape is not None:
            tape.append(hidden_ND)
        return self._norm(hidden_ND, FINAL_NORM)

    def body_gradient(self, tape: list[Tensor], layout: Layout, grad_ND: Tensor) -> Tensor:
        """Gradient of `embedded_ND` from that of the hidden states; the weights are constants.

        Each layer is computed again from its input on the tape, which is used up, so one layer's weights and
        activations are in memory at a time.
        """
        for layer in range(self.shape.num_layers, -1, -1):
            input_ND = tape.pop().requires_grad_(True)
            with torch.enable_grad():
                is_norm = layer == self.shape.num_layers
                output_ND = self._norm(input_ND, FINAL_NORM) if is_norm else self._layer(layer, input_ND, layout)
            (grad_ND,) = torch.autograd.grad(output_ND, input_ND, grad_ND)
        return grad_ND

    def _layer(self, layer: int, hidden_ND: Tensor, layout: Layout) -> Tensor:
        prefix = f"model.layers.{layer}."
        normed_ND = self._norm(hidden_ND, prefix + "input_layernorm.weight")
        hidden_ND = hidden_ND + self._attention(normed_ND, prefix + "self_attn.", layout)
        normed_ND = self._norm(hidden_ND, prefix + "post_attention_layernorm.weight")
        gate_NF = F.silu(F.linear(normed_ND, self._weight(prefix + "mlp.gate_proj.weight")))
        up_NF = F.linear(normed_ND, self._weight(prefix + "mlp.up_proj.weight"))
        return hidden_ND + F.linear(gate_NF * up_NF, self._weight(prefix + "mlp.down_proj.weight"))

    @torch.no_grad()
    def logits(
        self,
        tokens_BS: Tensor,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        positions: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Logits over the true vocabulary (see `hidden`), logits_BSV in `dtype`; at `positions` of S alone if given."""
        hidden_BSD = self.hidden(tokens_BS, cu_seqlens)
        if positions is not None:
            hidden_BSD = hidden_BSD[:, positions]
        return torch.cat([F.linear(hidden_BSD, block_VD) for _, block_VD in self.head_blocks()], dim=-1)

    @torch.no_grad()
    def token_nats(
        self,
        tokens_BS: Tensor,
        labels_BS: Tensor,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """Negative log-likelihood of every label under the true vocabulary, in nats.

        The logits are never held at once.

        Args:
            tokens_BS: token ids in [0, V).
            labels_BS: the id that follows each token, or `ignore_index`.
            cu_seqlens: borders of documents, see `hidden`.
            ignore_index: label whose loss is 0.

        Returns:
            nats_BS, float32 (float64 when computing in float64).
        """
        hidden_ND = self.hidden(tokens_BS, cu_seqlens).flatten(0, 1)
        label_N = labels_BS.reshape(-1).to(self.device)
        counted_N = label_N != ignore_index
        self._check_ids(label_N[counted_N])
        sum_N = torch.full(label_N.shape, -math.inf, dtype=self._wide, device=self.device)  # log of the sum of exp
        target_N = torch.zeros(label_N.shape, dtype=self._wide, device=self.device)
        for first, block_VD in self.head_blocks():
            step = max(1, LOGITS_BLOCK_ELEMENTS // block_VD.shape[0])
            for part in (slice(at, at + step) for at in range(0, len(label_N), step)):
                logits_NV = F.linear(hidden_ND[part], block_VD).to(self._wide)
                sum_N[part] = torch.logaddexp(sum_N[part], logits_NV.logsumexp(dim=-1))
                inside_N = (label_N[part] >= first) & (label_N[part] < first + block_VD.shape[0])
                local_N = torch.where(inside_N, label_N[part] - first, 0)
                chosen_N = logits_NV.gather(-1, local_N[:, None])[:, 0]
                target_N[part] = torch.where(inside_N, chosen_N, target_N[part])
        return torch.where(counted_N, sum_N - target_N, 0).view(labels_BS.shape)

    def _borders(self, batch: int, length: int, cu_seqlens: Tensor | Sequence[int] | None) -> Tensor:
        if cu_seqlens is None:
            return torch.arange(batch + 1) * length
        borders = torch.as_tensor(cu_seqlens).long().cpu()
        if borders[0] != 0 or borders[-1] != batch * length or (borders.diff() < 0).any():
            raise DataError(
                f"got cu_seqlens from {int(borders[0])} to {int(borders[-1])} for {batch * length} tokens, expected "
                "rising borders from 0 to the number of tokens"
            )
        return borders.unique()  # an empty document is none

    def _check_ids(self, ids: Tensor) -> None:
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size):
            raise DataError(
                f"got token ids from {int(ids.min())} to {int(ids.max())} for a vocabulary of {self.vocab_size}; "
                "the text was made with another tokenizer"
            )

    @torch.no_grad()
    def embed(self, token_N: Tensor) -> Tensor:
        """Rows of the embedding, one for each of N tokens."""
        token_N = token_N.to(self.device)
        self._check_ids(token_N)
        hidden_ND = torch.empty(len(token_N), self.shape.hidden_size, dtype=self._dtype, device=self.device)
        first = 0
        for block_VD in self._blocks(EMBEDDING):
            inside_N = (token_N >= first) & (token_N < first + block_VD.shape[0])
            hidden_ND[inside_N] = block_VD[token_N[inside_N] - first]
            first += block_VD.shape[0]
        return hidden_ND

    def _attention(self, normed_ND: Tensor, prefix: str, layout: Layout) -> Tensor:
        """Causal attention inside each document; documents of one length are computed together."""
        per_head = (len(normed_ND), -1, self.shape.head_dim)
        query_NHK, key_NGK, value_NGK = (
            F.linear(normed_ND, self._weight(f"{prefix}{kind}_proj.weight")).view(per_head) for kind in "qkv"
        )
        query_NHK, key_NGK = (_rotate(heads, layout.cos_NK, layout.sin_NK) for heads in (query_NHK, key_NGK))
        repeats = self.shape.num_attention_heads // self.shape.num_query_groups
        key_NHK, value_NHK = (heads.repeat_interleave(repeats, dim=1) for heads in (key_NGK, value_NGK))
        out_NHK = torch.empty_like(query_NHK)
        for size, starts in layout.groups:
            index = (starts[:, None] + torch.arange(size)).to(self.device)
            query, key, value = (heads[index].transpose(1, 2) for heads in (query_NHK, key_NHK, value_NHK))
            out_NHK[index] = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        return F.linear(out_NHK.flatten(1), self._weight(prefix + "o_proj.weight"))

    def _norm(self, hidden_ND: Tensor, name: str) -> Tensor:
        wide_ND = hidden_ND.to(self._wide)
        scaled_ND = wide_ND * torch.rsqrt(wide_ND.square().mean(dim=-1, keepdim=True) + self.shape.norm_epsilon)
        return self._weight(name) * scaled_ND.to(self._dtype)

    def _rotary(self, position_N: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle; angles are float32 in every implementation of Llama."""
        size = self.shape.head_dim
        exponent = torch.arange(0, size, 2, device=self.device).float() / size
        frequency = 1.0 / (self.shape.rope_theta**exponent)
        if self.shape.rope_scaling is not None:
            scaling = self.shape.rope_scaling
            # Turns in the original context: above `high` untouched, below `low` stretched, a ramp between.
            turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            ramp = ((turns - low) / (high - low)).clamp(0, 1)
            frequency = ramp * frequency + (1 - ramp) * frequency / scaling.factor
        angle_NK = torch.outer(position_N.float(), frequency).repeat(1, 2)
        return angle_NK.cos().to(self._dtype), angle_NK.sin().to(self._dtype)

    def head_blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The head in row order, as (number of the first row, rows) in the dtype of the computation."""
        first = 0
        for block_VD in self._blocks(self._head()):
            yield first, block_VD
            first += block_VD.shape[0]

    def _head(self) -> str:
        return EMBEDDING if self.shape.tied_embeddings else HEAD

    def _weight(self, name: str) -> Tensor:
        (block,) = self._blocks(name)
        return block

    def _blocks(self, name: str) -> Iterator[Tensor]:
        """A weight in row blocks (only the vocabulary tables have several)."""
        if self._cache is not None and name in self._cache:
            yield from self._cache[name]
            return
        kept = []
        for block in read_blocks(self.reader, name) if name in (EMBEDDING, HEAD) else [self.reader.read(name)]:
            block = block.to(device=self.device, dtype=self._dtype)
            if self._cache is not None:
                kept.append(block)
            yield block
        if self._cache is not None:
            self._cache[name] = kept


def _rotate(heads_NHK: Tensor, cos_NK: Tensor, sin_NK: Tensor) -> Tensor:
    first, second = heads_NHK.chunk(2, dim=-1)
    turned_NHK = torch.cat((-second, first), dim=-1)
    return heads_NHK * cos_NK[:, None] + turned_NHK * sin_NK[:, None]
