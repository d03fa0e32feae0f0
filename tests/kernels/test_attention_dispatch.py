"""Which implementation of attention a machine takes for which documents."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from megatron_cpt.config.schema import KernelConfig
from megatron_cpt.errors import KernelUnsupported
from megatron_cpt.kernels import attention, dispatch
from megatron_cpt.kernels.attention import torch_backends
from megatron_cpt.model.kernels import kernel_choices
from megatron_cpt.runtime import device

PACKED, EQUAL, SINGLE = [0, 3, 10], [0, 5, 5, 10], [0, 10]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that pretends a GPU on which torch takes, or refuses, its own kernels."""

    def pretend(capability: tuple[int, int] = (9, 0), cudnn: bool = True, flash: bool = True) -> None:
        def can_use(takes: bool) -> Callable[[Any, bool], bool]:
            def ask(call: Any, debug: bool) -> bool:
                if debug and not takes:
                    warnings.warn("head_dim should be a multiple of 8", stacklevel=1)
                return takes

            return ask

        monkeypatch.setattr(torch_backends, "compute_capability", lambda device: capability)
        monkeypatch.setattr(dispatch, "compute_capability", lambda device: capability)
        monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
        monkeypatch.setenv(dispatch.INTERPRETER, "0")
        monkeypatch.setattr(torch.backends.cuda, "can_use_cudnn_attention", can_use(cudnn))
        monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", can_use(flash))

    return pretend


def _decide(boundaries: list[int], implementation: str = "auto", head_size: int = 8, **facts: Any) -> dispatch.Choice:
    tensors = tuple(torch.zeros(10, count, head_size, dtype=torch.bfloat16) for count in (2, 1, 1))
    facts = {"device": "cuda", "dtype": torch.bfloat16, "window": None, "head_size": head_size, **facts}
    return dispatch.decide("attention", implementation, cu_seqlens=torch.tensor(boundaries), tensors=tensors, **facts)


def test_documents_of_one_length_go_to_torch_and_others_to_triton(gpu: Callable[..., None]) -> None:
    gpu()
    assert [_decide(x).implementation for x in (SINGLE, EQUAL, PACKED)] == ["cudnn", "cudnn", "triton"]
    assert "documents of one length" in _decide(PACKED).obstacles["flash"]
    gpu(capability=(8, 0))
    choice = _decide(SINGLE)
    assert choice.implementation == "flash" and "this GPU has 8.0" in choice.obstacles["cudnn"]
    assert _decide(PACKED).implementation == "triton"


def test_a_job_cannot_name_what_serves_documents_of_one_length(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu()
    monkeypatch.setattr(device, "current_device", lambda: device.Device("cuda", "a GPU", "nccl", None, None))
    assert kernel_choices(KernelConfig(), "bf16", 8)[0].implementation == "triton"
    for name in ("cudnn", "flash"):
        with pytest.raises(ValidationError, match="Input should be 'auto', 'triton' or 'torch'"):
            KernelConfig.model_validate({"attention": name})


def test_a_window_over_all_tokens_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(dispatch, "choose", lambda *_, window, **__: seen.append(window) or (lambda *x: x[0]))
    query = torch.zeros(10, 1, 8)
    for window in (None, 8, 9, 2**40):
        attention(query, query, query, torch.tensor(SINGLE), scale=1.0, window=window)
    assert seen == [None, 8, None, None]


def test_what_torch_refuses_goes_to_triton_with_the_reason(gpu: Callable[..., None]) -> None:
    gpu(cudnn=False, flash=False)
    choice = _decide(SINGLE)
    assert choice.implementation == "triton"
    assert choice.obstacles["cudnn"] == "torch refuses the call: head_dim should be a multiple of 8"
    with pytest.raises(KernelUnsupported, match="'flash' cannot run here: torch refuses the call"):
        _decide(SINGLE, "flash")


def test_windows_dtypes_and_head_sizes(gpu: Callable[..., None]) -> None:
    gpu()
    assert _decide(SINGLE, window=5).obstacles == dict.fromkeys(("cudnn", "flash"), "it has no sliding window")
    choice = _decide(SINGLE, dtype=torch.float32)
    assert choice.implementation == "torch"
    assert "by name only" in choice.obstacles["triton"] and "not torch.float32" in choice.obstacles["cudnn"]
    assert _decide(SINGLE, "triton", dtype=torch.float32).implementation == "triton"
    with pytest.raises(KernelUnsupported, match="head sizes up to 128 in fp32, not 160"):
        _decide(SINGLE, "triton", dtype=torch.float32, head_size=160)
    assert "up to 256, not 264" in _decide(PACKED, head_size=264).obstacles["triton"]


def test_what_is_traced_once_has_to_fit_documents_of_all_lengths(gpu: Callable[..., None]) -> None:
    gpu()
    facts = {"device": "cuda", "dtype": torch.bfloat16, "head_size": 128}
    assert dispatch.decide("attention", one_length=False, **facts).implementation == "triton"
    assert dispatch.decide("attention", **facts).implementation == "cudnn"


def test_named_kernels_of_a_gpu_are_refused_on_the_cpu() -> None:
    query = torch.zeros(10, 2, 8)
    for name in ("cudnn", "flash"):
        with pytest.raises(KernelUnsupported, match=f"'{name}' cannot run here: it needs an NVIDIA GPU, not cpu"):
            attention(query, query, query, torch.tensor(SINGLE), scale=1.0, implementation=name)


def test_torchs_kernel_is_asked_for_alone() -> None:
    """On the CPU torch has FlashAttention under the same name."""
    query = torch.randn(10, 2, 8)
    arguments = query, query, query, torch.tensor(EQUAL), 0.3, None
    assert torch.equal(torch_backends.flash(*arguments), attention(*arguments[:4], scale=0.3))
    with pytest.raises(RuntimeError, match="No (available kernel|viable backend)"):
        torch_backends.cudnn(*arguments)
