"""What does calibrating the new rows buy at equal tokens, and is it better than training all new rows first?

For each language and seed: a tiny base is trained on the source text; its vocabulary is extended; then every arm
reads the same number of tokens. What calibration or a first stage reads is taken off the training.

    mean            mean of the old pieces, training alone
    prior           the same rows, calibrated by default: frequencies, vectors, one forward pass
    frequencies     the prior without vectors
    prior_steps     prior, then 8 steps of a few numbers
    steps           20 steps of a few numbers, without the prior
    rows_first      20 steps of Adam on all new rows of both matrices, the model frozen (what the published
                    recipes do first), at the best of three learning rates
    rate_2, 4, 8    mean, and embedding and head at so many times the learning rate all along
    prior_rate_2    prior and rate_2 together

    python benchmarks/bench_calibration.py --source english.jsonl.gz --target ja=japanese.jsonl.gz --output runs/bench
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_cpt.checkpoint import LlamaForward, open_hf, read_checkpoint_manifest
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.config.loading import load_config
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.data import CalibrationText
from megatron_cpt.pipeline import run

PRIOR = "surgery.calibration.prior_tokens"
FACTOR = "train.optimizer.vocabulary_learning_rate_factor"
COLUMNS = ("target", "seed", "arm", "tokens", "step_0", "adapted", "step_0_source", "adapted_source", "base_source")
PLAIN = {"surgery.calibration": "null"}
ARMS: dict[str, tuple[int, dict[str, Any]]] = {  # tokens read before training, settings
    "mean": (0, PLAIN),
    "prior": (16384, {PRIOR: 16384}),
    "frequencies": (16384, {PRIOR: 16384, "surgery.calibration.dimension": 0}),
    "prior_steps": (26624, {PRIOR: 16384, "surgery.calibration.steps": 8}),
    "steps": (
        22528,
        {
            f"surgery.calibration.{key}": value
            for key, value in (("prior_tokens", 0), ("steps", 20), ("learning_rate", 0.3))
        },
    ),
    "rows_first": (20480, PLAIN),
    **{f"rate_{factor}": (0, {FACTOR: factor, **PLAIN}) for factor in (2, 4, 8)},
    "prior_rate_2": (16384, {PRIOR: 16384, FACTOR: 2}),
}


def overrides_of(arguments: argparse.Namespace, target: str, text: str, seed: int) -> list[str]:
    """Settings that all arms of a language and seed share."""
    return [
        f"seed={seed}",
        f"data.source={arguments.source}",
        f"data.target={text}",
        f"data.target_language={target}",
        f"tokenizer.script={'any' if target == 'de' else target}",
        *arguments.overrides,
    ]


def run_arm(
    arguments: argparse.Namespace,
    shared: list[str],
    folder: Path,
    arm: str,
    base: Path | None,
    rows: Path | None = None,
) -> dict[str, Any]:
    """One arm's report; an arm that was finished before is read, not run again."""
    tokens, settings = ARMS[arm]
    batch = load_config("real-text", RunConfig, shared).config.train.batch
    steps = arguments.steps - -(-tokens // (batch.global_batch_size * batch.seq_length))
    overrides = [*shared, f"output={folder / arm}", f"train.train_steps={steps}"]
    overrides += [f"{path}={value}" for path, value in settings.items()]
    start = base if rows is None else rows
    if start is not None:
        overrides += [f"base.path={start}", "base.shape=null", "base.train=null"]
    if rows is not None:  # the rows are in the model already
        overrides.append("tokenizer.method=none")
    return run(load_config("real-text", RunConfig, overrides))


def train_rows(folder: Path, out: Path, rate: float, steps: int, tokens: int) -> float:
    """Train all new rows of both matrices with the model frozen; returns the loss of the last quarter of the steps."""
    forward = LlamaForward(folder / "surgery" / "hf", cache=True)
    old_size = open_hf(folder.parent / "mean" / "base" / "hf").vocab_size
    tables = {name: open_hf(folder / "surgery" / "hf").read(name).float() for name in (EMBEDDING, HEAD)}
    rows = {name: table[old_size:].clone().requires_grad_(True) for name, table in tables.items()}
    language = next(
        path.name.split(".")[0] for path in (folder / "shards").glob("*.train.bin") if "en" not in path.name
    )
    prefixes = [folder / "shards" / f"{name}.train" for name in ("en", language)]
    tokenizer = read_checkpoint_manifest(folder / "surgery" / "hf")["tokenizer_sha256"]
    text = CalibrationText([prefixes[0]], [prefixes[1]], tokenizer, 128, 0.5, 1)
    optimizer = torch.optim.Adam(rows.values(), lr=rate, betas=(0.9, 0.95))
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        batch = text.take(tokens)
        ids, labels = torch.from_numpy(batch.tokens_N), torch.from_numpy(batch.labels_N)
        layout = forward.layout(1, len(ids), torch.from_numpy(batch.cu_seqlens))
        embedding = torch.cat([tables[EMBEDDING][:old_size], rows[EMBEDDING]])
        embedded = embedding[ids]
        tape: list[torch.Tensor] = []
        hidden = forward.body(embedded.detach(), layout, tape).requires_grad_(True)
        head = torch.cat([tables[HEAD][:old_size], rows[HEAD]])
        loss = torch.nn.functional.cross_entropy(hidden @ head.T, labels, ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        embedded.backward(forward.body_gradient(tape, layout, hidden.grad))
        optimizer.step()
        losses.append(float(loss.detach()))
    out.mkdir(parents=True, exist_ok=True)
    for path in (folder / "surgery" / "hf").iterdir():
        if path.is_file() and path.name not in ("model.safetensors", "manifest.json", "surgery_certificate.json"):
            (out / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "surgery" / "hf" / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        weights[name] = torch.cat([tables[name][:old_size], rows[name].detach()]).to(weights[name].dtype)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return statistics.mean(losses[-max(1, steps // 4) :])


def rows_first(arguments: argparse.Namespace, shared: list[str], folder: Path) -> dict[str, Any]:
    """The arm that trains all new rows first, at the learning rate whose last losses are the least."""
    tries = {
        rate: train_rows(folder / "mean", folder / f"rows_{rate:g}", rate, 20, 1024) for rate in (2e-3, 1e-2, 3e-2)
    }
    best = min(tries, key=lambda rate: tries[rate])
    print(f"rows_first: loss by learning rate {tries}; {best:g} is taken", flush=True)
    return run_arm(arguments, shared, folder, "rows_first", None, folder / f"rows_{best:g}")


def main() -> None:
    """Run the arms and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="source-language text")
    parser.add_argument("--target", nargs="+", required=True, metavar="LANG=FILE", help="target-language texts")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--csv", type=Path, help="where to write the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--steps", type=int, default=240, help="training steps of the arm without calibration")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE")
    arguments = parser.parse_args()
    table = []
    for target, text in (pair.split("=", 1) for pair in arguments.target):
        for seed in arguments.seeds:
            shared = overrides_of(arguments, target, text, seed)
            folder = arguments.output / f"{target}{seed}"
            for arm in dict.fromkeys(["mean", *arguments.arms]):
                base = None if arm == "mean" else folder / "mean" / "base" / "hf"
                if arm == "rows_first":
                    report = rows_first(arguments, shared, folder)
                else:
                    report = run_arm(arguments, shared, folder, arm, base)
                bits = report["bits_per_byte"]
                start = "base" if arm == "rows_first" else "after_surgery"
                row = (
                    target,
                    seed,
                    arm,
                    report["train"]["tokens"] + ARMS[arm][0],
                    bits[target][start],
                    bits[target]["adapted"],
                    bits["en"][start],
                    bits["en"]["adapted"],
                    bits["en"]["base"],
                )
                table.append(dict(zip(COLUMNS, row, strict=True)))
                print(table[-1], flush=True)
                if arguments.csv:
                    with open(arguments.csv, "w", newline="", encoding="utf-8") as file:
                        writer = csv.DictWriter(file, COLUMNS)
                        writer.writeheader()
                        writer.writerows(table)


if __name__ == "__main__":
    main()
