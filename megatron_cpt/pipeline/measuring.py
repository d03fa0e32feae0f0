"""Where a run keeps what it makes, and what is measured of it for the report."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt import __version__
from megatron_cpt.checkpoint import LlamaForward
from megatron_cpt.config.loading import Resolved
from megatron_cpt.config.manifest import read_json
from megatron_cpt.config.schema import RunConfig
from megatron_cpt.data import IndexedDataset
from megatron_cpt.data.forecast import forecast
from megatron_cpt.evaluation import probe_accuracy, score_dataset
from megatron_cpt.pipeline.corpus import Corpus, read_probe
from megatron_cpt.pipeline.steps import Steps
from megatron_cpt.reporting import write_report
from megatron_cpt.runtime.device import current_device
from megatron_cpt.tokenizer import fast_slow_mismatches, load_tokenizer, measure, source_lines_changed
from megatron_cpt.training.metrics import read_metrics

VERSIONS = ("torch", "megatron-core", "numpy", "sentencepiece", "tokenizers", "safetensors")


@dataclass(frozen=True)
class Paths:
    """The folders of a run, or of an arm of a comparison, which shares most of them with the other arms."""

    root: Path
    config: RunConfig
    arm: str | None = None

    @property
    def own(self) -> Path:
        """What depends on how the new rows are made."""
        return self.root if self.arm is None else self.root / "arms" / self.arm

    @property
    def text(self) -> Path:
        """Texts that the run wrote itself."""
        return self.root / "text"

    @property
    def own_base(self) -> Path:
        """Everything of a base model made here."""
        return self.root / "base"

    @property
    def base_model(self) -> Path:
        """HF folder of the base model."""
        return Path(self.config.base.path) if self.config.base.path else self.own_base / "hf"

    @property
    def base_tokenizer(self) -> Path:
        """Folder of the base's tokenizer."""
        return Path(self.config.base.path) if self.config.base.path else self.own_base / "tokenizer"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer that is trained with."""
        return self.base_tokenizer if self.config.tokenizer.method == "none" else self.root / "tokenizer"

    @property
    def surgery(self) -> Path:
        """The surgery's plan and model."""
        return self.own / "surgery"

    @property
    def operated_model(self) -> Path:
        """HF folder of the model that training begins with."""
        return self.base_model if self.config.tokenizer.method == "none" else self.surgery / "hf"

    @property
    def shards(self) -> Path:
        """Indexed datasets."""
        in_base_tokens = self.arm is not None and self.config.tokenizer.method == "none"
        return self.root / ("shards_base" if in_base_tokens else "shards")

    def base_held_out(self, language: str) -> Path:
        """Prefix of the held-out text in the base's tokens."""
        return self.shards / f"{language}.held_out.base"

    @property
    def train(self) -> Path:
        """The adaptation's training job."""
        return self.own / "train"

    @property
    def exported_model(self) -> Path:
        """HF folder of the result."""
        return self.own / "hf"


def tokenizer_facts(paths: Paths, source: Corpus, target: Corpus) -> dict[str, Any]:
    """Bytes per token before and after, source lines cut differently, fast against slow."""
    old, new = load_tokenizer(paths.base_tokenizer), load_tokenizer(paths.tokenizer)
    texts = {corpus.language: [document.text for document in corpus.held_out()] for corpus in (source, target)}
    lines = {
        language: [line for text in held for line in text.splitlines() if line] for language, held in texts.items()
    }
    per_token = {
        language: {"base": measure(old, held)["bytes_per_token"], "adapted": measure(new, held)["bytes_per_token"]}
        for language, held in texts.items()
    }
    return {
        "bytes_per_token": per_token,
        "source_lines_changed": source_lines_changed(old, new, lines[source.language]),
        "fast_slow_mismatches": fast_slow_mismatches(paths.tokenizer, [x for held in lines.values() for x in held]),
    }


