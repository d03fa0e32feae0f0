"""Methods that need nothing but the vocabulary map: old pieces, one row for all, random rows, inheritance."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cpt.config.surgery import CovarianceMethod, InheritMethod, NormalMethod, PiecesMethod, SameMethod
from megatron_cpt.surgery.matrix import Fill, MatrixPlan
from megatron_cpt.surgery.methods.rows import Task, numbers
from megatron_cpt.surgery.row_mix import Row


def of_pieces(task: Task, method: PiecesMethod) -> MatrixPlan:
    """From the old pieces s_1 ... s_n that the surface of a new piece v is cut into.

    mean: row(v) = (1 / n) * sum of old_row(s_i). first: old_row(s_1). last: old_row(s_n).
    position: sum of i * old_row(s_i), over 1 + ... + n.

    Source: mean: Fujii et al. 2024 (arXiv 2404.17790), vocabulary expansion; first, for the head: Kim et al.
    2024 (EEVE, arXiv 2402.14714).
    """

    def row(id: int) -> Row:
        pieces = task.cut(id)
        return _weighted(pieces, method.method)

    return task.plan({id: row(id) for id in task.new_rows})


def _weighted(pieces: Sequence[int], rule: str) -> Row:
    count = len(pieces)
    if rule == "first":
        return pieces[:1], (1.0,)
    if rule == "last":
        return pieces[-1:], (1.0,)
    if rule == "position":
        return pieces, [2.0 * place / (count * (count + 1)) for place in range(1, count + 1)]
    return pieces, [1.0 / count] * count


def same(task: Task, method: SameMethod) -> MatrixPlan:
    """Zero, or the mean of all old rows, for every new piece."""
    if method.method == "zero":
        return task.plan({})
    return task.plan({}, [Fill(numbers(task.new_rows), "mean")])


def inherited(task: Task, method: InheritMethod) -> MatrixPlan:
    """New id i takes old row i, whatever that row stood for; beyond the old size the mean of the old pieces.

    Source: the vocabulary-replaced Llama 2 13B of Ricoh (NLP2024).
    Deviates: ids beyond the old size do not occur there.
    """
    old_size = task.vocab_map.old_size
    return task.plan({id: ((id,), (1.0,)) if id < old_size else task.mean_of_pieces(id) for id in task.new_rows})


def drawn(task: Task, method: NormalMethod | CovarianceMethod) -> MatrixPlan:
    """Random rows: N(0, std), or N(mean, covariance) of the old rows.

    Source: covariance: Hewitt 2021, "Initializing new word embeddings for pretrained language models".
    Deviates: 1e-6 of the mean variance is added to the diagonal, so that small tables have a root too.
    """
    if isinstance(method, NormalMethod):
        fill = Fill(numbers(task.new_rows), "normal", method.std, method.seed, task.matrix)
    else:
        fill = Fill(numbers(task.new_rows), "covariance", 0.0, method.seed, task.matrix)
    return task.plan({}, [fill])
