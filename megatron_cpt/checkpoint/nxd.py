"""Training checkpoints of AWS NeuronX Distributed (NxD): one torch.save file for each rank.

Written from the format's public description, not verified on hardware: nothing here was loaded by NxD or run on a
Neuron device. `nxd_names` has the names and the cuts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_cpt.checkpoint.archive import Array, lay_out_archive, read_archive
from megatron_cpt.checkpoint.described import Hints, given_config
from megatron_cpt.checkpoint.files import brief, file_inside, json_inside, not_linked
from megatron_cpt.checkpoint.hf_config import CONFIG, DECIDED_FIELDS, parse_hf_config
from megatron_cpt.checkpoint.huggingface import BIN_INDEX, BIN_WEIGHTS, INDEX, WEIGHTS, dense
from megatron_cpt.checkpoint.layout import NewFile, NewLayout, Target, hole
from megatron_cpt.checkpoint.llama import EMBEDDING
from megatron_cpt.checkpoint.manifest import own_manifest
from megatron_cpt.checkpoint.nxd_names import (
    FORMS,
    HEAD,
    Cut,
    Form,
    Held,
    check_cut,
    layer_pieces,
    padding_pieces,
    pieces_of,
    place_all,
    place_version,
    stored_shapes,
)
from megatron_cpt.checkpoint.runs import StoredModel, same_rows
from megatron_cpt.checkpoint.stand_ins import Named, StandIn
from megatron_cpt.config.manifest import read_json, write_json_atomic
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.errors import CheckpointError

MODEL, BEGUN, DONE = "model", "checkpoint", "done"
_RANK_FILE = re.compile(r"dp_rank_00(_ep_rank_\d{2,})?_tp_rank_(\d{2,6})_pp_rank_(\d{2,6})\.pt")
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)")
_REFERENCE = ("torch_xla.utils.serialization", "TensorReference")
_WRAPPED = "_checkpoint_wrapped_module."
Ranks = dict[tuple[int, int], str]


def is_nxd(folder: str | Path) -> bool:
    """Whether a folder is a tag of NxD, its `model` folder, or holds finished tags."""
    return _find(Path(folder)) is not None


def open_nxd(folder: str | Path, hints: Hints | None = None) -> StoredModel:
    """Open a checkpoint of NxD; only headers are read, and one tensor where heads are stored more than once.

    Args:
        folder: a tag, its `model` folder, or what holds finished tags: then the newest of them.
        hints: `config` for a checkpoint without a config.json in the tag or the folder above; `vocab_size` where the
            tables have other rows than it says.

    Raises:
        CheckpointError: it is none; a rank, a tensor or config.json is missing; or the ranks do not fit together.
    """
    found = _find(Path(folder))
    if found is None:
        raise CheckpointError(
            f"{folder} holds no {_name(0, 0)} and no tag that has it and {DONE}; give the folder of the tag"
        )
    root, below = found
    hints = hints or Hints()
    config, where = _config(root, hints.config)
    llama, vocab_size = parse_hf_config(config, where)
    ranks = _ranks(root / below)
    tp, pp = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
    held = _stored(root, below, ranks, tp, pp)
    cut = _cut(root, llama, tp, held)
    check_cut(llama, cut, str(root), "a rank's file is missing, or config.json is of another model")
    vocab_size, table_rows = _vocabulary(root, vocab_size, hints.vocab_size or hints.tokenizer_size, tp, held)
    _check_stored(root, llama, stored_shapes(llama, table_rows, cut), held)
    cut = _in_its_order(root, llama, cut, held)
    tensors, copies = place_all(llama, vocab_size, pieces_of(llama, vocab_size, table_rows, cut), held)
    padding = {
        name: place_version(name, (table_rows * tp - vocab_size, llama.hidden_size), pieces, held)
        for name, pieces in padding_pieces(llama, vocab_size, table_rows, cut).items()
    }
    stated = own_manifest(root)
    stated |= {key: config[key] for key in ("bos_token_id", "eos_token_id") if config.get(key) is not None}
    other = {key: value for key, value in config.items() if key not in DECIDED_FIELDS}
    stated.setdefault("huggingface", {"config": other, "generation_config": None})
    layout: dict[str, Any] = {"tensor_parallel": tp, "pipeline_parallel": pp, "qkv": cut.form}
    if cut.replication > 1:
        layout |= {"kv_replication": cut.replication, "order_of_heads": cut.order}
    return StoredModel(root, "nxd", llama, vocab_size, table_rows * tp, tensors, padding, copies, stated, layout)


def _find(folder: Path) -> tuple[Path, str] | None:
    """The tag, and the folder below it that holds the ranks' files."""
    if _holds_ranks(folder):
        whole = folder.absolute()
        return (whole.parent, MODEL) if whole.name == MODEL else (folder, "")
    if _holds_ranks(folder / MODEL):
        not_linked(folder / MODEL)
        return folder, MODEL
    if any((folder / name).exists() for name in (WEIGHTS, INDEX, BIN_WEIGHTS, BIN_INDEX)):
        return None  # a model that tags were put beside
    done = [path for path in folder.glob(f"*/{DONE}") if _holds_ranks(path.parent / MODEL)]
    if not done:
        return None
    newest = max(done, key=lambda path: (path.stat().st_mtime_ns, path.parent.name)).parent
    not_linked(not_linked(newest) / MODEL)
    return newest, MODEL


