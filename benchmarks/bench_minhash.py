"""How fast are documents signed, how good are the signatures, and which near duplicates are found?

Speed: bytes of UTF-8 per CPU second, one thread, 128 values over 5-character shingles, side by side with
rensa and datasketch on the same documents in the same round. Their shingles are made before the clock
starts ("given") or within ("made"); ours are always made. Quality: the estimate against the exact Jaccard
index of pairs of documents and their altered copies, as bias and as root mean square error over that of
independent permutations, sqrt(J (1 - J) / 128). Recall: the share of those pairs, by exact Jaccard index,
of which `find_duplicates` drops the copy.

    python benchmarks/bench_minhash.py --text en=novels.jsonl.gz ja=aozora.jsonl.gz --output minhash.csv

rensa and datasketch are left out where they are not installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cpt.data import _native, read_documents
from megatron_cpt.data.cleaning.duplicates import Signing, find_duplicates

PLACES, SHINGLE = 128, 5
COLUMNS = ("measure", "language", "what", "value", "low", "high", "count")
Signer = Callable[[list[str]], np.ndarray]


def shingles(text: str) -> set[str]:
    """The shingles of a text, white space as `Signing` has it."""
    text = " ".join(text.split())
    return {text[k : k + SHINGLE] for k in range(max(1, len(text) - SHINGLE + 1))}


def ours(texts: list[str]) -> np.ndarray:
    """Signatures by this package."""
    return _native.minhash(_native.Block.from_texts(texts), PLACES, SHINGLE, 1)


def peers() -> dict[str, Callable[[list[set[str]]], np.ndarray]]:
    """Signatures of shingle sets by the libraries that are installed, each by its fastest call."""
    found: dict[str, Callable[[list[set[str]]], np.ndarray]] = {}
    if importlib.util.find_spec("rensa"):
        from rensa import CMinHash, RMinHash

        def c_minhash(sets: list[set[str]]) -> np.ndarray:
            sketches = [CMinHash(PLACES, 1) for _ in sets]
            for sketch, items in zip(sketches, sets, strict=True):
                sketch.update(items)
            return np.array([sketch.digest() for sketch in sketches])

        found["rensa RMinHash"] = lambda sets: np.array(RMinHash.digests_from_token_sets(sets, PLACES, 1))
        found["rensa CMinHash"] = c_minhash
    if importlib.util.find_spec("datasketch"):
        from datasketch import MinHash

        def datasketch(sets: list[set[str]]) -> np.ndarray:
            items = [[item.encode() for item in each] for each in sets]
            return np.array([sketch.hashvalues for sketch in MinHash.bulk(items, num_perm=PLACES)])

        found["datasketch"] = datasketch
    return found


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def row(measure: str, language: str, what: str, values: list[float]) -> dict[str, Any]:
    """Median and spread of a figure."""
    numbers = [float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))]
    names = dict(zip(("value", "low", "high"), numbers, strict=True))
    return {"measure": measure, "language": language, "what": what, **names, "count": len(values)}


def speed(language: str, texts: list[str], rounds: int) -> list[dict[str, Any]]:
    """MB per CPU second, and ours over each peer in the same round."""
    size = sum(len(text.encode()) for text in texts) / 1e6
    block = _native.Block.from_texts(texts)
    sets = [shingles(text) for text in texts]
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        took = {
            "ours": seconds(lambda: _native.minhash(block, PLACES, SHINGLE, 1)),
            "ours, fingerprint too": seconds(lambda: Signing(PLACES, SHINGLE).sign(block)),
        }
        make = seconds(lambda: [shingles(text) for text in texts])
        for name, sign in peers().items():
            took[f"{name}, given"] = seconds(lambda sign=sign: sign(sets))  # type: ignore[misc]
            took[f"{name}, made"] = took[f"{name}, given"] + make
        for name, each in took.items():
            rates.setdefault(name, []).append(size / each)
    table = [row("MB per CPU second", language, name, values) for name, values in rates.items()]
    for name, values in rates.items():
        if not name.startswith("ours"):
            ratios = [a / b for a, b in zip(rates["ours"], values, strict=True)]
            table.append(row("ours over it", language, name, ratios))
    return table


def altered_pairs(texts: list[str], rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Documents of 200 to 4,000 characters, and copies in which one stretch in 5 to 500 characters is another's."""
    pieces = [text[start : start + rng.randint(200, 4000)] for text in texts for start in range(0, len(text), 4000)]
    pieces = [piece for piece in dict.fromkeys(pieces) if len(piece) >= 200]
    pairs = []
    for piece in rng.sample(pieces, min(count, len(pieces))):
        copy, other = list(piece), rng.choice(pieces)
        for _ in range(max(1, len(piece) // round(5 * 100 ** rng.random()))):
            at, source = rng.randrange(len(copy)), rng.randrange(len(other))
            copy[at : at + 3] = other[source : source + rng.randint(0, 5)]
        pairs.append((piece, "".join(copy)))
    return pairs


def quality(language: str, texts: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """Bias and error of the estimates, and recall of the search."""
    pairs = altered_pairs(texts, rng, 3000)
    exact = np.array([len(a & b) / len(a | b) for a, b in ((shingles(a), shingles(b)) for a, b in pairs)])
    sides = [[pair[side] for pair in pairs] for side in (0, 1)]
    signers: dict[str, Signer] = {"ours": ours}
    for name, sign in peers().items():
        signers[name] = lambda side, sign=sign: sign([shingles(text) for text in side])  # type: ignore[misc]
    expected = np.sqrt((exact * (1 - exact)).mean() / PLACES)
    table = []
    for name, signer in signers.items():
        error = (signer(sides[0]) == signer(sides[1])).mean(axis=1) - exact
        table.append(row("bias of the estimate", language, name, [float(error.mean())]))
        table.append(row("error over expected", language, name, [float(np.sqrt((error**2).mean()) / expected)]))
    return table + recall(language, [text for pair in pairs for text in pair], exact)


def recall(language: str, texts: list[str], exact: np.ndarray) -> list[dict[str, Any]]:
    """Share of pairs found, by exact Jaccard index."""
    table = []
    with tempfile.TemporaryDirectory() as folder:
        part, signing = Path(folder) / "part", Signing(PLACES, SHINGLE, seed=1)
        part.write_bytes(signing.sign(_native.Block.from_texts(texts)).tobytes())
        for threshold in (0.7, 0.8, 0.9):
            found = ~find_duplicates([part], folder, signing, threshold).keep(0)[1::2]
            for low in np.arange(0.5, 1, 0.05):
                inside = (exact >= low) & (exact < low + 0.05)
                if inside.any():
                    name = f"threshold {threshold}, Jaccard {low:.2f} to {low + 0.05:.2f}"
                    one = row("share found", language, name, [float(found[inside].mean())])
                    table.append({**one, "count": int(inside.sum())})
    return table


def main() -> None:
    """Measures each language and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", required=True, metavar="LANGUAGE=FILE")
    parser.add_argument("--megabytes", type=float, default=8.0, help="of text a language, in the round of speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    table = []
    for given in arguments.text:
        language, _, path = given.partition("=")
        texts: list[str] = []
        size = 0
        for document in read_documents(path):
            texts.append(document.text)
            size += len(document.text.encode())
            if size > arguments.megabytes * 1e6:
                break
        table += speed(language, texts, arguments.rounds)
        table += quality(language, texts, random.Random(1))
    for line in table:
        spread = f" ({line['low']} to {line['high']})" if line["low"] != line["high"] else ""
        print(f"{line['language']:4} {line['measure']:20} {line['what']:42} {line['value']}{spread}  n={line['count']}")
    if arguments.output:
        with arguments.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
