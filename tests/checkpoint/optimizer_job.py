"""The job of test_optimizer_state.py: `python -m tests.checkpoint.optimizer_job FOLDER`.

FOLDER/cases.json: name -> {"layout": [TP, PP, VPP or null], "shape", "padded_vocab_size", "distributed", "forms":
torch_dist sharding types to save}. megatron-core alone trains two steps, saves as Megatron-LM saves, and goes on for
two more. Then the checkpoint is converted, a new model and a new optimizer load what came out, and go on too. What
every rank's live optimizer holds at each point goes to FOLDER/<name>/<point>_<rank>.pt. Last, FOLDER/own is what
own_run_job.py says.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.runtime.engine import install_engine
from tests.checkpoint.megatron_slices import Layout

LENGTH = 16
STATES = ("param", "exp_avg", "exp_avg_sq")


class Run:
    """A rank of megatron-core with its DDP and its optimizer, as Megatron-LM sets them up."""

    def __init__(self, case: dict[str, Any]) -> None:
        from megatron.core import optimizer as engine
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.optimizer import distrib_optimizer
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.module import Float16Module

        from megatron_cpt.training.optimizer import AdamW  # the layout of apex's and Transformer Engine's

        self.case, self.layout, self.distributed = case, Layout(*case["layout"]), case["distributed"]
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.manual_seed(1)
        self.bare = build(LlamaShape(**case["shape"]), case["padded_vocab_size"], self.layout)
        config = self.bare[0].config
        settings = DistributedDataParallelConfig(
            use_distributed_optimizer=self.distributed, grad_reduce_in_fp32=True, overlap_grad_reduce=False
        )
        self.model = [DistributedDataParallel(config, settings, Float16Module(config, chunk)) for chunk in self.bare]
        config.no_sync_func = config.grad_scale_func = None
        config.finalize_model_grads_func = finalize_model_grads
        engine.Adam, engine.USING_PYTORCH_OPTIMIZER, distrib_optimizer.Adam = AdamW, False, AdamW
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
        wanted = engine.OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            min_lr=1e-3,
            weight_decay=0.1,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=self.distributed,
        )
        self.optimizer = engine.get_megatron_optimizer(wanted, self.model)

    def train(self, seeds: range) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        rows = self.case["padded_vocab_size"]
        mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
        positions = torch.arange(LENGTH).expand(2, LENGTH)

        def forward(tokens: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
            text = next(tokens)
            losses = chunk(text[:, :-1], positions, mask, labels=text[:, 1:])
            return losses, lambda losses: (losses.float().mean(), {})

        for seed in seeds:
            for chunk in self.model:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            generator = torch.Generator().manual_seed(seed)
            texts = [torch.randint(rows, (2, LENGTH + 1), generator=generator) for _ in range(self.layout.pipeline)]
            tokens = [iter(texts) for _ in self.model]
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=tokens if len(tokens) > 1 else tokens[0],
                model=self.model if len(tokens) > 1 else self.model[0],
                num_microbatches=len(texts),
                seq_length=LENGTH,
                micro_batch_size=2,
                forward_only=False,
            )
            self.optimizer.step()

    def held(self) -> list[dict[str, dict[str, torch.Tensor]]]:
        """By chunk and name, what the live optimizer says of the very parameter."""
        (inner,) = self.optimizer.chained_optimizers
        found = []
        for chunk in self.bare:
            found.append(held := {})
            for name, weight in chunk.named_parameters():
                if self.distributed:
                    states = inner._get_main_param_and_optimizer_states(weight)
                else:
                    states = {"param": weight.main_param, **inner.optimizer.state[weight.main_param]}
                held[name] = {key: states[key].detach().clone().view(weight.shape) for key in STATES}
                held[name]["weight"] = weight.detach().clone()
        return found

    def _names(self) -> list[str]:
        return [f"model{index}" for index in range(len(self.bare))] if len(self.bare) > 1 else ["model"]

    def _rank_folder(self, folder: Path) -> Path:
        tensor, stage = self.layout.coordinates(dist.get_rank())
        iteration = (folder / "latest_checkpointed_iteration.txt").read_text().strip()
        name = f"mp_rank_{tensor:02d}" + (f"_{stage:03d}" if self.layout.pipeline > 1 else "")
        return folder / f"iter_{int(iteration):07d}" / name

    def _common(self) -> dict[str, Any]:
        args = arguments(LlamaShape(**self.case["shape"]), self.case["padded_vocab_size"], self.layout)
        scheduler = {"max_lr": 1e-2, "min_lr": 1e-3, "num_steps": 2, "lr_decay_style": "cosine"}
        return {"args": args, "checkpoint_version": 3.0, "iteration": 2, "opt_param_scheduler": scheduler}

    def save_legacy(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            folder.mkdir()
            (folder / "latest_checkpointed_iteration.txt").write_text("2")
        dist.barrier()
        here = self._rank_folder(folder)
        here.mkdir(parents=True)
        if self.distributed:
            self.optimizer.save_parameter_state(str(here / "distrib_optim.pt"))
        value = self._common() | {"optimizer": self.optimizer.state_dict()}
        for name, chunk in zip(self._names(), self.bare, strict=True):
            value[name] = chunk.state_dict_for_save_checkpoint()
        torch.save(value, here / "model_optim_rng.pt")

    def load_legacy(self, folder: Path) -> None:
        here = self._rank_folder(folder)
        value = torch.load(here / "model_optim_rng.pt", weights_only=True)
        for name, chunk in zip(self._names(), self.bare, strict=True):
            chunk.load_state_dict(value[name], strict=True)
        self.optimizer.load_state_dict(value["optimizer"])
        if self.distributed:
            self.optimizer.load_parameter_state(str(here / "distrib_optim.pt"))

    def _sharded(self, form: str, loading: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        from megatron.core import parallel_state

        metadata = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False}
        if self.distributed:
            metadata["distrib_optim_sharding_type"] = form
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        inside = {**metadata, "dp_cp_group": group}
        pairs = zip(self._names(), self.bare, strict=True)
        state: dict[str, Any] = {name: chunk.sharded_state_dict(metadata=inside) for name, chunk in pairs}
        state["optimizer"] = self.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=inside)
        return state, metadata

    def save_torch_dist(self, folder: Path, form: str) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        filesystem_async._results_queue = queue.SimpleQueue()  # else a server process for each rank
        state, metadata = self._sharded(form, False)
        dist_checkpointing.save(state | self._common(), str(folder), content_metadata=metadata)

    def load_torch_dist(self, folder: Path) -> None:
        from megatron.core import dist_checkpointing

        content = torch.load(folder / "common.pt", weights_only=True)["content_metadata"]
        state, _ = self._sharded(content["distrib_optim_sharding_type"], True)
        loaded = dist_checkpointing.load(state, str(folder))
        for name, chunk in zip(self._names(), self.bare, strict=True):
            chunk.load_state_dict(loaded[name], strict=True)
        self.optimizer.load_state_dict(loaded["optimizer"])


def arguments(shape: LlamaShape, rows: int, layout: Layout) -> Namespace:
    """Those of Megatron-LM that a checkpoint is described by."""
    return Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        group_query_attention=True,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        max_position_embeddings=shape.max_position_embeddings,
        position_embedding_type="rope",
        normalization="RMSNorm",
        swiglu=True,
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        vocab_size=rows,
        padded_vocab_size=rows,
        transformer_impl="local",
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        iteration=2,
        consumed_train_samples=64,
    )


def build(shape: LlamaShape, rows: int, layout: Layout) -> list[Any]:
    """The chunks of this rank in bfloat16."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from tests.checkpoint.megatron_rank import config_of

    config = config_of(shape, layout, torch.bfloat16)
    stage, last = parallel_state.get_pipeline_model_parallel_rank(), (layout.virtual or 1) - 1
    return [
        GPTModel(
            config=config,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=rows,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=stage == 0 and not chunk,
            post_process=stage == layout.pipeline - 1 and (chunk or 0) == last,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=shape.tied_embeddings,
            vp_stage=chunk,
        )
        for chunk in (range(layout.virtual) if layout.virtual else (None,))
    ]


