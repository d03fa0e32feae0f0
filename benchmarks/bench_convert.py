"""How long does a conversion take beside a plain copy and beside transformers, and in how much memory?

The model is a Llama of 1.25 G random weights in bf16 (2.5 GB) without tokenizer. In every round each of these works on
files that the page cache holds, in a process of its own, imports included: the floor, a plain read and write of the
same bytes in blocks of 64 MiB with an fsync of every file at the end (and, as a note, without); Hugging Face to
torch_dist and back; to mp_rank files and back; transformers' load and save in bf16, which calls no fsync (and, as a
note, with one of each file after it); if asked for, torchtitan's scripts, which hold the model in float32. What earlier
steps wrote is on the disk before the next one starts. The peak is the larger of ru_maxrss and of the resident memory
sampled over all processes of the command; "anonymous" is what no file stands behind. In the first round the tensors of
all Hugging Face folders that were made are compared with the model's by SHA-256, through a reader of 15 lines.

    python benchmarks/bench_convert.py --rounds 3 --output convert.csv
    python benchmarks/bench_convert.py --layers 2 --hidden 256 --ffn 704 --vocab 4000 --rounds 1 --output small.csv
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversions import (
    BLOCK_BYTES,
    COMMAND,
    Sizes,
    add_sizes,
    bytes_of,
    config_of,
    refused,
    sizes_of,
    tensor_hashes,
    warm,
    watched,
    write_model,
)

FILES = 6  # of the model
FLOOR, UNSYNCED, PEER, SYNCED_PEER = "floor", "floor without fsync", "transformers", "transformers, then fsync"
MAX_RATIO, MAX_PEAK_MIB = 2.0, 450
COLUMNS = ("round", "what", "wall_seconds", "cpu_seconds", "peak_mib", "anonymous_mib", "bytes", "load")
Row = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One command of a round: what it reads and what it makes, both by their names in the working folder."""

    what: str
    source: str
    result: str
    words: tuple[str, ...]  # before the two folders
    options: tuple[str, ...] = ()  # after them
    last: tuple[str, ...] = ()  # results that nobody reads any more


def steps_of(arguments: argparse.Namespace, with_mp_rank: bool) -> list[Step]:
    """The commands of a round, in order."""
    own, tp, pp = (sys.executable, __file__), arguments.tp, arguments.pp
    convert = (*COMMAND, "convert")
    steps = [
        Step(FLOOR, "model", "copy", (*own, "copy"), last=("copy",)),
        Step("hf to torch_dist", "model", "dist", convert, ("--to", "torch_dist")),
        Step("torch_dist to hf", "dist", "hf", convert, ("--to", "hf"), last=("dist", "hf")),
        Step(PEER, "model", "peer", (*own, "peer"), last=("peer",)),
        Step(SYNCED_PEER, "model", "peer", (*own, "peer-synced"), last=("peer",)),
        Step(UNSYNCED, "model", "copy", (*own, "copy-unsynced"), last=("copy",)),
    ]
    if with_mp_rank:
        layout = ("--to", "mp_rank", "--tp", str(tp), "--pp", str(pp))
        steps += [
            Step(f"hf to mp_rank {tp}x{pp}", "model", "ranks", convert, layout),
            Step(f"mp_rank {tp}x{pp} to hf", "ranks", "hf", convert, ("--to", "hf"), last=("ranks", "hf")),
        ]
    if arguments.titan:
        python, checkout = arguments.titan
        begin = (python, __file__, "titan", json.dumps(vars(sizes_of(arguments))), checkout)
        back = ("--export_dtype", "bfloat16", "--hf_assets_path", "{folder}/model")
        steps += [
            Step("torchtitan, from hf", "model", "titan", (*begin, "convert_from_hf.py")),
            Step("torchtitan, to hf", "titan", "hf", (*begin, "convert_to_hf.py"), back, last=("titan", "hf")),
        ]
    return steps


def copy(source: Path, result: Path, sync: bool) -> None:
    """The floor: the bytes of a folder, read and written, and nothing else."""
    result.mkdir()
    buffer = memoryview(bytearray(BLOCK_BYTES))
    written = []
    for path in sorted(source.iterdir()):
        with open(path, "rb", buffering=0) as old:
            new = open(result / path.name, "wb", buffering=0)  # noqa: SIM115 - closed at the end, after its fsync
            while count := old.readinto(buffer):
                done = 0
                while done < count:
                    done += new.write(buffer[done:count])
        written.append(new)
    for new in written:
        if sync:
            os.fsync(new.fileno())
        new.close()


def peer(source: Path, result: Path, sync: bool) -> None:
    """What transformers does, and, with `sync`, an fsync of each of its files."""
    import torch
    import transformers

    transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(result)
    for path in result.iterdir() if sync else ():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def titan(sizes: Sizes, checkout: Path, script: str, words: list[str]) -> None:
    """What a script of torchtitan does; it knows models by name, so these sizes get one first."""
    sys.path.insert(0, str(checkout))
    llama3 = importlib.import_module("torchtitan.models.llama3")
    arguments_of = importlib.import_module("torchtitan.models.llama3.model.args").TransformerModelArgs
    llama3.llama3_args["bench"] = arguments_of(
        dim=sizes.hidden,
        n_layers=sizes.layers,
        n_heads=sizes.heads,
        n_kv_heads=sizes.groups,
        vocab_size=sizes.vocab,
        rope_theta=config_of(sizes)["rope_theta"],
    )
    sys.argv = [script, *words, "--model_flavor", "bench"]
    runpy.run_path(str(checkout / "scripts" / "checkpoint_conversion" / script), run_name="__main__")


