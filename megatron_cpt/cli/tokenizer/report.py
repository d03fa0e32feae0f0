"""`megatron-cpt tokenizer report`: what a vocabulary is worth beside its base, on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.cli.tokenizer.texts import TextField, by_language, read_texts

if TYPE_CHECKING:
    from megatron_cpt.config.schema import LlamaShape


def report(
    folder: Annotated[Path, typer.Argument(help="Tokenizer folder.")],
    base: Annotated[Path, typer.Option(help="Tokenizer to compare with: a model's or tokenizer's folder, or a file.")],
    text: Annotated[list[str], typer.Option(metavar="LANG=FILE...", help="Held-out texts, each with its language.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="LANG=FILE", show_default=False, hidden=True)] = None,
    tp: Annotated[str, typer.Option(metavar="N,N", help="Tensor-parallel sizes to state.")] = "1,2,4,8",
    vocab_divisor: Annotated[int, typer.Option(min=1, help="The vocabulary is padded to a multiple of it.")] = 128,
    output: Annotated[Path | None, typer.Option(help="Folder for report.md, report.json and plots.")] = None,
    text_field: TextField = "text",
    as_json: JsonOption = False,
) -> None:
    """Compare a tokenizer with its base: density, lines cut anew, dead pieces, memory and FLOPs of its size.

    Where BASE is a model's folder (with config.json) costs are those of that model, else of Llama 2's 7B and 70B.
    With --output the whole page: examples piece by piece, new pieces beside the base's cut, pictures.
    """
    from megatron_cpt.reporting.tokenizer_report import add_costs, write_tokenizer_report
    from megatron_cpt.tokenizer import compare_tokenizers, load_tokenizer

    tensor_sizes = _sizes(tp)
    shapes = _shapes(base)
    old, new = load_tokenizer(base), load_tokenizer(folder)
    texts = {}
    for language, files in by_language([*text, *(more or ())]).items():
        with progress(f"Reading {language}") as advance:
            texts[language] = list(read_texts(files, text_field, language, advance))
    facts = compare_tokenizers(old, new, texts)
    names = {"name": _name(folder), "base_name": _name(base)}
    value = add_costs({**names, **facts}, shapes, tensor_sizes, vocab_divisor)
    if output is not None:
        write_tokenizer_report(value, output)
        value["report"] = str(output / "report.md")
    emit(value, as_json, _render)


def _sizes(option: str) -> list[int]:
    from megatron_cpt.errors import InputError

    sizes = [int(size) if size.strip().isdecimal() else 0 for size in option.split(",")]
    if not all(sizes):
        raise InputError(f"--tp {option!r}: expected tensor-parallel sizes such as 1,2,4,8")
    return sizes


def _shapes(base: Path) -> dict[str, LlamaShape]:
    from megatron_cpt.reporting.tokenizer_report import usual_shapes

    if not (base / "config.json").is_file():
        return usual_shapes()
    from megatron_cpt.checkpoint import read_shape

    return {_name(base): read_shape(base)[0]}


def _name(path: Path) -> str:
    path = path.resolve()
    return path.name if path.is_dir() else path.parent.name


def _render(value: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "language", "bytes/token", "base", "tokens", "byte fallback", "base", "lines cut differently", box=None
    )
    for language, facts in value["languages"].items():
        adapted, base, changed = facts["adapted"], facts["base"], facts["lines_changed"]
        table.add_row(
            language,
            f"{adapted['bytes_per_token']:.3f}",
            f"{base['bytes_per_token']:.3f}",
            f"{-facts['tokens_saved']:+.1%}" if facts["tokens_saved"] else "as before",
            f"{adapted['byte_fallback_share']:.2%}",
            f"{base['byte_fallback_share']:.2%}",
            f"{changed['changed']:,} of {changed['total']:,}",
        )
    sizes, pieces = value["vocab_size"], value["new_pieces"]
    lines = [
        f"vocabulary {sizes['adapted']:,}, base {sizes['base']:,}",
        f"{pieces['count']:,} new pieces, {pieces['dead']:,} of them dead, {pieces['unused']:,} not in these texts",
    ]
    fits = value["costs"]["tensor_parallel"]
    padded = ", ".join(f"TP {fit['tensor_model_parallel_size']}: {fit['padded_vocab_size']:,}" for fit in fits)
    lines.append(f"padded size at {padded}")
    if "report" in value:
        lines.append(f"report: {value['report']}")
    return Group(table, *map(Text, lines))
