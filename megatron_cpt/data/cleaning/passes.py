"""The two walks over a corpus: one that measures and judges, one that writes what stays."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_cpt.data import _native
from megatron_cpt.data.blocks import RawBlock, stop_at_fault
from megatron_cpt.data.cleaning.duplicates import Signing
from megatron_cpt.data.cleaning.normalise import Change, normalise
from megatron_cpt.data.cleaning.plugins import Scale, Scorer, open_scorers, scores
from megatron_cpt.data.cleaning.profiles import Profile
from megatron_cpt.data.cleaning.rules import KEPT, judge
from megatron_cpt.data.cleaning.tally import (
    Counts,
    Floats,
    Place,
    count_changes,
    count_documents,
    count_histograms,
    count_rules,
    edges_of,
    merge,
    scale_of,
)
from megatron_cpt.data.counting import fault_kind
from megatron_cpt.data.part import Part
from megatron_cpt.errors import DataError

Verdicts = npt.NDArray[np.uint8]
EXACT_DUPLICATE, NEAR_DUPLICATE = 254, 255  # verdicts that only the whole corpus can give
ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Job:
    """What every pass has to know; a plain value, which loads its scorers where it is.

    Args:
        profile: the rules.
        text_field: field (column) that holds the text.
        on_error: "stop": a record without a text stops the work; "skip": it is counted and left out.
    """

    profile: Profile
    text_field: str
    on_error: str

    @cached_property
    def scorers(self) -> dict[str, Scorer]:
        """The scorers of the profile, loaded."""
        return scorers_of(self.profile)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def signing(self) -> Signing | None:
        """How documents are signed, None where duplicates stay."""
        wanted = self.profile.duplicates
        return Signing(wanted.num_permutations, wanted.shingle, wanted.seed) if wanted is not None else None

    def parse(self, raw: RawBlock, path: Path, keep_records: bool = False) -> _native.Block:
        """The documents of a raw block; raises DataError at a fault where faults stop the work."""
        block = raw.parse(keep_records=keep_records)
        if self.on_error == "stop":
            stop_at_fault(block, path)
        return block


@dataclass(frozen=True)
class _Scanned:
    verdicts: Verdicts
    lines: npt.NDArray[np.int64]
    signatures: bytes
    faults: list[tuple[int, str]]
    counts: Counts


class Scan:
    """The first walk over one file: figures, verdicts, signatures, counts.

    Writes, for block after block: `documents` (how many the block has, int64), `verdicts` (one byte a document:
    `KEPT`, or the place of the first rule broken), and of what the rules keep `lines` (int64) and `signatures`.
    """

    def __init__(self, job: Job, scorers: Mapping[str, Scorer], part: Part) -> None:
        self._job, self._part, self._scorers = job, part, scorers
        self._counts: Counts = part.state
        self._edges = {metric: edges for metric, (_, edges) in axes_of(job.profile, scorers).items()}

    def process(self, raw: RawBlock, number: int) -> _Scanned:
        """Measure and judge one block."""
        profile = self._job.profile
        rules = profile.active_rules
        block = self._job.parse(raw, self._part.input)
        judged, changes = _normalised(block, profile)
        wanted = [metric for metric in self._edges if metric not in self._scorers]
        metrics: dict[str, Any] = {}
        if wanted:
            metrics |= _native.text_metrics(judged, list(profile.stop_words), wanted)
        if self._scorers:
            texts = judged.texts()
            metrics |= {name: np.array(scores(name, one, texts)) for name, one in self._scorers.items()}
        verdicts, broken = judge(metrics, rules, len(block))
        kept = verdicts == KEPT
        place = Place(self._part.number, number)
        counts: Counts = {
            "documents": len(block),
            "bytes": block.text_bytes,
            "rules": count_rules(rules, metrics, (verdicts, broken), block, place),
            "changes": count_changes(changes, block, place),
            "changed_documents": len({change.document for change in changes}),
            "histograms": count_histograms(metrics, self._edges, kept),
            "faults": {},
        }
        for _, reason in block.faults:
            merge(counts["faults"], {fault_kind(reason): 1})
        signing = self._job.signing
        signatures = signing.sign(judged.select(kept)).tobytes() if signing is not None and kept.any() else b""
        return _Scanned(verdicts, block.lines[kept], signatures, block.faults, counts)

    def write(self, result: _Scanned) -> None:
        """Append what was found to the part's files."""
        merge(self._counts, result.counts)
        self._part.write("documents", np.array([len(result.verdicts)], "<i8"))
        self._part.write("verdicts", result.verdicts)
        self._part.write("lines", result.lines.astype("<i8"))
        self._part.write("signatures", result.signatures)
        faults = "".join(f"{self._part.input}:{line}: {reason}\n" for line, reason in result.faults)
        self._part.write("faults", faults.encode())

    def state(self) -> dict[str, Any]:
        """The counts."""
        return self._counts


