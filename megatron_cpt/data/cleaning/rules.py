"""Which documents break which rules."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from megatron_cpt.data.cleaning.profiles import Rule

Bools = npt.NDArray[np.bool_]
Verdicts = npt.NDArray[np.uint8]
KEPT = 0


def judge(
    metrics: Mapping[str, npt.NDArray[np.float64]], rules: Mapping[str, Rule], documents: int
) -> tuple[Verdicts, Bools]:
    """Hold the figures of documents against rules.

    Args:
        metrics: metric -> [documents]; a figure that is not a number breaks its rule.
        rules: name -> rule.
        documents: how many there are.

    Returns:
        [documents] `KEPT`, or 1 + the place of the first rule broken; [rules, documents] whether a rule is broken.
    """
    broken = np.zeros((len(rules), documents), bool)
    for row, rule in zip(broken, rules.values(), strict=True):
        values = metrics[rule.metric]
        if rule.at_least is not None:
            row |= ~(values >= rule.at_least)
        if rule.at_most is not None:
            row |= ~(values <= rule.at_most)
    first = broken.argmax(axis=0) + 1 if len(rules) else np.zeros(documents, np.int64)
    return np.where(broken.any(axis=0), first, KEPT).astype(np.uint8), broken
