"""Calibration: a handful of numbers for all rows of new pieces together, found while the model is frozen.

Rows made from old pieces share errors that no method for single rows can know. A base that never predicted a
byte, say, gives them all the same direction in the head, away from everything; and where it has never seen the
script, they say nothing of what the pieces mean. Two parts mend that: the prior (`prior`), from counts of the text
and a forward pass, and steps of gradient descent (`steps`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.checkpoint.llama import EMBEDDING
from megatron_cpt.checkpoint.reader import ModelReader
from megatron_cpt.config.surgery import CalibrationConfig
from megatron_cpt.errors import InputError, TooLittleText
from megatron_cpt.surgery.calibration.prior import fit_prior, nothing, with_vectors
from megatron_cpt.surgery.calibration.steps import Calibrated, learn
from megatron_cpt.surgery.matrix import Adjustment, MatrixPlan
from megatron_cpt.surgery.methods.static_vectors import vectors_of_ids
from megatron_cpt.surgery.plan import SurgeryPlan
from megatron_cpt.surgery.planned import PlannedReader, check_one_table

__all__ = ["Text", "Tokens", "calibrate"]

_WINDOW, _MIN_COUNT = 2, 5  # pieces to either side that count; rarer pieces get no vector
_BLOCK_ROWS = 4096


class Tokens(Protocol):
    """Packed text in the new tokenizer's ids (`data.Batch`)."""

    @property
    def tokens_N(self) -> npt.NDArray[np.int64]:
        """Input ids."""

    @property
    def labels_N(self) -> npt.NDArray[np.int64]:
        """The id after each; -100 where it is not scored."""

    @property
    def cu_seqlens(self) -> npt.NDArray[np.int32]:
        """Borders of documents, 0 and N included."""


class Text(Protocol):
    """What calibration reads (`data.CalibrationText`)."""

    @property
    def num_tokens(self) -> int:
        """Tokens, from the first on, until a text begins again."""

    def take(self, count: int) -> Tokens:
        """The next tokens of both languages, at least `count`."""

    def counts(self) -> npt.NDArray[np.int64]:
        """How often each new id occurs in the target language's text."""

    def target_ids(self, count: int) -> Iterator[npt.NDArray[np.int64]]:
        """The first `count` tokens of the target language's text, in parts."""


