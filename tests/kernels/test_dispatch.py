from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

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
    assert _registry().decide("add", "auto", device="tpu").implementation == "fast"
    assert _registry().decide("add", "auto", device="cpu").implementation == "torch"
    assert _registry().decide("add", "torch", device="tpu").implementation == "torch"


def test_a_named_implementation_that_cannot_run_raises_with_the_reason() -> None:
    with pytest.raises(KernelUnsupported, match="'fast' cannot run here: it needs a tpu, not cpu"):
        _registry().decide("add", "fast", device="cpu")
    with pytest.raises(KernelUnsupported, match=r"'cuda'.*\['auto', 'fast', 'torch'\]"):
        _registry().decide("add", "cuda", device="cpu")


def test_auto_raises_with_every_reason_when_none_can_run() -> None:
    registry = dispatch.Registry()
    registry.register("add", "fast", lambda: "fast", _fast_only_on_tpu)
    registry.register("add", "faster", lambda: "faster", _fast_only_on_tpu)
    with pytest.raises(KernelUnsupported, match="'fast' cannot run here.*'faster' cannot run here"):
        registry.decide("add", device="cpu")


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
    rows = dispatch.explain(device="cpu", dtype=torch.float64)
    assert {row["op"] for row in rows if row["supported"]} == {row["op"] for row in dispatch.explain(device="cpu")}


def test_every_op_hands_its_implementation_on() -> None:
    tokens, heads, weight = torch.zeros(2, 4), torch.zeros(2, 1, 4), torch.zeros(3, 4)
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(KernelUnsupported, match="rms_norm: got implementation 'fpga'"):
        rms_norm(tokens, weight[0], 1e-5, implementation="fpga")
    with pytest.raises(KernelUnsupported, match="attention: got implementation 'fpga'"):
        attention(heads, heads, heads, torch.tensor([0, 2]), scale=1.0, implementation="fpga")
    with pytest.raises(KernelUnsupported, match="linear_cross_entropy: got implementation 'fpga'"):
        linear_cross_entropy(tokens, weight, labels, vocab_size=3, implementation="fpga")


def _facts(**facts: object) -> str:
    return dispatch.triton_obstacle(**facts) or ""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that pretends a machine: is Triton installed, the GPU's capability, is Triton interpreted."""

    def pretend(installed: bool = True, capability: tuple[int, int] | None = None, interpreted: bool = False) -> None:
        monkeypatch.setattr(dispatch, "triton_installed", lambda: installed)
        monkeypatch.setattr(dispatch, "compute_capability", lambda device: capability if device == "cuda" else None)
        monkeypatch.setenv(dispatch.INTERPRETER, str(int(interpreted)))

    return pretend


def test_triton_runs_on_gpus_from_compute_capability_8(here: Callable[..., None]) -> None:
    here(capability=(9, 0))
    assert dispatch.triton_obstacle() is None
    assert dispatch.triton_obstacle(device="cuda", dtype=torch.bfloat16, head_size=64) is None
    assert "torch.float64" in _facts(device="cuda", dtype=torch.float64)
    assert "NVIDIA GPU, not cpu" in _facts(device="cpu", named=True)
    here(capability=(7, 5))
    assert "this GPU has 7.5" in _facts(device="cuda")
    here(installed=False, capability=(9, 0))
    assert "not installed" in _facts(device="cuda") and "not installed" in _facts()


def test_triton_is_interpreted_by_name_only(here: Callable[..., None]) -> None:
    here(interpreted=True)
    assert dispatch.triton_obstacle(device="cpu", named=True) is None
    assert "NVIDIA GPU" in _facts(device="cpu")
    here(interpreted=True, capability=(9, 0))
    assert dispatch.triton_obstacle(device="cuda", named=True) is None
    assert "by name only" in _facts(device="cuda")


def test_an_implementation_knows_whether_it_is_named() -> None:
    registry = dispatch.Registry()
    registry.register("add", "shy", lambda: "shy", lambda **facts: None if facts["named"] else "it waits for its name")
    registry.register("add", "torch", lambda: "torch", dispatch.anywhere)
    assert registry.decide("add").implementation == "torch"
    assert registry.decide("add", "shy").implementation == "shy"
    assert registry.explain()[0]["reason"] == "it waits for its name"


def test_the_ops_need_torch_alone() -> None:
    """A machine for benchmarks may have nothing else; and where nothing asks for Triton it is not loaded."""
    program = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('pydantic', 'yaml', 'megatron', 'safetensors', 'rich', 'typer')))\n"
        "from megatron_cpt.kernels import dispatch\n"
        "dispatch.explain(device='cpu')\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_choice_says_each_reason_once() -> None:
    obstacles = {"first": "it needs a GPU", "second": "it needs a GPU", "third": "it has no window"}
    choice = dispatch.Choice("an op", "torch", print, obstacles)
    reasons = "first, second cannot run here: it needs a GPU; third cannot run here: it has no window"
    assert str(choice) == f"an op: torch; {reasons}"
