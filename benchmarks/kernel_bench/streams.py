"""RMSNorm, rotary embedding and SwiGLU: ops that do nothing but move memory, beside torch.compile and plain torch.

Shape letters: N tokens, D hidden size, H query heads, G key-value groups, K head size, F FFN size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_bench.ceilings import Ceilings
from kernel_bench.machine import Machine, Step, Tensors
from kernel_bench.measuring import OURS, Comparison, Provider, Work

EPSILON = 1e-5
# N; values of D; H, G and K; F.
SIZES = (8192, (4096, 8192), (32, 8, 128), 14336)
DRY_SIZES = (2, (40,), (4, 2, 16), 48)
Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Op:
    """One streaming op at one shape.

    Attributes:
        inputs: leaves that require gradients.
        others: tensors that get none.
        functions: provider, setting and what builds the function, of inputs and others.
        plain: the function in plain torch, which in float64 is the truth.
        forward_elements, backward_elements: elements read and written at the least.
    """

    kernel: str
    shape: str
    inputs: tuple[Tensor, ...]
    others: tuple[Tensor, ...]
    functions: list[tuple[str, str, Callable[[], Function]]]
    plain: Function
    forward_elements: int
    backward_elements: int


def comparisons(machine: Machine, ceilings: Ceilings) -> Iterator[tuple[str, Callable[[], Comparison]]]:
    """Yields (name, what makes the comparison)."""
    tokens, sizes, heads, ffn_size = DRY_SIZES if machine.dry else SIZES
    makers: list[tuple[str, Callable[[], Op]]] = []
    for size in sizes:
        makers.append((f"RMSNorm D={size}", partial(rms_norm, machine, tokens, size)))
        makers.append((f"RMSNorm with residual D={size}", partial(add_rms_norm, machine, tokens, size)))
    makers.append(("SwiGLU", partial(swiglu, machine, tokens, ffn_size)))
    makers.append(("RoPE", partial(rope, machine, tokens, *heads)))
    for title, maker in makers:
        made: list[Op] = []
        for mode in ("forward", "backward"):
            yield f"{title} {mode}", partial(_compare, maker, made, mode, machine, ceilings)
        if title == "RoPE":
            yield f"{title} in place", partial(_compare_in_place, made, machine, ceilings)


def _compare(maker: Callable[[], Op], made: list[Op], mode: str, machine: Machine, ceilings: Ceilings) -> Comparison:
    """`made` carries the op from one mode to the next."""
    if not made:
        made.append(maker())
    op = made[0]
    outputs, grads, gradients = _exact(op)
    elements = op.forward_elements if mode == "forward" else op.backward_elements
    return Comparison(
        kernel=op.kernel,
        mode=mode,
        shape=op.shape,
        providers=[
            Provider(name, setting, partial(_step, op, build, mode, grads)) for name, setting, build in op.functions
        ],
        work=Work(float(elements * machine.dtype.itemsize), ceilings.bytes, "GB/s"),
        exact=(outputs, ()) if mode == "forward" else ((), gradients),
        gradients_mib=sum(x.numel() for x in op.inputs) * machine.dtype.itemsize / 2**20,
    )


def _step(op: Op, build: Callable[[], Function], mode: str, grads: tuple[Tensor, ...]) -> Step[Any]:
    """Returns the forward pass of training, or the backward pass, as a step."""
    function = build()
    leaves = tuple(x.detach().requires_grad_() for x in op.inputs)

    def forward() -> tuple[Tensor, ...]:
        return function(*leaves, *op.others)

    if mode == "forward":
        return Step(lambda _: (tuple(x.detach() for x in forward()), ()), lambda: None)
    return Step(lambda results: ((), torch.autograd.grad(results, leaves, grads)), forward)


def step_of(op: Op, mode: str) -> Step[Any]:
    """Returns our implementation's step."""
    return _step(op, op.functions[0][2], mode, _exact(op)[1])


def _exact(op: Op) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Returns outputs in float64, gradients for them in the op's dtype, and gradients of the inputs in float64."""
    leaves = [x.detach().double().requires_grad_() for x in op.inputs]
    outputs = op.plain(*leaves, *(x.double() for x in op.others))
    generator = torch.Generator(leaves[0].device).manual_seed(22)
    grads = tuple(
        torch.randn(output.shape, device=output.device, generator=generator).to(op.inputs[0].dtype)
        for output in outputs
    )
    gradients = torch.autograd.grad(outputs, leaves, [grad.double() for grad in grads])
    return tuple(output.detach() for output in outputs), grads, gradients