def write_run_report(
    resolved: Resolved[RunConfig], paths: Paths, steps: Steps, source: Corpus, target: Corpus
) -> dict[str, Any]:
    """Measure the three models on the same held-out text and write the report."""
    config = resolved.config
    languages = (source.language, target.language)
    adapted = {language: paths.shards / f"{language}.held_out" for language in languages}
    models = {
        "base": (paths.base_model, paths.base_tokenizer, {name: paths.base_held_out(name) for name in languages}),
        "after_surgery": (paths.operated_model, paths.tokenizer, adapted),
        "adapted": (paths.exported_model, paths.tokenizer, adapted),
    }
    scores, probe = _scores(models, steps.facts("surgery").get("certificate"), paths, languages)
    facts = {name: steps.facts(name) for name in ("tokenizer", "export")}
    metrics = read_metrics(paths.train)
    history = history_of(metrics)
    last = {point["language"]: point["bits_per_byte"] for point in history}
    report = {
        "name": config.name,
        "bits_per_byte": scores,
        "bytes_per_token": facts["tokenizer"]["bytes_per_token"],
        "tokenizer": {
            "vocab_size": {
                "base": load_tokenizer(paths.base_tokenizer).vocab_size,
                "adapted": load_tokenizer(paths.tokenizer).vocab_size,
            },
            "source_lines_changed": facts["tokenizer"]["source_lines_changed"],
            "fast_slow_mismatches": facts["tokenizer"]["fast_slow_mismatches"],
        },
        **({"surgery": surgery} if (surgery := _surgery(steps.facts("surgery"))) else {}),
        **({"probe": probe} if probe else {}),
        "logit_parity": facts["export"]["logit_parity"],
        "export": {
            "verified_tensors": facts["export"]["verified_tensors"],
            "bits_per_byte_minus_trained": {
                language: scores[language]["adapted"] - last[language] for language in languages
            },
        },
        "train": _training_facts(metrics, paths.train),
        **({"stages": _stages(paths)} if config.train.stages else {}),
        "seconds": steps.seconds(),
        "versions": versions(),
        "config_hash": resolved.hash,
    }
    write_report(report, history, paths.root)
    return report


def _surgery(facts: dict[str, Any]) -> dict[str, Any]:
    """How the new rows were made; empty where the vocabulary is the base's."""
    if not facts:
        return {}
    methods = {name: method["method"] for name, method in facts["methods"].items()}
    return {**methods, "new_rows": facts["rows"]["new"], "calibration": facts.get("calibration", "none")}


def _stages(paths: Paths) -> list[dict[str, Any]]:
    """What each stage of the adaptation read of each text."""
    config, batch = paths.config, paths.config.train.batch
    num_samples = config.train.train_steps * batch.global_batch_size
    stages = forecast(config.training_data(str(paths.shards)), batch.seq_length, config.seed, num_samples)["stages"]
    return list(stages)


def _scores(
    models: dict[str, tuple[Path, Path, dict[str, Path]]],
    certificate: dict[str, Any] | None,
    paths: Paths,
    languages: tuple[str, str],
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, Any]]]:
    """Bits per byte and probe of each stage's (model, tokenizer, held-out prefixes), by language."""
    questions = read_probe(paths.text) if paths.config.data.builtin == "world" else {}
    scores: dict[str, dict[str, float]] = {language: {} for language in languages}
    probe: dict[str, dict[str, Any]] = {language: {} for language in questions}
    for stage, (model, tokenizer_path, prefixes) in models.items():
        side = {"base": "before", "after_surgery": "after"}.get(stage)
        if certificate is not None and side is not None:  # measured by the surgery, on the same windows
            for language in languages:
                scores[language][stage] = certificate["bits_per_byte"][language][side]
            prefixes = {}
        if not prefixes and not questions:
            continue
        forward = LlamaForward(model, cache=True, device=current_device().torch_device())
        tokenizer = load_tokenizer(tokenizer_path)
        for language, prefix in prefixes.items():
            dataset = IndexedDataset(prefix)
            score = score_dataset(forward, dataset, paths.config.train.batch.seq_length, tokenizer.eos_id)
            scores[language][stage] = score["bits_per_byte"]
        for language, items in questions.items():
            probe[language][stage] = probe_accuracy(forward, tokenizer, items)
    return scores, probe


def history_of(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Points {"step", "language", "bits_per_byte"} of a job's validations."""
    return [
        {"step": record["step"], "language": language, "bits_per_byte": score["bits_per_byte"]}
        for record in metrics
        if "validation" in record
        for language, score in record["validation"].items()
    ]


def _training_facts(metrics: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    records = [record for record in metrics if "loss" in record]
    job = read_json(output / "job.json")
    return {
        "steps": records[-1]["step"],
        "tokens": records[-1]["tokens"],
        "loss": records[-1]["loss"],
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in records),
        "bytes_per_second": statistics.median(record["bytes_per_second"] for record in records),
        "mfu": statistics.median(record["mfu"] for record in records),
        "mfu_against": job["peak_flops_from"],
        "world_size": job["world_size"],
        "layout": job["layout"],
        "device": job["device"],
        "parameters": job["parameters"],
    }


def versions() -> dict[str, str]:
    """Of this package and of those that decide the numbers."""
    return {
        "megatron_cpt": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in VERSIONS},
    }
