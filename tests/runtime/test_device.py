"""Which device is taken, and how many processes it serves."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_cpt.errors import ConfigError
from megatron_cpt.runtime import device
from megatron_cpt.runtime.launcher import refuse_more_processes_than_devices


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    device.current_device.cache_clear()
    yield
    device.current_device.cache_clear()


def test_a_device_that_is_not_here_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_CPT_DEVICE", "gpu")
    for ask in (device.current_device, device.device_count):
        with pytest.raises(ConfigError, match="the variable MEGATRON_CPT_DEVICE is 'gpu', expected 'cpu'"):
            ask()


def test_the_cpu_serves_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_CPT_DEVICE", "cpu")
    assert device.current_device().type == "cpu" and device.device_count() is None
    refuse_more_processes_than_devices(100)


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "device_count", lambda: 2)
    refuse_more_processes_than_devices(2)
    message = "got 3 processes for 2 devices; start at most 2 on this machine, or set MEGATRON_CPT_DEVICE=cpu"
    with pytest.raises(ConfigError) as caught:
        refuse_more_processes_than_devices(3)
    assert str(caught.value) == message
