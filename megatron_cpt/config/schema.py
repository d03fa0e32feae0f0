"""Every setting of the tool: frozen, strict, with its unit in its name.

Two documents exist. `TrainConfig` is one training job (verb `train`); `RunConfig` is the whole path
from a base model to a report (verb `run`), and its steps hand `TrainConfig`s to the training job.
Field names are Megatron's. No torch here: `--help`, `plan` and `--dry-run` start without it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_cpt.config.section import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from megatron_cpt.config.surgery import SurgeryConfig

Implementation = Literal["auto", "triton", "torch"]
# A language names files and metrics, so it must not be able to name another folder.
LANGUAGE_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]*$"
LANGUAGE_RULE = "a name of letters, digits, '-' and '_' that begins with a letter, such as ja"
Language = Annotated[str, Field(pattern=LANGUAGE_PATTERN)]
DEFAULT_REPLAY = 0.1


class RopeScaling(Section):
    """Llama 3.1's stretching of the rotary frequencies (Llama 3 report, section 3.2)."""

    factor: float = Field(gt=1.0, allow_inf_nan=False)
    low_freq_factor: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    high_freq_factor: float = Field(default=4.0, gt=0.0, allow_inf_nan=False)
    original_max_position_embeddings: Positive = 8192


class LlamaShape(Section):
    """The architecture of a Llama, without its vocabulary."""

    num_layers: Positive
    hidden_size: Positive
    ffn_hidden_size: Positive
    num_attention_heads: Positive
    num_query_groups: Positive
    head_dim: Positive
    norm_epsilon: float = Field(default=1e-5, gt=0.0)
    rope_theta: float = Field(default=10000.0, gt=0.0)
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    max_position_embeddings: Positive = 4096


class ParallelConfig(Section):
    """How one model is laid over the ranks. Data parallelism is what is left of the world.

    The optimizer's state is always sharded over the data-parallel ranks.
    """

    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    virtual_pipeline_model_parallel_size: Positive | None = None
    sequence_parallel: bool = False
    # Layers of each stage in pipeline order (virtual stages: chunk 0 of every rank, then chunk 1, ...).
    # None: even, or as even as the cost of the head allows when the layers do not divide.
    num_layers_per_stage: tuple[NonNegative, ...] | None = None
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    overlap_p2p: bool = False
    recompute: Literal["none", "selective", "full"] = "none"


class BatchConfig(Section):
    """Sizes of a step: tokens per step = global_batch_size * seq_length."""

    seq_length: Positive = 4096
    micro_batch_size: Positive = 1
    global_batch_size: Positive = 1024


class OptimizerConfig(Section):
    """AdamW with cosine decay after a linear warm-up; norms are not decayed."""

    learning_rate: float = Field(default=1e-4, gt=0.0)
    min_learning_rate: float = Field(default=3.3e-6, ge=0.0)
    vocabulary_learning_rate_factor: float = Field(default=1.0, gt=0.0)  # of embedding and head, relative to all others
    warmup_steps: NonNegative = 0
    weight_decay: float = Field(default=0.1, ge=0.0)
    adam_beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    adam_beta2: float = Field(default=0.95, ge=0.0, lt=1.0)
    adam_epsilon: float = Field(default=1e-8, gt=0.0)
    clip_grad: float = Field(default=1.0, ge=0.0)  # largest global L2 norm; 0 switches clipping off


class SourceOptions(Section):
    """How a source of training text is read."""

    weight: float = Field(default=1.0, gt=0.0)  # of the samples, relative to the sources it is named with
    max_epochs: float | None = Field(default=None, gt=0.0)  # passes over it that are allowed; None: any number
    packing: Literal["concat", "best_fit"] = "concat"  # how its documents fill the samples
    tokens: Positive | None = None  # how many it is expected to have: `plan` counts with them until it is built


class DataSource(SourceOptions):
    """One indexed dataset to train on: `prefix`.bin and `prefix`.idx."""

    prefix: str
    language: Language
    name: str = ""  # what stages call it; empty: the last part of the prefix

    @property
    def title(self) -> str:
        """The name that stages and reports call it by."""
        return self.name or self.prefix.rstrip("/").rpartition("/")[2]


