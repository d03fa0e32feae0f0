"""Causal attention with grouped heads: one document, four, and many short ones in a row.

Shape letters: N tokens of all documents, H query heads, G key-value groups, K head size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernel_bench.ceilings import Ceilings
from kernel_bench.machine import Machine, Step, Tensors
from kernel_bench.measuring import OURS, Comparison, Provider, Work

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One packed row: lengths of its documents, and heads."""

    title: str
    lengths: tuple[int, ...]
    num_heads: int
    num_groups: int
    head_size: int

    @property
    def shape(self) -> str:
        """Returns the shape as it stands in a row."""
        heads = f"H={self.num_heads} G={self.num_groups} K={self.head_size}"
        return f"N={sum(self.lengths)} {heads} {self.title}"


def _log_normal_lengths(total: int, mean: float) -> tuple[int, ...]:
    """Returns lengths with this mean before the last is cut to fit; always the same ones."""
    generator, lengths = torch.Generator().manual_seed(1), []
    spread = 1.0
    while sum(lengths) < total:
        normal = torch.randn((), generator=generator).item()
        lengths.append(max(int(mean * torch.tensor(spread * normal - spread**2 / 2).exp().item()), 16))
    lengths[-1] -= sum(lengths) - total
    return tuple(lengths)


def _cases() -> Iterator[Case]:
    for head_size, heads in ((128, (32, 8)), (64, (32, 8))):
        yield Case("1 document", (8192,), *heads, head_size)
        yield Case("documents of 1024 in the mean", _log_normal_lengths(8192, 1024), *heads, head_size)
        yield Case("4 documents", (4096, 2048, 1536, 512), *heads, head_size)


CASES = tuple(_cases())
DRY_CASES = (Case("1 document", (20,), 2, 1, 16), Case("2 documents", (9, 11), 1, 1, 16))


@dataclass(frozen=True)
class Inputs:
    """Leaves that require gradients, the gradient of the output, and the documents' boundaries on the host."""

    query_NHK: Tensor
    key_NGK: Tensor
    value_NGK: Tensor
    grad_NHK: Tensor
    cu_seqlens: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns query, key, value."""
        return self.query_NHK, self.key_NGK, self.value_NGK

    @property
    def documents(self) -> list[slice]:
        """Returns the rows of each document."""
        return [slice(start, stop) for start, stop in pairwise(self.cu_seqlens.tolist())]

    @property
    def scale(self) -> float:
        """Returns the factor of the logits."""
        return float(self.query_NHK.shape[-1] ** -0.5)

    def forward(self, function: Function) -> Step[None]:
        """Returns the forward pass of training as a step."""
        return Step(lambda _: ((function(*self.leaves).detach(),), ()), lambda: None)

    def backward(self, function: Function) -> Step[Tensor]:
        """Returns the backward pass as a step."""
        return Step(
            lambda output: ((), torch.autograd.grad(output, self.leaves, self.grad_NHK)),
            lambda: function(*self.leaves),
        )


def comparisons(machine: Machine, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Yields (name, what makes the comparison), the most telling shapes first."""
    for case in DRY_CASES if machine.dry else CASES:
        made: dict[str, Any] = {}
        for mode in ("forward", "backward"):
            yield f"attention {mode} {case.shape}", partial(_compare, case, mode, machine, ceilings, made)


def _compare(case: Case, mode: str, machine: Machine, ceilings: Ceilings, made: dict[str, Any]) -> Comparison:
    """`made` carries inputs, truth and functions from one mode of a case to the next."""
    if not made:
        inputs = make_inputs(case, machine)
        made.update(inputs=inputs, exact=exact(inputs), functions=_each_built_once(functions(inputs, case, machine)))
    inputs, (outputs, gradients) = made["inputs"], made["exact"]
    of_mode = inputs.forward if mode == "forward" else inputs.backward

    def make(build: Callable[[], Function]) -> Step[Any]:
        return of_mode(build())

    found = [Provider(name, setting, partial(make, build)) for name, setting, build in made["functions"]]
    squares = sum(length**2 for length in case.lengths)
    flops = 2.0 * case.num_heads * case.head_size * squares * (1.0 if mode == "forward" else 2.5)
    return Comparison(
        kernel="attention",
        mode=mode,
        shape=case.shape,
        providers=found,
        work=Work(flops, ceilings.flops, "TFLOP/s"),
        exact=(outputs, ()) if mode == "forward" else ((), gradients),
        gradients_mib=sum(leaf.numel() for leaf in inputs.leaves) * machine.dtype.itemsize / 2**20,
    )


def _each_built_once(found: list[tuple[str, str, Callable[[], Function]]]) -> list[Any]:
    """Both modes of a case share what was built, as a compiled function and its mask."""
    return [(name, setting, cache(build)) for name, setting, build in found]


def make_inputs(case: Case, machine: Machine) -> Inputs:
    """Standard normal tensors."""
    generator = torch.Generator(machine.device).manual_seed(21)
    num_tokens = sum(case.lengths)
    heads = case.num_heads, case.num_groups, case.num_groups, case.num_heads
    query, key, value, grad = (
        torch.randn(num_tokens, count, case.head_size, device=machine.device, generator=generator).to(machine.dtype)
        for count in heads
    )
    boundaries = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32)
    return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad, boundaries)


