"""The device: the only place that names one.

Everything that differs between CUDA, CPU and other torch backends is a field or a function here;
the rest of the package asks for `current_device()` and stays silent about what it is.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass

import torch

from megatron_cpt.errors import ConfigError

DEVICE = "MEGATRON_CPT_DEVICE"
# Dense bf16 peak in FLOP/s, as the vendors state it. Used for MFU and nothing else.
PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
}


@dataclass(frozen=True)
class Device:
    """One accelerator, or the CPU.

    Attributes:
        type: torch's device type: "cuda", "cpu", or another backend's name.
        name: the name a person knows it by.
        backend: torch.distributed backend that serves it.
        peak_flops: stated dense bf16 peak in FLOP/s, or None where the vendor states none.
        memory_bytes: memory of one device in bytes, or None when unknown.
    """

    type: str
    name: str
    backend: str
    peak_flops: float | None
    memory_bytes: int | None

    def torch_device(self) -> torch.device:
        """The torch device of this process."""
        return torch.device(self.type, _local_rank()) if self.type != "cpu" else torch.device("cpu")

    def activate(self) -> None:
        """Bind this process to its device (no-op on CPU)."""
        if self.type != "cpu":
            torch.get_device_module(self.type).set_device(_local_rank())

    def synchronize(self) -> None:
        """Wait until the device has finished what it was given."""
        if self.type != "cpu":
            torch.get_device_module(self.type).synchronize()

    def flops_bound(self) -> tuple[float, str]:
        """FLOP/s that MFU is a share of, and where the figure comes from.

        The vendor's dense bf16 peak where it is known; elsewhere the rate of a large fp32 matrix
        product on this process's share of the machine, measured now (about 0.1 s).
        """
        if self.peak_flops is not None:
            return self.peak_flops, "vendor's dense bf16 peak"
        size, rounds = 1024, 4
        a = torch.ones(size, size, device=self.torch_device())
        seconds = []
        for _ in range(rounds):
            begun = time.perf_counter()
            a @ a
            self.synchronize()
            seconds.append(time.perf_counter() - begun)
        return 2 * size**3 / min(seconds), "measured fp32 matrix product"

    def peak_memory_bytes(self) -> int | None:
        """Largest memory allocated by this process on the device; None on CPU."""
        if self.type != "cuda":
            return None
        return int(torch.cuda.max_memory_allocated())


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))


def _accelerator() -> str | None:
    """torch's type of the accelerator of this machine, or None."""
    if torch.cuda.is_available():
        return "cuda"
    found = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    return found.type if found is not None and found.type not in ("cuda", "cpu") else None


def _chosen_type() -> str:
    found, forced = _accelerator(), os.environ.get(DEVICE)
    if forced and forced not in ("cpu", found):
        here = f"'cpu' or {found!r}" if found else "'cpu': there is no accelerator here"
        raise ConfigError(f"the variable {DEVICE} is {forced!r}, expected {here}; change or unset it")
    return forced or found or "cpu"


def device_count() -> int | None:
    """Devices of this machine, each of which serves one process; None on the CPU, which serves any number."""
    chosen = _chosen_type()
    return int(torch.get_device_module(chosen).device_count()) if chosen != "cpu" else None


@functools.cache
def compute_capability(device_type: str) -> tuple[int, int] | None:
    """Compute capability of this process's NVIDIA GPU, as (9, 0); None where tensors of the type are on none."""
    if device_type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability()


@functools.cache
def multiprocessor_count(device_type: str) -> int | None:
    """Streaming multiprocessors of this process's GPU; None where tensors of the type are on none."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count)


def current_stream(device: torch.device) -> int:
    """The number of the stream on which work for the device is put now; 0 where there are none."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor of the host to a device; on CUDA the host does not wait until the device comes to it.

    The copy takes its turn on the current stream (`current_stream`), and only there may it be read right away.
    """
    # A graph would read its pinned memory again and again, and a compiler has ways of its own: both get a plain copy.
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@functools.cache
def current_device() -> Device:
    """The device of this process: CUDA where there is one, another accelerator, else the CPU.

    `MEGATRON_CPT_DEVICE=cpu` forces the CPU on a machine that has an accelerator.

    Raises:
        ConfigError: that variable names a device that is not here.
    """
    chosen = _chosen_type()
    if chosen == "cpu":
        return Device("cpu", "CPU", "gloo", None, None)
    if chosen != "cuda":
        return Device(chosen, chosen, chosen, None, None)
    properties = torch.cuda.get_device_properties(min(_local_rank(), torch.cuda.device_count() - 1))
    peak = next((flops for key, flops in PEAK_BF16_FLOPS.items() if key in properties.name), None)
    return Device("cuda", properties.name, "nccl", peak, properties.total_memory)