def _holds_ranks(folder: Path) -> bool:
    return any(_RANK_FILE.fullmatch(path.name) for path in folder.glob("dp_rank_*.pt"))


def _config(root: Path, given: Path | None) -> tuple[dict[str, Any], str]:
    """The content of config.json, and its path."""
    if given is not None:
        return given_config(given)
    for folder in (root, root.absolute().parent):
        if (folder / CONFIG).exists():
            return read_json(json_inside(folder, CONFIG), CheckpointError), str(folder / CONFIG)
    raise CheckpointError(
        f"{root}: there is no {CONFIG} in it or above it, and these files do not say what the model is; give that of "
        "the model with --config"
    )


def _ranks(folder: Path) -> Ranks:
    """File of each (tp, pp) rank; raises CheckpointError unless they are a complete grid."""
    ranks: Ranks = {}
    for path in folder.glob("dp_rank_*.pt"):
        if path.name.endswith(".info.pt"):
            continue
        match = _RANK_FILE.fullmatch(path.name)
        if match is None or path.name != _name(int(match[2]), int(match[3])):
            reason = "experts are not of a plain Llama" if match and match[1] else f"expected names like {_name(0, 0)}"
            raise CheckpointError(f"{path}: {reason}; remove or convert it with NxD's own tools")
        ranks[int(match[2]), int(match[3])] = path.name
    tp, pp = (1 + max(rank[axis] for rank in ranks) for axis in (0, 1))
    if tp * pp != len(ranks):
        t, p = next((t, p) for t in range(tp) for p in range(pp) if (t, p) not in ranks)
        raise CheckpointError(f"{folder}: {_name(t, p)} is missing of tp {tp} x pp {pp}; copy the checkpoint again")
    return ranks


def _name(tp: int, pp: int) -> str:
    return f"dp_rank_00_tp_rank_{tp:02d}_pp_rank_{pp:02d}.pt"


def _stored(root: Path, below: str, ranks: Ranks, tp: int, pp: int) -> dict[str, list[Held]]:
    """By stored name, the tensor of each tensor-parallel rank."""
    held: dict[str, list[Held]] = {}
    for stage in range(pp):
        files = [_rank_tensors(root, root / below, ranks[rank, stage]) for rank in range(tp)]
        for rank, file in enumerate(files):
            if file.keys() != files[0].keys():
                name = sorted(file.keys() ^ files[0].keys())[0]
                raise CheckpointError(
                    f"{root / below}: only one of {ranks[0, stage]} and {ranks[rank, stage]} has {name}; the files "
                    "are of two models"
                )
        if twice := sorted(files[0].keys() & held.keys()):
            raise CheckpointError(f"{root / below}: two pipeline ranks hold {twice[0]}; the files are of two models")
        held |= {name: [file[name] for file in files] for name in files[0]}
    return held


def _rank_tensors(root: Path, folder: Path, file: str) -> dict[str, Held]:
    """The tensors of a rank by stored name."""
    path = file_inside(folder, file)
    value = read_archive(path)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected a dict of tensors by name")
    held: dict[str, Held] = {}
    for full, tensor in value.items():
        name = full.replace(_WRAPPED, "")
        if name.endswith("rotary_emb.inv_freq"):  # a constant that old models carry
            continue
        if name in held:
            raise CheckpointError(f"{path} holds {name} twice; save the model again")
        where, source = f"{path}: {full}", path
        if isinstance(tensor, StandIn) and type(tensor).stands_for == _REFERENCE:
            source = _referenced(path, tensor, where)
            tensor = read_archive(source)
        if not isinstance(tensor, Array) and isinstance(type(tensor), Named):
            raise CheckpointError(f"{where} is {'.'.join(type(tensor).stands_for)[:100]}, expected a tensor")
        at = dense(tensor, where, source)
        held[name] = Held(source.relative_to(root).as_posix(), at.offset, at.shape, at.dtype)
    return held


