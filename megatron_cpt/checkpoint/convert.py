"""Convert a Llama between Hugging Face and `torch_dist`, tensor by tensor, without building a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_cpt import __version__
from megatron_cpt.checkpoint.files import require_space
from megatron_cpt.checkpoint.hf_config import CONFIG, hf_config
from megatron_cpt.checkpoint.huggingface import HFReader, write_hf
from megatron_cpt.checkpoint.manifest import write_checkpoint_manifest
from megatron_cpt.checkpoint.opening import open_checkpoint
from megatron_cpt.checkpoint.plan import plan_torch_dist
from megatron_cpt.checkpoint.reader import CastReader, ModelReader, num_bytes, read_blocks
from megatron_cpt.checkpoint.tokenizer_files import copy_tokenizer, end_tokens, matching_tokenizer
from megatron_cpt.checkpoint.torch_dist import TorchDistReader, write_torch_dist
from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.config.manifest import MANIFEST, sha256_file
from megatron_cpt.config.padding import padded_vocab_size
from megatron_cpt.errors import CheckpointError

Format = Literal["hf", "torch_dist"]
Reader = HFReader | TorchDistReader
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    src: str | Path,
    dst: str | Path,
    to: Format,
    vocab_divisor: int = 128,
    tokenizer: str | Path | None = None,
    dtype: str | None = None,
    *,
    bos_token_id: int | None = None,
    eos_token_id: int | list[int] | None = None,
    dry_run: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint; every tensor is carried over bit for bit unless `dtype` says otherwise.

    A plan that uses every source row once and fills every stored element once is made and checked
    before a byte is written. Memory is bounded by the largest tensor of a layer. Optimizer state is
    not converted.

    Args:
        src: a Hugging Face folder or a `torch_dist` folder with its manifest.
        dst: folder to make; must be new or empty. It appears only when it is complete.
        to: the format to write, "hf" or "torch_dist"; the other one than the source's.
        vocab_divisor: `torch_dist` only: the tables are padded with zero rows to a multiple of this.
        tokenizer: folder of the model's tokenizer; None: the source folder when it holds one. Its
            files go along to "hf"; "torch_dist" records the hash.
        dtype: "float32", "bfloat16" or "float16" to cast to; None keeps each tensor's own.
        bos_token_id: for config.json; None: what the source or its tokenizer says.
        eos_token_id: likewise.
        dry_run: plan and check only.
        on_progress: called with (bytes done, bytes in all).

    Returns:
        facts of the conversion, as recorded in the manifest, with `files` and `bytes`.

    Raises:
        CheckpointError: source, destination, tokenizer or dtype cannot be used; nothing is left behind.
    """
    src, dst = Path(src), Path(dst)
    source = open_checkpoint(src)
    reader = _checked_reader(source, to, dtype)
    check_free(dst, CheckpointError)
    facts, tokenizer_folder = _facts(source, reader, tokenizer)
    facts |= {"source": str(src), "destination": str(dst), "to": to}
    facts |= {
        key: end for key, end in (("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id)) if end is not None
    }
    if to == "torch_dist":
        facts["padded_vocab_size"] = padded_vocab_size(reader.vocab_size, vocab_divisor)
        facts["vocab_divisor"] = vocab_divisor
        plan = plan_torch_dist(reader, facts["padded_vocab_size"])
        needed = sum(num_bytes(tensor.size, tensor.dtype) for tensor in plan)
        write = partial(write_torch_dist, reader=reader, plan=plan, on_progress=on_progress)
    else:
        facts["padded_vocab_size"] = reader.vocab_size
        entries = [
            (name, reader.shape(name), reader.dtype(name), partial(read_blocks, reader, name))
            for name in reader.names()
        ]
        needed = sum(num_bytes(shape, kind) for _, shape, kind, _ in entries)
        config = hf_config(
            reader.llama, reader.vocab_size, facts["dtype"], facts["bos_token_id"], facts["eos_token_id"]
        )
        write = partial(write_hf, entries=entries, config=config, on_progress=on_progress)
    require_space(dst, needed)
    if dry_run:
        return {**facts, "bytes": needed, "dry_run": True}
    with new_folder(dst, CheckpointError) as folder:
        facts |= write(folder)
        if isinstance(reader, CastReader):
            facts["cast_max_abs_error"] = reader.max_abs_error
        if to == "hf":
            copy_tokenizer(tokenizer_folder, folder)
            (folder / "README.md").write_text(_model_card(reader, facts), encoding="utf-8")
        _write_manifest(folder, source, facts, dtype)
    return facts


def _checked_reader(source: Reader, to: str, dtype: str | None) -> ModelReader:
    have = _format(source)
    if to not in ("hf", "torch_dist") or to == have:
        raise CheckpointError(
            f"{source.folder} is {have} and the target is {to}; expected the other of hf and torch_dist"
        )
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"got dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    return source if dtype is None else CastReader(source, DTYPES[dtype])


def _format(source: Reader) -> Format:
    return "hf" if isinstance(source, HFReader) else "torch_dist"


def _facts(source: Reader, reader: ModelReader, tokenizer: str | Path | None) -> tuple[dict[str, Any], Path | None]:
    """What the manifest will say, and the tokenizer's folder."""
    stated = source.config if isinstance(source, HFReader) else source.manifest
    recorded = None if isinstance(source, HFReader) else source.manifest.get("tokenizer_sha256")
    folder, sha256 = matching_tokenizer(source.folder, recorded, None if tokenizer is None else Path(tokenizer))
    bos, eos = end_tokens(folder)
    sizes = Counter[str]()
    for name in reader.names():
        sizes[str(reader.dtype(name)).removeprefix("torch.")] += num_bytes(reader.shape(name), reader.dtype(name))
    return {
        "from": _format(source),
        "tensors": len(reader.names()),
        "vocab_size": reader.vocab_size,
        "dtype": sizes.most_common(1)[0][0],
        "tokenizer_sha256": sha256,
        "bos_token_id": stated["bos_token_id"] if stated.get("bos_token_id") is not None else bos,
        "eos_token_id": stated["eos_token_id"] if stated.get("eos_token_id") is not None else eos,
    }, folder


def _write_manifest(folder: Path, source: Reader, facts: dict[str, Any], cast: str | None) -> None:
    described_by = CONFIG if isinstance(source, HFReader) else MANIFEST
    inputs = {described_by: sha256_file(source.folder / described_by)}
    if cast is None:
        inputs["weights"] = facts["weights_sha256"]
    carried = (
        {}
        if isinstance(source, HFReader)
        else {key: source.manifest[key] for key in ("step",) if key in source.manifest}
    )
    names = ("vocab_divisor", "dtype", "weights_sha256", "bos_token_id", "eos_token_id", "cast_max_abs_error")
    write_checkpoint_manifest(
        folder,
        source.llama,
        facts["vocab_size"],
        facts["padded_vocab_size"],
        facts["tokenizer_sha256"],
        inputs,
        format=facts["to"],
        cast=cast,
        converted_from=facts["from"],
        **carried,
        **{name: facts[name] for name in names if name in facts},
    )


def _model_card(reader: ModelReader, facts: dict[str, Any]) -> str:
    """README.md of an exported model: what it is and where it comes from."""
    parameters = sum(num_bytes(reader.shape(name), torch.uint8) for name in reader.names())
    rows = {
        "Architecture": "Llama",
        "Parameters": f"{parameters:,}",
        "Vocabulary": f"{facts['vocab_size']:,} tokens",
        "Precision": facts["dtype"],
        "Weights SHA-256": f"`{facts['weights_sha256']}`",
        "Tokenizer SHA-256": f"`{facts['tokenizer_sha256'] or 'not recorded'}`",
        "Exported by": f"megatron-cpt {__version__}, from a `{facts['from']}` checkpoint",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    title = Path(facts["destination"]).name
    return f"---\nlibrary_name: transformers\n---\n\n# {title}\n\n| | |\n|---|---|\n{table}\n"
