"""The job of test_megatron.py: FOLDER. Runs megatron-core itself on the checkpoints of FOLDER/cases.json.

For each case it loads `torch_dist`, notes the logits, changes the weights, saves them with megatron-core
in the layouts that the case names, and notes the new logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_cpt.runtime.engine import install_engine


def build(shape: dict[str, Any], padded_vocab_size: int) -> Any:
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=shape["num_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["ffn_hidden_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_query_groups"],
        kv_channels=shape["head_dim"],
        layernorm_epsilon=shape["norm_epsilon"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )
    scaling = shape["rope_scaling"]
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=padded_vocab_size,
        max_sequence_length=shape["max_position_embeddings"],
        position_embedding_type="rope",
        rotary_base=shape["rope_theta"],
        rope_scaling=scaling is not None,
        rope_scaling_factor=scaling["factor"] if scaling else 8.0,
        share_embeddings_and_output_weights=shape["tied_embeddings"],
    ).eval()


def run_case(folder: Path, case: dict[str, Any]) -> None:
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from megatron_cpt.checkpoint import write_checkpoint_manifest
    from megatron_cpt.config.schema import LlamaShape

    model = build(case["shape"], case["padded_vocab_size"])
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(folder / "torch_dist"))
    model.load_state_dict(loaded["model"], strict=True)
    tokens = torch.load(folder / "tokens.pt")
    length = tokens.shape[1]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    position = torch.arange(length).expand_as(tokens)
    with torch.no_grad():
        torch.save(model(tokens, position, mask), folder / "loaded_logits.pt")
        for name, weight in sorted(model.named_parameters()):
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
        torch.save(model(tokens, position, mask), folder / "saved_logits.pt")
    layouts: dict[str, dict[str, bool] | None] = {
        "stacked": None,
        "single_layers": {"non_homogeneous_layers": True},
        "gate_apart": {"singleton_local_shards": True},
    }
    moment = ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.decoder.final_layernorm.weight", torch.ones(4))
    for layout in case["layouts"]:
        saved = folder / layout
        saved.mkdir()
        state = {
            "model": model.sharded_state_dict(metadata=layouts[layout]),
            "optimizer": {"moment": moment},
            "rng": ShardedObject("rng_state", {"seed": 1}, (1,), (0,)),
            "step": 7,
        }
        dist_checkpointing.save(state, str(saved))
        write_checkpoint_manifest(
            saved, LlamaShape(**case["shape"]), case["vocab_size"], case["padded_vocab_size"], None, {}, step=7
        )


def main(folder: Path) -> None:
    install_engine("cpu")

    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        run_case(folder / name, case)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
