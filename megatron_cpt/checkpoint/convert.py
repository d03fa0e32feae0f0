"""Convert a Llama between any two formats and layouts, tensor by tensor, without building a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_cpt import __version__
from megatron_cpt.checkpoint.carried_state import carried_state, masters_as_weights, wants_state
from megatron_cpt.checkpoint.described import Hints, megatron_flags
from megatron_cpt.checkpoint.execute import JOURNAL, Journal, execute, num_workers, peak_bytes
from megatron_cpt.checkpoint.files import file_inside, require_space
from megatron_cpt.checkpoint.hf_config import CONFIG, DECIDED_FIELDS, hf_config
from megatron_cpt.checkpoint.huggingface import lay_out_hf
from megatron_cpt.checkpoint.layout import NewLayout, Target, check_layout
from megatron_cpt.checkpoint.manifest import SEALS, write_checkpoint_manifest
from megatron_cpt.checkpoint.meta import lay_out_meta
from megatron_cpt.checkpoint.meta_params import PARAMS
from megatron_cpt.checkpoint.model_card import model_card
from megatron_cpt.checkpoint.mp_rank import lay_out_mp_rank, rank_divisor
from megatron_cpt.checkpoint.nxd import lay_out_nxd
from megatron_cpt.checkpoint.opening import open_checkpoint, state_of_files
from megatron_cpt.checkpoint.reader import num_bytes, weights_sha256
from megatron_cpt.checkpoint.runs import StoredModel
from megatron_cpt.checkpoint.seal import check_manifest, seal_files
from megatron_cpt.checkpoint.tokenizer_files import copy_tokenizer, end_tokens, matching_tokenizer
from megatron_cpt.checkpoint.torch_dist import lay_out_torch_dist
from megatron_cpt.config.folders import (
    check_apart,
    check_free,
    check_writable,
    resumable_folder,
    staged_folder,
    sync_folder,
)
from megatron_cpt.config.manifest import MANIFEST, sha256_file, sha256_json
from megatron_cpt.config.padding import padded_vocab_size
from megatron_cpt.errors import CheckpointError
from megatron_cpt.runtime.lock import lock_folder

Format = Literal["hf", "torch_dist", "mp_rank", "meta", "nxd"]
FORMATS: tuple[Format, ...] = ("hf", "torch_dist", "mp_rank", "meta", "nxd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a format has no use for.
_LEGACY = ("vpp", "spec", "optimizer_form")
_IGNORED = {
    "hf": ("tp", "pp", *_LEGACY, "vocab_divisor"),
    "torch_dist": ("tp", "pp", *_LEGACY),
    "meta": ("pp", *_LEGACY, "vocab_divisor"),
    "nxd": (*_LEGACY, "vocab_divisor"),
}
_CARRIED = ("step", "bos_token_id", "eos_token_id", "huggingface", "assumed")


def convert(
    src: str | Path,
    dst: str | Path,
    to: Format | None = None,
    vocab_divisor: int = 128,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int = 1,
    spec: str = "te",
    optimizer: bool = True,
    masters: bool = False,
    optimizer_form: str = "distributed",
    hints: Hints | None = None,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    workers: int | None = None,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    on_kept: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint; every tensor is carried over bit for bit unless `dtype` says otherwise.

    Where every byte goes is planned from headers, and checked, before one is written: every element of the source
    goes to one place, and every byte of the new files comes from one. Memory is bounded by a few blocks for each
    worker. A conversion that was killed is continued by the same call.

    Args:
        src: a checkpoint, see `open_checkpoint`.
        dst: folder to make; must be new or empty. It appears only when it is complete.
        to: the format to write; None: "hf", or "torch_dist" where the source is "hf".
        vocab_divisor: of Megatron's formats: the tables are padded with zero rows to a multiple of this.
        tokenizer: folder of the model's tokenizer; None: the source folder when it holds one. Its files go along.
        dtype: "float32", "bfloat16" or "float16" to cast the weights to; None keeps each tensor's own.
        tp: tensor-parallel size of a format that is cut by rank.
        pp: pipeline-parallel size, likewise.
        vpp: model chunks of each pipeline rank, likewise.
        spec: whose names "mp_rank" has: "te" (Transformer Engine) or "local" (megatron-core's own modules).
        optimizer: between Megatron's formats, the state of the source's optimizer goes along, if it has one.
        masters: the weights that are written are the optimizer's float32 masters, not those rounded from them.
        optimizer_form: of the state in "mp_rank": "distributed" (`--use-distributed-optimizer`) or "plain".
        hints: what the source does not say of itself.
        bos_token_id: for config.json; None: what the source or its tokenizer says.
        eos_token_id: likewise.
        workers: tensors that are worked on at once; None: two for each core, eight at most.
        dry_run: plan and check only.
        on_progress: called with (bytes done, bytes in all), by any worker.
        on_kept: called with the folder of what is done where the work is interrupted, or the system refuses something.

    Returns:
        facts of the conversion, as recorded in the manifest, with `files` and `bytes`.

    Raises:
        InputError: source, destination, tokenizer or layout cannot be used, or the optimizer's state is not of these
            weights, and nothing is left behind; or another conversion to the same folder is unfinished, and it stays.
        VerificationError: the source's own manifest was changed after it was written.
        OSError: what the system refuses; what was done stays for the next call.
    """
    src, dst = Path(src), Path(os.path.abspath(dst))
    source = open_checkpoint(src, hints=hints)
    if any(name in source.stated for name in SEALS):
        check_manifest(source.folder)
    to = to or ("torch_dist" if source.format == "hf" else "hf")
    target = Target(to, tp, pp, vpp, spec, vocab_divisor, optimizer_form)
    if source.holds_optimizer and wants_state(target, optimizer, masters):
        source = open_checkpoint(src, True, hints)
    source = masters_as_weights(source) if masters else source
    check_free(dst, CheckpointError)
    check_apart(source.folder, dst, CheckpointError)
    given = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "masters": masters or None}
    given = {key: value for key, value in given.items() if value is not None}
    source, plan = _plan(source, target, tokenizer, dtype, given, optimizer)
    workers = num_workers(workers)
    facts = plan.facts | {"source": str(src), "destination": str(dst), "bytes": plan.layout.num_bytes}
    facts["peak_bytes"] = peak_bytes(source, plan.layout, workers, None if dtype is None else DTYPES[dtype])
    check_writable(dst, CheckpointError)
    if dry_run:
        require_space(staged_folder(dst), plan.layout.num_bytes)
        facts.pop("huggingface", None)
        return {**facts, "files": len(plan.layout.files), "dry_run": True}
    described = [str(source.folder.resolve()), state_of_files(source), source.llama.model_dump(), plan.facts]
    with lock_folder(dst.parent, f".{dst.name}.lock", dst):
        try:
            check_free(dst, CheckpointError)  # another process may have made it meanwhile
            journal = _begin(dst, sha256_json([__version__, *described]), plan.layout)
            try:
                _write(source, plan, dst, journal, workers, facts, on_progress)
            except (KeyboardInterrupt, OSError):
                if on_kept is not None:
                    on_kept(staged_folder(dst))
                raise
        finally:
            (dst.parent / f".{dst.name}.lock").unlink()
    facts.pop("huggingface", None)  # a copy of two files, for the manifest alone
    return {**facts, "files": len(plan.layout.files)}


