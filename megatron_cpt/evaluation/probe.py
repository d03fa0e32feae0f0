"""A multiple-choice probe by likelihood: which of the answers does the model find most likely?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.data import IGNORED
from megatron_cpt.tokenizer import Tokenizer

TEXTS_PER_PASS = 64


def probe_accuracy(
    forward: LlamaForward, tokenizer: Tokenizer, questions: Sequence[tuple[str, str, Sequence[str]]]
) -> dict[str, Any]:
    """Share of the questions whose right answer gets the highest likelihood.

    The likelihood is that of the whole text, prompt and answer, so the cut between the two need not
    be a token's border; the prompt is the same for all answers of a question.

    Args:
        forward: the model.
        tokenizer: the model's tokenizer.
        questions: (prompt, right answer, wrong answers).

    Returns:
        `accuracy`, its `standard_error`, `chance`, `questions`.
    """
    texts = [prompt + answer for prompt, right, wrong in questions for answer in (right, *wrong)]
    passes = [texts[at : at + TEXTS_PER_PASS] for at in range(0, len(texts), TEXTS_PER_PASS)]
    nats = [score for some in passes for score in _nats(forward, tokenizer, some)]
    right, at, chance = 0, 0, 0.0
    for _, _, wrong in questions:
        scores = nats[at : at + 1 + len(wrong)]
        right += scores[0] < min(scores[1:])
        chance += 1 / len(scores)
        at += len(scores)
    count = max(1, len(questions))
    accuracy = right / count
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / count),
        "chance": chance / count,
        "questions": len(questions),
    }


def _nats(forward: LlamaForward, tokenizer: Tokenizer, texts: Sequence[str]) -> list[float]:
    """Negative log-likelihood of each text after BOS, in nats."""
    start = [tokenizer.bos_id] if tokenizer.bos_id is not None else []
    rows = [start + ids for ids in tokenizer.encode_batch(texts)]
    length = max(map(len, rows)) - 1
    # Filled up at the end, where causal attention keeps the filling from being seen.
    tokens_BS = torch.tensor([row[:-1] + [0] * (length + 1 - len(row)) for row in rows])
    labels_BS = torch.tensor([row[1:] + [IGNORED] * (length + 1 - len(row)) for row in rows])
    return [float(nats) for nats in forward.token_nats(tokens_BS, labels_BS).double().sum(dim=1)]
