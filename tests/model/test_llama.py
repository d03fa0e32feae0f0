"""The model is built as the engine has to see it: settings that close a trap, marks on the weights, own modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_cpt.config.schema import BatchConfig, KernelConfig, LlamaShape, LossConfig, ParallelConfig, RopeScaling
from megatron_cpt.errors import ConfigError, KernelUnsupported
from megatron_cpt.planning.layout import check_layout
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.engine import install_engine
from megatron_cpt.runtime.mesh import Mesh, start_mesh

SHAPE = LlamaShape(
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=12,
    max_position_embeddings=64,
)
VOCAB_SIZE, PADDED = 250, 256
KERNELS, LOSS = KernelConfig(), LossConfig()
# The engine's own words about its own defaults.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*custom_layers.transformer_engine:DeprecationWarning",
        "full scope is deprecated:UserWarning",
        "MLP requires ffn_hidden_size:DeprecationWarning",
        ".*tp_group is None:DeprecationWarning",
    )
]


def settings(
    parallel: dict[str, Any], precision: str = "fp32", kernels: KernelConfig = KERNELS, loss: LossConfig = LOSS
) -> Any:
    """The engine's configuration for a layout."""
    install_engine(current_device().type)
    from megatron_cpt.model.llama import engine_config

    layout = ParallelConfig.model_validate(parallel)
    world_size = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    batch = BatchConfig(seq_length=32, micro_batch_size=1, global_batch_size=8)
    checked = check_layout(SHAPE, VOCAB_SIZE, 128, layout, batch, world_size)
    return engine_config(SHAPE, VOCAB_SIZE, checked, layout, kernels, precision, loss)


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute": "full"},
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p": True},
        {"pipeline_model_parallel_size": 4, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_settings_that_close_a_trap(parallel: dict[str, Any], precision: str) -> None:
    config = settings(parallel, precision)
    assert config.deallocate_pipeline_outputs is False
    assert config.gradient_accumulation_fusion is False
    assert config.calculate_per_token_loss is True
    assert not (config.masked_softmax_fusion or config.bias_dropout_fusion or config.apply_rope_fusion)
    assert config.hidden_dropout == config.attention_dropout == 0.0
    assert not config.add_bias_linear and not config.add_qkv_bias
    assert config.overlap_p2p_comm is parallel.get("overlap_p2p", False)
    assert config.batch_p2p_comm is not config.overlap_p2p_comm
    assert config.recompute_granularity == (None if parallel.get("recompute", "none") == "none" else "full")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """This process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "29500")
        with start_mesh() as mesh:
            from megatron_cpt.runtime.engine import seed_everything

            seed_everything(1)
            yield mesh


def build(mesh: Mesh, shape: LlamaShape = SHAPE, kernels: KernelConfig = KERNELS, loss: LossConfig = LOSS) -> Any:
    from megatron_cpt.model.llama import build_model

    (model,) = build_model(settings({}, kernels=kernels, loss=loss), shape, PADDED, mesh)
    return model


def test_tensor_parallel_marks(mesh: Mesh) -> None:
    """Without them the gradient norm counts shards twice or not at all; the engine sets them while it draws weights."""
    marks = {
        name: (getattr(p, "tensor_model_parallel", False), getattr(p, "partition_dim", -1))
        for name, p in build(mesh).named_parameters()
    }
    columns, rows, whole = (True, 0), (True, 1), (False, -1)
    layer = {
        "self_attention.linear_qkv.weight": columns,
        "self_attention.linear_proj.weight": rows,
        "mlp.linear_fc1.weight": columns,
        "mlp.linear_fc2.weight": rows,
        "input_layernorm.weight": whole,
        "pre_mlp_layernorm.weight": whole,
    }
    wanted = {f"decoder.layers.{number}.{name}": mark for number in range(4) for name, mark in layer.items()}
    wanted |= {"embedding.word_embeddings.weight": columns, "output_layer.weight": columns}
    assert marks == {**wanted, "decoder.final_layernorm.weight": whole}


def test_sizes(mesh: Mesh) -> None:
    sizes = {name: tuple(p.shape) for name, p in build(mesh).named_parameters()}
    assert sizes["embedding.word_embeddings.weight"] == sizes["output_layer.weight"] == (PADDED, 32)
    assert sizes["decoder.layers.3.self_attention.linear_qkv.weight"] == ((4 + 2 + 2) * 12, 32)
    assert sizes["decoder.layers.3.mlp.linear_fc1.weight"] == (2 * 48, 32)
    tied = build(mesh, SHAPE.model_copy(update={"tied_embeddings": True}))
    assert "output_layer.weight" not in dict(tied.named_parameters())


def test_own_modules_are_in_place(mesh: Mesh) -> None:
    from megatron_cpt.model.layers import LlamaLayer, PackedAttention, RMSNorm, RotatedSelfAttention, SwiGLU

    model = build(mesh)
    norms = {name.removesuffix(".weight") for name, _ in model.named_parameters() if "norm" in name}
    own = {name for name, module in model.named_modules() if isinstance(module, RMSNorm)}
    assert own == norms and len(own) == 2 * 4 + 1
    for kind in (LlamaLayer, PackedAttention, RotatedSelfAttention, SwiGLU):
        assert sum(isinstance(module, kind) for module in model.modules()) == 4
    assert not any("DotProductAttention" in type(module).__name__ for module in model.modules())
    assert all(norm.epsilon == SHAPE.norm_epsilon for norm in model.modules() if isinstance(norm, RMSNorm))


def test_norms_know_sequence_parallelism() -> None:
    from megatron_cpt.model.layers import RMSNorm

    for on in (False, True):
        config = settings({"tensor_model_parallel_size": 2, "sequence_parallel": on})
        assert RMSNorm(config, 32).weight.sequence_parallel is on


def test_rotary_scaling_that_the_engine_cannot_represent(mesh: Mesh) -> None:
    scaling = RopeScaling(factor=8.0, original_max_position_embeddings=4096)
    with pytest.raises(ConfigError, match=r"\(1.0, 4.0, 4096\).*megatron-core knows only \(1, 4, 8192\)"):
        build(mesh, SHAPE.model_copy(update={"rope_scaling": scaling}))


def test_chosen_implementations_reach_the_ops(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no op has is refused where the op is called: nothing falls back."""
    import torch

    from megatron_cpt.model.layers import PackedDocuments

    tokens = torch.arange(8)[None]
    documents = PackedDocuments(torch.tensor([0, 8], dtype=torch.int32), torch.arange(8))
    arguments = {"input_ids": tokens, "position_ids": tokens, "attention_mask": None, "packed_seq_params": documents}
    for name in ("attention", "norm", "cross_entropy", "rope", "swiglu"):
        kernels = KernelConfig.model_construct(**{**KernelConfig().model_dump(), name: "nowhere"})
        with pytest.raises(KernelUnsupported, match="nowhere"):
            build(mesh, kernels=kernels)(**arguments, labels=tokens)
    assert build(mesh)(**arguments, labels=tokens).nats_N.shape == (8,)
    assert build(mesh)(**arguments).shape == (8, VOCAB_SIZE)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
def test_interpreted_kernels_give_the_numbers_of_torch(mesh: Mesh) -> None:
    import torch

    from megatron_cpt.model.layers import PackedDocuments

    pytest.importorskip("triton", reason="triton is not installed")
    tokens = torch.arange(8)[None]
    documents = PackedDocuments(torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([*range(3), *range(5)]))
    results = []
    for implementation in ("torch", "triton"):
        names = ("norm", "rope", "swiglu", "cross_entropy")
        kernels = KernelConfig.model_validate(dict.fromkeys(names, implementation))
        torch.manual_seed(1)
        model = build(mesh, kernels=kernels)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        result = model(tokens, tokens, None, labels=tokens, packed_seq_params=documents)
        (result.loss**2).backward()
        results.append([result.nats_N, *(parameter.grad for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * one.abs().max().item())


def test_what_is_added_to_the_loss_is_trained_and_not_logged(mesh: Mesh) -> None:
    import torch

    from megatron_cpt.model.layers import PackedDocuments

    tokens, labels = torch.arange(8)[None], torch.tensor([[3, 5, -100, 9, 9, -100, 249, 0]])
    documents = PackedDocuments(torch.tensor([0, 8], dtype=torch.int32), torch.arange(8), num_scored=6)
    results, grads = [], []
    for loss in (LossConfig(), LossConfig(label_smoothing=0.1, z_loss=0.01)):
        torch.manual_seed(1)
        model = build(mesh, loss=loss)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        result = model(tokens, tokens, None, labels=labels, packed_seq_params=documents)
        result.loss.backward()
        results.append(result)
        grads.append(model.output_layer.weight.grad)
    plain, other = results
    assert torch.equal(plain.nats_N, other.nats_N) and torch.equal(plain.loss, plain.nats_N.sum())
    logits = build_logits(model, tokens, documents)
    scored = labels[0] != -100
    log_probabilities = logits.log_softmax(-1)[scored]
    expected = 0.9 * plain.nats_N.sum() - 0.1 * log_probabilities.mean(-1).sum()
    torch.testing.assert_close(other.loss, expected + 0.01 * logits.logsumexp(-1)[scored].square().sum())
    assert not torch.allclose(*grads)


@pytest.mark.parametrize("tied", [False, True])
def test_the_heads_gradient_goes_straight_to_main_grad(tied: bool, mesh: Mesh) -> None:
    """Of two micro-batches, as megatron-core's data parallelism wants it; a tied table gets the embedding's as well."""
    import torch
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron_cpt.model.layers import PackedDocuments

    documents = PackedDocuments(torch.tensor([0, 8], dtype=torch.int32), torch.arange(8))
    shape = SHAPE.model_copy(update={"tied_embeddings": tied})

    def step(model: Any) -> None:
        for shift in range(2):
            tokens = torch.arange(8)[None] + shift
            model(tokens, tokens, None, labels=tokens + 1, packed_seq_params=documents).loss.backward()

    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(build(mesh, shape))
        for parameter in models[-1].parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    plain, model = models
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    step(plain)
    step(DistributedDataParallel(model.config, ddp, model))
    head = "embedding.word_embeddings.weight" if tied else "output_layer.weight"
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is None and parameter.grad_added_to_main_grad == (name == head)
        torch.testing.assert_close(parameter.main_grad, other.grad, rtol=1e-5, atol=1e-6)


def build_logits(model: Any, tokens: Any, documents: Any) -> Any:
    """Logits at all positions, without labels."""
    return model(tokens, tokens, None, packed_seq_params=documents).detach()