def _referenced(path: Path, reference: StandIn, where: str) -> Path:
    """The file of a tensor that torch_xla saved by itself."""
    state = reference.states[0] if reference.states else None
    number = state.get("tid") if isinstance(state, dict) else None
    if type(number) is not int or number < 0:
        raise CheckpointError(f"{where} refers to the tensor {brief(number)}, expected a number; save the model again")
    folder, file = path.with_name(path.name + ".tensors"), f"tensor_{number}.pt"
    not_linked(folder)
    if not (folder / file).exists():
        raise CheckpointError(
            f"{where} lies in {folder.name}/{file}, which is missing; copy the checkpoint again, or, where it was "
            "saved without weights of lower precision, save it with them"
        )
    return file_inside(folder, file)


def _cut(root: Path, llama: LlamaShape, tp: int, held: Mapping[str, list[Held]]) -> Cut:
    """How the tensors are cut, by the names and sizes of those of a layer; not yet the order of heads."""
    names = {match[2] for name in held if (match := _LAYER.fullmatch(name))}
    forms: list[Form] = [form for form, keys in FORMS.items() if names & set(keys)]
    if len(forms) != 1:
        megatron = "language_model." in " ".join(held)
        raise CheckpointError(
            f"{root}: got q, k and v {'in the form of Megatron' if megatron else f'in {len(forms)} forms'}, expected "
            f"one of {', '.join(keys[0] for keys in FORMS.values())}; convert it with NxD's own tools first"
        )
    keys = FORMS[forms[0]]
    if forms[0] not in ("split", "fused"):
        return Cut(tp, forms[0])
    stored = next(each for name, each in held.items() if name.endswith(f".{keys[len(keys) // 2]}"))
    query, kv = (heads * llama.head_dim for heads in (llama.num_attention_heads, llama.num_query_groups))
    rows = (*stored[0].shape, 0)[0] * tp
    times, rest = divmod(rows, kv) if forms[0] == "split" else divmod(rows - query, 2 * kv)
    if rest or times < 1:
        raise CheckpointError(
            f"{root}: {rows} rows of {keys[len(keys) // 2]} on all ranks are no multiple of what config.json says; "
            "a rank's file is missing, heads were padded, or the weights and the config are of two models"
        )
    return Cut(tp, forms[0], times)


def _vocabulary(root: Path, stated: int, given: int | None, tp: int, held: Mapping[str, list[Held]]) -> tuple[int, int]:
    """The true vocabulary size, and the rows that each rank holds."""
    if EMBEDDING not in held:
        raise CheckpointError(f"{root}: {EMBEDDING} is missing; the checkpoint is incomplete or of another model")
    rows = (*held[EMBEDDING][0].shape, 0)[0]
    if stated == rows * tp:  # no word of the user's (the size of a tokenizer, say) cuts off what config.json counts
        return stated, rows
    if given is None or not 0 < given <= rows * tp:
        raise CheckpointError(
            f"{root}: {EMBEDDING} has {rows * tp} rows on all ranks, config.json says {stated} and the user "
            f"{'nothing' if given is None else given}; give --vocab-size if the table is padded, else mend config.json"
        )
    return given, rows


def _check_stored(
    root: Path, llama: LlamaShape, shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, list[Held]]
) -> None:
    """Raise CheckpointError unless each tensor is there in its shape, and no other."""
    optional = {HEAD} if llama.tied_embeddings else set()
    missing, extra = sorted(shapes.keys() - held.keys() - optional), sorted(held.keys() - shapes.keys())
    if missing or extra:
        raise CheckpointError(
            f"{root}: the tensors do not match config.json; missing {', '.join(missing[:3]) or 'nothing'}, not "
            f"expected {', '.join(extra[:3]) or 'nothing'}; get the complete model, of a plain Llama"
        )
    for name, each in held.items():
        for at in each:
            if at.shape != shapes[name]:
                raise CheckpointError(
                    f"{root / at.file}: {name} has shape {at.shape}, expected {shapes[name]} by config.json and the "
                    f"{len(each)} ranks; the files, or they and the config, are of two models"
                )


