"""Tensors that lie inside larger ones of NaN, and the rule by which a kernel is judged."""

from __future__ import annotations

import torch
from torch import Tensor

_ZONE = 64  # elements on either side of the values


class Guard:
    """The values of a tensor, in its shape and strides, with a zone of NaN (integers: of their least number) around.

    The gaps that the strides leave are part of the zone. `value` is the tensor to hand to a kernel.
    """

    def __init__(self, tensor: Tensor) -> None:
        span = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        span = span if tensor.numel() else 0
        self._poison = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
        self._buffer = torch.full((span + 2 * _ZONE,), self._poison, dtype=tensor.dtype, device=tensor.device)
        self.value = self._buffer.as_strided(tensor.shape, tensor.stride(), _ZONE)
        self.value.copy_(tensor.detach())

    def check(self, what: str = "a tensor") -> None:
        """Asserts that nothing was written outside the values."""
        outside = torch.ones_like(self._buffer, dtype=torch.bool)
        outside.as_strided(self.value.shape, self.value.stride(), _ZONE).fill_(False)
        zone = self._buffer[outside]
        untouched = zone.isnan() if zone.is_floating_point() else zone == self._poison
        assert untouched.all(), f"{what}: {(~untouched).sum().item()} elements were written outside"


def guarded(tensor: Tensor) -> Guard:
    """Returns the tensor's values between zones of NaN; ask its `check` after the kernel has run."""
    return Guard(tensor)


def guard_allocations(monkeypatch: object) -> list[Guard]:
    """Has `new_empty`, `torch.empty` and `torch.empty_like` return guarded tensors of NaN; returns their guards.

    A kernel's results are made by its launch; so this is how an element that a kernel leaves out, or writes
    outside of them, is found.
    """
    guards: list[Guard] = []
    new_empty, empty, empty_like = Tensor.new_empty, torch.empty, torch.empty_like

    def poisoned(made: Tensor) -> Tensor:
        if not made.numel():
            return made  # Triton's interpreter makes empty tensors and gives them a storage later
        if made.is_floating_point():
            made.fill_(torch.nan)
        guards.append(Guard(made))
        return guards[-1].value

    def guarded_new_empty(self: Tensor, *size: object, **options: object) -> Tensor:
        return poisoned(new_empty(self, *size, **options))

    def guarded_empty(*arguments: object, **options: object) -> Tensor:
        return poisoned(empty(*arguments, **options))

    def guarded_empty_like(*arguments: object, **options: object) -> Tensor:
        return poisoned(empty_like(*arguments, **options))

    monkeypatch.setattr(Tensor, "new_empty", guarded_new_empty)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "empty", guarded_empty)  # type: ignore[attr-defined]
    monkeypatch.setattr(torch, "empty_like", guarded_empty_like)  # type: ignore[attr-defined]
    return guards


def assert_within_reference_error(ours: Tensor, plain: Tensor, exact: Tensor, what: str = "result") -> None:
    """Asserts that our error is at most twice that of plain torch in the same dtype, plus two ulp of the scale.

    Args:
        ours: what the kernel gave.
        plain: what plain torch gives in the dtype of `ours`.
        exact: the same in float64.
        what: its name in the message.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: {(~torch.isfinite(ours)).sum().item()} elements are not finite"
    if not exact.numel():
        return
    scale = exact.abs().max().item()
    for norm in (torch.inf, 2):
        error, plain_error = (
            torch.linalg.vector_norm((x.double() - exact).flatten(), norm).item() for x in (ours, plain)
        )
        ulp = torch.finfo(ours.dtype).eps * scale * (1 if norm == torch.inf else exact.numel() ** 0.5)
        assert error <= 2 * plain_error + 2 * ulp, f"{what}: {error:.3g} against {plain_error:.3g}, norm {norm}"
