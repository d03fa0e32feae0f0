"""Does extending and replacing a byte-level vocabulary keep its promises on real text, and what does it cost?

A base is trained on the first language as Llama 3's is made (with 256 reserved special tokens behind its
pieces), extended with each of some others, and replaced by one of it and the first of these. Every fourth
document is held out; the lines compared are of those, and texts that are known to be hard. "re-cut" are
lines of the other languages whose ids an extension changes, counted apart where they have a character of
the new script (a Japanese extension changes Korean lines with Han in them); "dead" are new pieces that
their own bytes do not give when merged without the look-up of whole words; "differ" are lines on which
tokenizers, transformers and this package do not have the same ids.

    python benchmarks/bench_byte_level.py en=novels.jsonl.gz ja=aozora.jsonl.gz de=gesetze.jsonl.gz \\
        --extend ja --output out.csv
"""

from __future__ import annotations

import argparse
import csv
import json
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer

from megatron_cpt.data import read_documents
from megatron_cpt.tokenizer import Tokenizer, load_tokenizer
from megatron_cpt.tokenizer.byte_level import extend_byte_level, replace_byte_level, train_byte_level
from megatron_cpt.tokenizer.scripts import script_rule
from megatron_cpt.tokenizer.verify import HARD_TEXTS

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{place}|>" for place in range(254)))
DIVISOR = 8
HELD_OUT = 4
COLUMNS = ("tokenizer", "what", "language", "value", "of")


class Corpus:
    """The documents of one language's files, every fourth of them held out; gives the others each time it is read."""

    def __init__(self, files: Sequence[Path], language: str) -> None:
        self._files, self._language = files, language

    def __iter__(self) -> Iterator[str]:
        return (text for place, text in self._all() if place % HELD_OUT)

    def held_out(self, count: int) -> list[str]:
        """Lines of the documents that are held out."""
        lines = (line for place, text in self._all() if not place % HELD_OUT for line in text.split("\n") if line)
        return list(islice(lines, count))

    def _all(self) -> Iterator[tuple[int, str]]:
        return enumerate(document.text for document in read_documents(self._files, "text", self._language))


def dead(folder: Path, first: int) -> int:
    """New pieces that merges alone do not make of their own bytes."""
    value = json.loads((folder / "tokenizer.json").read_text())
    value["model"]["ignore_merges"] = False
    model = tokenizers.Tokenizer.from_str(json.dumps(value)).model
    new = [(piece, id) for piece, id in value["model"]["vocab"].items() if id >= first]
    return sum([token.id for token in model.tokenize(piece)] != [id] for piece, id in new)


def differ(folder: Path, lines: Sequence[str]) -> int:
    """Lines with other ids in transformers or tokenizers."""
    ours = load_tokenizer(folder).encode_batch(lines)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.encode_special_tokens = True
    fast = [encoding.ids for encoding in library.encode_batch(lines, add_special_tokens=False)]
    auto = AutoTokenizer.from_pretrained(str(folder))
    theirs = auto(list(lines), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return sum(not (a == b == c) for a, b, c in zip(ours, fast, theirs, strict=True))


def bytes_per_token(tokenizer: Tokenizer, lines: Sequence[str]) -> float:
    """UTF-8 bytes of lines over their tokens."""
    tokens = sum(map(len, tokenizer.encode_batch(lines)))
    return round(sum(len(line.encode()) for line in lines) / tokens, 4)


def measure(name: str, folder: Path, base: Tokenizer, target: str, lines: dict[str, list[str]]) -> Iterator[list[Any]]:
    """The rows of one tokenizer made from the base; `target` is the language whose lines may change."""
    tokenizer = load_tokenizer(folder)
    for language, own in lines.items():
        yield [name, "bytes per token", language, bytes_per_token(tokenizer, own), len(own)]
        yield [name, "differ", language, differ(folder, own), len(own)]
        if target and language != target:
            changed = [
                line
                for line, before, after in zip(own, base.encode_batch(own), tokenizer.encode_batch(own), strict=True)
                if before != after
            ]
            having = sum(script_rule(target).search(line) is not None for line in changed)
            yield [name, "re-cut, without the script", language, len(changed) - having, len(own)]
            yield [name, "re-cut, with the script", language, having, len(own)]
    if target:
        yield [name, "dead", target, dead(folder, base.vocab_size), tokenizer.vocab_size - base.vocab_size]


def timed(name: str, make: Any) -> tuple[Any, list[list[Any]]]:
    """What a call returns, and the rows of its time and of the memory of this process so far."""
    wall, cpu = time.perf_counter(), time.process_time()
    made = make()
    rows = [
        [name, "wall seconds", "", round(time.perf_counter() - wall, 1), ""],
        [name, "CPU seconds", "", round(time.process_time() - cpu, 1), ""],
        [name, "peak MiB of the process", "", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, ""],
    ]
    return made, rows


def run(corpora: dict[str, Corpus], args: argparse.Namespace, folder: Path) -> Iterator[list[Any]]:
    """All rows, as they come."""
    source, *others = corpora
    targets = args.extend or others
    lines = {language: corpus.held_out(args.lines) for language, corpus in corpora.items()} | {"hard": list(HARD_TEXTS)}
    size = args.base_pieces + len(SPECIALS)
    _, rows = timed("base", lambda: train_byte_level(corpora[source], size, folder / "base", specials=SPECIALS))
    yield from rows
    base = load_tokenizer(folder / "base")
    yield from measure("base", folder / "base", base, "", lines)
    for language in targets:
        name, out = f"+ {language}", folder / language
        report, rows = timed(
            name,
            lambda text=corpora[language], language=language, out=out: extend_byte_level(
                folder / "base", text, args.new_pieces, language, DIVISOR, out
            ),
        )
        yield from rows
        yield [name, "new pieces", language, report.num_new, report.requested]
        yield [name, "only inside others", language, report.num_inner, report.num_new]
        yield from measure(name, out, base, language, lines)
    both = [text for language in (source, targets[0]) for text in corpora[language]]
    name = f"replaced, {source} and {targets[0]}"
    report, rows = timed(
        name,
        lambda: replace_byte_level(
            folder / "base", both, base.vocab_size // DIVISOR * DIVISOR, DIVISOR, folder / "new"
        ),
    )
    yield from rows
    yield [name, "shared at the base's ids", "", report.num_kept + report.num_shared, report.new_size]
    yield [name, "shared at other ids", "", report.num_moved, report.new_size]
    yield from measure(name, folder / "new", base, "", lines)


def main() -> None:
    """Run and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="+", metavar="LANG=FILE", help="the first language is the base's")
    parser.add_argument("--extend", nargs="*", metavar="LANG", help="languages to extend with; by default all others")
    parser.add_argument("--base-pieces", type=int, default=16_000)
    parser.add_argument("--new-pieces", type=int, default=16_000)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    files: dict[str, list[Path]] = {}
    for option in args.text:
        language, _, file = option.partition("=")
        files.setdefault(language, []).append(Path(file))
    corpora = {language: Corpus(own, language) for language, own in files.items()}
    with tempfile.TemporaryDirectory() as folder, open(args.output, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row in run(corpora, args, Path(folder)):
            table.writerow(row)
            file.flush()
            print(*row, sep="\t", flush=True)


if __name__ == "__main__":
    main()