def convert_all(folder: Path, case: dict[str, Any]) -> None:
    """From Megatron's own checkpoint, through another layout, to the one it goes on in."""
    from megatron_cpt.checkpoint import convert

    first, *_ = case["forms"]
    form = "distributed" if case["distributed"] else "plain"
    tp, pp, vpp = case["layout"]
    vocab = {"vocab_divisor": 2, "spec": "local", "optimizer_form": form}
    convert(folder / first, folder / "alone", "mp_rank", **vocab)
    convert(folder / "alone", folder / "torch_dist", "torch_dist", 2)
    convert(folder / "torch_dist", folder / "ranks", "mp_rank", tp=tp, pp=pp, vpp=vpp or 1, **vocab)


@contextmanager
def parallel(layout: Layout) -> Iterator[None]:
    """The process groups of a layout, those that save the distributed optimizer's buffers too."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, layout.virtual)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def run_case(folder: Path, case: dict[str, Any]) -> None:
    rank = dist.get_rank()

    def note(run: Run, point: str) -> None:
        torch.save(run.held(), folder / f"{point}_{rank}.pt")

    with parallel(Layout(*case["layout"])):
        run = Run(case)
        run.train(range(2))
        note(run, "saved")
        for form in case["forms"]:
            run.save_torch_dist(folder / form, form)
        run.save_legacy(folder / "legacy")
        run.train(range(2, 4))
        note(run, "uninterrupted")
        dist.barrier()
        if rank == 0:
            convert_all(folder, case)
        dist.barrier()
        again = Run(case)
        again.load_legacy(folder / "ranks")
        note(again, "loaded")
        again.train(range(2, 4))
        note(again, "continued")
    if case["distributed"]:
        other = {**case, "layout": [1, 2, None]}
        with parallel(Layout(1, 2)):
            again = Run(other)
            again.load_torch_dist(folder / "torch_dist")
            again.save_torch_dist(folder / "elsewhere", "dp_zero_gather_scatter")


def run_rank(rank: int, folder: Path, cases: dict[str, dict[str, Any]], world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    for name, case in cases.items():
        run_case(folder / name, case)
    dist.destroy_process_group()


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")  # the engine's own, about its own defaults
    install_engine("cpu")
    # Before the fork, so that all of it is imported once; and what is there is never looked at for garbage.
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401
    import torch._dynamo

    import megatron_cpt.checkpoint
    import megatron_cpt.training.loop  # noqa: F401
    from tests.checkpoint import own_run_job

    gc.freeze()
    cases = json.loads((folder / "cases.json").read_text())
    for name in cases:
        os.makedirs(folder / name)
    (size,) = {Layout(*case["layout"]).world_size for case in cases.values()}
    method = "fork" if sys.platform == "linux" else "spawn"  # elsewhere a fork is not safe
    torch.multiprocessing.start_processes(run_rank, (folder, cases, size), nprocs=size, start_method=method)
    own_run_job.main(folder / "own")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