class ValidationSource(Section):
    """One held-out indexed dataset, scored in bits per byte."""

    prefix: str
    language: Language


class Share(Section):
    """Sources that take a share of a stage together, split by their weights or one after another."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)]
    # Relative to the other shares of the stage; two values: it moves from the first to the second.
    share: NonNegativeFloat | tuple[NonNegativeFloat, NonNegativeFloat]
    in_turn: bool = False  # the first source for its part, then the next
    parts: tuple[PositiveFloat, ...] | None = None  # of each source in turn; None: by its number of samples


class Replay(Section):
    """Sources mixed into a stage so that earlier abilities stay; the other shares are scaled to the rest."""

    sources: Annotated[tuple[str, ...], Field(min_length=1)]  # split by their weights
    share: float = Field(gt=0.0, lt=1.0)  # of the samples of the stage


class Stage(Section):
    """A part of the run with its own mixture. Stages follow each other; the run ends with the last."""

    name: str
    tokens: Positive  # at seq_length tokens a sample
    shares: Annotated[tuple[Share, ...], Field(min_length=1)]
    replay: Replay | None = None


class TrainDataConfig(Section):
    """What a job trains on and what it is scored on. Without stages the weights hold for the whole run."""

    train: tuple[DataSource, ...]
    stages: tuple[Stage, ...] = ()
    validation: tuple[ValidationSource, ...] = ()
    loader_workers: NonNegative = 1  # processes of each rank that prepare batches ahead; 0: none


class KernelConfig(Section):
    """Which implementation each op uses; a named one that cannot run is an error."""

    attention: Implementation = "auto"
    cross_entropy: Implementation = "auto"
    norm: Implementation = "auto"
    rope: Implementation = "auto"
    swiglu: Implementation = "auto"
    cross_entropy_budget_mib: Positive = 1024  # logits held at once; all, where chunks would take more memory
    # In which logits are stored before the loss is made of them: as the weights, or nearer to the product's bits.
    cross_entropy_logits: Literal["model", "fp32", "fp16"] = "model"


class LossConfig(Section):
    """What is added to the cross-entropy while training; what is logged and scored is the cross-entropy alone."""

    label_smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)  # share of the target spread over the vocabulary
    z_loss: NonNegativeFloat = 0.0  # factor of the squared log-sum-exp of the logits


class CheckpointConfig(Section):
    """When trained weights are saved. The last step is always saved."""

    save_interval_steps: Positive | None = None
    keep_last: Positive = 2


class TrainConfig(Section):
    """One training job, from a `torch_dist` checkpoint (or random weights) to the next."""

    output: str
    tokenizer: str
    shape: LlamaShape | None = None  # None: taken from the initial checkpoint
    initial_checkpoint: str | None = None  # a torch_dist folder or an HF folder; None: random weights
    initial_optimizer: bool = False  # go on with the moments and masters of initial_checkpoint, a run's checkpoint
    seed: NonNegative = 1
    train_steps: Positive
    precision: Literal["fp32", "bf16"] = "bf16"
    batch: BatchConfig = BatchConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    data: TrainDataConfig
    kernels: KernelConfig = KernelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval_interval_steps: Positive | None = None  # None: before the first and after the last step
    log_interval_steps: Positive = 10
    vocab_divisor: Positive = 128  # padded_vocab_size is a multiple of this, whatever TP is


class LearnConfig(Section):
    """The part of a training job that a recipe states; the pipeline fills in paths and data."""

    train_steps: Positive
    precision: Literal["fp32", "bf16"] = "bf16"
    num_processes: Positive = 1
    batch: BatchConfig = BatchConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    kernels: KernelConfig = KernelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval_interval_steps: Positive | None = None
    log_interval_steps: Positive = 10


class NamedText(SourceOptions):
    """A part of a language's text that the stages of a recipe call by a name."""

    files: str | tuple[str, ...]