def exact(inputs: Inputs) -> Tensors:
    """Returns output and gradients in float64, by documents and heads."""
    leaves = [leaf.detach().double() for leaf in inputs.leaves]
    output, grads = torch.zeros_like(leaves[0]), [torch.zeros_like(leaf) for leaf in leaves]
    share = leaves[0].shape[1] // leaves[1].shape[1]
    for rows in inputs.documents:
        length = rows.stop - rows.start
        hidden = torch.ones(length, length, dtype=torch.bool, device=output.device).triu_(1)
        for head in range(leaves[0].shape[1]):
            places = (rows, head), (rows, head // share), (rows, head // share)
            parts = [leaf[place].clone().requires_grad_() for leaf, place in zip(leaves, places, strict=True)]
            logits = (parts[0] @ parts[1].T * inputs.scale).masked_fill(hidden, -torch.inf)
            part = logits.softmax(-1) @ parts[2]
            output[rows, head] = part.detach()
            found = torch.autograd.grad(part, parts, inputs.grad_NHK[rows, head].double())
            for grad, place, one in zip(grads, places, found, strict=True):
                grad[place] += one
    return (output,), tuple(grads)


def functions(inputs: Inputs, case: Case, machine: Machine) -> list[tuple[str, str, Callable[[], Function]]]:
    """Returns (provider, setting, what builds the function), for one document or for several."""
    ours = [(OURS, implementation, partial(_ours, inputs, implementation)) for implementation in ("triton", "auto")]
    flash, cudnn = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    separate = [
        ("torch", "varlen_attn", partial(_varlen, inputs)),
        ("torch", "flex_attention, mask made before", partial(_flex, inputs, machine)),
    ]
    if len(case.lengths) == 1:
        dense = [
            ("torch", "SDPA cuDNN", partial(_sdpa, cudnn)),
            ("torch", "SDPA flash", partial(_sdpa, flash)),
        ]
        return [*ours, *dense, *separate]
    mixing = "causal over the whole row: documents see each other"
    dense = [
        ("torch", f"SDPA cuDNN, {mixing}", partial(_sdpa, cudnn)),
        ("torch", f"SDPA flash, {mixing}", partial(_sdpa, flash)),
        ("torch", "SDPA flash, document after document", partial(_by_document, flash, inputs)),
        ("torch", "SDPA cuDNN, document after document", partial(_by_document, cudnn, inputs)),
        ("torch", "SDPA memory-efficient, dense mask", partial(_masked, SDPBackend.EFFICIENT_ATTENTION, inputs)),
        ("torch", "SDPA cuDNN, dense mask", partial(_masked, cudnn, inputs)),
    ]
    return [*ours, *separate, *dense, (OURS, "torch", partial(_ours, inputs, "torch"))]


def _ours(inputs: Inputs, implementation: str) -> Function:
    from megatron_cpt.kernels import attention

    return lambda query, key, value: attention(
        query, key, value, inputs.cu_seqlens, scale=inputs.scale, implementation=implementation
    )


def _batched(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).unsqueeze(0)


def _plain(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    batched = (_batched(tensor) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(*batched, enable_gqa=True, **options)[0].transpose(0, 1)


def _sdpa(backend: SDPBackend) -> Function:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _plain(query, key, value, is_causal=True)

    return run


def _by_document(backend: SDPBackend, inputs: Inputs) -> Function:
    def run(*tensors: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return torch.cat([_plain(*(t[rows] for t in tensors), is_causal=True) for rows in inputs.documents])

    return run


def _document_numbers(inputs: Inputs) -> Tensor:
    lengths = inputs.cu_seqlens.diff().long()
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(inputs.query_NHK.device)


def _masked(backend: SDPBackend, inputs: Inputs) -> Function:
    document_N = _document_numbers(inputs)
    mask_NN = (document_N[:, None] == document_N).tril_()

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _plain(query, key, value, attn_mask=mask_NN)

    return run


_COMPILED: dict[bool, Any] = {}


def _flex(inputs: Inputs, machine: Machine) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document_N = _document_numbers(inputs)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_N[query] == document_N[key])

    num_tokens = len(document_N)
    mask = create_block_mask(visible, None, None, num_tokens, num_tokens, device=machine.device)
    if machine.dry not in _COMPILED:
        _COMPILED[machine.dry] = flex_attention if machine.dry else torch.compile(flex_attention, dynamic=False)
    compiled = _COMPILED[machine.dry]

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batched = (_batched(tensor) for tensor in (query, key, value))
        output = compiled(*batched, block_mask=mask, scale=inputs.scale, enable_gqa=True)
        return output[0].transpose(0, 1)

    return run


def _varlen(inputs: Inputs) -> Function:
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    options |= {"enable_gqa": True} if "enable_gqa" in known else {}
    boundaries = inputs.cu_seqlens.to(inputs.query_NHK.device)
    longest = int(inputs.cu_seqlens.diff().max())
    return lambda query, key, value: varlen_attn(query, key, value, boundaries, boundaries, longest, longest, **options)
