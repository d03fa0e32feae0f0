"""Vocabulary surgery side by side with mergekit's tokensurgeon, deepfocus, WECHSEL's formula and transformers' resize.

`bits`: one tiny base of the source language, one vocabulary extended for the target, one donor. Each arm makes the
new model from them in a process of its own, under the interpreter of its tool (`surgery_arms.py`); then each result
is trained with the same data and scored, bits per byte of held-out works at step 0 and at the end. What
calibration reads is taken off its arm's training. Of each process: wall and CPU seconds, imports apart, and the
peak of its resident memory.

`cost`: the same processes on tables of real size, Llama 2's tokenizer extended by up to 11,176 pieces and random rows
of width 4,096 in bf16; nothing is trained.

    python benchmarks/bench_surgery_peers.py bits --source english.jsonl.gz --target japanese.jsonl.gz \
        --python mergekit=VENV/bin/python deepfocus=VENV/bin/python wechsel=VENV/bin/python --output runs/peers
    python benchmarks/bench_surgery_peers.py cost --tokenizer llama2/tokenizer.model --target japanese.jsonl.gz \
        --python mergekit=VENV/bin/python --output runs/cost
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import surgery_arms
from bench_surgery_apply import NEW_SIZE, OLD_SIZE, write_model

from megatron_cpt.checkpoint import convert, open_hf, read_shape
from megatron_cpt.checkpoint.llama import EMBEDDING, HEAD
from megatron_cpt.cli.main import main as command
from megatron_cpt.config.loading import load_config
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.data import Document, read_documents
from megatron_cpt.pipeline.measuring import history_of
from megatron_cpt.pipeline.run import Run, validation
from megatron_cpt.tokenizer import extend_tokenizer, load_tokenizer
from megatron_cpt.training.job import run_job
from megatron_cpt.training.metrics import read_metrics

ARMS_FILE = Path(surgery_arms.__file__)
COSTS = ("wall_seconds", "cpu_seconds", "imports_seconds", "imports_cpu_seconds", "work_seconds", "work_cpu_seconds")
COLUMNS = ("table", "arm", "seed", *COSTS, "imports_mib", "peak_mib", "load", "steps", *(
    f"{language}_{place}" for language in ("target", "source") for place in ("step_0", "end")
), "note")  # fmt: skip
CALIBRATION_TOKENS = 16384
COST_ARMS = ("transformers resize", "tokensurgeon subword", "tokensurgeon mean", "ours mean")


def measured(arm: str, python: str, inputs: Path, output: Path, timeout: float) -> dict[str, Any]:
    """Run an arm in a process of its own; what it took, or why there is nothing."""
    for left in ("", ".plan", ".plan.calibrated", ".cache"):
        shutil.rmtree(f"{output}{left}", ignore_errors=True)
    load, begun, log = os.getloadavg()[0], time.monotonic(), output.with_name(f"{output.name}.log")
    with log.open("w") as file:
        words = [python, str(ARMS_FILE), arm, str(inputs), str(output)]
        child = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        usage: resource.struct_rusage | None = None
        status, peak = 0, 0.0
        while usage is None and time.monotonic() - begun < timeout:
            peak = surgery_arms.peak_mib(child.pid) or peak
            pid, status, found = os.wait4(child.pid, os.WNOHANG)
            usage = found if pid else None
            time.sleep(0.01)
    row: dict[str, Any] = {"arm": arm, "wall_seconds": round(time.monotonic() - begun, 2), "load": round(load, 1)}
    if usage is None:
        child.kill()
        _, _, usage = os.wait4(child.pid, 0)
        row["note"] = f"not finished in {timeout:.0f} s"
    row |= {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2), "peak_mib": round(peak)}
    last = log.read_text().strip().splitlines()[-1:]
    if status:
        row["note"] = f"failed: {' '.join(last)}"
    elif "note" not in row:
        told = json.loads(last[0])
        row |= {name: round(told[name], 2) for name in COSTS[2:]}
        row |= {"imports_mib": round(told["imports_mib"]), "peak_mib": round(told["work_mib"])}
    return row


def prepare(options: argparse.Namespace, seed: int) -> Run:
    """Base, extended vocabulary, datasets and donor of a seed, made once."""
    overrides = [
        f"seed={seed}",
        f"data.source={options.source}",
        f"data.target={options.target}",
        f"output={options.output / f'seed{seed}'}",
        f"train.train_steps={options.steps}",
        f"train.eval_interval_steps={options.steps}",
        *options.overrides,
    ]
    if options.base:
        overrides += [f"base.path={options.base.format(seed=seed)}", "base.shape=null", "base.train=null"]
    shared = Run(load_config("real-text", RunConfig, overrides))
    shared.share()
    folder = shared.root / "donor"
    makes = (folder / "train", folder / "hf")
    rate = {"learning_rate": 2e-3, "min_learning_rate": 2e-4}
    settings = {"train_steps": options.donor_steps, "rate": rate, "seed": seed}

    def train_donor() -> dict[str, Any]:
        # Half of each language: matching pursuit takes a new piece's row apart into rows of old ones.
        learn = shared.config.train.model_copy(
            update={
                "train_steps": options.donor_steps,
                "replay": 0.5,
                "optimizer": shared.config.train.optimizer.model_copy(update=rate),
            }
        )
        mixture = shared.config.model_copy(update={"train": learn})
        corpora = (shared.source, shared.target)
        data = mixture.training_data(str(shared.paths.shards))
        data = data.model_copy(update={"validation": validation(shared.paths.shards, corpora)})
        shape, _ = read_shape(shared.paths.base_model)
        job = shared.job(learn, makes[0], shared.paths.tokenizer, data, shape=shape)
        convert(run_job(job, learn.num_processes), makes[1], "hf", tokenizer=shared.paths.tokenizer)
        return {}

    needs = ("base", "tokenizer", "shards")
    shared.steps.add("donor", "train the donor on both languages", settings, needs, train_donor, makes=makes)
    shared.steps.run()
    return shared


def write_inputs(run: Run) -> Path:
    """What every arm is given."""
    inputs = run.root / "inputs"
    if not inputs.exists():
        inputs.mkdir()
        places = {"base": run.paths.base_model, "tokenizer": run.paths.tokenizer, "donor": run.root / "donor" / "hf"}
        for name, place in {**places, "shards": run.paths.shards}.items():
            (inputs / name).symlink_to(place.absolute())
        for name, corpus in (("source", run.source), ("target", run.target)):
            write_texts(corpus.train(), inputs / f"{name}.jsonl")
        write_texts(chain(run.source.train(), run.target.train()), inputs / "both.jsonl")
    return inputs


def write_texts(documents: Iterable[Document], path: Path) -> None:
    """Plain jsonl, for tools that read nothing else."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")


