"""Methods that weigh the old rows of shared pieces by the similarity of vectors.

The vectors come from elsewhere (a helper model, static vectors); what is here turns them into weights, in
blocks of new rows, so that no matrix of all similarities is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_cpt.checkpoint import open_hf
from megatron_cpt.checkpoint.llama import EMBEDDING
from megatron_cpt.checkpoint.tokenizer_files import recorded_tokenizer
from megatron_cpt.config.surgery import ClpMethod
from megatron_cpt.errors import CheckpointError
from megatron_cpt.surgery.matrix import MatrixPlan, Rule, SimilarityMix
from megatron_cpt.surgery.methods.rows import Row, Task, numbers

_BLOCK_ELEMENTS = 1 << 24  # similarities held at once


def clp(task: Task, method: ClpMethod) -> MatrixPlan:
    """CLP-Transfer: row(v) = sum over shared pieces u of w(v, u) * old_row(u), h the helper's input embedding.

    topk: w = softmax over the `top_k` largest cos(h_v, h_u) of cos / temperature. clamped: w = max(0, cos) over
    their sum. published: w = cos over the sum of all cosines.

    Source: Ostendorff and Rehm 2023 (arXiv 2301.09626), equation 1.
    Deviates: both matrices are written, not the input's alone; topk and clamped are ours: with a helper that
    has as many negative cosines as positive ones the published weights have no bound.

    Raises:
        CheckpointError: the helper is not a model of the new tokenizer.
    """
    vectors = unit(helper_rows(Path(method.helper), task))
    shared_new, shared_old = task.shared
    if method.form == "topk":
        best = topk_weights(
            vectors[numbers(task.new_rows)], vectors[numbers(shared_new)], method.top_k, method.temperature
        )
        rows = {id: ([shared_old[u] for u in place], w) for id, (place, w) in zip(task.new_rows, best, strict=True)}
        return task.plan(rows)
    rule: Rule = "clamped" if method.form == "clamped" else "signed"
    new, old = numbers(task.new_rows), numbers(shared_new)
    return task.plan({}, (), SimilarityMix(new, numbers(shared_old), vectors[new], vectors[old], rule))


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


def unit(vectors_NE: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays."""
    return vectors_NE / vectors_NE.norm(dim=1, keepdim=True).clamp(min=1e-30)


def topk_weights(new_NE: Tensor, old_OE: Tensor, top_k: int, temperature: float) -> Iterator[Row]:
    """For each new vector the places of the most similar old ones and softmax(cosine / temperature) over them.

    Both sides are unit vectors.

    Yields:
        (places, weights), in the order of the new vectors.
    """
    top_k = min(top_k, len(old_OE))
    for block in similarities(new_NE, old_OE):
        best, places = block.topk(top_k)
        weights = torch.softmax(best.double() / temperature, dim=1).float()
        yield from zip(places.tolist(), weights.tolist(), strict=True)


def similarities(new_NE: Tensor, old_OE: Tensor) -> Iterator[Tensor]:
    """Blocks of new_NE @ old_OE.T, in order."""
    for block_NE in new_NE.split(max(1, _BLOCK_ELEMENTS // max(1, len(old_OE)))):
        yield block_NE @ old_OE.T
