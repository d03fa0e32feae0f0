"""WECHSEL: the rows of new pieces by static vectors of two languages, turned onto each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_cpt.config.surgery import WechselMethod
from megatron_cpt.errors import InputError
from megatron_cpt.surgery.matrix import MatrixPlan
from megatron_cpt.surgery.methods.inputs import Inputs, Reading
from megatron_cpt.surgery.methods.rows import Task, numbers
from megatron_cpt.surgery.methods.similarity import topk_weights, unit
from megatron_cpt.surgery.methods.static_vectors import static_vectors
from megatron_cpt.surgery.row_mix import Row
from megatron_cpt.surgery.threads import in_blocks
from megatron_cpt.tokenizer import Tokenizer


def wechsel(task: Task, method: WechselMethod) -> MatrixPlan:
    """WECHSEL: row(v) = sum over old pieces u of softmax(cos(y_v, x_u @ Q) / temperature) * old_row(u).

    x are static vectors of the old pieces from source text, y of the new pieces from target text; the sum goes
    over the `top_k` most similar u. Q is the rotation that brings pairs nearest (orthogonal Procrustes): pieces
    that both vocabularies have, and words of the dictionary, whose vector is the mean of their pieces'.

    Source: Minixhofer et al. 2022 (arXiv 2112.06598), section 3.
    Deviates: vectors are of pieces, made here from the two corpora (`static_vectors`), not of fastText's words
    and n-grams; shared pieces align beside the dictionary; rows of shared pieces are kept; pieces without a
    vector are the mean of their old pieces, not drawn from N(mean, variance); both matrices are written.

    Raises:
        InputError: there are fewer pairs than dimensions, or the dictionary cannot be read.
    """

    def make() -> tuple[dict[int, Row], dict[str, object]]:
        source = Reading(task.inputs.read_texts(method.source_corpus, "source"), method.max_bytes, "source_corpus")
        target = Reading(task.inputs.read_texts(method.target_corpus, "target"), method.max_bytes, "target_corpus")
        old_vectors = static_vectors(task.inputs.old, source, method)
        new_vectors = static_vectors(task.inputs.new, target, method)
        pairs = list(_shared_pairs(task, old_vectors, new_vectors))
        if method.dictionary is not None:
            pairs += _word_pairs(Path(method.dictionary), task.inputs, old_vectors, new_vectors)
        turned = old_vectors @ _rotation(pairs, old_vectors.shape[1], new_vectors.shape[1])
        sources = turned.any(1).nonzero().flatten()
        new_rows = [id for id in task.new_rows if new_vectors[id].any()]
        weights = topk_weights(new_vectors[numbers(new_rows)], unit(turned[sources]), method.top_k, method.temperature)
        old_ids = sources.numpy()
        rows: dict[int, Row] = {id: (old_ids[places], row) for id, (places, row) in zip(new_rows, weights, strict=True)}
        facts = {"source_corpus": source.facts(), "target_corpus": target.facts(), "pairs": len(pairs)}
        return rows, facts

    rows, facts = task.inputs.once(method, make)
    return task.plan_or_fall_back(rows, facts)


def _shared_pairs(task: Task, old_vectors: Tensor, new_vectors: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for new, old in zip(*task.shared, strict=True):
        if old_vectors[old].any() and new_vectors[new].any():
            yield old_vectors[old], new_vectors[new]


def _word_pairs(path: Path, inputs: Inputs, old_vectors: Tensor, new_vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Vectors of the pairs of words whose pieces have any."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as caught:
        raise InputError(
            f"the dictionary {path} cannot be read ({caught}): expected a UTF-8 file, a line with a word of the source "
            "language, a tab, and its translation"
        ) from None
    pairs = []
    for number, line in enumerate(lines, 1):
        words = [word.strip() for word in line.split("\t")]
        if len(words) != 2 or not all(words):
            if not line.strip():
                continue
            raise InputError(f"{path}:{number} holds {line[:60]!r}, expected two words with a tab between them")
        left, right = _of_word(words[0], inputs.old, old_vectors), _of_word(words[1], inputs.new, new_vectors)
        if left.any() and right.any():
            pairs.append((left, right))
    return pairs


def _of_word(word: str, tokenizer: Tokenizer, vectors: Tensor) -> Tensor:
    """Unit mean of the vectors of a word's pieces, zero where none has one; after a space, if that is shorter."""
    ids = min((tokenizer.encode_bytes(form.encode()) for form in (f" {word}", word)), key=len)
    return unit(vectors[numbers(ids)].sum(0, keepdim=True))[0]


def _rotation(pairs: list[tuple[Tensor, Tensor]], old_width: int, new_width: int) -> Tensor:
    """Q with orthonormal columns (or rows) that maximises the sum of (x @ Q) . y over pairs: U V' of X' Y."""
    if len(pairs) < min(old_width, new_width):
        raise InputError(
            f"{len(pairs)} pairs of pieces or words join the two languages, expected at least as many as dimensions, "
            f"{min(old_width, new_width)}: give a dictionary, more text, or a smaller dimension"
        )
    left, right = (torch.stack(side).double() for side in zip(*pairs, strict=True))
    ((turn, _, other),) = in_blocks(lambda product: torch.linalg.svd(product, full_matrices=False), [left.T @ right])
    return (turn @ other).float()
