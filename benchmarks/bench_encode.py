"""How fast are texts encoded to ids, exactly, beside gigatoken and SentencePiece?

One thread, texts in memory, each distinct text met once by each fresh encoder (cold caches), bytes of UTF-8 per CPU
second. The encoders take turns round by round, so their ratios hold on a busy machine too; before that the ids
of all texts are compared with SentencePiece's, document by document.

    python benchmarks/bench_encode.py --text en=novels.jsonl.gz --text en=pairs.jsonl.gz:en --text ja=aozora.jsonl.gz \
        --tokenizer llama2=llama2/tokenizer.model --output encode.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")

import numpy as np  # noqa: E402
from corpora import distinct_documents, named  # noqa: E402

from megatron_cpt.data import _native  # noqa: E402
from megatron_cpt.data.encoder import check_encoder, open_encoder  # noqa: E402
from megatron_cpt.tokenizer import load_tokenizer  # noqa: E402

BLOCK_BYTES = 1 << 20
COLUMNS = ("tokenizer", "text", "megabytes", "encoder", "median", "least", "most", "ratio", "ratio_least", "ratio_most")
Encode = Callable[[], None]


def blocks_of(texts: list[str]) -> list[list[str]]:
    """Texts in runs of about a megabyte."""
    blocks: list[list[str]] = [[]]
    size = 0
    for text in texts:
        if size > BLOCK_BYTES:
            blocks.append([])
            size = 0
        blocks[-1].append(text)
        size += len(text.encode())
    return blocks


def ours(model: Path, blocks: list[list[str]]) -> Encode:
    """A fresh encoder of this project, its blocks laid out beforehand as a reader does."""
    encoder = open_encoder(load_tokenizer(model), False, False, np.dtype(np.uint16))
    laid_out = [_native.Block.from_texts(block) for block in blocks]
    return lambda: [encoder.encode(block) for block in laid_out] and None


def gigatoken(model: Path, blocks: list[list[str]]) -> Encode:
    """A fresh encoder of gigatoken, given bytes as its fastest face takes them."""
    import gigatoken as library

    tokenizer = library.Tokenizer.from_sentencepiece(model)
    encoded = [[text.encode() for text in block] for block in blocks]
    return lambda: [tokenizer.encode_batch(block, parallel=False) for block in encoded] and None


def sentencepiece(model: Path, blocks: list[list[str]]) -> Encode:
    """SentencePiece itself."""
    tokenizer = load_tokenizer(model)
    return lambda: [tokenizer.encode_batch(block) for block in blocks] and None


ENCODERS = {"ours": ours, "gigatoken": gigatoken, "sentencepiece": sentencepiece}


def measure(name: str, model: Path, language: str, texts: list[str], rounds: int) -> list[dict[str, object]]:
    """A row for each encoder: speed over the rounds, and how many times as fast ours was in the same round."""
    blocks = blocks_of(texts)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    speeds: dict[str, list[float]] = {encoder: [] for encoder in ENCODERS}
    for _ in range(rounds):
        for encoder, make in ENCODERS.items():
            encode = make(model, blocks)
            start = time.process_time()
            encode()
            speeds[encoder].append(megabytes / (time.process_time() - start))
    rows = []
    for encoder, measured in speeds.items():
        ratios = [first / second for first, second in zip(speeds["ours"], measured, strict=True)]
        figures = (statistics.median(measured), min(measured), max(measured))
        spread = (statistics.median(ratios), min(ratios), max(ratios))
        row = (name, language, round(megabytes, 1), encoder, *(round(value, 2) for value in (*figures, *spread)))
        rows.append(dict(zip(COLUMNS, row, strict=True)))
    return rows


def main() -> None:
    """Compare, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", action="append", required=True, metavar="LANG=FILE[:FIELD]")
    parser.add_argument("--tokenizer", action="append", required=True, metavar="NAME=MODEL", help="a tokenizer.model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV to write")
    arguments = parser.parse_args()
    texts = {
        language: [document.text for document in distinct_documents(files)]
        for language, files in named(arguments.text).items()
    }
    rows = []
    for name, _, model in (value.partition("=") for value in arguments.tokenizer):
        tokenizer = load_tokenizer(model)
        encoder = open_encoder(tokenizer, False, False, np.dtype(np.uint16))
        for language, documents in texts.items():
            for block in blocks_of(documents):
                check_encoder(encoder, tokenizer, block)
            print(f"{name}, {language}: {len(documents)} documents, 0 differ from SentencePiece", flush=True)
            for row in measure(name, tokenizer.path, language, documents, arguments.rounds):
                rows.append(row)
                print(
                    "  {encoder:14} {median:7.1f} MB/CPU-s ({least:.1f} to {most:.1f}); ours: {ratio:.2f} times"
                    " ({ratio_least:.2f} to {ratio_most:.2f})".format(**row),
                    flush=True,
                )
    if arguments.output:
        with arguments.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
