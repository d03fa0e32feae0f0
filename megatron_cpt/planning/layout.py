"""Which layouts are possible, and how layers are laid over the pipeline's stages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_cpt.config.padding import padded_vocab_size
from megatron_cpt.config.schema import BatchConfig, LlamaShape, ParallelConfig
from megatron_cpt.errors import ConfigError
from megatron_cpt.planning.parameters import matrix_parameters_per_layer


@dataclass(frozen=True)
class Layout:
    """A layout that was found possible, with everything that follows from it."""

    tensor_size: int
    pipeline_size: int
    virtual_size: int  # chunks of layers on each pipeline rank; 1 without interleaving
    data_size: int
    num_micro_batches: int  # per step and data-parallel rank
    padded_vocab_size: int
    layers_per_stage: tuple[int, ...]  # in pipeline order: chunk 0 of every rank, then chunk 1, ...

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_size * self.pipeline_size * self.data_size

    @property
    def name(self) -> str:
        """The layout in one word, for example "TP2-PP4-VPP2-DP1"."""
        virtual = f"-VPP{self.virtual_size}" if self.virtual_size > 1 else ""
        return f"TP{self.tensor_size}-PP{self.pipeline_size}{virtual}-DP{self.data_size}"

    @property
    def pipeline_layout(self) -> str | None:
        """megatron-core's layout string, None without pipeline parallelism."""
        return pipeline_layout_string(self.layers_per_stage) if self.pipeline_size > 1 else None

    @property
    def bubble(self) -> float:
        """Idle time of the pipeline relative to its work: (PP - 1) / (VPP * micro-batches)."""
        return (self.pipeline_size - 1) / (self.virtual_size * self.num_micro_batches)


def pipeline_layout_string(layers_per_stage: Sequence[int]) -> str:
    """megatron-core's `pipeline_model_parallel_layout`: E embedding, t layer, L head and loss, | border."""
    return f"E{'|'.join('t' * count for count in layers_per_stage)}L"


def split_layers(num_layers: int, num_stages: int, head_cost_in_layers: float) -> tuple[int, ...]:
    """Layers of each stage so that the slowest one is as fast as possible; the head costs time too.

    The last stage computes the head, worth `head_cost_in_layers` layers (V * D / parameters of a
    layer), and gets fewer layers for it. What does not divide among the others goes to the later
    ones, which hold fewer micro-batches in flight than the first.

    Raises:
        ConfigError: fewer layers than stages.
    """
    if num_layers < num_stages:
        raise ConfigError(f"{num_layers} layers cannot fill {num_stages} pipeline stages; use at most {num_layers}")
    if num_stages == 1:
        return (num_layers,)

    def slowest(last: int) -> tuple[float, int]:
        others = math.ceil((num_layers - last) / (num_stages - 1))
        return max(others, last + head_cost_in_layers), -last

    last = min(range(1, num_layers - num_stages + 2), key=slowest)
    even, rest = divmod(num_layers - last, num_stages - 1)
    return (*[even] * (num_stages - 1 - rest), *[even + 1] * rest, last)


