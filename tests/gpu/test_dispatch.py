"""What "auto" takes on a GPU."""

from __future__ import annotations

from typing import Any

import torch

from megatron_cpt.kernels import attention, dispatch, linear_cross_entropy, rms_norm, swiglu


def _taken(device: str) -> dict[str, str]:
    """Returns what "auto" takes of each op, as far as the device and bf16 decide it."""
    taken: dict[str, str] = {}
    for row in dispatch.explain(device=device, dtype=torch.bfloat16):
        if row["supported"]:
            taken.setdefault(row["op"], row["implementation"])
    return taken


def test_auto_takes_triton(device: str, sized: Any) -> None:
    taken = _taken(device)
    dense = taken.pop("attention")
    assert set(taken.values()) == {sized("triton", "torch")}, taken
    assert dense in sized(("cudnn", "flash", "triton"), ("torch",))


def test_auto_has_the_bits_of_the_implementation_it_takes(device: str, normal: Any, sized: Any) -> None:
    named = {"implementation": sized("triton", "torch")}
    hidden, weight = normal(48, 512), normal(512, 512)
    labels_N = torch.arange(48, device=device)
    query, key = normal(48, 4, 64), normal(48, 2, 64)
    boundaries = torch.tensor([0, 5, 48])  # of unlike lengths, which is where ours is taken
    for function in (
        lambda **which: rms_norm(hidden, weight[0], 1e-5, **which),
        lambda **which: swiglu(hidden, hidden, **which),
        lambda **which: linear_cross_entropy(hidden, weight, labels_N, vocab_size=512, **which).loss,
        lambda **which: attention(query, key, key, boundaries, scale=0.1, **which),
    ):
        assert torch.equal(function(), function(**named))
