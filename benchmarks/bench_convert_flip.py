"""Does `checkpoint verify` find a single flipped bit anywhere in a converted folder, and who else would?

Each trial flips one random bit of one random file of a small model's conversion to hf, torch_dist or mp_rank, runs the
package's `verify` against the source, and flips it back. In half of the trials every file is as likely as any other, in
half every byte. Beside it, what the format's own readers say: safetensors' `load_file` and the JSON files (hf), torch's
checkpoint reader and `torch.load` (torch_dist, mp_rank), without error ("silent") and without error though what they
give is not what was written ("silent and wrong"). Every miss of `verify` is printed.

    python benchmarks/bench_convert_flip.py --trials 200 --output flips.csv
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import random
import shutil
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from conversions import COMMAND, TINY, refused, write_model
from safetensors.torch import load_file

from megatron_cpt.checkpoint import verify
from megatron_cpt.errors import CptError
from megatron_cpt.tokenizer import train_tokenizer

COLUMNS = ("format", "trial", "file", "byte", "bit", "verify", "others")
FOUND, MISSED, CRASHED = "found", "missed", "crashed"
Row = dict[str, Any]


def write_source(folder: Path) -> None:
    """A model with a tokenizer of as many pieces as it has rows."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(60)]
    train_tokenizer(
        [" ".join(draw.choices(words, k=9)) for _ in range(200)], TINY.vocab, folder.with_suffix(".tokenizer")
    )
    write_model(folder, TINY, 2)
    for path in folder.with_suffix(".tokenizer").glob("tokenizer*"):
        shutil.copy(path, folder)


def convert(source: Path, result: Path, *options: str) -> None:
    """Convert as a user does."""
    subprocess.run([*COMMAND, "convert", source, result, *options], check=True, stdout=subprocess.DEVNULL)


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    """One bit of a file the other way round."""
    with open(path, "r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ (1 << bit)]))
    try:
        yield
    finally:
        with open(path, "r+b") as file:
            file.seek(byte)
            file.write(bytes([old]))


def draw_bit(files: list[Path], by_bytes: bool, draw: random.Random) -> tuple[Path, int, int]:
    """A random bit: of any file alike, or of any byte alike."""
    sizes = [path.stat().st_size for path in files]
    number = draw.choices(range(len(files)), sizes if by_bytes else None)[0]
    return files[number], draw.randrange(sizes[number]), draw.randrange(8)


def read_hf(folder: Path) -> Iterator[Any]:
    """What the usual readers of a Hugging Face folder give, tokenizer left out."""
    for name in ("config.json", "generation_config.json"):
        yield json.loads((folder / name).read_text())
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for name in sorted(names):
        yield load_file(folder / name)


def read_torch_dist(folder: Path) -> Iterator[Any]:
    """What torch's reader, which megatron-core stands on, gives; empty objects left out."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    yield json.loads((folder / "metadata.json").read_text())
    yield torch.load(folder / "common.pt", weights_only=False)
    reader = FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        load(tensors, storage_reader=reader, no_dist=True)
    yield tensors


def read_mp_rank(folder: Path) -> Iterator[Any]:
    """What torch.load gives of the files that Megatron's tracker points to."""
    step = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
    inside = folder / (step if step == "release" else f"iter_{int(step):07d}")
    for path in sorted(inside.glob("mp_rank_*/model_optim_rng.pt")):
        yield torch.load(path, weights_only=False)


READERS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "hf": read_hf,
    "torch_dist": read_torch_dist,
    "mp_rank": read_mp_rank,
}


def digest_of(values: Iterator[Any]) -> str:
    """SHA-256 over whatever a reader gives."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(repr(key).encode())
                feed(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                feed(one)
        elif hasattr(value, "__dict__"):
            feed(vars(value))
        else:
            digest.update(repr(value).encode() if not hasattr(value, "getvalue") else value.getvalue())

    for value in values:
        feed(value)
    return digest.hexdigest()


def others_say(kind: str, folder: Path, clean: str) -> str:
    """Whether the format's own readers refuse a folder, or what they make of it."""
    try:
        found = digest_of(READERS[kind](folder))
    except KeyboardInterrupt:
        raise
    except BaseException:  # torch's CheckpointException is no Exception
        return "refused"
    return "silent" if found == clean else "silent and wrong"


def verify_says(source: Path, folder: Path) -> tuple[str, str]:
    """(found, missed or crashed, the message)."""
    try:
        verify(source, folder)
    except CptError as caught:
        return FOUND, str(caught)
    except Exception as caught:
        return CRASHED, repr(caught)
    return MISSED, ""


def run(kind: str, source: Path, folder: Path, trials: int, seed: int) -> list[Row]:
    """All trials on one folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    clean, draw, rows = digest_of(READERS[kind](folder)), random.Random(seed), []
    for number in range(trials):
        path, byte, bit = draw_bit(files, number % 2 == 0, draw)
        name = path.relative_to(folder).as_posix()
        with flipped(path, byte, bit):
            says, message = verify_says(source, folder)
            others = others_say(kind, folder, clean)
        rows.append(dict(zip(COLUMNS, (kind, number, name, byte, bit, says, others), strict=True)))
        if says != FOUND:
            print(f"{kind}: {says} {name} byte {byte} bit {bit}, others {others} {message}".rstrip(), flush=True)
    if verify_says(source, folder)[0] != MISSED:
        raise SystemExit(f"{kind}: the folder is not what it was before the trials")
    return rows


def report(rows: list[Row]) -> list[str]:
    """A table by format and one of the missed files."""
    kinds = list(dict.fromkeys(row["format"] for row in rows))
    lines = [
        "| format | trials | found | missed | crashed | other readers silent | silent and wrong |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in kinds:
        says = Counter(row["verify"] for row in rows if row["format"] == kind)
        others = Counter(row["others"] for row in rows if row["format"] == kind)
        wrong = others["silent and wrong"]
        counts = (says.total(), says[FOUND], says[MISSED], says[CRASHED], others["silent"] + wrong, wrong)
        lines.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    missed = Counter(f"{row['format']} {row['file']}" for row in rows if row["verify"] != FOUND)
    return [*lines, *(f"not found: {count} in {name}" for name, count in missed.most_common())]


def main() -> None:
    """Convert, flip, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200, help="of each format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tp", type=int, default=2, help="of the mp_rank files")
    parser.add_argument("--pp", type=int, default=2, help="of the mp_rank files")
    parser.add_argument("--formats", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--output", type=Path, default=None, help="CSV of all trials")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder, rows = Path(name), list[Row]()
        source = folder / "model"
        write_source(source)
        convert(source, folder / "torch_dist", "--to", "torch_dist")
        convert(folder / "torch_dist", folder / "hf", "--to", "hf", "--tokenizer", str(source))
        layout = ("--to", "mp_rank", "--tp", str(arguments.tp), "--pp", str(arguments.pp))
        refusal = refused(source, layout)
        if refusal:
            print(f"mp_rank is left out: {refusal}")
        else:
            convert(source, folder / "mp_rank", *layout)
        for kind in arguments.formats:
            if (folder / kind).exists():
                rows += run(kind, source, folder / kind, arguments.trials, arguments.seed)
    print("\n".join(report(rows)))
    if arguments.output is not None:
        with open(arguments.output, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if any(row["verify"] != FOUND for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
