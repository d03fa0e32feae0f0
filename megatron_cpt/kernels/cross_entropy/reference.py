"""The op as its definition reads, with all logits at once and autograd's own gradients: what the others are held to.

Shape letters: N tokens, D hidden size, L rows of the output matrix, V of them the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_cpt.kernels.cross_entropy.plan import Call


def supports(*, sharded: object = False, has_main_grad: object = False, **_facts: object) -> str | None:
    """Returns why the reference cannot run, or None."""
    if sharded:
        return "it takes a whole table, not one rank's slice"
    if has_main_grad:
        return "it leaves gradients to autograd and adds none to main_grad"
    return None


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_LD: Tensor,
    labels_N: Tensor,
    token_weights_N: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns loss, nats [N], log-sum-exp [N] and correct [N]; see `op.linear_cross_entropy`."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    frozen = min(call.trainable_rows, call.vocab_size)
    weight_VD = torch.cat([weight_LD[:frozen].detach(), weight_LD[frozen : call.vocab_size]])
    logits_NV = (hidden_ND.to(call.dtype) @ weight_VD.to(call.dtype).T).to(wide)
    if call.softcap:
        logits_NV = call.softcap * torch.tanh(logits_NV / call.softcap)
    scored_N = labels_N != call.ignore_index
    valid_N = (labels_N >= 0) & (labels_N < call.vocab_size)
    lse_N = logits_NV.logsumexp(-1)
    target_N = logits_NV.gather(1, labels_N.long().clamp(0, call.vocab_size - 1).unsqueeze(1)).squeeze(1)
    nats_N = torch.where(valid_N, lse_N - target_N, torch.nan)
    even_N = lse_N - logits_NV.mean(-1)
    loss_N = (1.0 - call.label_smoothing) * nats_N + call.label_smoothing * even_N + call.z_loss * lse_N.square()
    weights_N = scored_N.to(wide) if token_weights_N is None else scored_N * token_weights_N.to(wide)
    loss_N = torch.where(scored_N, loss_N * weights_N, 0.0)
    loss = loss_N
    if call.reduction != "none":
        loss = loss_N.sum()
    if call.reduction == "mean":
        total = weights_N.sum()
        loss = loss / torch.where(total == 0, 1.0, total)
    correct_N = scored_N & valid_N & (target_N >= logits_NV.amax(-1))
    lse_N = torch.where(valid_N, lse_N, torch.nan)
    nats_N, lse_N = torch.where(scored_N, nats_N, 0.0).detach(), torch.where(scored_N, lse_N, 0.0).detach()
    return loss, nats_N, lse_N, correct_N
