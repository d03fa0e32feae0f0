"""What a new vocabulary is worth beside the one it comes from, as facts that a report shows."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.tokenizer.loading import Tokenizer
from megatron_cpt.tokenizer.measure import count_usage, density, lines_changed
from megatron_cpt.tokenizer.pieces import Pieces, cut, dead_ids, new_ids, old_ids, read_pieces

_SHOWN = 12  # pieces of each kind
_LINES = 10  # lines of each language
_POINTS = 60  # of the curve of coverage
_SEED = 0  # of the sample


def compare_tokenizers(old: Tokenizer, new: Tokenizer, texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Two vocabularies on the same held-out texts.

    Args:
        old: the base.
        new: the adapted tokenizer.
        texts: documents by language.

    Returns:
        `vocab_size` (base, adapted), `languages`: for each what `density` says of base and adapted, the share
        of `new_tokens`, `tokens_saved` (share of the base's), `lines_changed`, and the curve `coverage`;
        `vocabulary`: how the two overlap; `new_pieces`: counts, lengths, and the longest, rarest, most used
        and some drawn at random, each with the base's cut; `dead`: pieces that never come up.
    """
    before, after = read_pieces(old), read_pieces(new)
    fresh = new_ids(before, after)
    used = np.zeros(new.vocab_size, np.int64)
    languages = {}
    for language, documents in texts.items():
        usage = count_usage(new, documents)
        used += usage.counts
        base, adapted = density(before, count_usage(old, documents)), density(after, usage)
        lines = (line for document in documents for line in document.split("\n") if line)
        languages[language] = {
            "base": base,
            "adapted": adapted,
            "tokens_saved": 1 - adapted["tokens"] / base["tokens"] if base["tokens"] else 0.0,
            "new_tokens": float(usage.counts[fresh].sum()) / max(usage.tokens, 1),
            "new_pieces_used": int(np.count_nonzero(usage.counts[fresh])),
            "lines_changed": lines_changed(before, after, lines, _LINES),
            "coverage": _coverage(usage.counts[fresh], usage.tokens),
        }
    return {
        "vocab_size": {"base": old.vocab_size, "adapted": new.vocab_size},
        "languages": languages,
        "vocabulary": _overlap(before, after),
        "new_pieces": _new_pieces(before, after, fresh, used),
        "dead": {"base": _dead(before), "adapted": _dead(after)},
    }


def _overlap(old: Pieces, new: Pieces) -> dict[str, int]:
    kept = [(before, id) for id, before in enumerate(old_ids(old, new)) if before is not None]
    return {
        "kept": len(kept),
        "kept_at_their_id": sum(before == after for before, after in kept),
        "new": len(new_ids(old, new)),
        "removed": len(old.by_name) - len({before for before, _ in kept}),
    }


def _coverage(counts: npt.NDArray[np.int64], tokens: int) -> list[tuple[int, float]]:
    """Points (number of the most used new pieces, share of all tokens that they make)."""
    falling = np.sort(counts[counts > 0])[::-1]
    if not len(falling):
        return []
    shares = np.cumsum(falling) / tokens
    places = np.unique(np.geomspace(1, len(falling), _POINTS).round().astype(int))
    return [(int(place), float(shares[place - 1])) for place in places]


def _new_pieces(old: Pieces, new: Pieces, fresh: Sequence[int], used: npt.NDArray[np.int64]) -> dict[str, Any]:
    spelt = [id for id in fresh if new.texts[id]]
    length = {id: len(new.texts[id] or "") for id in spelt}
    by_use = sorted(spelt, key=lambda id: (-used[id], id))
    met = [id for id in by_use if used[id]]
    weighted: Counter[int] = Counter()
    for id in spelt:
        weighted[length[id]] += int(used[id])
    drawn = sorted(random.Random(_SEED).sample(spelt, min(_SHOWN, len(spelt))))
    dead = dead_ids(new, fresh)
    return {
        "count": len(fresh),
        "unused": int(np.count_nonzero(used[list(fresh)] == 0)),
        "dead": len(dead),
        "lengths": dict(sorted(Counter(length.values()).items())),
        "lengths_used": dict(sorted(weighted.items())),
        "most_used": _shown(old, new, met[:_SHOWN], used),
        "rarest": _shown(old, new, met[-_SHOWN:], used),
        "longest": _shown(old, new, sorted(spelt, key=lambda id: (-length[id], id))[:_SHOWN], used),
        "sample": _shown(old, new, drawn, used),
    }


def _shown(old: Pieces, new: Pieces, ids: Sequence[int], used: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
    cuts = cut(old, [new.data[id] or b"" for id in ids])
    return [
        {"id": id, "piece": new.shown(id), "uses": int(used[id]), "old": pieces}
        for id, pieces in zip(ids, cuts, strict=True)
    ]


def _dead(pieces: Pieces) -> dict[str, Any]:
    found = dead_ids(pieces)
    return {"count": len(found), "examples": [pieces.shown(id) for id in found[:_SHOWN]]}
