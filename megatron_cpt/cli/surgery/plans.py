"""`megatron-cpt surgery plan`, `show` and `apply`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_cpt.cli.console import DryRunOption, JsonOption, SetOption, emit, progress

if TYPE_CHECKING:
    from megatron_cpt.config.surgery import Method
    from megatron_cpt.surgery.methods import ReadTexts

Plan = Annotated[Path, typer.Argument(help="Folder of the plan.")]


def plan(
    old_tokenizer: Annotated[Path, typer.Option(help="The base model's tokenizer: its folder or file.")],
    new_tokenizer: Annotated[Path, typer.Option(help="Folder of the new tokenizer, with its vocab_map.json.")],
    output: Annotated[Path, typer.Option(help="Folder of the plan to write: new or empty.")],
    method: Annotated[str, typer.Option(help="How rows of new pieces are made, in both matrices.")] = "mean",
    embedding: Annotated[str | None, typer.Option(help="The method for the embedding, where it is another.")] = None,
    head: Annotated[str | None, typer.Option(help="The method for the head, where it is another.")] = None,
    settings: SetOption = None,
    text_field: Annotated[str, typer.Option(help="Field that holds the text, in the corpora of a method.")] = "text",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a plan: which old rows make each new row. The base model is not needed.

    `--set top_k=5` is for the methods of both matrices, `--set head.top_k=5` for one of them. Methods that read
    text are given theirs with `--set target_corpus=FILE` and `--set source_corpus=[FILE, FILE]`.
    """
    from megatron_cpt.config.folders import check_free
    from megatron_cpt.errors import InputError, TokenizerError
    from megatron_cpt.surgery import Inputs, plan_surgery
    from megatron_cpt.tokenizer import VocabMap, load_tokenizer

    of_embedding = _method("embedding", embedding or method, settings or ())
    of_head = _method("head", head or method, settings or ())
    vocab_map = VocabMap.load(new_tokenizer)
    inputs = Inputs(load_tokenizer(old_tokenizer), load_tokenizer(new_tokenizer), _texts(text_field))
    for name, path, found, expected in (
        ("old", old_tokenizer, inputs.old, vocab_map.old_sha256),
        ("new", new_tokenizer, inputs.new, vocab_map.new_sha256),
    ):
        if found.sha256 != expected:
            raise TokenizerError(
                f"{path} is not the {name} tokenizer of the vocabulary map in {new_tokenizer}: name the tokenizer that "
                "was extended, and the folder that the extension wrote"
            )
    made = plan_surgery(vocab_map, of_embedding, of_head, inputs)
    if dry_run:
        check_free(output, InputError)
    else:
        made.save(output, new_tokenizer)
    emit({"output": str(output), **made.facts()}, as_json, _facts)


def apply(
    plan: Plan,
    src: Annotated[Path, typer.Argument(help="Model: a Hugging Face, torch_dist or mp_rank folder.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write, in the same format: new or empty.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the new tokenizer; by default the copy inside the plan.")
    ] = None,
    divisor: Annotated[
        int | None,
        typer.Option(min=1, help="Pad the tables to a multiple of this; by default as the checkpoint says."),
    ] = None,
    optimizer: Annotated[
        bool, typer.Option("--optimizer/--no-optimizer", help="Carry over an optimizer's state, or leave it.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Write the model with the rows of the plan; every other tensor stays bit for bit.

    Only the files that hold one of the two matrices are written, the others are hard links. No model is built.
    Of a run's torch_dist checkpoint the optimizer's state follows: kept rows keep their moments, new ones begin
    with zero.
    """
    from megatron_cpt.surgery import SurgeryPlan, apply_surgery
    from megatron_cpt.surgery.plan import TOKENIZER

    loaded = SurgeryPlan.load(plan)
    folder = tokenizer or plan / TOKENIZER
    with progress(f"Writing {dst}") as advance:
        value = apply_surgery(loaded, src, dst, folder, advance, divisor=divisor, with_optimizer=optimizer)
    emit(value, as_json, _facts)


def undo(
    plan: Plan,
    src: Annotated[Path, typer.Argument(help="What `surgery apply` wrote by this plan.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write: new or empty.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the old tokenizer, to go along to a Hugging Face folder.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the model as it was before the surgery, bit for bit."""
    from megatron_cpt.surgery import SurgeryPlan, undo_surgery

    loaded = SurgeryPlan.load(plan)
    with progress(f"Writing {dst}") as advance:
        value = undo_surgery(loaded, src, dst, tokenizer, advance)
    emit(value, as_json, _facts)


def show(
    plan: Plan,
    row: Annotated[int | None, typer.Option(min=0, help="Show what this new row is made of.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a plan does, or what one row is made of."""
    from megatron_cpt.surgery import SurgeryPlan

    loaded = SurgeryPlan.load(plan)
    emit({**loaded.facts(), "plan_sha256": loaded.sha256} if row is None else loaded.row(row), as_json, _facts)


def _method(matrix: str, name: str, settings: Sequence[str]) -> Method:
    """A matrix's method with those of the settings that are for it."""
    from megatron_cpt.config.layers import Layers
    from megatron_cpt.config.surgery import parse_method

    layers = Layers("--set", {"method": name})
    for setting in settings:
        first, dot, rest = setting.partition(".")
        if not (dot and first in ("embedding", "head")):
            layers.override(setting)
        elif first == matrix:
            layers.override(rest)
    return parse_method(layers.tree)


def _texts(text_field: str) -> ReadTexts:
    def read(files: Sequence[str], side: str) -> Iterator[str]:
        from megatron_cpt.data import read_documents
        from megatron_cpt.errors import ConfigError

        if not files:
            raise ConfigError(
                f"the method reads text of the {side} language: name it with --set {side}_corpus=FILE, or [FILE, FILE]"
            )
        return (document.text for document in read_documents(files, text_field))

    return read


def _facts(value: dict[str, Any]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    for name, fact in value.items():
        for part, entry in fact.items() if isinstance(fact, dict) else [("", fact)]:
            table.add_row(f"{name} {part}".strip(), Text(f"{entry:,}" if type(entry) is int else str(entry)))
    return table
