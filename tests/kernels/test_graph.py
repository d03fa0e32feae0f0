"""torch.compile sees each op as one node of one graph, with the numbers of an eager call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_cpt.kernels import add_rms_norm, packed_swiglu, rms_norm, rope, swiglu

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["torch", "triton"])

pytestmark = pytest.mark.usefixtures("triton")


def _rope(in_place: bool) -> Callable[..., Any]:
    def function(query: Tensor, key: Tensor, table: Tensor, implementation: str) -> Any:
        cos, sin = table.detach().unbind()
        query, key = query + 0.0, key + 0.0  # in place is for what an op has made
        return rope(query, key, cos, sin, in_place=in_place, implementation=implementation)

    return function


def _implemented(function: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
    return lambda *x, implementation: function(*x, *constants, implementation=implementation)


OPS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "rms_norm": (_implemented(rms_norm, 1e-5), [(2, 5, 8), (8,)]),
    "add_rms_norm": (_implemented(add_rms_norm, 1e-5), [(5, 8), (5, 8), (8,)]),
    "rope": (_rope(False), [(5, 4, 8), (5, 2, 8), (2, 5, 4)]),
    "rope-in-place": (_rope(True), [(5, 4, 8), (5, 2, 8), (2, 5, 4)]),
    "swiglu": (_implemented(swiglu), [(2, 5, 8), (2, 5, 8)]),
    "packed_swiglu": (_implemented(packed_swiglu), [(5, 8)]),
}


def _run(function: Callable[..., Any], inputs: list[Tensor], implementation: str) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*leaves, implementation=implementation)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in outputs)
    loss.backward()
    return [*outputs, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("name", OPS)
@IMPLEMENTATIONS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_call_gives_the_bits_of_an_eager_one(name: str, implementation: str) -> None:
    function, shapes = OPS[name]
    inputs = [torch.randn(shape) for shape in shapes]
    eager = _run(function, inputs, implementation)
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    got = _run(compiled, inputs, implementation)
    assert len(got) == len(eager)
    assert all(torch.equal(one, other) for one, other in zip(got, eager, strict=True))


@pytest.mark.parametrize("name", ["rms_norm", "rope", "swiglu"])
def test_a_kernel_is_one_node(name: str) -> None:
    function, shapes = OPS[name]
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend, fullgraph=True)(
        *(torch.randn(shape) for shape in shapes), implementation="triton"
    )
    (graph,) = graphs
    own = [node for node in graph.graph.nodes if str(node.target).startswith("megatron_cpt")]
    assert [str(node.target) for node in own] == [f"megatron_cpt.{name}.default"]


def test_the_ops_keep_the_rules_of_the_dispatcher() -> None:
    """Schemas, fake results and gradients agree with what the kernels do."""
    from megatron_cpt.kernels.norm import triton_norm
    from megatron_cpt.kernels.rope import triton_rope
    from megatron_cpt.kernels.swiglu import triton_swiglu

    assert triton_norm and triton_rope and triton_swiglu
    ops = torch.ops.megatron_cpt

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape).requires_grad_()

    tests = "test_schema", "test_autograd_registration", "test_faketensor"
    for residual in (None, leaf(3, 8)):
        torch.library.opcheck(ops.rms_norm, (leaf(3, 8), residual, leaf(8), 1e-5), test_utils=tests)
    for up in (None, leaf(3, 8)):
        torch.library.opcheck(ops.swiglu, (leaf(3, 8), up), test_utils=tests)
    torch.library.opcheck(ops.rope, (leaf(3, 2, 8), leaf(3, 1, 8), *torch.randn(2, 3, 4), False), test_utils=tests)