def measure(step: Step, folder: Path, number: int, same: dict[str, str] | None) -> Row:
    """Run one step; with `same`, the tensors' hashes, also compare what it made."""
    source, result = folder / step.source, folder / step.result
    warm(source)
    os.sync()
    load = os.getloadavg()[0]
    options = [option.replace("{folder}", str(folder)) for option in step.options]
    done = watched([*step.words, str(source), str(result), *options], folder)
    if done.code:
        raise SystemExit(f"{step.what} failed: {done.last_line}")
    if same is not None and any(result.glob("*.safetensors")):
        found = tensor_hashes(result)
        equal = sum(same[name] == found.get(name) for name in same)
        print(f"{step.what}: {equal} of {len(same)} tensors are the model's, {len(found) - len(same)} more", flush=True)
        if equal != len(same):
            raise SystemExit(1)
    size = bytes_of(result)
    for name in step.last:
        shutil.rmtree(folder / name)
    figures = (round(done.wall_seconds, 2), round(done.cpu_seconds, 2), round(done.peak_mib), round(done.anonymous_mib))
    return dict(zip(COLUMNS, (number, step.what, *figures, size, round(load, 1)), strict=True))


def spread(values: list[float], digits: int = 2) -> str:
    """Median (least to most)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(rows: list[Row]) -> list[str]:
    """The table of medians and whether the bars are met."""
    by_step: dict[str, list[Row]] = {}
    for row in rows:
        by_step.setdefault(row["what"], []).append(row)
    floor, other = ([row["wall_seconds"] for row in by_step[what]] for what in (FLOOR, PEER))
    lines = ["| what | wall, s | CPU, s | peak, MiB | anonymous, MiB | wall / floor | wall / transformers |"]
    lines += ["|---|---|---:|---:|---:|---|---|"]
    bars = []
    for what, held in by_step.items():
        wall, cpu, peak, anonymous = ([row[name] for row in held] for name in COLUMNS[2:6])
        to_floor, to_peer = ([a / b for a, b in zip(wall, base, strict=True)] for base in (floor, other))
        lines.append(
            f"| {what} | {spread(wall, 1)} | {statistics.median(cpu):.1f} | {max(peak)} | {max(anonymous)} "
            f"| {spread(to_floor)} | {spread(to_peer)} |"
        )
        if what in (FLOOR, UNSYNCED, PEER, SYNCED_PEER) or what.startswith("torchtitan"):
            continue
        least_peer = min(row["peak_mib"] for row in by_step[PEER])
        met = {
            f"at most {MAX_RATIO} x the floor": statistics.median(to_floor) <= MAX_RATIO,
            f"at most {MAX_PEAK_MIB} MiB": max(peak) <= MAX_PEAK_MIB,
            "sooner than transformers": statistics.median(to_peer) < 1,
            "in less memory": max(peak) < least_peer,
        }
        bars.append(f"{what}: " + ", ".join(f"{bar}: {'yes' if yes else 'NO'}" for bar, yes in met.items()))
    return [*lines, "", *bars]


def prepare(model: Path, sizes: Sizes) -> None:
    """Write the model, or take the one that is there."""
    if (model / "config.json").exists():
        if json.loads((model / "config.json").read_text()) != config_of(sizes):
            raise SystemExit(f"{model} has other sizes than asked for: remove it or choose another folder")
        return
    # In a process of its own, whose memory the measured ones do not inherit as their ru_maxrss.
    subprocess.run([sys.executable, __file__, "make", str(model), json.dumps(vars(sizes))], check=True)


def main() -> None:
    """Measure, print the table and write the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sizes(parser, Sizes())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tp", type=int, default=8, help="of the mp_rank files")
    parser.add_argument("--pp", type=int, default=2, help="of the mp_rank files")
    parser.add_argument(
        "--titan", nargs=2, metavar=("PYTHON", "CHECKOUT"), help="also run torchtitan's scripts (0.2.2) with a Python"
    )
    parser.add_argument("--model", type=Path, default=None, help="where the model is written once and kept")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; four times the model's size")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.model is not None:
            (folder / "model").symlink_to(arguments.model.absolute())
        prepare((folder / "model").resolve(), sizes_of(arguments))
        refusal = refused(folder / "model", ("--to", "mp_rank", "--tp", str(arguments.tp), "--pp", str(arguments.pp)))
        if refusal:
            print(f"mp_rank is left out: {refusal}", flush=True)
        same = tensor_hashes(folder / "model")
        for number in range(1, arguments.rounds + 1):
            for step in steps_of(arguments, not refusal):
                rows.append(measure(step, folder, number, same if number == 1 else None))
                print(rows[-1], flush=True)
    print("\n".join(report(rows)))
    with open(arguments.output, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        write_model(Path(sys.argv[2]), Sizes(**json.loads(sys.argv[3])), FILES)
    elif sys.argv[1:2] in (["copy"], ["copy-unsynced"]):
        copy(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[1] == "copy")
    elif sys.argv[1:2] == ["titan"]:
        titan(Sizes(**json.loads(sys.argv[2])), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
    elif sys.argv[1:2] in (["peer"], ["peer-synced"]):
        peer(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[1] == "peer-synced")
    else:
        main()
