"""The whole path of a recipe: base, tokenizer, surgery, data, training, export, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.checkpoint import convert, open_checkpoint, verify
from megatron_cpt.checkpoint.fingerprint import fingerprint
from megatron_cpt.config.loading import Resolved
from megatron_cpt.config.manifest import sha256_file, sha256_json
from megatron_cpt.config.schema import (
    DEFAULT_REPLAY,
    DataSource,
    LearnConfig,
    LlamaShape,
    RunConfig,
    TrainConfig,
    TrainDataConfig,
    ValidationSource,
)
from megatron_cpt.config.surgery import MODEL_FIELDS, CalibrationConfig, Method
from megatron_cpt.data import CalibrationText, DatasetBuild, build_dataset, build_files, read_documents
from megatron_cpt.data.world import write_world
from megatron_cpt.errors import ConfigError, TooLittleText, VerificationError
from megatron_cpt.evaluation import certify, check_certificate, logit_parity
from megatron_cpt.pipeline.claim import claim, refuse_foreign
from megatron_cpt.pipeline.corpus import Corpus, open_corpora, world_corpora
from megatron_cpt.pipeline.measuring import Paths, tokenizer_facts, write_run_report
from megatron_cpt.pipeline.steps import Steps
from megatron_cpt.pipeline.vocabulary import adapt_tokenizer
from megatron_cpt.reporting.report import REPORT_JSON, REPORT_MD
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.lock import lock_folder
from megatron_cpt.surgery import Inputs, SurgeryPlan, apply_surgery, calibrate, plan_surgery
from megatron_cpt.tokenizer import VocabMap, load_tokenizer, train_tokenizer
from megatron_cpt.training.folder import last_checkpoint
from megatron_cpt.training.job import run_job


def run(resolved: Resolved[RunConfig]) -> dict[str, Any]:
    """Walk the whole path; what was done before with the same settings and texts is not done again.

    Returns:
        the report, as written to `report.json` in the run's folder.

    Raises:
        CptError: the first step that fails; everything before it is kept and found again.
    """
    return Run(resolved).walk()


class Run:
    """One run folder and the steps that fill it."""

    def __init__(self, resolved: Resolved[RunConfig]) -> None:
        self.resolved, self.config = resolved, resolved.config
        self.own_models: dict[str, Path] = {}  # of those that surgery's methods name, the ones made here
        self.root = Path(self.config.output)
        self.paths = Paths(self.root, self.config)
        self.steps = Steps(self.root)
        self.source: Corpus
        self.target: Corpus

    def walk(self) -> dict[str, Any]:
        """Do every step in order; returns the report."""
        if self.config.data.builtin is None:
            open_corpora(self.config.data)  # a missing file is refused before anything is written
        refuse_foreign(self.root)
        with lock_folder(self.root):
            return self._walk()

    def _walk(self) -> dict[str, Any]:
        identity = sha256_json(self.config.model_dump(mode="json", exclude={"output"}))  # a run may be moved
        claim(self.root, self.config.name, identity, self.resolved.dump(), self.steps.any_done())
        self.share()
        self._surgery()
        self._adapt()
        self._export()
        self._report()
        return self.steps.run()

    def share(self) -> None:
        """Add what does not depend on how the new rows are made: texts, base, vocabulary, datasets."""
        self._text()
        self._base_tokenizer()
        self._base_model()
        self._adapt_tokenizer()
        self._shards()

    def _text(self) -> None:
        data, seed, folder = self.config.data, self.config.seed, self.paths.text
        settings: dict[str, Any] = {"data": data.model_dump()}
        if data.builtin == "world":
            languages = (data.source_language, data.target_language)
            self.source, self.target = world_corpora(data, folder)
            self.steps.add(
                "text",
                "write the bilingual world",
                {**settings, "seed": seed},
                (),
                lambda: write_world(folder, seed, data.world_documents, *languages),
                makes=(folder,),
            )
        else:
            self.source, self.target = open_corpora(data)
            hashes = [self.source.hashes(), self.target.hashes()]
            self.steps.add("text", "read the texts", {**settings, "files": hashes}, (), self._count)

    def _count(self) -> dict[str, Any]:
        """Read every document once: a broken file stops the run here, before anything is trained."""
        return {
            corpus.language: {
                "train_documents": sum(1 for _ in corpus.train()),
                "held_out_documents": len(corpus.held_out()),
            }
            for corpus in (self.source, self.target)
        }

    def _base_tokenizer(self) -> None:
        base, folder = self.config.base, self.paths.own_base / "tokenizer"
        if base.path is not None:
            given = {"sha256": load_tokenizer(base.path).sha256}
            self.steps.add("base_tokenizer", f"take the tokenizer of {base.path}", given, ("text",), dict)
            return

        def train() -> dict[str, Any]:
            texts = (document.text for document in self.source.train())
            language = self.source.language
            return dataclasses.asdict(train_tokenizer(texts, base.vocab_size, folder, language=language))

        title = f"train the base's tokenizer on {self.source.language} text"
        self.steps.add("base_tokenizer", title, {"vocab_size": base.vocab_size}, ("text",), train, makes=(folder,))

    def _base_model(self) -> None:
        base, paths = self.config.base, self.paths
        if base.path is not None:
            given = {"fingerprint": fingerprint(base.path)}
            self.steps.add("base", f"take the base model {base.path}", given, ("base_tokenizer",), dict)
            return
        assert base.train is not None and base.shape is not None  # a rule of the configuration
        job_folder, shards = paths.own_base / "train", paths.own_base / "shards"

        def train() -> dict[str, Any]:
            assert base.train is not None
            source = self.source
            name = source.language
            self._build(shards, paths.base_tokenizer, dataclasses.replace(source, parts={name: source.files}))
            data = TrainDataConfig(
                train=(DataSource(prefix=str(shards / f"{name}.train"), language=name),),
                validation=validation(shards, (source,)),
            )
            job = self.job(base.train, job_folder, paths.base_tokenizer, data, shape=base.shape)
            checkpoint = run_job(job, base.train.num_processes)
            return convert(checkpoint, paths.base_model, "hf", tokenizer=paths.base_tokenizer)

        title = f"train the base model on {self.source.language} text"
        settings = {**base.model_dump(), "seed": self.config.seed, "vocab_divisor": self.config.vocab_divisor}
        makes = (job_folder, shards, paths.base_model)
        self.steps.add("base", title, settings, ("text", "base_tokenizer"), train, makes=makes, resumable=job_folder)

    def _adapt_tokenizer(self) -> None:
        tokenizer, paths, source, target = self.config.tokenizer, self.paths, self.source, self.target

        def adapt() -> dict[str, Any]:
            facts = adapt_tokenizer(tokenizer, paths.base_tokenizer, source, target, paths.tokenizer)
            return {**facts, **tokenizer_facts(paths, source, target)}

        title = {
            "extend": f"extend the tokenizer for {target.language}",
            "replace": f"replace the tokenizer by one of {source.language} and {target.language}",
            "none": "keep the base's tokenizer",
        }[tokenizer.method]
        makes = () if tokenizer.method == "none" else (paths.tokenizer,)
        self.steps.add("tokenizer", title, tokenizer.model_dump(), ("text", "base_tokenizer"), adapt, makes=makes)

    def _surgery(self) -> None:
        surgery, paths = self.config.surgery, self.paths
        if self.config.tokenizer.method == "none":
            self.steps.add("surgery", "no surgery: the vocabulary is the base's", {}, ("base", "tokenizer"), dict)
            return

        def operate() -> dict[str, Any]:
            vocab_map = VocabMap.load(paths.tokenizer / "vocab_map.json")
            inputs = Inputs(load_tokenizer(paths.base_tokenizer), load_tokenizer(paths.tokenizer), self._texts)
            embedding, head = map(self._with_own_models, (surgery.embedding, surgery.head))
            plan = plan_surgery(vocab_map, embedding, head, inputs)
            facts: dict[str, Any] = {}
            if surgery.calibration is not None and len(plan.head.new_rows):
                plan, facts["calibration"] = self._calibrated(plan, surgery.calibration)
            plan.save(paths.surgery / "plan", paths.tokenizer)
            facts |= apply_surgery(plan, paths.base_model, paths.operated_model, paths.tokenizer)
            texts = {corpus.language: corpus.held_out() for corpus in (self.source, self.target)}
            length = self.config.train.batch.seq_length
            found = certify(
                paths.base_model,
                paths.operated_model,
                plan,
                paths.base_tokenizer,
                texts,
                self.source.language,
                length,
            )
            check_certificate(paths.operated_model)
            return {**facts, "certificate": found}

        names = (surgery.embedding.method, surgery.head.method)
        title = "vocabulary surgery: {} for the embedding, {} for the head".format(*names)
        if surgery.calibration is not None:
            title += ", then calibration"
        settings = {**surgery.model_dump(), "seq_length": self.config.train.batch.seq_length}
        settings["read"] = self._hashes_of_surgery()
        needs = ("text", "base_tokenizer", "base", "tokenizer", "shards")
        makes = (paths.surgery, paths.operated_model)
        self.steps.add("surgery", title, settings, needs, operate, makes=makes)

    def _with_own_models(self, method: Method) -> Method:
        named = {field: getattr(method, field, None) for field in MODEL_FIELDS}
        return method.model_copy(
            update={field: str(self.own_models[name]) for field, name in named.items() if name in self.own_models}
        )

    def _calibrated(self, plan: SurgeryPlan, settings: CalibrationConfig) -> tuple[SurgeryPlan, dict[str, Any]]:
        """The plan calibrated on the texts that training reads; as it is where they tell too little."""
        source, target = (
            [str(self.paths.shards / f"{name}.train") for name in corpus.parts] for corpus in (self.source, self.target)
        )
        base, device = open_checkpoint(self.paths.base_model), current_device().torch_device()
        length = min(settings.seq_length, base.llama.max_position_embeddings)
        text = CalibrationText(source, target, plan.new_sha256, length, settings.source_share, settings.seed)
        try:
            return calibrate(plan, base, text, settings, device=device)
        except TooLittleText as caught:
            print(f"  not calibrated: {caught}", flush=True)
            return plan, {"left_out": str(caught)}

    def _texts(self, files: Sequence[str], side: str) -> Iterator[str]:
        """Texts that a method of surgery reads; the run's own where it names none."""
        own = self.source if side == "source" else self.target
        documents = read_documents(files, self.config.data.text_field) if files else own.train()
        return (document.text for document in documents)

    def _hashes_of_surgery(self) -> dict[str, str]:
        """Of the files and models that the methods of surgery read beside what the run makes.

        Raises:
            ConfigError: one of them is missing.
        """
        methods = (self.config.surgery.embedding, self.config.surgery.head)
        files = {file for method in methods for file in method.files}
        for file in sorted(files):
            if not Path(file).is_file():
                raise ConfigError(f"{file} does not exist; surgery names it as text to read")
        models = {model for method in methods for model in method.models} - self.own_models.keys()
        return {file: sha256_file(file) for file in files} | {model: fingerprint(model) for model in models}

    def _shards(self) -> None:
        paths = self.paths

        def build() -> dict[str, Any]:
            for corpus in (self.source, self.target):
                self._build(paths.shards, paths.tokenizer, corpus)
                held_out = corpus.held_out()
                build_dataset(held_out, paths.base_tokenizer, paths.base_held_out(corpus.language), corpus.language)
            return {}

        title = "tokenise both languages into indexed datasets"
        needs = ("text", "base_tokenizer", "tokenizer")
        self.steps.add("shards", title, {}, needs, build, makes=(paths.shards,))

    def _adapt(self) -> None:
        learn, paths = self.config.train, self.paths
        source, target = self.source, self.target
        replay = DEFAULT_REPLAY if learn.replay is None else learn.replay
        mixture = f"on {target.language} with {replay:.0%} {source.language}"
        if learn.stages:
            mixture = f"in {len(learn.stages)} stages: {', '.join(stage.name for stage in learn.stages)}"
        title = f"continue pre-training {mixture}"
        needs = ("base", "tokenizer", "surgery", "shards")
        settings = {**learn.model_dump(), "seed": self.config.seed, "vocab_divisor": self.config.vocab_divisor}
        self.steps.add("train", title, settings, needs, self._train, makes=(paths.train,), resumable=paths.train)

    def _train(self) -> dict[str, Any]:
        learn, paths = self.config.train, self.paths
        data = self.config.training_data(str(paths.shards))
        data = data.model_copy(update={"validation": validation(paths.shards, (self.source, self.target))})
        job = self.job(learn, paths.train, paths.tokenizer, data, **self._start())
        return {"checkpoint": str(run_job(job, learn.num_processes))}

    def _start(self) -> dict[str, Any]:
        """What the adaptation begins with: `initial`, a model, or `shape`, for random weights."""
        model = self.paths.operated_model
        if model != self.paths.base_model:
            check_certificate(model)
        return {"initial": model}

    def _export(self) -> None:
        paths = self.paths

        def export() -> dict[str, Any]:
            checkpoint = last_checkpoint(paths.train)
            convert(checkpoint, paths.exported_model, "hf", tokenizer=paths.tokenizer)
            verified = verify(checkpoint, paths.exported_model)
            proof, precision = checkpoint / "proof.safetensors", self.config.train.precision
            parity = logit_parity(paths.exported_model, proof, precision)
            if not parity["within_bound"]:
                raise VerificationError(
                    f"the logits of {paths.exported_model} differ from the trained model's by "
                    f"{parity['max_abs_diff']:.1e}, expected at most {parity['bound']:.1e}; do not use the export"
                )
            return {"verified_tensors": verified["tensors"], "logit_parity": parity}

        title = "export to Hugging Face and verify: every tensor, and the logits"
        needs = ("tokenizer", "train")
        self.steps.add("export", title, {}, needs, export, makes=(paths.exported_model,), is_result=True)

    def _report(self) -> None:
        self.steps.add(
            "report",
            "measure base, surgery and result; write the report",
            {},
            ("text", "base_tokenizer", "base", "tokenizer", "surgery", "shards", "train", "export"),
            lambda: write_run_report(self.resolved, self.paths, self.steps, self.source, self.target),
            makes=(self.root / REPORT_JSON, self.root / REPORT_MD),
            is_result=True,
        )

    def _build(self, folder: Path, tokenizer: Path, corpus: Corpus) -> None:
        """Build the datasets `<part>.train` of each part of a corpus, and its `<language>.held_out`."""
        build_dataset(
            corpus.held_out(), tokenizer, folder / f"{corpus.language}.held_out", corpus.language, overwrite=True
        )
        side = (corpus.fraction, "train") if corpus.held_out_files is None else None
        for name, files in corpus.parts.items():
            train = folder / f"{name}.train"
            build = DatasetBuild(files, tokenizer, train, corpus.language, held_out=side, text_field=corpus.text_field)
            build_files(build, workers=2, overwrite=True)

    def job(
        self,
        learn: LearnConfig,
        output: Path,
        tokenizer: Path,
        data: TrainDataConfig,
        *,
        shape: LlamaShape | None = None,
        initial: Path | None = None,
    ) -> TrainConfig:
        """The training job of a recipe's section."""
        shared = {name: getattr(learn, name) for name in LearnConfig.model_fields if name in TrainConfig.model_fields}
        return TrainConfig(
            output=str(output),
            tokenizer=str(tokenizer),
            shape=shape,
            initial_checkpoint=str(initial) if initial else None,
            seed=self.config.seed,
            data=data,
            vocab_divisor=self.config.vocab_divisor,
            **shared,
        )


def validation(shards: Path, corpora: tuple[Corpus, ...]) -> tuple[ValidationSource, ...]:
    """The held-out datasets of a folder, one for each corpus."""
    return tuple(
        ValidationSource(prefix=str(shards / f"{corpus.language}.held_out"), language=corpus.language)
        for corpus in corpora
    )
