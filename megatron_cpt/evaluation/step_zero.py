"""The certificate of a surgery: what it left alone, and what the model is before its first step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpt.checkpoint import LlamaForward, open_checkpoint
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest
from megatron_cpt.checkpoint.reader import ModelReader, num_bytes, row_blocks
from megatron_cpt.config.manifest import read_json, write_json_atomic
from megatron_cpt.data import Document
from megatron_cpt.errors import CheckpointError, VerificationError
from megatron_cpt.evaluation.bits_per_byte import bits_per_byte
from megatron_cpt.runtime.device import current_device
from megatron_cpt.surgery import SurgeryPlan
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

CERTIFICATE = "surgery_certificate.json"
_FORMAT = 1
_BLOCK_BYTES = 64 << 20
_BLOCK_ROWS = 4096
_LOGIT_TOKENS = 512
_QUANTILES = (0.05, 0.5, 0.95)


def certify(
    base: str | Path,
    operated: str | Path,
    plan: SurgeryPlan,
    old_tokenizer: str | Path,
    texts: Mapping[str, Sequence[Document]],
    source: str,
    seq_length: int,
) -> dict[str, Any]:
    """Measure a model after surgery against its base and leave the certificate in its folder.

    Args:
        base: folder of the base model.
        operated: folder of the model after surgery, which holds the new tokenizer.
        plan: the plan that was applied.
        old_tokenizer: folder or file of the base's tokenizer.
        texts: language -> held-out documents; the source language among them.
        source: the language that must not be lost.
        seq_length: context in tokens.

    Returns:
        The certificate, as written to `surgery_certificate.json`: whether it is `passed`; `kept_rows` compared and
        `different`; `logits`: the largest difference of the kept rows' logits on source text; for each matrix the
        norms of old and new rows, duplicates, zero rows and rows that are not finite; bits per byte of each
        language `before` and `after`, and the share of probability that new rows take.

    Raises:
        CheckpointError: a folder is not the plan's.
        DataError: no source text.
    """
    old, new = open_checkpoint(base), open_checkpoint(operated)
    made_for = read_checkpoint_manifest(operated)["tokenizer_sha256"]
    if made_for != plan.new_sha256 or new.vocab_size < plan.new_size:  # more rows are padding
        raise CheckpointError(f"{operated} was not made by this plan: it has another vocabulary; apply the plan first")
    names = {"embedding": EMBEDDING} if old.llama.tied_embeddings else {"embedding": EMBEDDING, "head": HEAD}
    kept = {name: plan.kept(name) for name in names}
    matrices = {name: _rows(old, new, plan, name, key) for name, key in names.items()}
    tokenizers = load_tokenizer(old_tokenizer), load_tokenizer(operated)
    text = _kept_text(texts[source], *tokenizers, kept["embedding"])
    logits = _logits(old, new, kept.get("head", kept["embedding"]), text)
    different = sum(facts.pop("kept_different") for facts in matrices.values())
    broken = sum(facts["new_not_finite"] for facts in matrices.values())
    certificate = {
        "format": _FORMAT,
        "passed": different == 0 and broken == 0 and logits["max_abs_diff"] == 0.0,
        "weights_sha256": _weights(operated),
        "plan": plan.facts(),
        "kept_rows": {"compared": sum(map(len, kept.values())), "different": different},
        "logits": logits,
        "matrices": matrices,
        "bits_per_byte": {
            language: {
                "before": bits_per_byte(base, documents, seq_length, old_tokenizer)["bits_per_byte"],
                "after": bits_per_byte(operated, documents, seq_length)["bits_per_byte"],
            }
            for language, documents in texts.items()
        },
        "probability_of_new_rows": {
            language: _new_share(operated, plan, tokenizers[1], documents, seq_length)
            for language, documents in texts.items()
        },
        "source": source,
    }
    write_json_atomic(Path(operated) / CERTIFICATE, certificate)
    return certificate


def check_certificate(operated: str | Path) -> dict[str, Any]:
    """The certificate of a model, where it has one that is good.

    Raises:
        VerificationError: there is none, it belongs to other weights, or a check has failed.
    """
    path = Path(operated) / CERTIFICATE
    if not path.is_file():
        raise VerificationError(f"{operated} has no {CERTIFICATE}: measure it with `surgery certify`")
    held: dict[str, Any] = read_json(path)
    if held.get("format") != _FORMAT or held.get("weights_sha256") != _weights(operated):
        raise VerificationError(f"{path} belongs to other weights: measure the model again with `surgery certify`")
    if not held["passed"]:
        raise VerificationError(
            f"{path}: {held['kept_rows']['different']} kept rows differ, logits of kept tokens move by "
            f"{held['logits']['max_abs_diff']:.1e}; expected none: apply the plan again"
        )
    return held


def _weights(folder: str | Path) -> str | None:
    recorded: str | None = read_checkpoint_manifest(folder).get("weights_sha256")
    return recorded


def _rows(old: ModelReader, new: ModelReader, plan: SurgeryPlan, name: str, key: str) -> dict[str, Any]:
    """Kept rows of a matrix compared bit by bit, and what the new ones look like."""
    old_VD = old.read(key)[: plan.old_size]
    kept_W = torch.full((plan.new_size,), -1)
    kept = plan.kept(name)
    kept_W[torch.tensor(list(kept), dtype=torch.int64)] = torch.tensor(list(kept.values()), dtype=torch.int64)
    is_new = torch.zeros(plan.new_size, dtype=torch.bool)
    is_new[plan.matrix(name).new_rows] = True
    norms, seen, facts = [], set(), {"kept_different": 0, "new_not_finite": 0, "new_zero": 0, "new_duplicates": 0}
    for start, stop in row_blocks(plan.new_size, num_bytes(new.shape(key)[1:], new.dtype(key)), _BLOCK_BYTES):
        rows = new.read_rows(key, start, stop)
        at = torch.nonzero(kept_W[start:stop] >= 0).flatten()
        moved = _bits(rows[at]) != _bits(old_VD[kept_W[start:stop][at]])
        facts["kept_different"] += int(moved.any(dim=1).sum())
        made = rows[is_new[start:stop]].float()
        finite = made.isfinite().all(dim=1)
        facts["new_not_finite"] += int((~finite).sum())
        norms.append(made[finite].norm(dim=1))
        facts["new_zero"] += int((norms[-1] == 0).sum())
        for row in _bits(rows[is_new[start:stop]]).numpy():
            facts["new_duplicates"] += (digest := hashlib.blake2b(row.tobytes(), digest_size=16).digest()) in seen
            seen.add(digest)
    old_norms = torch.cat([block.float().norm(dim=1) for block in old_VD.split(_BLOCK_ROWS)])
    return {**facts, "norms": {"old": _quantiles(old_norms), "new": _quantiles(torch.cat(norms))}}


def _bits(rows: Tensor) -> Tensor:
    return rows.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.dtype.itemsize])


def _quantiles(values: Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    ordered = values.sort().values
    return {f"{share:.0%}": float(ordered[int(share * (len(values) - 1))]) for share in _QUANTILES}


def _kept_text(
    documents: Sequence[Document], old: Tokenizer, new: Tokenizer, kept: Mapping[int, int]
) -> tuple[list[int], list[int]]:
    """(old ids, new ids) of source lines that both tokenizers cut alike, some hundred tokens."""
    before: list[int] = []
    after: list[int] = []
    for line in (line for document in documents for line in document.text.split("\n") if line):
        ids = new.encode(line)
        if all(id in kept for id in ids) and [kept[id] for id in ids] == old.encode(line):
            before += [kept[id] for id in ids]
            after += ids
        if len(after) >= _LOGIT_TOKENS:
            break
    return before[:_LOGIT_TOKENS], after[:_LOGIT_TOKENS]


def _logits(
    old: ModelReader, new: ModelReader, kept: Mapping[int, int], ids: tuple[list[int], list[int]]
) -> dict[str, Any]:
    """Logits of the kept rows on a source text, before and after; products of equal shapes, so equal means equal."""
    if not ids[0] or not kept:
        return {"max_abs_diff": 0.0, "tokens": 0}
    device = current_device().torch_device()
    made = []
    for reader, tokens, rows in ((old, ids[0], list(kept.values())), (new, ids[1], list(kept))):
        length = min(len(tokens), reader.llama.max_position_embeddings)
        hidden_SD = LlamaForward(reader, device=device).hidden(torch.tensor([tokens[:length]]))[0]
        table = reader.read(EMBEDDING if reader.llama.tied_embeddings else HEAD)
        made.append(F.linear(hidden_SD, table[torch.tensor(rows, dtype=torch.int64)].to(hidden_SD)))
    return {"max_abs_diff": float((made[0] - made[1]).abs().max()), "tokens": made[0].shape[0]}


def _new_share(
    operated: str | Path, plan: SurgeryPlan, tokenizer: Tokenizer, documents: Sequence[Document], seq_length: int
) -> float:
    """Mean share of the probability that the new rows take, over the first tokens of a language's text."""
    tokens: list[int] = []
    for document in documents:
        tokens += ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(document.text)
        if len(tokens) >= _LOGIT_TOKENS:
            break
    length = min(len(tokens), _LOGIT_TOKENS, seq_length)
    if not length or not len(plan.embedding.new_rows):
        return 0.0
    forward = LlamaForward(operated, device=current_device().torch_device())
    logits_SV = forward.logits(torch.tensor([tokens[:length]]))[0].float()
    return float(logits_SV.softmax(dim=-1)[:, plan.embedding.new_rows.to(logits_SV.device)].sum(dim=-1).mean())
