"""The device of this process, as the rest of the package sees it."""

from __future__ import annotations

import types
from collections.abc import Iterator

import pytest
import torch

from megatron_cpt.errors import ConfigError
from megatron_cpt.runtime.device import current_device, device_count, upload
from megatron_cpt.runtime.launcher import refuse_more_processes_than_devices


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    current_device.cache_clear()
    yield
    current_device.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, name: str, count: int = 1) -> None:
    """`count` CUDA devices of this name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    properties = types.SimpleNamespace(name=name, total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


def test_the_cpu() -> None:
    device = current_device()
    assert (device.type, device.backend, str(device.torch_device())) == ("cpu", "gloo", "cpu")
    assert device.peak_memory_bytes() is None
    bound, where = device.flops_bound()
    assert bound > 1e8 and where == "measured fp32 matrix product"
    device.activate()
    device.synchronize()


def test_the_cpu_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("MEGATRON_CPT_DEVICE", "cpu")
    assert current_device().type == "cpu"


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA T4", None)]
)
def test_cuda(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, name)
    monkeypatch.delenv("MEGATRON_CPT_DEVICE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    device = current_device()
    assert (device.type, device.name, device.backend, device.peak_flops) == ("cuda", name, "nccl", peak)
    assert device.memory_bytes == 80 << 30 and str(device.torch_device()) == "cuda:3"
    if peak is not None:
        assert device.flops_bound() == (peak, "vendor's dense bf16 peak")


@pytest.mark.parametrize(("here", "expected"), [(False, "'cpu': there is no acc"), (True, "'cpu' or 'cuda'")])
def test_a_device_that_is_not_here_is_an_error(here: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if here:
        pretend(monkeypatch, "NVIDIA H100 80GB HBM3")
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MEGATRON_CPT_DEVICE", "gpu")
    for ask in (current_device, device_count):
        with pytest.raises(ConfigError, match=f"the variable MEGATRON_CPT_DEVICE is 'gpu', expected {expected}"):
            ask()


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEGATRON_CPT_DEVICE", raising=False)
    pretend(monkeypatch, "NVIDIA H100 80GB HBM3", count=2)
    refuse_more_processes_than_devices(2)
    message = "got 3 processes for 2 devices; start at most 2 on this machine, or set MEGATRON_CPT_DEVICE=cpu"
    with pytest.raises(ConfigError) as caught:
        refuse_more_processes_than_devices(3)
    assert str(caught.value) == message
    monkeypatch.setenv("MEGATRON_CPT_DEVICE", "cpu")
    assert device_count() is None
    refuse_more_processes_than_devices(100)


@pytest.mark.parametrize("capturing", [False, True])
def test_uploads_to_cuda_do_not_wait_for_it(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []
    tensor = types.SimpleNamespace(to=lambda device, **options: calls.append(("plain", options)))
    pinned = types.SimpleNamespace(to=lambda device, **options: calls.append(("pinned", options)))
    tensor.pin_memory = lambda: pinned
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    upload(tensor, torch.device("cuda"))  # type: ignore[arg-type]
    upload(tensor, torch.device("cpu"))  # type: ignore[arg-type]
    assert calls == [("plain", {}) if capturing else ("pinned", {"non_blocking": True}), ("plain", {})]
