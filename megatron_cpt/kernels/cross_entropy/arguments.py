"""What the op's arguments have to be, said where they are not."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from megatron_cpt.kernels.cross_entropy.plan import Call

_LABELS = (torch.int64, torch.int32)
_LOGITS = ("float32", "bfloat16", "float16", "float64")


def check_arguments(
    op: str,
    hidden_RD: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    token_weights_N: Tensor | None,
    main_grad_LD: Tensor | None,
    softcap: float | None,
    call: Call,
    *,
    is_shard: bool = False,
) -> None:
    """Raises ValueError where the arguments do not belong together.

    `is_shard` says that the table may be a part of the vocabulary although the call has no group.
    """
    _check_tensors(op, hidden_RD, weight_LD, labels_N, call)
    if token_weights_N is not None and (
        token_weights_N.shape != labels_N.shape or not token_weights_N.is_floating_point()
    ):
        raise ValueError(
            f"{op}: got token weights {tuple(token_weights_N.shape)} in {token_weights_N.dtype}; "
            f"expected {tuple(labels_N.shape)}, floating"
        )
    if main_grad_LD is not None and (main_grad_LD.shape != weight_LD.shape or main_grad_LD.dtype != torch.float32):
        raise ValueError(
            f"{op}: got main_grad {tuple(main_grad_LD.shape)} in {main_grad_LD.dtype}; "
            f"expected {tuple(weight_LD.shape)} in torch.float32"
        )
    if call.group_size == 1 and not is_shard and not call.vocab_start == 0 < call.vocab_size <= weight_LD.shape[0]:
        raise ValueError(
            f"{op}: got rows {call.vocab_start} to {call.vocab_start + weight_LD.shape[0]} of a vocabulary of "
            f"{call.vocab_size} and no group; expected the whole table, or the group of ranks that hold the rest"
        )
    check_numbers(op, len(labels_N), softcap, call)


def _check_tensors(op: str, hidden_RD: Tensor, weight_LD: Tensor, labels_N: Tensor, call: Call) -> None:
    shapes = tuple(hidden_RD.shape), tuple(weight_LD.shape), tuple(labels_N.shape)
    of_group = call.group_size if call.sequence_parallel else 1
    if call.sequence_parallel and call.group_size == 1:
        raise ValueError(f"{op}: got sequence_parallel and no group; give the group whose ranks share the tokens")
    if (
        hidden_RD.dim() != 2
        or weight_LD.dim() != 2
        or shapes[0][1] != shapes[1][1]
        or shapes[2] != (shapes[0][0] * of_group,)
    ):
        tokens = f"[N / {of_group}, D]" if of_group > 1 else "[N, D]"
        raise ValueError(f"{op}: got hidden, weight, labels {shapes}; expected {tokens}, [L, D] and [N]")
    devices = {str(tensor.device) for tensor in (hidden_RD, weight_LD, labels_N)}
    if len(devices) > 1:
        raise ValueError(f"{op}: got hidden, weight and labels on {', '.join(sorted(devices))}; expected one device")
    if hidden_RD.dtype != weight_LD.dtype or not hidden_RD.is_floating_point():
        raise ValueError(f"{op}: got hidden {hidden_RD.dtype}, weight {weight_LD.dtype}; expected one floating dtype")
    if labels_N.dtype not in _LABELS:
        raise ValueError(f"{op}: got labels {labels_N.dtype}; expected torch.int64 or torch.int32")
    if call.logits_dtype not in _LOGITS or call.dtype.itemsize < hidden_RD.dtype.itemsize:
        raise ValueError(
            f"{op}: got logits_dtype torch.{call.logits_dtype} with inputs in {hidden_RD.dtype}; "
            "expected None, or a floating dtype of 16 bits or more that is no narrower than the inputs'"
        )
    if (call.dtype == torch.float64) != (hidden_RD.dtype == torch.float64):
        raise ValueError(f"{op}: got logits_dtype torch.float64 with inputs in {hidden_RD.dtype}; use torch.float32")


def integer(name: str, value: object) -> int:
    """Returns an argument as Python's own integer, which NumPy's are not.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int):
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"linear_cross_entropy: got {name} {value!r}; expected an integer") from error


def check_numbers(op: str, num_tokens: int, softcap: float | None, call: Call) -> None:
    """Raises ValueError where a number is out of its range."""
    if call.vocab_start < 0 or call.vocab_size < 1 or call.budget_bytes < 1 or call.trainable_rows < 0:
        raise ValueError(
            f"{op}: got vocab_start {call.vocab_start}, vocab_size {call.vocab_size}, budget_bytes "
            f"{call.budget_bytes}, trainable_rows {call.trainable_rows}; expected >= 0, >= 1, >= 1, >= 0"
        )
    if not -1 <= call.num_scored <= num_tokens:
        raise ValueError(f"{op}: got num_scored {call.num_scored} for {num_tokens} tokens; expected 0 to {num_tokens}")
    if not 0.0 <= call.label_smoothing < 1.0 or not 0.0 <= call.z_loss < float("inf"):
        raise ValueError(
            f"{op}: got label_smoothing {call.label_smoothing}, z_loss {call.z_loss}; expected [0, 1) and >= 0"
        )
    if softcap is not None and not 0.0 < softcap < float("inf"):
        raise ValueError(f"{op}: got softcap {softcap}; expected a number > 0, or None for none")
    if call.reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: got reduction {call.reduction!r}; expected 'none', 'mean' or 'sum'")
