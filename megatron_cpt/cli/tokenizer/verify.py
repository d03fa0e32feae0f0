"""`megatron-cpt tokenizer verify`: one tokenizer, all its readers, every difference shown."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Group, RenderableType
from rich.text import Text

from megatron_cpt.cli.console import JsonOption, emit, progress
from megatron_cpt.cli.tokenizer.texts import MoreFiles, TextField, lines_of, read_texts, show_facts

if TYPE_CHECKING:
    from megatron_cpt.tokenizer import Peer, Tokenizer

_SHOWN_SPANS = 3  # differences of one text on the screen
_NONE = "none"


def verify(
    path: Annotated[Path, typer.Argument(help="Tokenizer folder, of this tool or any other, or a tokenizer.model.")],
    text: Annotated[
        list[Path] | None, typer.Option(metavar="FILE...", help="Texts to compare on, beside the built-in ones.")
    ] = None,
    more: MoreFiles = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS", help="Class of transformers that also reads it; 'none' for none. May be repeated."
        ),
    ] = None,
    documents: Annotated[bool, typer.Option("--documents", help="Compare whole documents, not their lines.")] = False,
    show: Annotated[int, typer.Option(min=0, help="Mismatches to print; the others are counted.")] = 10,
    output: Annotated[
        Path | None, typer.Option(help="Write every mismatch to this file, a JSON object a line.")
    ] = None,
    text_field: TextField = "text",
    as_json: JsonOption = False,
) -> None:
    """Prove that all readers of a tokenizer give the same ids and text, and that its folder is whole.

    Held against SentencePiece reading tokenizer.model (or `tokenizers` reading tokenizer.json, where there is no
    other file): tokenizer.json, the encoder of `data build`, and AutoTokenizer where transformers is installed.
    With --json all mismatches are printed. Ends with 1 when there is one.
    """
    from megatron_cpt.errors import VerificationError
    from megatron_cpt.tokenizer import load_tokenizer, verify_tokenizer

    kept: list[dict[str, Any]] = []
    with contextlib.ExitStack() as opened:
        advance = opened.enter_context(progress(f"Verifying {path}"))
        peers, left_out = _peers(path, load_tokenizer(path), against, opened)
        file: TextIO | None = None if output is None else opened.enter_context(output.open("w", encoding="utf-8"))

        def take(mismatch: dict[str, Any]) -> None:
            if file is not None:
                file.write(json.dumps(mismatch, ensure_ascii=False) + "\n")
            if as_json or len(kept) < show:
                kept.append(mismatch)

        texts = read_texts([*(text or ()), *(more or ())], text_field, "", advance)
        result = verify_tokenizer(path, texts if documents else lines_of(texts), peers, take)
    emit({"path": str(path), **result, "left_out": left_out, "details": kept}, as_json, _render)
    if result["mismatches"]:
        raise VerificationError(
            f"{result['mismatches']} of {result['total']} texts are not cut as {result['reference']} of {path} cuts "
            "them" + _way_out(result["readers"], path, output)
        )


def _peers(
    path: Path, tokenizer: Tokenizer, against: list[str] | None, opened: contextlib.ExitStack
) -> tuple[list[Peer], dict[str, str]]:
    """The readers beside the folder's own files, and why others are left out."""
    import importlib.util

    from megatron_cpt.data.encoder_peer import encoder_peer

    peers: list[Peer] = []
    left_out = {}
    encoder, reason = encoder_peer(tokenizer)
    if encoder is None:
        left_out["megatron_cpt.data"] = reason
    else:
        peers.append(encoder)
    if against == [_NONE]:
        left_out["transformers"] = "not asked for"
    elif importlib.util.find_spec("transformers") is None:
        if against:
            from megatron_cpt.errors import InputError

            raise InputError(f"--against {against[0]}: transformers is not installed; pip install transformers")
        left_out["transformers"] = "not installed"
    else:
        from megatron_cpt.evaluation.transformers_tokenizer import DEFAULT_CLASS, transformers_peer

        peers += [opened.enter_context(transformers_peer(path, name)) for name in against or [DEFAULT_CLASS]]
    return peers, left_out


def _way_out(readers: dict[str, int], path: Path, output: Path | None) -> str:
    where = f"; all of them are in {output}" if output else "; --output FILE or --json lists them all"
    if readers.get("tokenizer.json") or any(readers[name] for name in readers if name.startswith("transformers")):
        return f"{where}. Write files that agree: megatron-cpt tokenizer convert {path} --output NEW"
    return where


def _render(result: dict[str, Any]) -> RenderableType:
    shown = {key: value for key, value in result.items() if key not in ("details", "left_out", "readers", "manifest")}
    shown["manifest"] = "whole" if result["manifest"] else "none of this tool: only the files are compared"
    shown["mismatches of"] = dict(result["readers"])
    shown["not compared"] = result["left_out"]
    return Group(show_facts(shown), *(line for mismatch in result["details"] for line in _lines(mismatch)))


def _lines(mismatch: dict[str, Any]) -> Iterator[Text]:
    text = mismatch["text"]
    yield Text()
    yield Text(f"text {mismatch['number']:,}, {mismatch['peer']}: {text[:100]!r}{'...' if len(text) > 100 else ''}")
    for span in mismatch["differences"][:_SHOWN_SPANS]:
        yield Text(f"  expected {_cut(span['expected'])}")
        yield Text(f"  got      {_cut(span['got'])}")
    if len(mismatch["differences"]) > _SHOWN_SPANS:
        yield Text(f"  and {len(mismatch['differences']) - _SHOWN_SPANS} more places")
    if "got_text" in mismatch:
        yield Text(f"  decoded as {mismatch['got_text'][:100]!r}, expected {mismatch['expected_text'][:100]!r}")


def _cut(pieces: list[str]) -> str:
    shown = " | ".join(repr(piece)[1:-1] for piece in pieces[:24]) or "nothing"
    return shown + (f" | ... ({len(pieces)} pieces)" if len(pieces) > 24 else "")
