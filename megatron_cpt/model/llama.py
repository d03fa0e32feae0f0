"""Build the model chunks of this rank; the only place that does.

One path for every layout: the weights drawn here are never trained, they are replaced from a
checkpoint (`training/state.py`), so that every layout starts from the same numbers. They are drawn all
the same, because megatron-core marks tensor-parallel parameters only while it initialises them, and
counts the gradient norm wrongly without the marks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megatron_cpt.config.schema import KernelConfig, LlamaShape, LossConfig, ParallelConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.kernels import LinearCrossEntropy, linear_cross_entropy, rotary_table
from megatron_cpt.model.layers import (
    LlamaLayer,
    PackedAttention,
    PackedDocuments,
    RMSNorm,
    RotatedSelfAttention,
    SwiGLU,
)
from megatron_cpt.planning.layout import Layout
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.mesh import Mesh

LOGITS_DTYPES = {"model": None, "fp32": torch.float32, "fp16": torch.float16}


@dataclass
class LlamaEngineConfig(TransformerConfig):
    """megatron-core's configuration plus the choices its modules pass on to this project's ops."""

    attention_implementation: str = "auto"
    norm_implementation: str = "auto"
    rope_implementation: str = "auto"
    swiglu_implementation: str = "auto"
    cross_entropy_implementation: str = "auto"
    cross_entropy_budget_bytes: int = 1 << 30
    cross_entropy_logits_dtype: torch.dtype | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    vocab_size: int = 0
    parameter_device: Any = None


class LlamaModel(GPTModel):
    """GPTModel over packed documents, with the head and its loss as one op.

    Differences from the base class: rotary positions restart with each document; the loss is
    `kernels.linear_cross_entropy` over the true vocabulary, so that logits take bounded memory and
    padded rows take no part in the softmax, and the head's gradient goes straight into the fp32 buffer
    of megatron-core's data parallelism (`main_grad`), on a GPU unrounded. The last stage returns, with labels, the op's
    results with the summed loss, and without them, for proofs, fp32 logits over the true vocabulary at the
    wanted positions.
    """

    config: LlamaEngineConfig

    def _preprocess(
        self, input_ids: Tensor, position_ids: Tensor, decoder_input: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        packed: PackedDocuments = kwargs["packed_seq_params"]
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        table_2NR = torch.stack(rotary_table(self.rotary_pos_emb.inv_freq, packed.position_ids_N))
        return decoder_input, table_2NR, None, None, None, None

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor | None, packed_seq_params: PackedDocuments, **_: Any
    ) -> Tensor | LinearCrossEntropy:
        if not self.post_process:
            return hidden_states
        tied = self.share_embeddings_and_output_weights
        weight_LD = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        if labels is None:
            return self._logits(hidden_states, weight_LD, packed_seq_params.logit_positions)
        group, config = self.pg_collection.tp, self.config
        if not config.sequence_parallel:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states, group=group)
        return linear_cross_entropy(
            hidden_states.squeeze(1),
            weight_LD,
            labels.reshape(-1),
            vocab_start=group.rank() * weight_LD.shape[0],
            vocab_size=config.vocab_size,
            group=group,
            sequence_parallel=config.sequence_parallel,
            num_scored=packed_seq_params.num_scored,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            reduction="sum",
            main_grad=getattr(weight_LD, "main_grad", None),
            logits_dtype=config.cross_entropy_logits_dtype,
            budget_bytes=config.cross_entropy_budget_bytes,
            implementation=config.cross_entropy_implementation,
        )

    def _logits(self, hidden_states: Tensor, weight_LD: Tensor, positions: Tensor | None) -> Tensor:
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states, group=group)
        hidden_ND = hidden_states.squeeze(1) if positions is None else hidden_states.squeeze(1)[positions]
        logits_NL = hidden_ND @ weight_LD.t()
        logits_NP = tensor_parallel.gather_from_tensor_model_parallel_region(logits_NL, group=group)
        return logits_NP[:, : self.config.vocab_size].float()


def engine_config(
    shape: LlamaShape,
    vocab_size: int,
    layout: Layout,
    parallel: ParallelConfig,
    kernels: KernelConfig,
    precision: str,
    loss: LossConfig,
) -> LlamaEngineConfig:
    """Translate shape and layout into megatron-core's configuration.

    Args:
        shape: the architecture.
        vocab_size: true vocabulary size.
        layout: from `planning.layout.check_layout`.
        parallel: the section the layout was made from.
        kernels: which implementation each op uses.
        precision: "fp32" or "bf16" (with fp32 masters in the optimizer).
        loss: what is added to the cross-entropy.

    Settings that are fixed here close a trap each: outputs are never freed early (a race with the
    overlapped send, fixed upstream only later), no fusion that needs apex or TE, the loss is summed
    and divided by the tokens of the whole batch, so that every layout computes the same gradient.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    recompute_full = parallel.recompute == "full"
    return LlamaEngineConfig(
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
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=layout.pipeline_layout,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=False,
        overlap_p2p_comm=parallel.overlap_p2p,
        batch_p2p_comm=not parallel.overlap_p2p,
        recompute_granularity=None if parallel.recompute == "none" else parallel.recompute,
        recompute_method="uniform" if recompute_full else None,
        recompute_num_layers=1 if recompute_full else None,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        use_te_activation_func=True,  # the place for a module of ours; transformer-engine takes no part
        attention_implementation=kernels.attention,
        norm_implementation=kernels.norm,
        rope_implementation=kernels.rope,
        swiglu_implementation=kernels.swiglu,
        cross_entropy_implementation=kernels.cross_entropy,
        cross_entropy_budget_bytes=kernels.cross_entropy_budget_mib << 20,
        cross_entropy_logits_dtype=LOGITS_DTYPES[kernels.cross_entropy_logits],
        label_smoothing=loss.label_smoothing,
        z_loss=loss.z_loss,
        vocab_size=vocab_size,
        parameter_device=current_device().torch_device(),
    )


def build_model(config: LlamaEngineConfig, shape: LlamaShape, padded_vocab_size: int, mesh: Mesh) -> list[LlamaModel]:
    """Build this rank's model chunks (one, or VPP of them) with weights still to be loaded.

    Raises:
        ConfigError: the rotary scaling is not the one megatron-core can represent.
    """
    scaling = shape.rope_scaling
    if scaling is not None:
        constants = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings)
        if constants != (1.0, 4.0, 8192):
            raise ConfigError(
                f"rope scaling with (low, high, original length) = {constants}, but megatron-core knows only "
                "(1, 4, 8192), Llama 3.1's; train another model or change the checkpoint's rope_scaling"
            )
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.module = LlamaLayer
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    layer.submodules.self_attention.module = RotatedSelfAttention
    layer.submodules.self_attention.submodules.core_attention = PackedAttention
    layer.submodules.mlp.submodules.activation_func = SwiGLU
    stages = range(mesh.virtual_size) if mesh.virtual_size else (None,)
    last = (mesh.virtual_size or 1) - 1
    return [
        LlamaModel(
            config,
            TransformerBlockSubmodules(
                layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=stage), layer_norm=RMSNorm
            ),
            vocab_size=padded_vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=mesh.pipeline_rank == 0 and not stage,
            post_process=mesh.pipeline_rank == mesh.pipeline_size - 1 and (stage or 0) == last,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            rope_scaling=scaling is not None,
            rope_scaling_factor=scaling.factor if scaling else 8.0,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            vp_stage=stage,
        )
        for stage in stages
    ]