@dataclass(frozen=True)
class _Written:
    data: bytes
    counts: Counts


class Write:
    """The second walk over one file: the documents that stay, one JSON line each, zstd frames of a block each."""

    def __init__(self, job: Job, part: Part, documents: npt.NDArray[np.int64], verdicts: Verdicts) -> None:
        self._job, self._part = job, part
        self._blocks = np.split(verdicts, np.cumsum(documents)[:-1]) if len(documents) else []
        survivors = [int((block == KEPT).sum() + (block >= EXACT_DUPLICATE).sum()) for block in self._blocks]
        self._survivors_before = np.cumsum([0, *survivors])
        self._counts: Counts = part.state.get("counts", {})
        saved = part.state.get("sha256")
        self._hash = _native.Sha256.from_saved(base64.b64decode(saved)) if saved else _native.Sha256()

    def process(self, raw: RawBlock, number: int) -> _Written:
        """Normalise, select and compress one block."""
        import pyarrow

        block = self._job.parse(raw, self._part.input, keep_records=True)
        verdicts = self._blocks[number] if number < len(self._blocks) else np.zeros(0, np.uint8)
        if len(verdicts) != len(block):
            raise DataError(f"{self._part.input} has other documents than when it was judged; run the command again")
        kept = verdicts == KEPT
        texts = block.texts() if kept.any() and self._job.profile.normalise else []
        changed = normalise(texts, self._job.profile.normalise)[0] if texts else None
        lines = block.write_jsonl(kept, changed)
        counts: Counts = {
            "documents": int(kept.sum()),
            "bytes": _kept_bytes(block, kept, changed),
            "exact_duplicates": self._duplicates(block, verdicts, EXACT_DUPLICATE, number),
            "near_duplicates": self._duplicates(block, verdicts, NEAR_DUPLICATE, number),
        }
        compressed = pyarrow.Codec("zstd", compression_level=ZSTD_LEVEL).compress(lines, asbytes=True) if lines else b""
        return _Written(compressed, counts)

    def _duplicates(self, block: _native.Block, verdicts: Verdicts, verdict: int, number: int) -> Counts:
        """Counts, with samples that know their place (`survivor`) among what the rules keep of the file."""
        counts = count_documents(verdicts == verdict, block, Place(self._part.number, number))
        for sample in counts["samples"]:
            before = verdicts[: sample.pop("document")]
            survivors = (before == KEPT).sum() + (before >= EXACT_DUPLICATE).sum()
            sample["survivor"] = int(self._survivors_before[number] + survivors)
        return counts

    def write(self, result: _Written) -> None:
        """Append a frame."""
        merge(self._counts, result.counts)
        self._part.write("zst", result.data)
        self._hash.update(result.data)

    def state(self) -> dict[str, Any]:
        """The counts, and the hash of what was written."""
        return {"counts": self._counts, "sha256": base64.b64encode(self._hash.saved()).decode()}


def digest(state: dict[str, Any]) -> str:
    """SHA-256 of what `Write` has written, from its state."""
    return _native.Sha256.from_saved(base64.b64decode(state["sha256"])).digest().hex()


def scorers_of(profile: Profile) -> dict[str, Scorer]:
    """The scorers that a rule of the profile looks at, loaded."""
    wanted = {rule.metric for rule in profile.active_rules.values()}
    return open_scorers({name: config for name, config in profile.active_scorers.items() if name in wanted})


def axes_of(profile: Profile, scorers: Mapping[str, Scorer]) -> dict[str, tuple[Scale, Floats]]:
    """Of each figure that a rule looks at: how it is drawn, and the borders of its histogram's bins."""
    rules = list(profile.active_rules.values())
    scales: dict[str, Scale] = {
        rule.metric: scorers[rule.metric].scale if rule.metric in scorers else scale_of(rule.metric) for rule in rules
    }
    return {
        metric: (scale, edges_of(scale, [rule for rule in rules if rule.metric == metric]))
        for metric, scale in scales.items()
    }


def _normalised(block: _native.Block, profile: Profile) -> tuple[_native.Block, list[Change]]:
    if not profile.normalise:
        return block, []
    texts = block.texts()
    changed, changes = normalise(texts, profile.normalise)
    if not changes:
        return block, []
    now = [text if new is None else new for text, new in zip(texts, changed, strict=True)]
    return _native.Block.from_texts(now), changes


def _kept_bytes(block: _native.Block, kept: npt.NDArray[np.bool_], changed: list[str | None] | None) -> int:
    sizes = block.document_bytes.copy()
    for document, text in enumerate(changed or []):
        if text is not None:
            sizes[document] = len(text.encode())
    return int(sizes[kept].sum())
