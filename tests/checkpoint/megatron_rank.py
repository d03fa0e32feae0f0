"""One rank of megatron-core itself: its part of a GPTModel, loaded from what was converted, and its logits.

Only for processes in which `install_engine` was called. Nothing of this project's model is used: the GPTModel, its
configuration and the loading are those that a user of megatron-core writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cpt.config.schema import LlamaShape
from tests.checkpoint.megatron_slices import Layout

OWN_ATTENTION_TOKENS = 1024  # longer texts are attended without the matrix of scores, which would fill the memory


@contextmanager
def parallel(layout: Layout) -> Iterator[None]:
    """The process groups of a layout; torch.distributed is initialized with as many ranks."""
    parallel_state.initialize_model_parallel(
        layout.tensor, layout.pipeline, layout.virtual, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


@contextmanager
def pretended_rank(layout: Layout, rank: int) -> Iterator[None]:
    """This process as one rank of a layout whose others do not exist: nothing is ever sent, so it only loads."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    alone = partial(dist.checkpoint.load_state_dict, no_dist=True)  # each rank plans its own reads
    try:
        with parallel(layout), mock.patch.object(dist.checkpoint, "load_state_dict", alone):
            yield
    finally:
        dist.destroy_process_group()


class BlockwiseAttention(MegatronModule):
    """Causal attention without the matrix of scores, in the place of megatron-core's own, for long texts."""

    def __init__(self, config: Any, *_: Any, **__: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def config_of(shape: LlamaShape, layout: Layout, dtype: torch.dtype, **settings: Any) -> TransformerConfig:
    """What megatron-core needs to know of a Llama, without what needs a GPU."""
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **settings,
    )


def build(shape: LlamaShape, padded_vocab_size: int, layout: Layout, num_tokens: int = 0) -> list[GPTModel]:
    """The chunks of this rank; `num_tokens` long texts are to be read by them."""
    config = config_of(
        shape,
        layout,
        torch.float32,
        overlap_p2p_comm=layout.virtual is not None,
        batch_p2p_comm=layout.virtual is None,
        deallocate_pipeline_outputs=False,
    )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    if num_tokens > OWN_ATTENTION_TOKENS:
        layer.submodules.self_attention.submodules.core_attention = BlockwiseAttention
    scaling, stage = shape.rope_scaling, parallel_state.get_pipeline_model_parallel_rank()
    last = (layout.virtual or 1) - 1
    return [
        GPTModel(
            config=config,
            transformer_layer_spec=layer,
            vocab_size=padded_vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=stage == 0 and not chunk,
            post_process=stage == layout.pipeline - 1 and (chunk or 0) == last,
            parallel_output=False,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            rope_scaling=scaling is not None,
            rope_scaling_factor=scaling.factor if scaling else 8.0,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            vp_stage=chunk,
        ).eval()
        for chunk in (range(layout.virtual) if layout.virtual else (None,))
    ]


def load(chunks: Sequence[GPTModel], folder: Path, kind: str) -> None:
    """Load a converted folder, of the format `kind`, into this rank's chunks."""
    state = _torch_dist_state(chunks, folder) if kind == "torch_dist" else _mp_rank_state(folder)
    names = [f"model{index}" for index in range(len(chunks))] if len(chunks) > 1 else ["model"]
    for name, chunk in zip(names, chunks, strict=True):
        chunk.load_state_dict(state[name], strict=True)


def _torch_dist_state(chunks: Sequence[GPTModel], folder: Path) -> dict[str, Any]:
    names = [f"model{index}" for index in range(len(chunks))] if len(chunks) > 1 else ["model"]
    wanted = {name: chunk.sharded_state_dict() for name, chunk in zip(names, chunks, strict=True)}
    # That the ranks together read everything once is not asked: pretended ranks know nothing of each other.
    return dist_checkpointing.load(wanted, str(folder), validate_access_integrity=False)


def _mp_rank_state(folder: Path) -> dict[str, Any]:
    """The file of this rank, found and read the way that Megatron-LM does it."""
    iteration = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    name = "release" if iteration == "release" else f"iter_{int(iteration):07d}"
    tensor, pipeline = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    staged = parallel_state.get_pipeline_model_parallel_world_size() > 1
    rank = f"mp_rank_{tensor:02d}_{pipeline:03d}" if staged else f"mp_rank_{tensor:02d}"
    return torch.load(folder / name / rank / "model_optim_rng.pt", map_location="cpu", weights_only=False)


def weights(chunks: Sequence[GPTModel]) -> list[dict[str, Tensor]]:
    """Name -> weight of each chunk of this rank."""
    return [{name: weight.detach().clone() for name, weight in chunk.named_parameters()} for chunk in chunks]


def logits(chunks: Sequence[GPTModel], layout: Layout, tokens_BS: Tensor) -> Tensor | None:
    """Logits over the padded vocabulary, through all stages; on the ranks of the last one, None elsewhere."""
    length = tokens_BS.shape[1]
    own = length <= OWN_ATTENTION_TOKENS
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None] if own else None
    positions = torch.arange(length).expand_as(tokens_BS)

    def forward_step(_: Any, chunk: Any) -> tuple[Tensor, Any]:
        return chunk(tokens_BS, positions, mask), lambda logits_BSP, non_loss_data: logits_BSP.clone()

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[None for _ in chunks],
            model=list(chunks),
            num_microbatches=layout.pipeline if layout.virtual else 1,  # the interleaved schedule's least
            seq_length=length,
            micro_batch_size=len(tokens_BS),
            forward_only=True,
            collect_non_loss_data=True,
        )
    return found[0] if found else None
