"""The training job: prepare, then one step after another until the last is saved."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from megatron_cpt.checkpoint.manifest import carried_settings
from megatron_cpt.config.manifest import write_json_atomic
from megatron_cpt.config.schema import TrainConfig
from megatron_cpt.data import Batch, IndexedDataset, Loader, open_windows, validation_batch
from megatron_cpt.errors import InputError, TrainingError
from megatron_cpt.model.kernels import kernel_choices
from megatron_cpt.model.llama import build_model, engine_config
from megatron_cpt.planning.flops import flops_per_token
from megatron_cpt.planning.parameters import count_parameters
from megatron_cpt.runtime.device import current_device
from megatron_cpt.runtime.engine import seed_everything
from megatron_cpt.runtime.launcher import started_by_launcher
from megatron_cpt.runtime.lock import lock_folder
from megatron_cpt.runtime.mesh import Mesh, World, start_mesh, world_from_environment
from megatron_cpt.training.folder import checkpoint_folders, claim_run_folder, initial_folder, run_identity
from megatron_cpt.training.inputs import Inputs, read_inputs
from megatron_cpt.training.metrics import MetricsLog
from megatron_cpt.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from megatron_cpt.training.state import load_weights, load_weights_and_optimizer, resume, save_checkpoint
from megatron_cpt.training.step import StepSums, logits_at, run_schedule, to_device

PREFETCH_STEPS = 2  # batches are prepared this many steps ahead
PROOF_TOKENS = 8192  # at most this much context is proven; the model's full context where it is shorter
PROOF_POSITIONS = 128  # positions whose logits are kept, evenly spaced, the first and the last included


def train(config: TrainConfig) -> None:
    """Run the job of this process: one rank of the world. The initial weights are there (`job.prepare`).

    Raises:
        InputError: something does not fit; nothing was written.
        TrainingError: the loss or the gradient stopped being a number.
    """
    inputs = read_inputs(config, (world_from_environment() or World()).size)
    parallel = config.parallel
    with start_mesh(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    ) as mesh:
        seed_everything(config.seed)
        Trainer(config, inputs, mesh).run()


class Trainer:
    """One rank of a training job."""

    def __init__(self, config: TrainConfig, inputs: Inputs, mesh: Mesh) -> None:
        self.config, self.inputs, self.mesh = config, inputs, mesh
        self.output = Path(config.output)
        self.is_main = mesh.world.rank == 0
        layout, self.vocab_size = inputs.layout, inputs.tokenizer.vocab_size
        self.engine = engine_config(
            inputs.shape, self.vocab_size, layout, config.parallel, config.kernels, config.precision, config.loss
        )
        self.kernel_choices = kernel_choices(config.kernels, config.precision, inputs.shape.head_dim)
        chunks = build_model(self.engine, inputs.shape, layout.padded_vocab_size, mesh)
        self.model = [self._distribute(chunk, index) for index, chunk in enumerate(chunks)]
        self.optimizer = build_optimizer(config.optimizer, self.model, config.precision)
        self._connect_engine()
        self.facts = {
            "vocab_size": self.vocab_size,
            "padded_vocab_size": layout.padded_vocab_size,
            "tokenizer_sha256": inputs.tokenizer.sha256,
            "vocab_divisor": config.vocab_divisor,
            **carried_settings(initial_folder(config)),
        }
        self.micro_batches_per_step = layout.num_micro_batches
        peak, peak_from = current_device().flops_bound()
        self.peak_flops = peak * mesh.world.size
        self.facts_of_job = {
            "world_size": mesh.world.size,
            "layout": layout.name,
            "device": current_device().name,
            "parameters": count_parameters(inputs.shape, self.vocab_size).total,
            "peak_flops_per_process": peak,
            "peak_flops_from": peak_from,
            "kernels": {
                choice.op: {"implementation": choice.implementation, "obstacles": choice.obstacles}
                for choice in self.kernel_choices
            },
        }

    def _distribute(self, chunk: torch.nn.Module, index: int) -> DistributedDataParallel:
        parallel = self.config.parallel
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=parallel.overlap_grad_reduce,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        return DistributedDataParallel(self.engine, settings, chunk, disable_bucketing=index > 0)

    def _connect_engine(self) -> None:
        self.engine.finalize_model_grads_func = finalize_model_grads
        self.engine.grad_scale_func = self.optimizer.scale_loss
        if self.config.parallel.overlap_grad_reduce:
            functions = [chunk.no_sync for chunk in self.model]
            self.engine.no_sync_func = functions if len(functions) > 1 else functions[0]

    def run(self) -> None:
        """Load or resume, then train to the last step; every rank runs it."""
        config = self.config
        with self._run_folder():
            step = resume(self.model, self.optimizer, self.output)
            if step == 0:
                load = load_weights_and_optimizer if config.initial_optimizer else load_weights
                load(self.model, self.optimizer, initial_folder(config))
            if step >= config.train_steps:
                if self.is_main:
                    print(f"{self.output}: all {step} steps are done already", flush=True)
                return
            if self.is_main:
                write_json_atomic(self.output / "job.json", self.facts_of_job)
                for choice in self.kernel_choices:
                    print(f"kernel | {choice}", flush=True)
            log = MetricsLog(self.output, config.train_steps, step) if self.is_main else None
            ahead = PREFETCH_STEPS * self.micro_batches_per_step
            try:
                with Loader(self.inputs.plan, self._schedule(step), config.data.loader_workers, ahead) as loader:
                    self._train(step, loader, log)
            finally:
                if log:
                    log.close()

    @contextmanager
    def _run_folder(self) -> Iterator[None]:
        """Rank 0 checks the identity and holds the lock, if the launcher does not; its refusal is everybody's."""
        refusal: list[InputError | None] = [None]
        with ExitStack() as stack:
            if self.is_main:
                try:
                    if not started_by_launcher():
                        stack.enter_context(lock_folder(self.output))
                    claim_run_folder(self.output, run_identity(self.config, self.inputs))
                except InputError as caught:
                    refusal = [caught]
            torch.distributed.broadcast_object_list(refusal, src=0)
            if refusal[0] is not None:
                raise refusal[0]
            yield

    def _schedule(self, step: int) -> Iterator[range]:
        """Samples of each micro-batch of this rank, from `step` on: what a step sees does not depend on the layout."""
        size, mesh = self.config.batch.micro_batch_size, self.mesh
        for current in range(step, self.config.train_steps):
            for index in range(self.micro_batches_per_step):
                first = current * self.config.batch.global_batch_size + (index * mesh.data_size + mesh.data_rank) * size
                yield range(first, first + size)

    def _train(self, step: int, loader: Loader, log: MetricsLog | None) -> None:
        config = self.config
        if step == 0:
            self._validate(step, log)
        # What starts once, the workers of the loader too, is no part of the rate of the first steps.
        batches = itertools.chain([next(loader)], loader)
        meter = _Meter(self)
        if log:
            log.begin()
        while step < config.train_steps:
            record = self._step(step, batches)
            step += 1
            meter.add()
            last = step == config.train_steps
            if log and (last or step % config.log_interval_steps == 0):
                log.training({"step": step, **record, **meter.read(step)})
            if last or (config.eval_interval_steps and step % config.eval_interval_steps == 0):
                with meter.paused():
                    self._validate(step, log)
            if last or (config.checkpoint.save_interval_steps and step % config.checkpoint.save_interval_steps == 0):
                with meter.paused(), self._whole_parameters():
                    self._save(step)

    def _save(self, step: int) -> None:
        """Save a checkpoint, with the model's own logits beside it as the proof for every export."""
        for chunk in self.model:
            chunk.eval()
        dataset = self.inputs.plan.datasets[0]
        length = min(self.inputs.shape.max_position_embeddings, dataset.num_tokens, PROOF_TOKENS)
        length -= length % self.mesh.tensor_size  # sequence parallelism cuts the tokens evenly
        tokens_N = torch.from_numpy(dataset.tokens(0, length)[0])
        positions_P = torch.linspace(0, length - 1, min(length, PROOF_POSITIONS)).round().long()
        logits_PV = logits_at(self.model, self.mesh, tokens_N, positions_P)
        for chunk in self.model:
            chunk.train()
        proof = None
        if logits_PV is not None and self.mesh.tensor_rank == 0 and self.mesh.data_rank == 0:
            proof = {"tokens": tokens_N, "positions": positions_P, "logits": logits_PV.contiguous()}
        read = self.inputs.plan.order_hash(step * self.config.batch.global_batch_size)
        facts = {**self.facts, "inputs": {"data_order": read}}
        tokenizer = self.inputs.tokenizer.path
        save_checkpoint(self.model, self.optimizer, step, self.config, facts, self.inputs.shape, proof, tokenizer)

    def _step(self, step: int, batches: Iterator[Batch]) -> dict[str, Any]:
        """One update; returns what is logged of it."""
        config = self.config
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        micro_batches = [to_device(next(batches)) for _ in range(self.micro_batches_per_step)]
        sums = run_schedule(self.model, self.mesh, micro_batches, len(self.inputs.plan.languages), forward_only=False)
        if not math.isfinite(sums.loss):
            raise TrainingError(
                f"the loss of step {step + 1} is {sums.loss}; no update was made{self._last_good()}: "
                "lower the learning rate, or look at the samples of this step"
            )
        rate = learning_rate(config.optimizer, step, config.train_steps)
        set_learning_rate(self.optimizer, rate)
        _, grad_norm, _ = self.optimizer.step()
        if not math.isfinite(grad_norm):
            raise TrainingError(
                f"the gradient norm of step {step + 1} is {grad_norm}; the update is thrown away"
                f"{self._last_good()}: lower the learning rate"
            )
        return {
            "loss": sums.loss,
            "learning_rate": rate,
            "grad_norm": float(grad_norm),
            "train_bits_per_byte": self._bits_per_byte(sums),
        }

    def _last_good(self) -> str:
        complete = checkpoint_folders(self.output)
        return f" and {complete[-1][1]} holds the last good state" if complete else "; there is no checkpoint yet"

    def _bits_per_byte(self, sums: StepSums) -> dict[str, float]:
        """Training loss of each language in bits per byte, bytes per token taken from the manifests."""
        bits: dict[str, float] = {}
        num_bytes: dict[str, float] = {}
        plan = self.inputs.plan
        for index, (language, dataset) in enumerate(zip(plan.languages, plan.datasets, strict=True)):
            bits[language] = bits.get(language, 0.0) + float(sums.nats[index]) / math.log(2)
            text = float(sums.tokens[index]) * dataset.manifest["bytes_per_token"]
            num_bytes[language] = num_bytes.get(language, 0.0) + text
        return {language: bits[language] / size for language, size in num_bytes.items() if size}

    @contextmanager
    def _whole_parameters(self) -> Iterator[None]:
        """With overlapped parameter gathers, complete the gather of the last update before others read."""
        overlap = self.config.parallel.overlap_param_gather
        for chunk in self.model if overlap else ():
            chunk.disable_forward_pre_hook(param_sync=True)
        yield
        for chunk in self.model if overlap else ():
            chunk.enable_forward_pre_hook()

    def _validate(self, step: int, log: MetricsLog | None) -> None:
        """Score every held-out set in bits per byte; text tokens alone count, not EOS."""
        scores = {}
        for chunk in self.model:
            chunk.eval()
        with self._whole_parameters():
            for language, dataset in self.inputs.validation.items():
                sums = self._score(dataset)
                scores[language] = {
                    "bits_per_byte": float(sums.nats.sum() / math.log(2) / dataset.manifest["text_bytes"]),
                    "nats_per_token": sums.loss,
                    "tokens": int(sums.tokens.sum()),
                }
        for chunk in self.model:
            chunk.train()
        if log and scores:
            log.validation(step, scores)

    def _score(self, dataset: IndexedDataset) -> StepSums:
        size, mesh = self.config.batch.micro_batch_size, self.mesh
        windows = open_windows(dataset, self.config.batch.seq_length)
        per_round = size * mesh.data_size
        rounds = -(-len(windows) // per_round)
        if mesh.virtual_size:  # the interleaved schedule takes multiples of the pipeline's size
            rounds = -(-rounds // mesh.pipeline_size) * mesh.pipeline_size
        firsts = [(index * mesh.data_size + mesh.data_rank) * size for index in range(rounds)]
        eos = self.inputs.tokenizer.eos_id
        mine = [to_device(validation_batch(windows, first, size), ignored_label=eos) for first in firsts]
        with torch.no_grad():
            return run_schedule(self.model, mesh, mine, 1, forward_only=True)


class _Meter:
    """Throughput over the steps since the last reading; pauses do not count."""

    def __init__(self, trainer: Trainer) -> None:
        config, plan = trainer.config, trainer.inputs.plan
        self.tokens_per_step = config.batch.global_batch_size * config.batch.seq_length
        self.plan, self.samples_per_step = plan, config.batch.global_batch_size
        self.flops_per_token = flops_per_token(trainer.inputs.shape, trainer.vocab_size, config.batch.seq_length)
        self.peak_flops = trainer.peak_flops
        self.steps, self.since, self.left_out = 0, time.perf_counter(), 0.0

    def add(self) -> None:
        self.steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.left_out += time.perf_counter() - begun

    def read(self, step: int) -> dict[str, Any]:
        """Figures since the last reading."""
        current_device().synchronize()
        now = time.perf_counter()
        seconds = now - self.since - self.left_out
        rate = self.steps * self.tokens_per_step / seconds
        samples = step * self.samples_per_step
        text_bytes = self.plan.text_bytes(samples - self.steps * self.samples_per_step, samples)
        self.steps, self.since, self.left_out = 0, now, 0.0
        return {
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": rate,
            "bytes_per_second": text_bytes / seconds,
            "mfu": rate * self.flops_per_token / self.peak_flops,
        }