def _in_its_order(root: Path, llama: LlamaShape, cut: Cut, held: Mapping[str, list[Held]]) -> Cut:
    """The cut with the order of heads that the bytes of layer 0 show: copies of a head are equal."""
    if cut.replication == 1 or llama.num_query_groups == 1:
        return cut
    shape, name = (llama.num_query_groups * llama.head_dim, llama.hidden_size), "self_attn.k_proj.weight"
    fitting = []
    for trial in (Cut(cut.tp, cut.form, cut.replication, "trn1"), Cut(cut.tp, cut.form, cut.replication, "trn2")):
        first, *copies = (
            place_version(name, shape, version, held) for version in layer_pieces(llama, trial, "model.layers.0.")[name]
        )
        if all(same_rows(root, first, copy) for copy in copies):
            fitting.append(trial)
    if len(fitting) != 1:
        raise CheckpointError(
            f"{root}: each key-value head should be stored {cut.replication} times, yet the keys of layer 0 fit "
            f"{'both orders of copies' if fitting else 'neither the order of trn1 nor that of trn2'}, so that of the "
            "heads cannot be told; the files are damaged, of two models, or of one that was not trained"
        )
    return fitting[0]


def lay_out_nxd(
    source: StoredModel, dtypes: Mapping[str, torch.dtype], target: Target, config: Mapping[str, Any]
) -> NewLayout:
    """Lay out the weights of a model as a tag of NxD: q, k and v fused, and heads in trn1's order.

    Args:
        source: the model.
        dtypes: of each weight as it is written.
        target: its `tp` and `pp`.
        config: content of config.json, which NxD has no use for and `open_nxd` needs.

    Raises:
        CheckpointError: the model cannot be cut in this way.
    """
    llama, tp = source.llama, target.tp
    cut = _new_cut(source, target)
    shapes = stored_shapes(llama, source.vocab_size // tp, cut)
    pieces = pieces_of(llama, source.vocab_size, source.vocab_size // tp, cut)
    users: dict[str, set[torch.dtype]] = defaultdict(set)
    for name, versions in pieces.items():
        for piece in (piece for version in versions for piece in version):
            users[piece.key].add(dtypes[name])
    files: list[NewFile] = []
    held: dict[str, list[Held]] = {}
    for stage, keys in enumerate(_stages(llama, target.pp, shapes)):
        kinds = {key: next(iter(users[key])) for key in keys}
        size, parts, offsets = lay_out_archive({key: hole(shapes[key], kinds[key]) for key in keys})
        names = [f"{MODEL}/{_name(rank, stage)}" for rank in range(tp)]
        files += [NewFile(name, size, tuple(parts)) for name in names]
        for key, offset in zip(keys, offsets, strict=True):
            held[key] = [Held(name, offset, shapes[key], kinds[key]) for name in names]
    tensors, copies = place_all(llama, source.vocab_size, pieces, held)
    return NewLayout(tuple(files), tensors, partial(_finish, config=config), copies=copies)


def _new_cut(source: StoredModel, target: Target) -> Cut:
    """The cut that is written; raises CheckpointError where there is none."""
    llama, tp, pp, where = source.llama, target.tp, target.pp, str(source.folder)
    if tp < 1 or not 1 <= pp <= llama.num_layers:
        raise CheckpointError(f"{where}: got tp {tp} and pp {pp}, expected 1 or more and a layer for each stage")
    if source.vocab_size % tp:
        raise CheckpointError(
            f"{where}: got tp {tp} for a vocabulary of {source.vocab_size}, expected a divisor; NxD pads no table, "
            "choose another tp or extend the vocabulary"
        )
    if llama.num_attention_heads == llama.num_query_groups:
        cut = Cut(tp, "stacked")
    else:
        cut = Cut(tp, "fused", max(1, tp // llama.num_query_groups))
    check_cut(llama, cut, where, "choose another tp, or another format")
    return cut


def _stages(llama: LlamaShape, pp: int, keys: Mapping[str, Any]) -> list[list[str]]:
    """Stored names by stage; what layers do not divide is given to the last stages, as NxD does."""
    each, more = divmod(llama.num_layers, pp)
    stage_of = [stage for stage in range(pp) for _ in range(each + (stage >= pp - more))]
    stages: list[list[str]] = [[] for _ in range(pp)]
    for key in keys:
        match = _LAYER.fullmatch(key)
        stages[stage_of[int(match[1])] if match else 0 if key == EMBEDDING else -1].append(key)
    return stages


def _finish(folder: Path, config: Mapping[str, Any]) -> None:
    """Write what is not tensors; NxD takes a tag for finished when `done` is there."""
    (folder / BEGUN).write_text("1", encoding="utf-8")
    write_json_atomic(folder / CONFIG, dict(config))
    (folder / DONE).write_text("1", encoding="utf-8")