class CorpusConfig(Section):
    """The texts of a run. `builtin: world` writes the small bilingual world instead of reading files."""

    builtin: Literal["world"] | None = None
    # jsonl(.gz), txt or parquet files of each language; with names for its parts where stages tell them apart.
    source: str | tuple[str, ...] | dict[Language, NamedText] | None = None
    target: str | tuple[str, ...] | dict[Language, NamedText] | None = None
    source_language: Language = "en"
    target_language: Language = "ja"
    text_field: str = "text"
    held_out_fraction: float = Field(default=0.05, gt=0.0, lt=0.5)  # by hash of the document's work
    held_out_bytes: Positive = 200_000  # of each language, whole documents up to this are scored, at least one
    world_documents: Positive = 4000  # documents per language that `builtin: world` writes

    def texts(self) -> tuple[dict[str, NamedText], dict[str, NamedText]]:
        """The source and the target language's texts by name; a text without one is called as its language."""
        found = []
        for language, given in ((self.source_language, self.source), (self.target_language, self.target)):
            found.append(given if isinstance(given, dict) else {language: NamedText(files=given or ())})
        return found[0], found[1]


class BaseModelConfig(Section):
    """The base Llama: an HF folder, or one trained here on the source text alone."""

    path: str | None = None
    vocab_size: Positive = 2048  # of the tokenizer trained for a base made here
    shape: LlamaShape | None = None
    train: LearnConfig | None = None


class TokenizerConfig(Section):
    """How the base tokenizer is adapted to the target language.

    `extend` appends pieces of the target language; `replace` trains a vocabulary of both languages in which
    the pieces that the base has keep their ids; `none` keeps the base's.
    """

    method: Literal["extend", "replace", "none"] = "extend"
    divisor: Positive = 8  # the new size is a multiple of this, reached by dropping the last pieces
    presegment: str = ""  # module:function or command that finds words no new piece may cross; empty: none
    # extend
    num_pieces: Positive = 4096  # pieces of the target-language model that are offered
    script: Literal["ja", "ko", "de", "any"] = "ja"
    scores: Literal["rank-tail", "own-rank"] = "rank-tail"  # below the base's, or each at its own rank
    min_count: NonNegative = 0  # pieces used fewer times in the target text are left out
    # replace
    vocab_size: Positive | None = None  # None: as many as the base has
    # Of the bytes trained on, the other share being the target's; None: all text as it is.
    source_share: float | None = Field(default=None, gt=0.0, lt=1.0)


class AdaptConfig(LearnConfig):
    """Continued pre-training: through stages, or on the target language with replay of the source language."""

    stages: tuple[Stage, ...] = ()  # of the texts by their names, as in a job's `data.stages`
    replay: Fraction | None = None  # share of source-language samples without stages; None: DEFAULT_REPLAY


class RunConfig(Section):
    """The whole path: base, tokenizer, surgery, data, training, export, report."""

    name: str
    output: str
    seed: NonNegative = 1
    data: CorpusConfig
    base: BaseModelConfig = BaseModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    surgery: SurgeryConfig = SurgeryConfig()
    train: AdaptConfig
    vocab_divisor: Positive = 128

    def training_data(self, shards: str) -> TrainDataConfig:
        """What the adaptation trains on: the dataset `<shards>/<name>.train` of each text; nothing that is scored.

        Without stages the texts of a language share what it has by their weights.

        Args:
            shards: the folder of the run's datasets.
        """
        replay = DEFAULT_REPLAY if self.train.replay is None else self.train.replay
        source, target = self.data.texts()
        sources = []
        for language, named, share in (
            (self.data.target_language, target, 1.0 - replay),
            (self.data.source_language, source, replay),
        ):
            total = sum(text.weight for text in named.values())
            for name, text in named.items():
                options = text.model_dump(exclude={"files"})
                if not self.train.stages:
                    options["weight"] = share * text.weight / total
                if options["weight"]:
                    sources.append(DataSource(prefix=f"{shards}/{name}.train", language=language, name=name, **options))
        return TrainDataConfig(train=tuple(sources), stages=self.train.stages)