def check_layout(
    shape: LlamaShape,
    vocab_size: int,
    vocab_divisor: int,
    parallel: ParallelConfig,
    batch: BatchConfig,
    world_size: int,
) -> Layout:
    """Check that a model, a batch and a world fit a layout, and return what follows from it.

    Args:
        shape: the architecture.
        vocab_size: true vocabulary size.
        vocab_divisor: the embedding's rows are padded to a multiple of this, and of TP.
        parallel: the layout.
        batch: sequence length and batch sizes.
        world_size: number of ranks; data parallelism is world_size / (TP * PP).

    Raises:
        ConfigError: one line for each thing that does not divide, with the nearest value that works.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    # Rows that no tensor-parallel rank could share evenly are padded further; the loader fills them.
    padded = padded_vocab_size(vocab_size, math.lcm(vocab_divisor, tensor))
    problems = [
        *_shape_problems(shape),
        *_tensor_problems(shape, parallel, batch),
        *_pipeline_problems(shape, parallel),
        *_overlap_problems(parallel),
        *_length_problems(shape, batch),
        *_batch_problems(parallel, batch, world_size),
    ]
    if problems:
        header = f"this layout has {len(problems)} problems:\n  " if len(problems) > 1 else ""
        raise ConfigError(header + "\n  ".join(problems))
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    layers = parallel.num_layers_per_stage
    if layers is None:
        head_cost = vocab_size * shape.hidden_size / matrix_parameters_per_layer(shape)
        layers = default_layers(shape.num_layers, pipeline * virtual, head_cost)
    data = world_size // (tensor * pipeline)
    micro_batches = batch.global_batch_size // (batch.micro_batch_size * data)
    return Layout(tensor, pipeline, virtual, data, micro_batches, padded, layers)


def default_layers(num_layers: int, num_stages: int, head_cost_in_layers: float) -> tuple[int, ...]:
    """Even stages where the layers divide, else `split_layers`."""
    if num_layers % num_stages == 0:
        return (num_layers // num_stages,) * num_stages
    return split_layers(num_layers, num_stages, head_cost_in_layers)


def _nearest(wanted: int, candidates: Sequence[int]) -> int:
    """The candidate nearest to `wanted`; the smaller one of two equally near."""
    return min(candidates, key=lambda value: (abs(value - wanted), value))


def _divisors(value: int) -> list[int]:
    return [size for size in range(1, value + 1) if value % size == 0]


def _nearest_multiple(wanted: int, step: int) -> int:
    return max(step, (wanted + step // 2) // step * step)


def _shape_problems(shape: LlamaShape) -> Iterator[str]:
    heads, groups = shape.num_attention_heads, shape.num_query_groups
    if heads % groups:
        yield (
            f"num_query_groups={groups} does not divide num_attention_heads={heads}; "
            f"the nearest that does is {_nearest(groups, _divisors(heads))}"
        )
    if shape.hidden_size % heads:
        yield (
            f"num_attention_heads={heads} does not divide hidden_size={shape.hidden_size}, and transformers refuses "
            f"such a Llama; the nearest hidden_size is {_nearest_multiple(shape.hidden_size, heads)}"
        )
    if shape.head_dim % 2:
        yield f"head_dim={shape.head_dim} is odd, and rotary positions turn pairs; use {shape.head_dim + 1}"


def _tensor_problems(shape: LlamaShape, parallel: ParallelConfig, batch: BatchConfig) -> Iterator[str]:
    tensor = parallel.tensor_model_parallel_size
    sizes = {
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_query_groups,
        "ffn_hidden_size": shape.ffn_hidden_size,
    }
    undivided = [f"{name}={size}" for name, size in sizes.items() if size % tensor]
    if undivided:
        works = _divisors(math.gcd(*sizes.values()))
        yield (
            f"tensor_model_parallel_size={tensor} does not divide {', '.join(undivided)}; "
            f"the nearest that divides heads, groups and ffn is {_nearest(tensor, works)}"
        )
    if parallel.sequence_parallel and tensor == 1:
        yield "sequence_parallel needs tensor_model_parallel_size > 1, got 1; switch it off"
    elif parallel.sequence_parallel and batch.seq_length % tensor:
        yield (
            f"sequence_parallel cuts seq_length={batch.seq_length} into tensor_model_parallel_size={tensor} parts; "
            f"the nearest that divides is seq_length={_nearest_multiple(batch.seq_length, tensor)}"
        )


def _pipeline_problems(shape: LlamaShape, parallel: ParallelConfig) -> Iterator[str]:
    pipeline, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    stages = pipeline * (virtual or 1)
    product = f"pipeline_model_parallel_size={pipeline}" + (f" x virtual={virtual}" if virtual else "")
    layers = parallel.num_layers_per_stage
    if virtual == 1:
        yield "virtual_pipeline_model_parallel_size=1 interleaves nothing; leave it out (null), or use at least 2"
    elif virtual and pipeline == 1:
        yield f"virtual_pipeline_model_parallel_size={virtual} needs pipeline_model_parallel_size >= 2, got 1"
    elif virtual and pipeline == 2 and not parallel.overlap_p2p:
        yield (
            "interleaving over pipeline_model_parallel_size=2 needs overlap_p2p=true: without it both neighbours are "
            "the same rank and megatron-core mixes up their messages; set it, or use at least 3 stages"
        )
    if layers is None:
        if stages > shape.num_layers:
            possible = [size for size in range(1, shape.num_layers + 1) if size * (virtual or 1) <= shape.num_layers]
            yield (
                f"{product} makes {stages} stages for num_layers={shape.num_layers}; "
                f"the largest pipeline_model_parallel_size is {max(possible, default=1)}"
                + (" without virtual stages" if virtual and not possible else "")
            )
        return
    if len(layers) != stages:
        yield f"num_layers_per_stage has {len(layers)} entries, expected {stages} ({product})"
    if sum(layers) != shape.num_layers:
        yield (
            f"num_layers_per_stage={list(layers)} sums to {sum(layers)}, expected num_layers={shape.num_layers}; "
            f"an even split is {list(default_layers(shape.num_layers, max(1, min(stages, shape.num_layers)), 0.0))}"
        )
    if 0 in layers[1:-1]:
        yield f"num_layers_per_stage={list(layers)} has an empty stage in the middle; only the first and last may be 0"


def _overlap_problems(parallel: ParallelConfig) -> Iterator[str]:
    if parallel.overlap_p2p and not parallel.virtual_pipeline_model_parallel_size:
        yield "overlap_p2p needs the interleaved schedule; set virtual_pipeline_model_parallel_size, or switch it off"
    if parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield "overlap_param_gather needs overlap_grad_reduce; set overlap_grad_reduce=true"


def _length_problems(shape: LlamaShape, batch: BatchConfig) -> Iterator[str]:
    if batch.seq_length > shape.max_position_embeddings:
        yield (
            f"batch.seq_length={batch.seq_length} is longer than the model's max_position_embeddings="
            f"{shape.max_position_embeddings}; shorten it"
        )


def _batch_problems(parallel: ParallelConfig, batch: BatchConfig, world_size: int) -> Iterator[str]:
    pipeline = parallel.pipeline_model_parallel_size
    model = parallel.tensor_model_parallel_size * pipeline
    if world_size % model:
        yield (
            f"world size {world_size} is not a multiple of tensor x pipeline = "
            f"{parallel.tensor_model_parallel_size} x {pipeline} = {model}; "
            f"the nearest number of processes that works is {_nearest_multiple(world_size, model)}"
        )
        return
    data = world_size // model
    step = batch.micro_batch_size * data
    if batch.global_batch_size % step:
        yield (
            f"global_batch_size={batch.global_batch_size} is not micro_batch_size x data-parallel size = "
            f"{batch.micro_batch_size} x {data} = {step} times a whole number; "
            f"the nearest that works is {_nearest_multiple(batch.global_batch_size, step)}"
        )
        return
    micro_batches = batch.global_batch_size // step
    if parallel.virtual_pipeline_model_parallel_size and micro_batches % pipeline:
        yield (
            f"the interleaved schedule needs a number of micro-batches divisible by "
            f"pipeline_model_parallel_size={pipeline}, got {micro_batches}; the nearest that works is "
            f"global_batch_size={_nearest_multiple(batch.global_batch_size, step * pipeline)}"
        )
