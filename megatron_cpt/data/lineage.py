"""What of a plan was already seen: the identity that lets a run grow and refuses to change its past.

A description holds everything that decides the order, as JSON. Of it, `seen` keeps what decides the first N
samples: later stages, the length of a stage that is still going on with constant shares, sources not yet read
and the names of things fall away. So two plans whose first N samples are the same samples have one hash there.
"""

from __future__ import annotations

from typing import Any

from megatron_cpt.config.manifest import sha256_json
from megatron_cpt.data.stages import Order

ORDER_VERSION = 2  # of the rules that make samples of a description; others are other orders


def description(order: Order) -> dict[str, Any]:
    """Everything that decides the order, as JSON."""
    return {
        "version": ORDER_VERSION,
        "seed": order.seed,
        "seq_length": order.seq_length,
        "sources": [
            {
                "name": source.name,
                "content": source.content,
                "windows": source.windows,
                "language": source.language,
                "packing": source.packing,
            }
            for source in order.sources
        ],
        "stages": [
            {
                "name": stage.name,
                "samples": stage.samples,
                "changes": stage.changes,
                "unit": stage.unit,
                "block": stage.block,
                "lanes": [[source, *lane] for source, lane in zip(stage.sources, stage.lanes.tolist(), strict=True)],
            }
            for stage in order.stages
        ],
    }


def seen(plan: dict[str, Any], num_samples: int) -> dict[str, Any]:
    """What of a description decides the first `num_samples` samples."""
    stages = []
    first = 0
    for stage in plan["stages"]:
        if first >= num_samples:
            break
        goes_on = not stage["samples"] or first + stage["samples"] >= num_samples
        lanes = [
            [*(plan["sources"][source][name] for name in ("content", "windows", "language", "packing")), *shares]
            for source, *shares in stage["lanes"]
        ]
        samples = None if goes_on and not stage["changes"] else stage["samples"]
        stages.append({"samples": samples, "unit": stage["unit"], "block": stage["block"], "lanes": lanes})
        first += stage["samples"] or num_samples
    return {"version": plan["version"], "seed": plan["seed"], "seq_length": plan["seq_length"], "stages": stages}


def order_hash(plan: dict[str, Any], num_samples: int) -> str:
    """Identity of the first `num_samples` samples of a description."""
    return sha256_json(seen(plan, num_samples))


def what_changed(earlier: dict[str, Any], now: dict[str, Any], num_samples: int) -> str:
    """Why the first `num_samples` samples of two descriptions are not the same; empty if they are."""
    for name in ("version", "seed", "seq_length"):
        if earlier.get(name) != now.get(name):
            return f"the order's {name} was {earlier.get(name)} and is now {now.get(name)}"
    old, new = (seen(plan, num_samples)["stages"] for plan in (earlier, now))
    first = 0
    for number, (one, other) in enumerate(zip(old, new, strict=False)):
        if one != other:
            title = now["stages"][number]["name"] or "the mixture"
            return f"{title!r}, which began at sample {first:,}: {_difference(earlier, now, number)}"
        first += one["samples"] or 0
    return "" if len(old) == len(new) else f"there were {len(old)} stages in it and are now {len(new)}"


def _difference(earlier: dict[str, Any], now: dict[str, Any], number: int) -> str:
    old, new = (plan["stages"][number] for plan in (earlier, now))
    mixtures = [_mixture(plan, stage) for plan, stage in ((earlier, old), (now, new))]
    if mixtures[0] != mixtures[1]:
        return f"it was {mixtures[0]} and is now {mixtures[1]}"
    for lane, other in zip(old["lanes"], new["lanes"], strict=True):
        facts, changed = earlier["sources"][lane[0]], now["sources"][other[0]]
        content = "other tokens or another pack" if facts["packing"] == "best_fit" else "other tokens"
        for name, words in (("content", content), ("packing", "another packing"), ("language", "a language")):
            if facts[name] != changed[name]:
                return f"source {changed['name']!r} has {words} now ({facts[name][:12]} became {changed[name][:12]})"
        if facts["windows"] != changed["windows"]:
            return f"source {changed['name']!r} had {facts['windows']:,} samples and has {changed['windows']:,}"
    return f"it had {old['samples']:,} samples and has {new['samples']:,}, or its sources take their turns elsewhere"


def _mixture(plan: dict[str, Any], stage: dict[str, Any]) -> str:
    parts = []
    for source, start, end, _, _ in stage["lanes"]:
        share = f"{start / stage['unit']:.6g}" + (f" to {end / stage['unit']:.6g}" if start != end else "")
        parts.append(f"{plan['sources'][source]['name']} {share}")
    return ", ".join(parts)
