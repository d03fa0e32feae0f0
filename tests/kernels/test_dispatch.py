from __future__ import annotations

import pytest
import torch

from megatron_cpt.errors import KernelUnsupported
from megatron_cpt.kernels import attention, dispatch, linear_cross_entropy, rms_norm


def _fast_only_on_tpu(**facts: object) -> str | None:
    device = facts.get("device", "tpu")
    return None if device == "tpu" else f"it needs a tpu, not {device}"


def _registry() -> dispatch.Registry:
    registry = dispatch.Registry()
    registry.register("add", "fast", lambda: "fast", _fast_only_on_tpu)
    registry.register("add", "torch", lambda: "torch", dispatch.anywhere)
    return registry


def test_auto_takes_the_first_that_supports_the_facts() -> None:
    assert _registry().choose("add", "auto", device="tpu")() == "fast"
    assert _registry().choose("add", "auto", device="cpu")() == "torch"
    assert _registry().choose("add", "torch", device="tpu")() == "torch"


def test_a_named_implementation_that_cannot_run_raises_with_the_reason() -> None:
    with pytest.raises(KernelUnsupported, match="'fast' cannot run here: it needs a tpu, not cpu"):
        _registry().choose("add", "fast", device="cpu")
    with pytest.raises(KernelUnsupported, match=r"'cuda'.*\['auto', 'fast', 'torch'\]"):
        _registry().choose("add", "cuda", device="cpu")


def test_auto_raises_with_every_reason_when_none_can_run() -> None:
    registry = dispatch.Registry()
    registry.register("add", "fast", lambda: "fast", _fast_only_on_tpu)
    registry.register("add", "faster", lambda: "faster", _fast_only_on_tpu)
    with pytest.raises(KernelUnsupported, match="'fast' cannot run here.*'faster' cannot run here"):
        registry.choose("add", device="cpu")


def test_a_name_is_given_once() -> None:
    for name in ("fast", "auto"):
        with pytest.raises(ValueError, match="taken"):
            _registry().register("add", name, lambda: None, dispatch.anywhere)


def test_explain_says_for_every_implementation_whether_it_runs_and_why() -> None:
    assert _registry().explain(device="cpu") == [
        {"op": "add", "implementation": "fast", "supported": False, "reason": "it needs a tpu, not cpu"},
        {"op": "add", "implementation": "torch", "supported": True, "reason": "runs here; 'auto' takes it"},
    ]
    assert _registry().explain()[1]["reason"] == "runs here; 'auto' takes fast"


def test_every_op_of_the_package_has_an_implementation_everywhere() -> None:
    rows = dispatch.explain()
    assert {row["op"] for row in rows if row["supported"]} == {"attention", "linear_cross_entropy", "rms_norm"}


def test_every_op_hands_its_implementation_on() -> None:
    tokens, heads, weight = torch.zeros(2, 4), torch.zeros(2, 1, 4), torch.zeros(3, 4)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KernelUnsupported, match="rms_norm: got implementation 'fpga'"):
        rms_norm(tokens, weight[0], 1e-5, implementation="fpga")
    with pytest.raises(KernelUnsupported, match="attention: got implementation 'fpga'"):
        attention(heads, heads, heads, torch.tensor([0, 2]), scale=1.0, implementation="fpga")
    with pytest.raises(KernelUnsupported, match="linear_cross_entropy: got implementation 'fpga'"):
        linear_cross_entropy(tokens, weight, labels, vocab_size=3, implementation="fpga")
