"""FOCUS: the rows of new pieces by the surroundings they share with pieces that are kept."""

from __future__ import annotations

from itertools import chain

from megatron_cpt.config.surgery import FocusMethod
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.methods.inputs import Reading
from megatron_cpt.surgery.methods.rows import Task, numbers
from megatron_cpt.surgery.methods.similarity import sparsemax_weights
from megatron_cpt.surgery.methods.static_vectors import centred, static_vectors
from megatron_cpt.surgery.row_mix import Row


def focus(task: Task, method: FocusMethod) -> MatrixPlan:
    """FOCUS: row(v) = sum over shared pieces u of sparsemax over u of cos(x_v, x_u) * old_row(u).

    x are static vectors of the new tokenizer's pieces, made from both corpora as the new tokenizer cuts them.

    Source: Dobler and de Melo 2023 (arXiv 2305.14481), section 2.
    Deviates: text of the source language is read too, unless `target_only`, so that a new piece is told from all
    pieces of the source and not from the few that the target's text holds; x comes from a factorised co-occurrence
    matrix, not from fastText (`static_vectors`), and is `centred`, or pieces of both languages would be alike;
    pieces without a vector are the mean of their old pieces, not drawn from N(mean, variance); pieces are shared
    where their bytes are the same, not where they are alike but for case and space; both matrices are written.
    """

    def make() -> tuple[dict[int, Row], dict[str, object]]:
        target = Reading(task.inputs.read_texts(method.target_corpus, "target"), method.max_bytes, "target_corpus")
        readings = {"target_corpus": target}
        if not method.target_only:
            source = Reading(task.inputs.read_texts(method.source_corpus, "source"), method.max_bytes, "source_corpus")
            readings = {"source_corpus": source, **readings}
        vectors = centred(static_vectors(task.inputs.new, chain.from_iterable(readings.values()), method))
        known = vectors.any(1)
        shared = [(new, old) for new, old in zip(*task.shared, strict=True) if known[new]]
        new_rows = [id for id in task.new_rows if known[id]] if shared else []
        sources = numbers([old for _, old in shared]).numpy()
        kept = vectors[numbers([new for new, _ in shared])]
        weights = sparsemax_weights(vectors[numbers(new_rows)], kept)
        rows: dict[int, Row] = {id: (sources[places], row) for id, (places, row) in zip(new_rows, weights, strict=True)}
        return rows, {name: reading.facts() for name, reading in readings.items()}

    rows, facts = task.inputs.once(method, make)
    return task.plan_or_fall_back(rows, facts)
