"""Output projection + cross-entropy, forward and backward: ours beside everything that can be installed.

Shape letters: N tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.ceilings import Ceilings
from kernel_bench.machine import Machine, Step, Tensors, version_of
from kernel_bench.measuring import OURS, Comparison, Provider, Work

MIB, GIB = 1 << 20, 1 << 30
_EXACT_ROWS = 512  # tokens of a float64 block


@dataclass(frozen=True)
class Case:
    """One shape and kind of data.

    Attributes:
        peaked: whether a label's logit stands out as in a trained model (a loss of about 3 nats), which is what
            implementations that skip small gradients live on; else logits are random.
        short: whether only the default setting of each provider is asked.
    """

    tokens: int
    hidden_size: int
    vocab_size: int
    peaked: bool = True
    short: bool = False

    @property
    def shape(self) -> str:
        """Returns the shape as it stands in a row."""
        kind = "peaked" if self.peaked else "random"
        return f"N={self.tokens} D={self.hidden_size} V={self.vocab_size} {kind}"


CASES = (
    Case(8192, 4096, 43176),
    Case(8192, 4096, 128256),
    Case(8192, 4096, 32000),
    Case(8192, 4096, 176000),
    Case(8192, 4096, 128256, peaked=False, short=True),
    Case(8192, 8192, 43176, short=True),
    Case(8192, 8192, 128256, short=True),
)
DRY_CASES = (Case(2, 16, 141), Case(2, 16, 70, peaked=False, short=True))


@dataclass(frozen=True)
class Inputs:
    """Leaves that require gradients, and labels."""

    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor

    def step(self, loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step[None]:
        """Returns forward and backward of a mean loss as one step."""

        def run(_: None) -> Tensors:
            loss = loss_of(self.hidden_ND, self.weight_VD, self.labels_N)
            return (loss.detach(),), torch.autograd.grad(loss, (self.hidden_ND, self.weight_VD))

        return Step(run, lambda: None)


def comparisons(machine: Machine, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Yields (name, what makes the comparison), the most telling shapes first."""
    for case in DRY_CASES if machine.dry else CASES:
        yield f"linear cross-entropy {case.shape}", partial(compare, case, machine, ceilings)


def compare(case: Case, machine: Machine, ceilings: Ceilings) -> Comparison:
    """Makes the inputs, the float64 truth and the list of providers."""
    inputs = make_inputs(case, machine.device, machine.dtype)
    amount = 6.0 * case.tokens * case.hidden_size * case.vocab_size
    elements = inputs.hidden_ND.numel() + inputs.weight_VD.numel()
    return Comparison(
        kernel="linear cross-entropy",
        mode="full",
        shape=case.shape,
        providers=providers(inputs, machine, case.short),
        work=Work(amount, ceilings.flops, "TFLOP/s"),
        exact=exact(inputs),
        gradients_mib=elements * machine.dtype.itemsize / MIB,
    )


def make_inputs(case: Case, device: str, dtype: torch.dtype) -> Inputs:
    """Logits of standard deviation 3; peaked ones lean a token towards its label's row by one and a half times it."""
    generator = torch.Generator(device).manual_seed(20)
    options: dict[str, Any] = {"device": device, "generator": generator}
    weight_VD = torch.randn(case.vocab_size, case.hidden_size, **options).mul_(3 / case.hidden_size**0.5)
    hidden_ND = torch.randn(case.tokens, case.hidden_size, **options)
    labels_N = torch.randint(0, case.vocab_size, (case.tokens,), **options)
    if case.peaked:
        hidden_ND += 1.5 * weight_VD[labels_N]
    leaves = (x.to(dtype).requires_grad_() for x in (hidden_ND, weight_VD))
    return Inputs(*leaves, labels_N)


