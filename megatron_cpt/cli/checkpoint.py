"""`megatron-cpt checkpoint`: convert a model between formats, prove it, look into it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from megatron_cpt.cli.console import DryRunOption, JsonOption, emit, progress, say_kept

app = typer.Typer(help="Convert, verify and show checkpoints.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of a checkpoint of any format, or of a training run.")]
_LAYOUT, _STATE, _TOLD = "Layout", "State of an optimizer", "What SRC does not say"
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="config.json of the model, where SRC does not say what it is.", rich_help_panel=_TOLD
    ),
]
VocabSizeOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Size of the vocabulary, where SRC does not say what of it is padding.", rich_help_panel=_TOLD
    ),
]
ToOption = Annotated[
    Literal["hf", "torch_dist", "mp_rank", "meta", "nxd"] | None,
    typer.Option(help="Format to write; default: hf, or torch_dist where SRC is hf."),
]
TpOption = Annotated[
    int, typer.Option(min=1, help="Tensor-parallel size of a format cut by rank.", rich_help_panel=_LAYOUT)
]
PpOption = Annotated[int, typer.Option(min=1, help="Pipeline-parallel size, likewise.", rich_help_panel=_LAYOUT)]
VppOption = Annotated[
    int, typer.Option(min=1, help="Model chunks of each pipeline rank, likewise.", rich_help_panel=_LAYOUT)
]
SpecOption = Annotated[
    Literal["te", "local"],
    typer.Option(help="mp_rank: names of Transformer Engine's or of local modules.", rich_help_panel=_LAYOUT),
]
DivisorOption = Annotated[
    int, typer.Option(min=1, help="Megatron: pad the vocabulary to a multiple.", rich_help_panel=_LAYOUT)
]
OptimizerOption = Annotated[
    bool,
    typer.Option(
        "--optimizer/--no-optimizer",
        help="Megatron: the optimizer's state goes along, if any.",
        rich_help_panel=_STATE,
    ),
]
OptimizerFormOption = Annotated[
    Literal["distributed", "plain"],
    typer.Option(help="mp_rank: of --use-distributed-optimizer, or without it.", rich_help_panel=_STATE),
]
MastersOption = Annotated[
    bool,
    typer.Option("--masters", help="Write the optimizer's float32 masters as weights.", rich_help_panel=_STATE),
]
TokenizerOption = Annotated[
    Path | None, typer.Option(help="Tokenizer folder; default: the source's own.", rich_help_panel=_TOLD)
]
CountedTokenizerOption = Annotated[
    Path | None,
    typer.Option(
        help="Tokenizer folder, whose ids are the vocabulary where nothing else says its size.", rich_help_panel=_TOLD
    ),
]
DtypeOption = Annotated[
    Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Cast every tensor; default: as it is.")
]
BosOption = Annotated[
    int | None, typer.Option(min=0, help="Id of the token that begins a text.", rich_help_panel=_TOLD)
]
EosOption = Annotated[int | None, typer.Option(min=0, help="Id of the token that ends a text.", rich_help_panel=_TOLD)]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Tensors at once; default: two for each core, up to 8.")]


@app.command()
def convert(
    src: Folder,
    dst: Annotated[Path, typer.Argument(help="Folder to make; must be new or empty.")],
    to: ToOption = None,
    tp: TpOption = 1,
    pp: PpOption = 1,
    vpp: VppOption = 1,
    spec: SpecOption = "te",
    optimizer: OptimizerOption = True,
    optimizer_form: OptimizerFormOption = "distributed",
    masters: MastersOption = False,
    vocab_divisor: DivisorOption = 128,
    tokenizer: TokenizerOption = None,
    dtype: DtypeOption = None,
    config: ConfigOption = None,
    vocab_size: VocabSizeOption = None,
    bos: BosOption = None,
    eos: EosOption = None,
    workers: WorkersOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert SRC to DST tensor by tensor, bit for bit, in the memory of a few blocks.

    No GPU, no process group and no model is built. DST appears only when it is complete; called again after a kill,
    the command goes on.
    """
    from megatron_cpt.checkpoint import convert

    with progress(f"Converting {src}") as advance:
        facts = convert(
            src,
            dst,
            to,
            vocab_divisor,
            tokenizer,
            dtype,
            tp=tp,
            pp=pp,
            vpp=vpp,
            spec=spec,
            optimizer=optimizer,
            masters=masters,
            optimizer_form=optimizer_form,
            hints=_hints(config, vocab_size, tokenizer),
            bos_token_id=bos,
            eos_token_id=eos,
            workers=workers,
            dry_run=dry_run,
            on_progress=advance,
            on_kept=say_kept,
        )
    emit(facts, as_json, _facts)


@app.command()
def verify(
    src: Folder,
    dst: Annotated[Path | None, typer.Argument(help="What was made from SRC.", show_default=False)] = None,
    logits: Annotated[
        bool, typer.Option("--logits", help="Compute both in fp32, and compare the logits near and far.")
    ] = False,
    config: ConfigOption = None,
    vocab_size: VocabSizeOption = None,
    tokenizer: CountedTokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that DST holds the model of SRC: the config field by field, every tensor bit for bit.

    SRC alone is compared with the hashes of its own manifest.
    """
    from megatron_cpt.checkpoint import verify

    with progress(f"Verifying {dst or src}") as advance:
        hints = _hints(config, vocab_size, tokenizer)
        facts = verify(src, dst, on_progress=advance, logits=logits, hints=hints)
    emit(facts, as_json, _facts)


@app.command()
def show(
    path: Folder,
    config: ConfigOption = None,
    vocab_size: VocabSizeOption = None,
    tokenizer: CountedTokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a checkpoint holds, from its headers alone."""
    from megatron_cpt.checkpoint import show

    emit(show(path, _hints(config, vocab_size, tokenizer)), as_json, _facts)


def _hints(config: Path | None, vocab_size: int | None, tokenizer: Path | None) -> Any:
    """What the user says of a checkpoint."""
    from megatron_cpt.checkpoint import Hints
    from megatron_cpt.checkpoint.tokenizer_files import tokenizer_sha256
    from megatron_cpt.errors import TokenizerError
    from megatron_cpt.tokenizer import load_tokenizer

    size = None
    if tokenizer is not None:
        try:
            size = load_tokenizer(tokenizer).vocab_size
        except TokenizerError:
            if not tokenizer.exists() or tokenizer_sha256(tokenizer) is None:
                raise  # else one of another kind, such as Meta's ranks of byte pairs: carried along, not counted
    return Hints(config, vocab_size, size)


def _facts(value: dict[str, Any]) -> RenderableType:
    table = Table(show_header=False, box=None)
    for name, fact in value.items():
        if isinstance(fact, dict):
            for inner, detail in fact.items():
                table.add_row(f"{name}.{inner}", Text(_text(detail)))
        else:
            table.add_row(name, Text(_text(fact)))
    return table


def _text(fact: Any) -> str:
    return f"{fact:,}" if type(fact) is int else str(fact)
