"""How long does `surgery apply` take on tables of real size, in how much memory, beside transformers' resize?

The model has one small layer and the two tables; rows are random, each new piece stands for 2 to 9 old ones, drawn
by a fixed seed. Every run is a process of its own, imports included; peak is its ru_maxrss. transformers loads the
model in bf16, calls `resize_token_embeddings` with its default, the mean resizing, and saves.

    python benchmarks/bench_surgery_apply.py --width 4096 --rounds 3 --peer --output apply.csv
"""

from __future__ import annotations

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COLUMNS = ("what", "width", "wall_seconds", "cpu_seconds", "peak_mib", "load")
OLD_SIZE, NEW_SIZE = 32000, 43176


def write_model(folder: Path, width: int, size: int = OLD_SIZE) -> None:
    """Write a model of one small layer and two tables of random rows, bf16."""
    import torch

    from megatron_cpt.checkpoint import hf_config, hf_shapes, write_hf
    from megatron_cpt.config.schema import LlamaShape

    head_dim = 128
    shape = LlamaShape(
        num_layers=1,
        hidden_size=width,
        ffn_hidden_size=256,
        num_attention_heads=2,
        num_query_groups=2,
        head_dim=head_dim,
    )

    def rows(size: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, size[0], 1024):
            part = torch.randn(min(1024, size[0] - start), *size[1:], generator=generator)
            yield (part * 0.02).bfloat16()

    entries = [
        (name, part, torch.bfloat16, lambda part=part, seed=seed: rows(part, seed))
        for seed, (name, part) in enumerate(hf_shapes(shape, size).items())
    ]
    write_hf(folder, entries, hf_config(shape, size, "bfloat16", 1, 2))


def make(folder: Path, width: int) -> None:
    """Write the model, a tokenizer and the plan."""
    import random

    from megatron_cpt.surgery import plan_surgery
    from megatron_cpt.tokenizer import Entry, VocabMap, load_tokenizer, train_tokenizer

    write_model(folder / "model", width)
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(60)]
    train_tokenizer([" ".join(draw.choices(words, k=9)) for _ in range(200)], 330, folder / "tokenizer")
    kept = [Entry("kept", id) for id in range(OLD_SIZE)]
    new = [
        Entry("new", None, tuple(draw.choices(range(OLD_SIZE), k=draw.randint(2, 9))))
        for _ in range(NEW_SIZE - OLD_SIZE)
    ]
    sha256 = load_tokenizer(folder / "tokenizer").sha256
    plan = plan_surgery(VocabMap(OLD_SIZE, NEW_SIZE, "0" * 64, sha256, tuple(kept + new)))
    plan.save(folder / "plan", folder / "tokenizer")


def resize(folder: Path, output: Path) -> None:
    """What transformers does by itself."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
    model.resize_token_embeddings(NEW_SIZE)
    model.save_pretrained(output)


def measured(what: str, width: int, words: list[str], timeout: float) -> dict[str, Any]:
    """Run a command in a process of its own."""
    load, begun = os.getloadavg()[0], time.monotonic()
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    usage: resource.struct_rusage | None = None
    while usage is None and time.monotonic() - begun < timeout:
        pid, status, found = os.wait4(child.pid, os.WNOHANG)
        if pid:
            assert status == 0, f"{' '.join(words)} failed"
            usage = found
        time.sleep(0.01)
    wall = time.monotonic() - begun
    if usage is None:
        child.kill()
        child.wait()
        return {"what": f"{what} (stopped)", "width": width, "wall_seconds": f"> {timeout:.0f}", "load": round(load, 1)}
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
    return dict(zip(COLUMNS, (what, width, round(wall, 2), round(cpu, 2), round(peak), round(load, 1)), strict=True))


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", action="store_true", help="also run transformers")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which the peer is stopped")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; some GB")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for width in args.width:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            subprocess.run([sys.executable, __file__, "make", name, str(width)], check=True)
            program = "import sys; from megatron_cpt.cli.main import main; sys.exit(main(sys.argv[1:]))"
            model, plan = str(folder / "model"), str(folder / "plan")
            for number in range(args.rounds):
                words = ["surgery", "apply", plan, model, str(folder / f"new{number}")]
                rows.append(measured("surgery apply", width, [sys.executable, "-c", program, *words], args.timeout))
            if args.peer:
                words = [sys.executable, __file__, "resize", name, str(folder / "resized")]
                rows.append(measured("transformers resize", width, words, args.timeout))
        for row in rows:
            print(row, flush=True)
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["resize"]:
        resize(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
