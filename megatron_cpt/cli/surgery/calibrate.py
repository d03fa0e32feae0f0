"""`megatron-cpt surgery calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_cpt.cli.console import JsonOption, SetOption, emit, progress


def calibrate(
    plan: Annotated[Path, typer.Argument(help="Folder of the plan.")],
    base: Annotated[Path, typer.Argument(help="The base model: a Hugging Face or torch_dist folder.")],
    source: Annotated[
        str, typer.Option(metavar="PREFIX", help="Dataset of the source language, of the new tokenizer.")
    ],
    target: Annotated[str, typer.Option(metavar="PREFIX", help="Dataset of the target language, likewise.")],
    output: Annotated[Path, typer.Option(help="Folder of the calibrated plan to write: new or empty.")],
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find the few numbers for all new rows together that a little text asks for, with the model frozen.

    The default counts what stands around each piece and makes one forward pass over 16,384 tokens;
    `--set steps=20` adds steps of gradient descent.
    """
    from megatron_cpt.checkpoint import open_checkpoint
    from megatron_cpt.config.folders import check_free
    from megatron_cpt.config.layers import Layers
    from megatron_cpt.config.surgery import parse_calibration
    from megatron_cpt.data import CalibrationText
    from megatron_cpt.errors import InputError
    from megatron_cpt.runtime.device import current_device
    from megatron_cpt.surgery import SurgeryPlan, calibrate
    from megatron_cpt.surgery.plan import TOKENIZER

    layers = Layers("--set")
    for setting in settings or ():
        layers.override(setting)
    wanted = parse_calibration(layers.tree)
    check_free(output, InputError)
    loaded = SurgeryPlan.load(plan)
    model = open_checkpoint(base)
    length = min(wanted.seq_length, model.llama.max_position_embeddings)
    text = CalibrationText([source], [target], loaded.new_sha256, length, wanted.source_share, wanted.seed)
    with progress(f"Calibrating {plan}") as advance:
        made, facts = calibrate(
            loaded,
            model,
            text,
            wanted,
            device=current_device().torch_device(),
            on_progress=advance,
        )
    tokenizer = plan / TOKENIZER
    made.save(output, tokenizer if tokenizer.is_dir() else None)
    emit({"output": str(output), **facts}, as_json, _facts)


def _facts(value: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, fact in value.items():
        for part, number in fact.items() if isinstance(fact, dict) else [("", fact)]:
            table.add_row(f"{name} {part}".strip(), f"{number:.4f}" if isinstance(number, float) else str(number))
    return table
