"""AdamW, the learning-rate schedule, and megatron-core's optimizer around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_cpt.config.schema import OptimizerConfig


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay and one step counter per parameter group.

    The update is the one of Loshchilov and Hutter (arXiv 1711.05101), with bias correction:

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        p = p (1 - lr wd) - lr / (1 - b1^t) * m / (sqrt(v / (1 - b2^t)) + eps)

    Element by element the same numbers as torch.optim.AdamW. It exists because torch's keeps the
    step as a tensor of every parameter, which megatron-core's distributed optimizer does not restore
    (after loading all parameters share one tensor and the bias correction runs ahead). The layout here
    is that of the fused Adam of apex and transformer-engine, which the engine handles.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay is implemented")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the group's step counter grows by one."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params, [p.grad for p in params])

    def _update(self, group: dict[str, Any], params: list[Tensor], gradients: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]
        (beta1, beta2), lr, step = group["betas"], group["lr"], group["step"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(first, gradients, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, math.sqrt(1 - beta2**step))
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, first, denominator, -lr / (1 - beta1**step))


def learning_rate(config: OptimizerConfig, step: int, train_steps: int) -> float:
    """Learning rate of update `step` (0-based): linear warm-up, then cosine to the minimum.

    The first update already moves (1 / warmup_steps of the peak), the last one runs at
    `min_learning_rate` exactly.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    span = max(1, train_steps - 1 - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / span)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * cosine


def build_optimizer(config: OptimizerConfig, model: Sequence[torch.nn.Module], precision: str) -> Any:
    """Wrap the DDP model chunks in megatron-core's distributed optimizer (clipping, masters, sharding).

    There is no other: with one data-parallel rank it shards over one, and every checkpoint has one
    format that any layout reads.

    Embedding and head are a group of their own where their learning rate differs (`vocabulary_learning_rate_factor`);
    a tied table is one matrix and has that rate. Matrices decay, norms (one-dimensional parameters) do not. The
    decay is set here on the groups because the engine would apply it only through its own scheduler, which is not
    used.
    """
    import megatron.core.optimizer as engine
    import megatron.core.optimizer.distrib_optimizer as distributed_engine

    if engine.USING_PYTORCH_OPTIMIZER:  # neither transformer-engine nor apex is here
        engine.Adam, engine.USING_PYTORCH_OPTIMIZER = AdamW, False
        distributed_engine.Adam = AdamW
        distributed_engine.HAVE_APEX_OR_TE = distributed_engine.USING_APEX_OPTIMIZER = True
    settings = engine.OptimizerConfig(
        optimizer="adam",
        lr=config.learning_rate,
        min_lr=config.min_learning_rate,
        weight_decay=config.weight_decay,
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        adam_eps=config.adam_epsilon,
        clip_grad=config.clip_grad,
        bf16=precision == "bf16",
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        use_distributed_optimizer=True,
    )
    overrides = engine.get_standard_config_overrides(settings)
    if config.vocabulary_learning_rate_factor != 1.0:
        # `lr_mult`, for by it the engine finds the group again in a checkpoint; by its own `decoupled_lr` it does not
        overrides[engine.ParamKey(attr="is_embedding_or_output_parameter")] = {
            "lr_mult": config.vocabulary_learning_rate_factor
        }
    optimizer = engine.get_megatron_optimizer(settings, list(model), config_overrides=overrides)
    for group in optimizer.param_groups:
        group["weight_decay"] = config.weight_decay * group.get("wd_mult", 1.0)
    return optimizer


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Set the learning rate of every parameter group, those with a factor of their own by that factor."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_mult", 1.0)
