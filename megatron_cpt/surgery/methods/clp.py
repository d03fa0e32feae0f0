"""CLP-Transfer: the rows of new pieces by similarity in a helper model of the new tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_cpt.checkpoint import EMBEDDING, open_hf
from megatron_cpt.checkpoint.tokenizer_files import recorded_tokenizer
from megatron_cpt.config.surgery import ClpMethod
from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery.matrix import MatrixPlan, Rule, SimilarityMix
from megatron_cpt.surgery.methods.rows import Task, numbers
from megatron_cpt.surgery.methods.similarity import row_blocks, topk_weights, unit
from megatron_cpt.surgery.row_mix import Row
from megatron_cpt.surgery.threads import in_blocks

_LEAST_SUM = 1e-4  # of the cosines that a row is divided by


def clp(task: Task, method: ClpMethod) -> MatrixPlan:
    """CLP-Transfer: row(v) = sum over shared pieces u of w(v, u) * old_row(u), h the helper's input embedding.

    topk: w = softmax over the `top_k` largest cos(h_v, h_u) of cos / temperature. clamped: w = max(0, cos) over
    their sum. published: w = cos over the sum of all cosines. A helper whose row of v is zero, or like no shared
    piece's, says nothing of v, which is then the mean of its old pieces.

    Source: Ostendorff and Rehm 2023 (arXiv 2301.09626), equation 1.
    Deviates: both matrices are written, not the input's alone; topk and clamped are ours: with a helper that
    has as many negative cosines as positive ones the published weights have no bound. A row whose cosines sum
    to less than 1e-4 is not made by them: their sum is rounding.

    Raises:
        CheckpointError: the helper is not a model of the new tokenizer, or no piece is shared.
    """
    vectors = unit(helper_rows(Path(method.helper), task))
    shared_new, shared_old = task.shared
    if not shared_new:
        raise CheckpointError(
            "the two vocabularies share no piece, so there is no old row to draw on: take a method that needs none, "
            "such as global_mean or covariance"
        )
    known = vectors.any(1)
    new_rows = [id for id in task.new_rows if known[id]]
    new, old = numbers(new_rows), numbers(shared_new)
    if method.form == "topk":

        def make() -> dict[int, Row]:
            best = topk_weights(vectors[new], vectors[old], method.top_k, method.temperature)
            sources = numbers(shared_old).numpy()
            return {id: (sources[places], weights) for id, (places, weights) in zip(new_rows, best, strict=True)}

        return task.plan_or_fall_back(make() if task.given is None else task.given.once(method, make))
    rule: Rule = "clamped" if method.form == "clamped" else "signed"
    made = SimilarityMix(new, numbers(shared_old), vectors[new], vectors[old], rule)
    sums = in_blocks(
        lambda block_BE: made.weights(block_BE, made.old_vectors_OE).sum(1), row_blocks(made.new_vectors_RE, len(old))
    )
    sound = torch.cat(list(sums)).abs() >= _LEAST_SUM
    made = replace(made, rows=new[sound], new_vectors_RE=made.new_vectors_RE[sound])
    return task.plan_or_fall_back({}, similarity=made)


def helper_rows(helper: Path, task: Task) -> Tensor:
    """The input embedding of a helper model, float32, a row for each id of the new vocabulary.

    Raises:
        CheckpointError: the helper has another tokenizer or fewer rows.
    """
    reader = open_hf(helper)
    recorded, wanted = recorded_tokenizer(helper), task.vocab_map.new_sha256
    if recorded is not None and recorded != wanted:
        raise CheckpointError(
            f"the helper {helper} has another tokenizer ({recorded[:12]}) than the new one ({wanted[:12]}): "
            "train a helper with the new tokenizer, or name the folder of one"
        )
    if reader.vocab_size < task.vocab_map.new_size:
        raise CheckpointError(
            f"the helper {helper} has {reader.vocab_size} rows, the new vocabulary {task.vocab_map.new_size}: "
            "name a helper that was trained with the new tokenizer"
        )
    return reader.read_rows(EMBEDDING, 0, task.vocab_map.new_size).float()
