"""Which implementation of each op a training job takes: settled before its first step, and before anything is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_cpt.config.schema import KernelConfig
from megatron_cpt.errors import KernelUnsupported

if TYPE_CHECKING:
    from megatron_cpt.kernels.dispatch import Choice

_OPS = {
    "attention": "attention",
    "cross_entropy": "linear_cross_entropy",
    "norm": "rms_norm",
    "rope": "rope",
    "swiglu": "swiglu",
}


def kernel_choices(kernels: KernelConfig, precision: str, head_size: int | None) -> list[Choice]:
    """Returns which implementation each op of the model uses, and the reasons against those before it.

    Args:
        kernels: which implementations are asked for.
        precision: "fp32" or "bf16".
        head_size: of the model's attention; None where it is not known yet.

    Raises:
        KernelUnsupported: a named implementation cannot run in training on this process's device; the message
            begins with the setting.
    """
    import torch

    from megatron_cpt.kernels import dispatch
    from megatron_cpt.runtime.device import current_device

    facts: dict[str, object] = {
        "device": current_device().type,
        "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        # "auto" is asked again for each batch; packed documents differ in length, but for a batch now and then.
        "one_length": False,
    }
    if head_size is not None:
        facts["head_size"] = head_size
    choices = []
    for field, op in _OPS.items():
        try:
            choices.append(dispatch.decide(op, getattr(kernels, field), **facts))
        except KernelUnsupported as caught:
            raise KernelUnsupported(f"kernels.{field}: {caught}") from None
    return choices


def refuse_kernels(kernels: KernelConfig, precision: str, head_size: int | None) -> None:
    """Refuses named implementations that cannot run here; where none is named, torch is not even imported.

    Raises:
        KernelUnsupported: as in `kernel_choices`.
    """
    if any(getattr(kernels, field) != "auto" for field in _OPS):
        kernel_choices(kernels, precision, head_size)
