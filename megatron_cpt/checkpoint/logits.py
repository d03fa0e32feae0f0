"""The logits of two checkpoints, computed in fp32 from their files and compared, nearby and far apart."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpt.checkpoint.forward import LlamaForward
from megatron_cpt.checkpoint.runs import StoredModel
from megatron_cpt.errors import VerificationError

NEAR = 64  # positions of the document whose tokens follow each other
SPAN = 8  # tokens that follow each other in the document whose spans lie far apart
_SPANS = 7
_SEED = 20240607
# Of the bound: 6 deviations, which the largest of millions of errors reaches, times 5 for what softmax and norms add.
_FACTOR = 30.0


def compare_logits(source: StoredModel, target: StoredModel) -> dict[str, Any]:
    """Compare the logits of two models of one vocabulary; the weights of one layer's matrix are in memory at a time.

    Each model is computed by its own config on the same tokens: a document at positions 0 to 63, and one whose spans
    of 8 tokens begin at 0 and end at the last position, its half, its quarter and so on. Rotary attention sees only
    distances: a scaling of them that was forgotten is large in the second alone, and few tokens are enough for that.

    Every weight, and every sum in fp32, is off by up to u of its value, half of the dtype's `eps`. These errors are
    independent, and each of the 2 * layers + 2 steps from the embedding to the logits adds those of its own; so the
    logits are off by about u * sqrt(2 * layers + 2) of their standard deviation. The bound is 30 times that: u of
    fp32 (2e-5 of a deviation for 32 layers), or of the target's dtype where that is a coarser one than the source's
    (1 for bfloat16 and 32 layers, where the logits of an unrelated model differ by 7). A cast model beyond it was
    converted wrongly, or needs more precision than the dtype has.

    Returns:
        `max_abs_diff`; `std` of the source's logits; `bound`, of differences relative to it; and of each document
        `near_` and `far_` `relative_diff` and `positions`.
    """
    near = torch.arange(min(NEAR, source.llama.max_position_embeddings))
    far = _far_positions(source.llama.max_position_embeddings)
    generator = torch.Generator().manual_seed(_SEED)
    token_N = torch.randint(0, source.vocab_size, (len(near) + len(far),), generator=generator)
    ours_NV, theirs_NV = (_logits(model, token_N, near, far) for model in (source, target))
    deviation = float(ours_NV.std())
    difference_N = (ours_NV - theirs_NV).abs_().amax(dim=-1)
    facts: dict[str, Any] = {
        "max_abs_diff": float(difference_N.max()),
        "std": deviation,
        "bound": _bound(source, target),
    }
    for name, positions, part_N in (
        ("near", near, difference_N[: len(near)]),
        ("far", far, difference_N[len(near) :]),
    ):
        facts |= {f"{name}_relative_diff": float(part_N.max()) / deviation, f"{name}_positions": _spans(positions)}
    return facts


def check_logits(source: StoredModel, target: StoredModel) -> dict[str, Any]:
    """Compare the logits of two models, see `compare_logits`; raises VerificationError where they differ by more."""
    facts = compare_logits(source, target)
    for name in ("near", "far"):
        if not facts[f"{name}_relative_diff"] <= facts["bound"]:  # NaN is a difference
            raise VerificationError(
                f"{target.folder} does not compute what {source.folder} does: at positions {facts[f'{name}_positions']}"
                f" its logits differ by {facts[f'{name}_relative_diff']:.1e} of their standard deviation, expected at "
                f"most {facts['bound']:.1e}; convert it again, or, after a cast, to a finer dtype"
            )
    return facts


def _bound(source: StoredModel, target: StoredModel) -> float:
    """Largest difference of logits, relative to their deviation, that rounding explains."""
    coarse = max(
        (
            torch.finfo(target.dtype(name)).eps
            for name in target.names()
            if torch.finfo(target.dtype(name)).eps > torch.finfo(source.dtype(name)).eps
        ),
        default=0.0,
    )
    unit = max(coarse, torch.finfo(torch.float32).eps) / 2
    return _FACTOR * unit * math.sqrt(2 * source.llama.num_layers + 2)


def _far_positions(limit: int) -> Tensor:
    """Spans at 0, and up to each of `limit`, its half, its quarter and so on."""
    starts = {0, *(max(0, (limit >> halvings) - SPAN) for halvings in range(_SPANS))}
    return torch.tensor(sorted({start + i for start in starts for i in range(min(SPAN, limit))}))


def _spans(positions: Tensor) -> str:
    """Positions as a person writes them: 0-7, 120-127."""
    breaks = (positions.diff() != 1).nonzero()[:, 0] + 1
    return ", ".join(f"{int(span[0])}-{int(span[-1])}" for span in positions.tensor_split(breaks))


def _logits(model: StoredModel, token_N: Tensor, *documents: Tensor) -> Tensor:
    """fp32 logits over the vocabulary, of documents whose tokens have these positions."""
    forward = LlamaForward(model, torch.float32)
    borders = [0, *torch.tensor([len(positions) for positions in documents]).cumsum(0).tolist()]
    layout = forward.layout(1, len(token_N), borders, torch.cat(documents))
    hidden_ND = forward.body(forward.embed(token_N), layout)
    return torch.cat([F.linear(hidden_ND, block_VD) for _, block_VD in forward.head_blocks()], dim=-1)