def _write(
    source: StoredModel,
    plan: _Plan,
    dst: Path,
    journal: Journal,
    workers: int,
    facts: dict[str, Any],
    on_progress: Callable[[int, int], None] | None,
) -> None:
    """Make the folder; what is found out meanwhile joins the facts."""
    with resumable_folder(dst, CheckpointError) as folder:
        digests, done = execute(source, plan.layout, folder, journal, workers, on_progress)
        facts |= done
        named = {n: (str(p.dtype).removeprefix("torch."), p.shape, digests[n]) for n, p in plan.layout.tensors.items()}
        facts["weights_sha256"] = weights_sha256({name: named[name] for name in source.names()})
        plan.layout.finish(folder)
        copy_tokenizer(plan.tokenizer, folder)
        if facts["to"] == "hf":
            (folder / "README.md").write_text(model_card(source, facts), encoding="utf-8")
        _write_manifest(folder, source, plan, facts, digests)
        sync_folder(folder)
        journal.close()


@dataclass(frozen=True)
class _Plan:
    layout: NewLayout
    facts: dict[str, Any]
    tokenizer: Path | None


def _plan(
    source: StoredModel,
    target: Target,
    tokenizer: str | Path | None,
    dtype: str | None,
    given: Mapping[str, Any],
    optimizer: bool,
) -> tuple[StoredModel, _Plan]:
    """What will be written, checked to the last byte."""
    _check_request(source, target, dtype, given)
    dtypes = {name: source.dtype(name) if dtype is None else DTYPES[dtype] for name in source.names()}
    facts, folder = _facts(source, dtypes, tokenizer)
    source, state, told = carried_state(source, target, dtypes, optimizer)
    dtypes |= state
    if not state and target.optimizer_form != Target(target.format).optimizer_form:
        raise CheckpointError(
            f"got --optimizer-form {target.optimizer_form}, and no optimizer's state goes along; leave it out"
        )
    facts |= {"to": target.format, "cast": dtype, **told, **given}
    if target.format in ("hf", "nxd"):
        facts["padded_vocab_size"] = source.vocab_size
        config = hf_config(
            source.llama, source.vocab_size, facts["dtype"], facts["bos_token_id"], facts["eos_token_id"]
        )
        other = facts.get("huggingface", {})
        kept = {key: value for key, value in (other.get("config") or {}).items() if key not in DECIDED_FIELDS}
        config = kept | config
        if target.format == "hf":
            layout = lay_out_hf(source, dtypes, config, other.get("generation_config"))
        else:
            layout = lay_out_nxd(source, dtypes, target, config)
            facts |= {"tp": target.tp, "pp": target.pp}
    elif target.format == "meta":
        facts |= {"padded_vocab_size": source.vocab_size, "tp": target.tp}
        layout = lay_out_meta(source, dtypes, target)
    else:
        facts["padded_vocab_size"] = padded_vocab_size(source.vocab_size, target.vocab_divisor)
        facts["vocab_divisor"] = target.vocab_divisor
        if target.format == "torch_dist":
            layout = lay_out_torch_dist(source, dtypes, facts["padded_vocab_size"])
        else:
            layout = lay_out_mp_rank(source, dtypes, target, facts["padded_vocab_size"])
            facts |= {"tp": target.tp, "pp": target.pp, "vpp": target.vpp, "spec": target.spec}
        facts["megatron_flags"] = megatron_flags(source.llama, rank_divisor(target, facts["padded_vocab_size"]))
    check_layout(source, layout, dtypes)
    return source, _Plan(layout, facts, folder)