def calibrate(
    plan: SurgeryPlan,
    base: ModelReader,
    text: Text,
    settings: CalibrationConfig,
    *,
    device: torch.device | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[SurgeryPlan, dict[str, Any]]:
    """Find the adjustment of new rows that a little text asks for.

    One forward pass over the text for the prior; a forward and a backward pass for each step. One layer is in
    memory at a time where the weights have no room, so this is for models of any size.

    Args:
        plan: as the methods made it; an adjustment that it has is replaced.
        base: the base model.
        text: of both languages, in the new tokenizer's ids.
        settings: how much text, and how many steps.
        device: where to compute; None: in host memory.
        on_progress: called with (tokens done, tokens in all).

    Returns:
        The plan with its adjustments, and facts: `tokens` read, and what the prior and the steps found.

    Raises:
        TooLittleText: the text tells too little of new pieces, or of others.
        InputError: the plan has no new rows, or makes kept ones anew.
        CheckpointError: the base is not the one that the plan is for.
    """
    plan = replace(plan, embedding=replace(plan.embedding, adjustment=None), head=replace(plan.head, adjustment=None))
    width, tied = base.llama.hidden_size, base.llama.tied_embeddings
    _check_fits(plan, base)
    prior_tokens = min(settings.prior_tokens, text.num_tokens)
    total = prior_tokens + settings.steps * settings.step_tokens
    done = 0

    def next_tokens(count: int) -> Tokens:
        nonlocal done
        tokens = text.take(count)
        done += len(tokens.tokens_N)
        if on_progress is not None:
            on_progress(min(done, total), total)
        return tokens

    start = Calibrated(nothing(plan.embedding, width), nothing(plan.head, width))
    facts: dict[str, Any] = {}
    if settings.prior_tokens:
        if not prior_tokens:
            raise TooLittleText("a text is too short for its share of one sample: give more text of both languages")
        start, facts["prior"] = _prior(plan, base, text, start, partial(next_tokens, prior_tokens), settings, device)
    if settings.steps:
        forward = LlamaForward(PlannedReader(base, plan), cache=True, device=device)
        start, facts["steps"] = learn(forward, plan, start, next_tokens, settings)
    if tied:  # the one table is made as the head asks; of tensors of their own, as a file wants them
        start = replace(start, embedding=deepcopy(start.head))
    return _with(plan, start), {"tokens": done, **facts}


def _check_fits(plan: SurgeryPlan, base: ModelReader) -> None:
    """Check that a plan has new rows and no others, and makes one table where the base has one."""
    if not all(matrix.method.get("copy_kept", True) for matrix in (plan.embedding, plan.head)):
        raise InputError(
            "the plan makes the rows of kept pieces anew (copy_kept: false), calibration is of new pieces alone: plan "
            "again with kept rows, or leave calibration out"
        )
    if not len(plan.head.new_rows):
        raise InputError("the plan has no new rows: there is nothing to calibrate")
    if base.llama.tied_embeddings:
        check_one_table(plan, base.folder)


def _prior(
    plan: SurgeryPlan,
    base: ModelReader,
    text: Text,
    start: Calibrated,
    take: Callable[[], Tokens],
    settings: CalibrationConfig,
    device: torch.device | None,
) -> tuple[Calibrated, dict[str, Any]]:
    """What frequencies and vectors say, and the facts of it; `start` where it makes nothing better."""
    vectors = piece_vectors(plan, text, settings)
    told = start
    if vectors.shape[1] and not base.llama.tied_embeddings:
        width, length = base.llama.hidden_size, _mean_length(base, plan.old_size)
        told = replace(start, embedding=with_vectors(plan.embedding, vectors, length, width, settings.seed))
    features = torch.cat([log_frequencies(plan.head, text.counts())[:, None], vectors], dim=1)
    forward = LlamaForward(PlannedReader(base, _with(plan, told)), cache=True, device=device)
    head, facts = fit_prior(forward, plan.head, features, *_hidden(forward, take()))
    return (start if head is None else replace(told, head=head)), facts


def piece_vectors(plan: SurgeryPlan, text: Text, settings: CalibrationConfig) -> Tensor:
    """Vectors of the new pieces by what stands around them: mean 0 and mean length 1 over those that occur often.

    Of no numbers where none are wanted, or where the text is so short that no new piece has a vector.
    """
    if not settings.dimension:
        return torch.zeros(len(plan.head.new_rows), 0)
    ids = text.target_ids(settings.counted_tokens)
    vectors_WE = vectors_of_ids(ids, plan.new_size, settings.dimension, _WINDOW, _MIN_COUNT)
    vectors_NE = vectors_WE[plan.head.new_rows]
    known_N = vectors_NE.any(dim=1)
    if not bool(known_N.any()):
        return vectors_NE[:, :0]
    vectors_NE[known_N] -= vectors_NE[known_N].mean(dim=0)
    return vectors_NE / vectors_NE[known_N].norm(dim=1).mean().clamp(min=1e-12)


def _mean_length(base: ModelReader, rows: int) -> float:
    """Mean length of the first rows of the embedding."""
    total = 0.0
    for start in range(0, rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, rows)
        total += float(base.read_rows(EMBEDDING, start, stop).float().norm(dim=1).sum())
    return total / rows


def log_frequencies(plan: MatrixPlan, counts_W: npt.NDArray[np.int64]) -> Tensor:
    """log((count + 1/2) / all) of each new row, float32; all: of the text, new pieces and others."""
    counts = torch.from_numpy(np.asarray(counts_W, np.float64))
    return ((counts[plan.new_rows] + 0.5) / counts.sum().clamp(min=1.0)).log().float()


def _hidden(forward: LlamaForward, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Hidden states and labels of the scored positions."""
    labels_N = torch.from_numpy(tokens.labels_N)
    hidden_ND = forward.hidden(torch.from_numpy(tokens.tokens_N)[None], torch.from_numpy(tokens.cu_seqlens))[0]
    scored_N = labels_N >= 0
    return hidden_ND[scored_N.to(hidden_ND.device)].float(), labels_N[scored_N].to(hidden_ND.device)


def _with(plan: SurgeryPlan, found: Calibrated) -> SurgeryPlan:
    return replace(plan, embedding=_adjusted(plan.embedding, found.embedding), head=_adjusted(plan.head, found.head))


def _adjusted(plan: MatrixPlan, adjustment: Adjustment) -> MatrixPlan:
    parts = (adjustment.offset_D, adjustment.directions_FD, adjustment.down_DR)
    changed = adjustment.scale != 0.0 or any(bool(part.any()) for part in parts)
    return replace(plan, adjustment=adjustment if changed else None)