def adopt(made: Path, tokenizer: Path) -> str:
    """Give what a tool wrote the new tokenizer's own files, as `run` reads a base; what there is to say of it."""
    for path in tokenizer.iterdir():
        if path.name not in ("manifest.json", "vocab_map.json"):
            shutil.copyfile(path, made / path.name)
    reader = open_hf(made)
    broken = [name for name in (EMBEDDING, HEAD) if not bool(reader.read(name).isfinite().all())]
    return f"not finite: {', '.join(broken)}" if broken else ""


def trained(run: Run, made: Path, arm: str, folder: Path) -> dict[str, Any]:
    """Bits per byte of both languages before and after the training that all arms share."""
    note = adopt(made, run.paths.tokenizer)
    learn, batch = run.config.train, run.config.train.batch
    read = CALIBRATION_TOKENS if "prior" in arm else 0
    steps = learn.train_steps - -(-read // (batch.global_batch_size * batch.seq_length))
    learn = learn.model_copy(update={"train_steps": steps})
    data = run.config.training_data(str(run.paths.shards))
    data = data.model_copy(update={"validation": validation(run.paths.shards, (run.source, run.target))})
    shutil.rmtree(folder, ignore_errors=True)
    run_job(run.job(learn, folder, run.paths.tokenizer, data, initial=made), learn.num_processes)
    points = {(point["language"], point["step"]): point["bits_per_byte"] for point in history_of(read_metrics(folder))}
    sides = (("target", run.target.language), ("source", run.source.language))
    shutil.rmtree(folder)
    return {
        "note": note,
        "steps": steps,
        **{f"{side}_step_0": round(points[language, 0], 4) for side, language in sides},
        **{f"{side}_end": round(points[language, steps], 4) for side, language in sides},
    }


def bits(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A row for each arm and seed; arms that are in the table already are not done again."""
    pythons = dict(pair.split("=", 1) for pair in options.python)
    for seed in options.seeds:
        run = prepare(options, seed)
        inputs = write_inputs(run)
        for arm in options.arms or surgery_arms.ARMS:
            folder = run.root / "arms" / arm.replace(",", "").replace(" ", "_")
            folder.mkdir(parents=True, exist_ok=True)
            python, made = python_of(arm, pythons), folder / "made"
            took = once(folder / "cost.json", partial(measured, arm, python, inputs, made, options.timeout))
            found: dict[str, Any] = {}
            if "note" not in took and arm == "vectors":
                shutil.copyfile(made / "vectors.safetensors", inputs / "vectors.safetensors")
            elif "note" not in took:
                found = once(folder / "bits.json", partial(trained, run, made, arm, folder / "train"))
            yield {"table": "bits", "seed": seed, **took, **found}


def once(record: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was recorded before, or what is made now."""
    if not record.exists():
        record.write_text(json.dumps(make()))
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def cost(options: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A row for each arm on tables of real size."""
    pythons = dict(pair.split("=", 1) for pair in options.python)
    inputs = options.output / "inputs"
    if not inputs.exists():
        options.output.mkdir(parents=True, exist_ok=True)
        staged = options.output / "inputs.part"
        shutil.rmtree(staged, ignore_errors=True)
        write_real_size(staged, options.tokenizer, options.target)
        staged.rename(inputs)
    for number in range(options.rounds):
        for arm in options.arms or COST_ARMS:
            made = options.output / "made"
            yield {
                "table": "cost",
                "seed": number,
                **measured(arm, python_of(arm, pythons), inputs, made, options.timeout),
            }
            shutil.rmtree(made, ignore_errors=True)


def write_real_size(inputs: Path, tokenizer: Path, text: Path) -> None:
    """A base of Llama 2's vocabulary and width 4,096, a donor of width 64 with the extended one."""
    corpus = [document.text for document in read_documents([text])]
    assert command(["tokenizer", "convert", str(tokenizer), "--output", str(inputs / "base_tokenizer")]) == 0
    extend_tokenizer(inputs / "base_tokenizer", corpus, NEW_SIZE - OLD_SIZE, "ja", 8, inputs / "tokenizer", "ja")
    sizes = [load_tokenizer(inputs / name).vocab_size for name in ("base_tokenizer", "tokenizer")]
    for name, folder, width, size in zip(
        ("base", "donor"), ("base_tokenizer", "tokenizer"), (4096, 64), sizes, strict=True
    ):
        write_model(inputs / name, width, size)
        for path in (inputs / folder).iterdir():
            if path.name not in ("manifest.json", "vocab_map.json"):
                shutil.copyfile(path, inputs / name / path.name)


def python_of(arm: str, pythons: dict[str, str]) -> str:
    """The interpreter of an arm's tool."""
    tool = arm.split()[0].removesuffix(",")
    return pythons.get({"tokensurgeon": "mergekit"}.get(tool, tool), sys.executable)


def main() -> None:
    """Measure and write the table, anew after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("bits", "cost"))
    parser.add_argument("--source", type=Path, help="source-language text")
    parser.add_argument("--target", type=Path, required=True, help="target-language text")
    parser.add_argument("--output", type=Path, required=True, help="folder to work in")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--python", nargs="*", default=[], metavar="TOOL=PYTHON", help="where a tool is installed")
    parser.add_argument("--arms", nargs="+", choices=list(surgery_arms.ARMS))
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which an arm is stopped")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100, help="of training, after surgery")
    parser.add_argument("--donor-steps", type=int, default=250)
    parser.add_argument("--base", help="bits: a finished base, {seed} in its path stands for the seed")
    parser.add_argument("--tokenizer", type=Path, help="cost: Llama 2's tokenizer.model")
    parser.add_argument("--rounds", type=int, default=1, help="cost: how often each arm is run")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="PATH=VALUE")
    options = parser.parse_args()
    rows = []
    for row in (bits if options.table == "bits" else cost)(options):
        print(row, flush=True)
        rows.append(row)
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
