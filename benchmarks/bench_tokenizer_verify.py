"""Do the readers of a tokenizer agree: SentencePiece, tokenizer.json, transformers, and the encoder of `data build`?

For a bare tokenizer.model: what transformers makes of it, by class, and the files that `tokenizer convert` writes.
For each further folder: all its readers. Texts are the first --documents documents of each file, whole, cut at
5,000 characters, and their first --lines lines.

    python benchmarks/bench_tokenizer_verify.py --model llama2/tokenizer.model --text en=novels.jsonl.gz \
        --text ja=aozora.jsonl.gz --folder extended=out/llama2-ja --output verify.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_cpt.data import read_documents
from megatron_cpt.data.encoder_peer import encoder_peer
from megatron_cpt.evaluation.transformers_tokenizer import transformers_peer
from megatron_cpt.tokenizer import Peer, Tokenizer, compare_peers, convert_tokenizer, load_tokenizer
from megatron_cpt.tokenizer.verify import peer_of_json

COLUMNS = ("tokenizer", "text", "unit", "texts", "reader", "mismatches", "first_difference")
# What Llama 2's own tokenizer_config.json says of its class.
PUBLISHED = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
}


def renamed(peer: Peer, suffix: str) -> Peer:
    """The same reader under a name that says of what."""
    return Peer(f"{peer.name}, {suffix}", peer.encode_batch, peer.decode)


def units_of(path: str, documents: int, lines: int) -> Iterator[tuple[str, list[str]]]:
    """Whole documents, and lines."""
    texts = [document.text for document in read_documents([Path(path)])]
    yield "document", [text[:5_000] for text in texts[:documents]]
    yield "line", list(islice((line for text in texts for line in text.split("\n") if line), lines))


def rows_of(
    name: str, reference: Tokenizer, peers: list[Peer], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row a text, unit and reader."""
    for language, _, path in (value.partition("=") for value in arguments.text):
        for unit, texts in units_of(path, arguments.documents, arguments.lines):
            first: dict[str, str] = {}

            def keep(mismatch: dict[str, Any], first: dict[str, str] = first) -> None:
                spans = mismatch["differences"][:1]
                shown = [" ".join(span[side]) for span in spans for side in ("expected", "got")]
                first.setdefault(mismatch["peer"], " -> ".join(shown))

            result = compare_peers(reference, peers, texts, keep)
            for reader, count in result["mismatches"].items():
                row = (name, language, unit, result["total"], reader, count, first.get(reader, ""))
                yield dict(zip(COLUMNS, row, strict=True))


def main() -> None:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a bare tokenizer.model")
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=FOLDER", help="a tokenizer folder")
    parser.add_argument("--text", action="append", required=True, metavar="LANG=FILE", help="jsonl, txt or parquet")
    parser.add_argument("--documents", type=int, default=600)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--output", type=Path, help="CSV to write")
    arguments = parser.parse_args()
    rows = []
    with ExitStack() as opened:
        todo = []
        if arguments.model:
            work = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            published, right = work / "published", work / "right"
            published.mkdir()
            shutil.copyfile(arguments.model, published / "tokenizer.model")
            (published / "tokenizer_config.json").write_text(json.dumps(PUBLISHED))
            convert_tokenizer(arguments.model, right)
            reference = load_tokenizer(arguments.model)
            peers = [
                renamed(opened.enter_context(transformers_peer(published)), "model and published settings"),
                renamed(opened.enter_context(transformers_peer(arguments.model)), "model alone"),
                renamed(opened.enter_context(transformers_peer(right)), "files of `tokenizer convert`"),
                renamed(peer_of_json(right / "tokenizer.json"), "of `tokenizer convert`"),
                *filter(None, [encoder_peer(reference)[0]]),
            ]
            todo.append(("model", reference, peers))
        for name, _, folder in (value.partition("=") for value in arguments.folder):
            reference = load_tokenizer(folder)
            peers = [
                peer_of_json(Path(folder) / "tokenizer.json"),
                opened.enter_context(transformers_peer(folder)),
                *filter(None, [encoder_peer(reference)[0]]),
            ]
            todo.append((name, reference, peers))
        for name, reference, peers in todo:
            for row in rows_of(name, reference, peers, arguments):
                rows.append(row)
                print("{tokenizer:10} {text:6} {unit:9} {texts:6} {mismatches:6}  {reader}".format(**row), flush=True)
    if arguments.output:
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
