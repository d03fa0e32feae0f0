"""The certificate of a surgery: what it left alone, and what the model is before its first step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpt.checkpoint import LlamaForward, StoredModel, open_checkpoint
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.checkpoint.manifest import read_checkpoint_manifest
from megatron_cpt.checkpoint.reader import ModelReader, bits, num_bytes, row_blocks
from megatron_cpt.config.manifest import read_json, write_json_atomic
from megatron_cpt.data import Document
from megatron_cpt.errors import CheckpointError, DataError, TokenizerError, VerificationError
from megatron_cpt.evaluation.bits_per_byte import bits_per_byte
from megatron_cpt.runtime.device import current_device
from megatron_cpt.surgery import RowMaker, SurgeryPlan
from megatron_cpt.surgery.apply.record import check_made_by
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer

CERTIFICATE = "surgery_certificate.json"
_FORMAT = 2
_BLOCK_BYTES = 64 << 20
_BLOCK_ROWS = 4096
_LOGIT_TOKENS = 512
_QUANTILES = (0.05, 0.5, 0.95)
# Of a row's length: products of matrices may be rounded otherwise by another kind of processor.
_ROUNDING = 1e-3


def certify(
    base: str | Path,
    operated: str | Path,
    plan: SurgeryPlan,
    old_tokenizer: str | Path,
    texts: Mapping[str, Sequence[Document]],
    source: str,
    seq_length: int,
    new_tokenizer: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a model after surgery against its base and leave the certificate in its folder.

    Args:
        base: folder of the base model.
        operated: folder of the model after surgery.
        plan: the plan that was applied.
        old_tokenizer: folder or file of the base's tokenizer.
        texts: language -> held-out documents; the source language among them.
        source: the language that must not be lost.
        seq_length: context in tokens.
        new_tokenizer: folder or file of the new tokenizer; None: the folder of the model after surgery holds it.

    Returns:
        The certificate, as written to `surgery_certificate.json`: whether it is `passed`; `kept_rows` compared with
        the base's and `different`; `new_rows`, all others of the vocabulary, compared with what the plan makes of
        the base's, `different` and `rounded` (equal but for rounding); `padding_rows` compared with zero; `logits`:
        the largest difference of the kept rows' logits on kept pieces of source text, None where the plan keeps no
        row of a matrix; for each matrix the norms of old and new rows, duplicates, zero rows and rows that are not
        finite; bits per byte of each language `before` and `after`, and the share of probability that new rows take.

    Raises:
        CheckpointError: a folder is not the plan's, or of a format that no forward pass reads.
        TokenizerError: a tokenizer is not the plan's.
        DataError: no piece of the source text is kept.
    """
    old, new = open_checkpoint(base), open_checkpoint(operated)
    _check_made_by(plan, new)
    tokenizers = _tokenizer(plan, "old", old_tokenizer), _tokenizer(plan, "new", new_tokenizer or operated)
    names = {"embedding": EMBEDDING} if old.llama.tied_embeddings else {"embedding": EMBEDDING, "head": HEAD}
    logits = _logits(old, new, [plan.kept(name) for name in names], texts[source], tokenizers[0])
    counts = {
        "kept_rows": {"compared": 0, "different": 0},
        "new_rows": {"compared": 0, "different": 0, "rounded": 0},
        "padding_rows": {"compared": 0, "different": 0},
    }
    matrices = {name: _rows(old, new, plan, name, key, counts) for name, key in names.items()}
    faults = [found["different"] for found in counts.values()]
    faults += [facts["new_not_finite"] for facts in matrices.values()]
    certificate = {
        "format": _FORMAT,
        "passed": not any(faults) and logits["max_abs_diff"] in (None, 0.0),
        "weights_sha256": _weights(operated),
        "plan": plan.facts(),
        **counts,
        "logits": logits,
        "matrices": matrices,
        "bits_per_byte": {
            language: {
                "before": bits_per_byte(base, documents, seq_length, old_tokenizer)["bits_per_byte"],
                "after": bits_per_byte(operated, documents, seq_length, new_tokenizer)["bits_per_byte"],
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
    if held.get("format") != _FORMAT:
        raise VerificationError(f"{path} is of another version: measure the model again with `surgery certify`")
    if held.get("weights_sha256") != _weights(operated):
        raise VerificationError(f"{path} belongs to other weights: measure the model again with `surgery certify`")
    if not held["passed"]:
        moved, broken = held["logits"]["max_abs_diff"], [facts["new_not_finite"] for facts in held["matrices"].values()]
        raise VerificationError(
            f"{path}: {held['kept_rows']['different']} kept rows differ from the base's, "
            f"{held['new_rows']['different']} other rows from the plan's, {sum(broken)} are not finite, "
            f"{held['padding_rows']['different']} rows of padding are not zero, logits of kept tokens move by "
            f"{moved or 0.0:.1e}; expected none: apply the plan again"
        )
    return held


def _weights(folder: str | Path) -> str | None:
    recorded: str | None = read_checkpoint_manifest(folder).get("weights_sha256")
    return recorded


def _check_made_by(plan: SurgeryPlan, new: ModelReader) -> None:
    manifest = read_checkpoint_manifest(new.folder)
    if manifest["tokenizer_sha256"] != plan.new_sha256 or new.vocab_size < plan.new_size:  # more rows are padding
        raise CheckpointError(
            f"{new.folder} was not made by this plan: it has another vocabulary; apply the plan first"
        )
    # A conversion does not carry the record on; rows are compared with the plan's in any case.
    if isinstance(surgery := manifest.get("surgery"), dict):
        check_made_by(plan, surgery, new.folder)


def _tokenizer(plan: SurgeryPlan, side: Literal["old", "new"], path: str | Path) -> Tokenizer:
    tokenizer, expected = load_tokenizer(path), plan.old_sha256 if side == "old" else plan.new_sha256
    if tokenizer.sha256 != expected:
        raise TokenizerError(
            f"{path} is not the {side} tokenizer of the plan (got {tokenizer.sha256[:12]}, expected {expected[:12]}): "
            "give that one"
        )
    return tokenizer


def _rows(
    old: ModelReader, new: ModelReader, plan: SurgeryPlan, name: str, key: str, counts: Mapping[str, dict[str, int]]
) -> dict[str, Any]:
    """What the rows of a matrix look like; `counts` is told how many are as they have to be."""
    old_VD, matrix, kept = old.read(key), plan.matrix(name), plan.kept(name)
    maker = RowMaker(matrix, old_VD)
    kept_W = torch.full((plan.new_size,), -1)
    kept_W[torch.tensor(list(kept), dtype=torch.int64)] = torch.tensor(list(kept.values()), dtype=torch.int64)
    is_new = torch.zeros(plan.new_size, dtype=torch.bool)
    is_new[matrix.new_rows] = True
    norms, seen, facts = [], set(), {"new_not_finite": 0, "new_zero": 0, "new_duplicates": 0}
    row_bytes = num_bytes(new.shape(key)[1:], new.dtype(key))
    for start, stop in row_blocks(plan.new_size, row_bytes, _BLOCK_BYTES):
        rows, is_kept = new.read_rows(key, start, stop), kept_W[start:stop] >= 0
        before = old_VD[kept_W[start:stop][is_kept]]
        _count(counts["kept_rows"], different=_unlike(rows[is_kept], before))
        planned = maker.rows(start, stop)[~is_kept]
        unlike = _unlike(rows[~is_kept], planned)
        ours, theirs = rows[~is_kept][unlike].float(), planned[unlike].float()
        near = (ours - theirs).norm(dim=1) <= _ROUNDING * theirs.norm(dim=1)
        unlike[unlike.clone()] = ~near
        _count(counts["new_rows"], different=unlike, rounded=near)
        made = rows[is_new[start:stop]].float()
        finite = made.isfinite().all(dim=1)
        facts["new_not_finite"] += int((~finite).sum())
        norms.append(made[finite].norm(dim=1))
        facts["new_zero"] += int((norms[-1] == 0).sum())
        for row in bits(rows[is_new[start:stop]]).numpy():
            facts["new_duplicates"] += (digest := hashlib.blake2b(row.tobytes(), digest_size=16).digest()) in seen
            seen.add(digest)
    for padding in _padding(new, plan.new_size, key, row_bytes):
        _count(counts["padding_rows"], different=(padding != 0).any(dim=1))
    old_norms = torch.cat([block.float().norm(dim=1) for block in old_VD[: plan.old_size].split(_BLOCK_ROWS)])
    return {**facts, "norms": {"old": _quantiles(old_norms), "new": _quantiles(torch.cat(norms))}}


def _unlike(rows: Tensor, expected: Tensor) -> Tensor:
    """For each row, whether any bit is another (bool)."""
    if rows.dtype != expected.dtype:
        return torch.ones(len(rows), dtype=torch.bool)
    return (bits(rows) != bits(expected)).any(dim=1)


def _count(counts: dict[str, int], *, different: Tensor, **others: Tensor) -> None:
    counts["compared"] += len(different)
    for name, found in {"different": different, **others}.items():
        counts[name] += int(found.sum())


def _padding(new: ModelReader, vocab_size: int, key: str, row_bytes: int) -> Iterator[Tensor]:
    """The stored rows beyond the vocabulary; a torch_dist folder does not count them, config.json does."""
    for start, stop in row_blocks(new.shape(key)[0] - vocab_size, row_bytes, _BLOCK_BYTES):
        yield new.read_rows(key, vocab_size + start, vocab_size + stop)
    if isinstance(new, StoredModel):
        yield from new.padding_blocks(key)


def _quantiles(values: Tensor) -> dict[str, float]:
    if not len(values):
        return {}
    ordered = values.sort().values
    return {f"{share:.0%}": float(ordered[int(share * (len(values) - 1))]) for share in _QUANTILES}


def _kept_pieces(documents: Sequence[Document], old: Tokenizer, kept: Mapping[int, int]) -> list[int]:
    """New ids of source text in the old tokenizer's cut, some hundred, without the pieces that are not kept.

    Whether the new tokenizer cuts the text so too does not matter: the same rows have to give the same logits.
    """
    new_id = {old_id: id for id, old_id in kept.items()}
    pieces: list[int] = []
    cut = 0
    for line in (line for document in documents for line in document.text.split("\n") if line):
        ids = old.encode(line)
        cut += len(ids)
        pieces += [new_id[id] for id in ids if id in new_id]
        if len(pieces) >= _LOGIT_TOKENS:
            break
    if not pieces:
        raise DataError(
            f"no logit can be compared: of {cut} tokens of the source text the surgery keeps none, expected at least "
            f"one of the {len(kept)} pieces that it keeps; give more text of the language that must not be lost"
        )
    return pieces[:_LOGIT_TOKENS]


def _logits(
    old: ModelReader,
    new: ModelReader,
    kept: Sequence[Mapping[int, int]],
    documents: Sequence[Document],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """Logits of the kept rows on a source text, before and after; products of equal shapes, so equal means equal.

    Args:
        old: the base.
        new: the model after surgery.
        kept: new id -> old id of the embedding's rows, and of the head's where it has its own.
        documents: source text.
        tokenizer: the old one.
    """
    embedding, head = kept[0], kept[-1]
    if not embedding or not head:
        return {"max_abs_diff": None, "tokens": 0}
    pieces = _kept_pieces(documents, tokenizer, embedding)[: old.llama.max_position_embeddings]
    device = current_device().torch_device()
    made = []
    for reader, tokens, rows in (
        (old, [embedding[id] for id in pieces], list(head.values())),
        (new, pieces, list(head)),
    ):
        hidden_SD = LlamaForward(reader, device=device).hidden(torch.tensor([tokens]))[0]
        table = reader.read(EMBEDDING if reader.llama.tied_embeddings else HEAD)
        made.append(F.linear(hidden_SD, table[torch.tensor(rows, dtype=torch.int64)].to(hidden_SD)))
    return {"max_abs_diff": float((made[0] - made[1]).abs().max()), "tokens": len(pieces)}


def _new_share(
    operated: str | Path, plan: SurgeryPlan, tokenizer: Tokenizer, documents: Sequence[Document], seq_length: int
) -> float:
    """Mean share of the probability that the head's new rows take, over the first tokens of a language's text."""
    tokens: list[int] = []
    for document in documents:
        tokens += ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(document.text)
        if len(tokens) >= _LOGIT_TOKENS:
            break
    length = min(len(tokens), _LOGIT_TOKENS, seq_length)
    if not length or not len(plan.head.new_rows):
        return 0.0
    forward = LlamaForward(operated, device=current_device().torch_device())
    logits_SV = forward.logits(torch.tensor([tokens[:length]]))[0].float()
    return float(logits_SV.softmax(dim=-1)[:, plan.head.new_rows.to(logits_SV.device)].sum(dim=-1).mean())