def _check_request(source: StoredModel, target: Target, dtype: str | None, given: Mapping[str, Any]) -> None:
    """Raise CheckpointError where what is asked for cannot be, or would be ignored."""
    if target.format not in FORMATS:
        raise CheckpointError(f"got the format {target.format!r}, expected one of {', '.join(FORMATS)}")
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"got dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    plain = Target(target.format)
    if useless := [name for name in _IGNORED.get(target.format, ()) if getattr(target, name) != getattr(plain, name)]:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in useless)
        raise CheckpointError(f"got {options} for {target.format}, which has no use for it; leave it out")
    ends = {name: given[name] for name in ("bos_token_id", "eos_token_id") if name in given}
    for name, ids in ends.items():
        for token in ids if isinstance(ids, list) else [ids]:
            if not 0 <= token < source.vocab_size:
                raise CheckpointError(
                    f"got {name} {token}, expected an id below {source.vocab_size}, the size of the vocabulary"
                )


def _facts(
    source: StoredModel, dtypes: Mapping[str, torch.dtype], tokenizer: str | Path | None
) -> tuple[dict[str, Any], Path | None]:
    """What the manifest will say, and the tokenizer's folder."""
    recorded = source.stated.get("tokenizer_sha256")
    folder, sha256 = matching_tokenizer(source.folder, recorded, None if tokenizer is None else Path(tokenizer))
    bos, eos = end_tokens(folder)
    sizes = Counter[str]()
    for name in source.names():
        sizes[str(dtypes[name]).removeprefix("torch.")] += num_bytes(source.shape(name), dtypes[name])
    facts = {
        "from": source.format,
        "tensors": len(source.names()),
        "vocab_size": source.vocab_size,
        "dtype": sizes.most_common(1)[0][0],
        "tokenizer_sha256": sha256,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    return facts | {key: source.stated[key] for key in _CARRIED if source.stated.get(key) is not None}, folder


def _begin(dst: Path, key: str, layout: NewLayout) -> Journal:
    """The journal of this very conversion, begun or found.

    Raises:
        CheckpointError: something else than the same conversion, unfinished, is in its place; or the disk is too small.
    """
    staged = staged_folder(dst)
    if staged.is_symlink():  # not ours: we make folders
        staged.unlink()
    held_there = {path.name for path in staged.glob("*")} if staged.exists() else set()
    if held_there - {JOURNAL} and not Journal.is_of(staged, key):
        what = f"an unfinished conversion to {dst}" if JOURNAL in held_there else "files of something else"
        raise CheckpointError(
            f"{staged} holds {what}, not this one (the source's files, the options and the tool's version count); to "
            "go on with it repeat its very command, to give it up remove that folder"
        )
    _remove_strangers(staged, {JOURNAL, *(file.name for file in layout.files)})
    held = sum(path.stat().st_blocks * 512 for path in staged.rglob("*") if path.is_file())
    require_space(staged, max(0, layout.num_bytes - held))
    staged.mkdir(parents=True, exist_ok=True)
    return Journal(staged, key)


def _remove_strangers(staged: Path, known: Set[str]) -> None:
    """Remove what an unfinished folder holds beside files of its plan: a killed attempt's last files, or a user's."""
    for path in sorted(staged.rglob("*"), reverse=True):
        name = path.relative_to(staged).as_posix()
        if path.is_dir() and not path.is_symlink():
            if not any(file.startswith(f"{name}/") for file in known):
                path.rmdir()
        elif name not in known or path.is_symlink():
            path.unlink()


def _write_manifest(
    folder: Path, source: StoredModel, plan: _Plan, facts: dict[str, Any], digests: Mapping[str, str]
) -> None:
    inputs = {}
    for name in (MANIFEST, CONFIG, PARAMS):
        if (source.folder / name).exists():
            inputs[name] = sha256_file(file_inside(source.folder, name))
            break
    if facts["cast"] is None:
        inputs["weights"] = facts["weights_sha256"]
    names = ("vocab_divisor", "dtype", "weights_sha256", "cast", "cast_max_abs_error", "optimizer", "masters")
    write_checkpoint_manifest(
        folder,
        source.llama,
        facts["vocab_size"],
        facts["padded_vocab_size"],
        facts["tokenizer_sha256"],
        inputs,
        format=facts["to"],
        converted_from=facts["from"],
        **{name: facts[name] for name in (*names, *_CARRIED) if name in facts},
        tensors=dict(digests),
        files=seal_files(folder, plan.layout),
    )