def _random(machine: Machine, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator(machine.device).manual_seed(23)
    return tuple(torch.randn(s, device=machine.device, generator=generator).to(machine.dtype) for s in shapes)


def _with_torch(machine: Machine, plain: Function, ours: Callable[[], Function]) -> list[Any]:
    return [
        (OURS, "triton", ours),
        ("torch", "torch.compile", lambda: machine.compile(plain)),
        ("torch", "plain", lambda: plain),
    ]


def _normalised(hidden: Tensor, weight: Tensor) -> Tensor:
    """Llama's: statistics in fp32, the cast before the weight."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return weight * wide.to(hidden.dtype)


def rms_norm(machine: Machine, tokens: int, size: int) -> Op:
    """RMSNorm of a batch of tokens."""

    def plain(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (_normalised(hidden, weight),)

    def ours() -> Function:
        from megatron_cpt import kernels

        return lambda hidden, weight: (kernels.rms_norm(hidden, weight, EPSILON, implementation="triton"),)

    functions = _with_torch(machine, plain, ours)
    functions.append(("torch", "F.rms_norm", lambda: lambda x, weight: (F.rms_norm(x, (size,), weight, EPSILON),)))
    inputs = _random(machine, (tokens, size), (size,))
    elements = tokens * size
    return Op("RMSNorm", f"N={tokens} D={size}", inputs, (), functions, plain, 2 * elements, 3 * elements)


def add_rms_norm(machine: Machine, tokens: int, size: int) -> Op:
    """The sum of two streams and its RMSNorm."""

    def plain(hidden: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        total = hidden + residual
        return _normalised(total, weight), total

    def ours() -> Function:
        from megatron_cpt import kernels

        return lambda *tensors: kernels.add_rms_norm(*tensors, EPSILON, implementation="triton")

    inputs = _random(machine, (tokens, size), (tokens, size), (size,))
    functions, elements = _with_torch(machine, plain, ours), tokens * size
    return Op("RMSNorm with residual", f"N={tokens} D={size}", inputs, (), functions, plain, 4 * elements, 4 * elements)


def swiglu(machine: Machine, tokens: int, ffn_size: int) -> Op:
    """The activation of a Llama MLP."""

    def plain(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (F.silu(gate) * up,)

    def ours() -> Function:
        from megatron_cpt import kernels

        return lambda gate, up: (kernels.swiglu(gate, up, implementation="triton"),)

    inputs = _random(machine, (tokens, ffn_size), (tokens, ffn_size))
    functions, elements = _with_torch(machine, plain, ours), tokens * ffn_size
    return Op("SwiGLU", f"N={tokens} F={ffn_size}", inputs, (), functions, plain, 3 * elements, 5 * elements)


def rope(machine: Machine, tokens: int, num_heads: int, num_groups: int, head_size: int) -> Op:
    """Query and key of a batch of tokens, rotated."""

    def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = heads.chunk(2, -1)
        cos, sin = cos[:, None].to(heads.dtype), sin[:, None].to(heads.dtype)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def plain(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        return turned(query, cos, sin), turned(key, cos, sin)

    def ours() -> Function:
        from megatron_cpt import kernels

        return lambda *tensors: kernels.rope(*tensors, implementation="triton")

    pairs = head_size // 2
    inputs = _random(machine, (tokens, num_heads, head_size), (tokens, num_groups, head_size))
    frequencies = 10000.0 ** -(torch.arange(pairs, device=machine.device) / pairs)
    angles = torch.outer(torch.arange(tokens, device=machine.device).float(), frequencies)
    # The table is fp32: two of the tensors' elements for each of its own.
    elements = 2 * sum(x.numel() for x in inputs) + 2 * tokens * pairs * 4 // machine.dtype.itemsize
    shape = f"N={tokens} H={num_heads} G={num_groups} K={head_size}"
    functions = _with_torch(machine, plain, ours)
    return Op("RoPE", shape, inputs, (angles.cos(), angles.sin()), functions, plain, elements, elements)


def _compare_in_place(made: list[Op], machine: Machine, ceilings: Ceilings) -> Comparison:
    """Ours alone: plain torch has no such form."""
    op = made[0]

    def make() -> Step[tuple[Tensor, ...]]:
        from megatron_cpt import kernels

        def run(copies: tuple[Tensor, ...]) -> Tensors:
            return kernels.rope(*copies, *op.others, in_place=True, implementation="triton"), ()

        return Step(run, lambda: tuple(x.clone() for x in op.inputs))

    work = Work(float(op.forward_elements * machine.dtype.itemsize), ceilings.bytes, "GB/s")
    providers = [Provider(OURS, "triton, in place", make)]
    return Comparison("RoPE", "forward", op.shape + " in place", providers, work, (_exact(op)[0], ()))