@torch.no_grad()
def exact(inputs: Inputs) -> Tensors:
    """Returns mean loss and gradients in float64, in blocks of tokens."""
    weight_VD = inputs.weight_VD.double()
    grad_weight_VD, grads, losses = torch.zeros_like(weight_VD), [], []
    num_tokens = len(inputs.labels_N)
    for tokens, labels in zip(inputs.hidden_ND.split(_EXACT_ROWS), inputs.labels_N.split(_EXACT_ROWS), strict=True):
        hidden = tokens.double()
        logits = hidden @ weight_VD.T
        lse = logits.logsumexp(-1)
        losses.append(lse - logits.gather(1, labels[:, None])[:, 0])
        grad = logits.sub_(lse[:, None]).exp_()
        grad[torch.arange(len(labels), device=grad.device), labels] -= 1
        grad /= num_tokens
        grads.append(grad @ weight_VD)
        grad_weight_VD.addmm_(grad.T, hidden)
    return (torch.cat(losses).mean(),), (torch.cat(grads), grad_weight_VD)


def providers(inputs: Inputs, machine: Machine, short: bool) -> list[Provider]:
    """Returns all providers, the defaults of each first: where time runs out, variants are what is left out."""
    ours = _ours(inputs, machine)
    liger, cce, quack = list(_liger(inputs)), list(_cut_cross_entropy(inputs)), _quack(inputs)
    torchs = list(_torch(inputs, machine))
    first = [ours[0], liger[0], cce[0], quack, *torchs[:2]]
    return first if short else [*first, *ours[1:], *torchs[2:], *_megatron_core(inputs), *liger[1:], *cce[1:]]


def _ours(inputs: Inputs, machine: Machine) -> list[Provider]:
    """Ours at the default budget, with logits stored in wider dtypes, at other budgets, and into an fp32 gradient."""
    budgets = {"1 GiB": GIB, "256 MiB": 256 * MIB, "4 GiB": 4 * GIB}
    if machine.dry:
        budgets = {"1 KiB": 1 << 10, "512 B": 512, "4 KiB": 4 << 10}
    default, *others = budgets
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    settings = [(default, bf16, False), (default, fp32, False), (default, fp32, True), (default, bf16, True)]
    settings += [(default, fp16, False), *((other, bf16, False) for other in others), (others[-1], fp32, False)]
    made = []
    for implementation, wanted in (("triton", settings), ("torch", settings[:1])):
        for budget, logits_dtype, into_main_grad in wanted:
            options = {
                "logits_dtype": logits_dtype,
                "budget_bytes": budgets[budget],
                "implementation": implementation,
                "reduction": "mean",
            }
            stored = {bf16: "bf16", fp16: "fp16", fp32: "fp32"}[logits_dtype]
            setting = f"{implementation}, budget {budget}, logits {stored}{', into main_grad' * into_main_grad}"
            build = _our_step_into_main_grad if into_main_grad else _our_step
            made.append(Provider(OURS, setting, partial(build, inputs, options)))
    return made


def _our_step(inputs: Inputs, options: dict[str, Any]) -> Step[None]:
    from megatron_cpt.kernels import linear_cross_entropy

    return inputs.step(
        lambda hidden, weight, labels: (
            linear_cross_entropy(hidden, weight, labels, vocab_size=len(weight), **options).loss
        )
    )


def _our_step_into_main_grad(inputs: Inputs, options: dict[str, Any]) -> Step[Tensor]:
    """The weight's gradient is added to an fp32 tensor that is there before, as in training."""
    from megatron_cpt.kernels import linear_cross_entropy

    main_grad_VD = torch.empty_like(inputs.weight_VD, dtype=torch.float32)

    def run(main_grad_VD: Tensor) -> Tensors:
        loss = linear_cross_entropy(
            inputs.hidden_ND,
            inputs.weight_VD,
            inputs.labels_N,
            vocab_size=len(main_grad_VD),
            main_grad=main_grad_VD,
            **options,
        ).loss
        grad_ND, _ = torch.autograd.grad(loss, (inputs.hidden_ND, inputs.weight_VD), allow_unused=True)
        return (loss.detach(),), (grad_ND, main_grad_VD)

    return Step(run, main_grad_VD.zero_)


