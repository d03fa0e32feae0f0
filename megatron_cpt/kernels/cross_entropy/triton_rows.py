"""What is done to a chunk's logits between its products, by Triton kernels: the twin of `torch_rows`.

Shape letters: T rows of a chunk, M columns, K numbers a row.
"""

from __future__ import annotations

from torch import Tensor

from megatron_cpt.kernels.cross_entropy import triton_kernels as kernels


def statistics(logits_TM: Tensor, columns_T: Tensor, out_KT: Tensor, softcap: float) -> None:
    """As `torch_rows.statistics`; rows lie a multiple of TRITON_STRIDE elements apart."""
    num_rows, num_columns = logits_TM.shape
    launch = kernels.STATISTICS.choose(logits_TM.device.type, num_columns)
    kernels.cross_entropy_statistics[(num_rows,)](
        logits_TM,
        columns_T,
        out_KT,
        logits_TM.stride(0),
        out_KT.stride(0),
        num_columns,
        softcap,
        HAS_CAP=softcap != 0.0,
        WITH_SUM=len(out_KT) == 4,
        VECTOR=kernels.VECTOR_BYTES // logits_TM.element_size(),
        **launch.keywords(),
    )


def gradient(
    logits_TM: Tensor,
    out_TM: Tensor,
    columns_T: Tensor,
    lse_T: Tensor,
    grad_T: Tensor,
    *,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    """As `torch_rows.gradient`; rows lie a multiple of TRITON_STRIDE elements apart, and the padding is overwritten."""
    num_rows, num_columns = logits_TM.shape
    launch = kernels.GRADIENT.choose(logits_TM.device.type, num_columns)
    kernels.cross_entropy_gradient[(num_rows,)](
        logits_TM,
        out_TM,
        columns_T,
        lse_T,
        grad_T,
        logits_TM.stride(0),
        out_TM.stride(0),
        num_columns,
        1.0 - label_smoothing,
        label_smoothing / vocab_size,
        z_loss,
        softcap,
        HAS_CAP=softcap != 0.0,
        NARROWER=out_TM.element_size() < logits_TM.element_size(),
        **launch.keywords(),
    )
