"""Are extended and replaced vocabularies exact, and what do they leave of the base?

Extends a SentencePiece base by pieces of each target language, with the script filter and without, and replaces
it by a bilingual vocabulary. Counts the source lines that are cut anew, the lines on which tokenizer.json and
tokenizer.model differ in ids or decoded text, and the shared pieces that are not at the base's id.

    python benchmarks/bench_tokenizer.py --base llama2 --source en=english.jsonl.gz --target ja=japanese.jsonl.gz \
        --target ko=korean.jsonl.gz --text de=german.jsonl.gz --output tokenizer.csv

The lines that are counted are the first `--lines` of each language from the works that are held out of training
by their hash (`--held-out` of them).
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron_cpt.data import is_held_out, read_documents
from megatron_cpt.tokenizer import (
    TextMixture,
    extend_tokenizer,
    fast_slow_mismatches,
    load_tokenizer,
    measure,
    replace_tokenizer,
    source_lines_changed,
)
from megatron_cpt.tokenizer.verify import HARD_TEXTS

COLUMNS = ("tokenizer", "vocab_size", "seconds", "what", "language", "count", "lines", "bytes_per_token")


@dataclass(frozen=True)
class Corpus:
    """The files of one language, parted by the hash of each document's work."""

    language: str
    files: list[Path]
    held_out: float

    def lines(self, held_out: bool) -> Iterator[str]:
        """The lines of one side that are not blank."""
        for document in read_documents(self.files, language=self.language):
            if is_held_out(document, self.held_out) == held_out:
                yield from (line for line in document.text.split("\n") if line.strip())

    def __iter__(self) -> Iterator[str]:
        """The lines to train on."""
        return self.lines(held_out=False)


def corpora(options: list[str], held_out: float) -> dict[str, Corpus]:
    """Corpora of options LANG=FILE; a language may be given several files."""
    files: dict[str, list[Path]] = {}
    for option in options:
        language, _, file = option.partition("=")
        files.setdefault(language, []).append(Path(file))
    return {language: Corpus(language, own, held_out) for language, own in files.items()}


def rows_of(
    folder: Path, base: Path, texts: dict[str, list[str]], source: str, seconds: float
) -> list[dict[str, object]]:
    """What is counted of one tokenizer."""
    old, new = load_tokenizer(base), load_tokenizer(folder)
    head = {"tokenizer": folder.name, "vocab_size": new.vocab_size, "seconds": f"{seconds:.1f}"}
    rows: list[dict[str, object]] = []
    for language, lines in texts.items():
        found = fast_slow_mismatches(folder, lines)
        length = f"{measure(new, lines)['bytes_per_token']:.3f}"
        row = {"language": language, "count": found["mismatches"], "lines": found["total"], "bytes_per_token": length}
        rows.append({**head, "what": "fast differs", **row})
    found = fast_slow_mismatches(folder, HARD_TEXTS)
    rows.append(
        {**head, "what": "fast differs", "language": "hard", "count": found["mismatches"], "lines": found["total"]}
    )
    found = source_lines_changed(old, new, texts[source])
    rows.append({**head, "what": "cut anew", "language": source, "count": found["changed"], "lines": found["total"]})
    ids = {new.piece(id): id for id in range(new.vocab_size)}
    shared = [id for id in range(old.vocab_size) if old.piece(id) in ids]
    elsewhere = sum(ids[old.piece(id)] != id for id in shared)
    rows.append({**head, "what": "shared pieces at another id", "count": elsewhere, "lines": len(shared)})
    return rows


def main() -> None:
    """Make the tokenizers, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True, help="folder with tokenizer.model")
    parser.add_argument("--source", action="append", required=True, metavar="LANG=FILE", help="the base's language")
    parser.add_argument("--target", action="append", required=True, metavar="LANG=FILE", help="ja, ko or de")
    parser.add_argument("--text", action="append", default=[], metavar="LANG=FILE", help="further text to count on")
    parser.add_argument("--pieces", type=int, default=16000)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--lines", type=int, default=10000)
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the works that is not trained on")
    parser.add_argument("--output", type=Path, required=True, help="CSV to write")
    args = parser.parse_args()
    sources, targets = corpora(args.source, args.held_out), corpora(args.target, args.held_out)
    [source] = sources
    everything = {**sources, **targets, **corpora(args.text, args.held_out)}
    texts = {name: list(islice(corpus.lines(held_out=True), args.lines)) for name, corpus in everything.items()}
    rows = []
    with tempfile.TemporaryDirectory() as made:
        for language, corpus in targets.items():
            for script in (language, "any"):
                folder, start = Path(made) / f"{language} +{args.pieces} script={script}", time.perf_counter()
                extend_tokenizer(args.base, corpus, args.pieces, script, 8, folder, language)
                rows += rows_of(folder, args.base, texts, source, time.perf_counter() - start)
                print(folder.name, file=sys.stderr, flush=True)
        first = next(iter(targets))
        folder, start = Path(made) / f"{source}+{first} {args.vocab_size}", time.perf_counter()
        mixture = TextMixture({source: sources[source], first: targets[first]})
        replace_tokenizer(args.base, mixture, args.vocab_size, 8, folder)
        rows += rows_of(folder, args.base, texts, source, time.perf_counter() - start)
    with args.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*(row.get(column, "") for column in COLUMNS), sep="\t")


if __name__ == "__main__":
    main()