def _torch(inputs: Inputs, machine: Machine) -> Iterator[Provider]:
    def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    yield Provider("torch", "plain", lambda: inputs.step(plain))
    yield Provider("torch", "torch.compile", lambda: inputs.step(machine.compile(plain)))
    for setting in ("F.linear_cross_entropy", "F.linear_cross_entropy in chunks"):

        def make(chunked: bool = setting.endswith("chunks")) -> Step[None]:
            if not hasattr(F, "linear_cross_entropy"):
                raise ImportError("this version of torch has no linear_cross_entropy")
            options = torch.nn.LinearCrossEntropyOptions() if chunked else None
            return inputs.step(lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options))

        yield Provider("torch", setting, make)


def _liger(inputs: Inputs) -> Iterator[Provider]:
    name = f"liger-kernel {version_of('liger-kernel')}".strip()
    for constant, accumulate in ((1, None), (8, None), (16, None), (1, torch.float32), (16, torch.float32)):

        def make(constant: int = constant, accumulate: torch.dtype | None = accumulate) -> Step[None]:
            from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Function

            known = list(inspect.signature(Function.forward).parameters)[1:]
            chosen: dict[str, Any] = {"reduction": "mean", "accum_dtype": accumulate}
            if "chunk_mem_const" in known:
                chosen["chunk_mem_const"] = constant
            elif constant != 1:
                raise ValueError("this version has no constant for its chunks")
            # An autograd function takes its arguments by position.
            defaults = [parameter.default for parameter in inspect.signature(Function.forward).parameters.values()][1:]
            rest = [chosen.get(key, default) for key, default in zip(known[3:], defaults[3:], strict=True)]
            return inputs.step(lambda x, w, y: Function.apply(x, w, y, *rest)[0])

        yield Provider(name, f"chunk constant {constant}{', dW summed in fp32' * (accumulate is not None)}", make)


def _cut_cross_entropy(inputs: Inputs) -> Iterator[Provider]:
    """Every implementation that the installed package ships, and its own without skipping where it has the switch."""
    name = f"cut-cross-entropy {version_of('cut-cross-entropy')}".strip()
    variants: dict[str, dict[str, Any]] = {"cce": {}, "cce, nothing skipped": {"filter_eps": None}}
    try:
        from cut_cross_entropy.linear_cross_entropy import LinearCrossEntropyImpl

        shipped = [impl.name.lower() for impl in LinearCrossEntropyImpl]
        variants |= {impl: {"impl": impl} for impl in shipped if impl != "cce"}
    except Exception as error:  # not installed, or no kernels for this machine: the rows of "cce" say so
        del error
    for setting, chosen in variants.items():

        def make(chosen: dict[str, Any] = chosen) -> Step[None]:
            from cut_cross_entropy import linear_cross_entropy

            return inputs.step(lambda x, w, y: linear_cross_entropy(x, w, y, reduction="mean", **chosen))

        yield Provider(name, setting, make)


def _quack(inputs: Inputs) -> Provider:
    def make() -> Step[None]:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return inputs.step(lambda x, w, y: chunked_linear_cross_entropy(x, w, y, reduction="mean"))

    return Provider(f"quack-kernels {version_of('quack-kernels')}".strip(), "chunked", make)


def _megatron_core(inputs: Inputs) -> Iterator[Provider]:
    """Its vocabulary-parallel losses over a group of one rank, behind a matrix product."""
    name = f"megatron-core {version_of('megatron-core')}".strip()

    def fused() -> Step[None]:
        from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

        group = _group_of_one(inputs.hidden_ND.device.type)
        return inputs.step(
            lambda x, w, y: fused_vocab_parallel_cross_entropy(F.linear(x, w)[:, None], y[:, None], group).mean()
        )

    def unfused() -> Step[None]:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

        _group_of_one(inputs.hidden_ND.device.type)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel()
        return inputs.step(
            lambda x, w, y: vocab_parallel_cross_entropy(F.linear(x, w)[:, None].float(), y[:, None]).mean()
        )

    yield Provider(name, "fused", fused)
    yield Provider(name, "unfused", unfused)


def _group_of_one(device_type: str) -> Any:
    """Returns the group of this process alone."""
    import torch.distributed as dist

    if not dist.is_initialized():
        backend = "gloo" if device_type == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD
