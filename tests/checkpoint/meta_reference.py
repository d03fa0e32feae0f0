"""Meta's form of a Llama, written anew from its description: files cut and joined, and what its code computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softmax

# Which dimension is cut over the files; norms are not.
CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0, "output": 0}
Weights = dict[str, Tensor]
# A model that divides by 4 files, as its manifest and as params.json describe it.
SIZES = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 88, "head_dim": 8, "num_query_groups": 4}
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 4, "norm_eps": 1e-5, "multiple_of": 8}
FFN = 176  # of these parameters
VOCAB_SIZE = 136


def cut_dimension(name: str, table: int) -> int | None:
    part = name.split(".")[-2]
    return table if part == "tok_embeddings" else CUT.get(part)


def random_weights(params: dict[str, Any], vocab_size: int, ffn: int, seed: int = 0) -> Weights:
    """Weights by Meta's names."""
    generator = torch.Generator().manual_seed(seed)
    dim, head = params["dim"], params["dim"] // params["n_heads"]
    kv = params.get("n_kv_heads", params["n_heads"]) * head
    sizes = {"wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim)}
    forward = {"w1": (ffn, dim), "w2": (dim, ffn), "w3": (ffn, dim)}
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (vocab_size, dim), "norm": (dim,)}
    for layer in range(params["n_layers"]):
        shapes |= {f"layers.{layer}.attention.{name}": size for name, size in sizes.items()}
        shapes |= {f"layers.{layer}.feed_forward.{name}": size for name, size in forward.items()}
        shapes |= {f"layers.{layer}.{name}": (dim,) for name in ("attention_norm", "ffn_norm")}
    shapes["output"] = (vocab_size, dim)
    made = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator) * 0.15
        made[f"{name}.weight"] = noise + 1 if len(shape) == 1 else noise
    return made


def write(folder: Path, params: dict[str, Any], weights: Weights, count: int, table: int) -> Path:
    """A folder of Meta's, by torch.save: `table` is the dimension in which the embedding is cut."""
    folder.mkdir()
    for rank in range(count):
        held = {}
        for name, tensor in weights.items():
            axis = cut_dimension(name, table)
            held[name] = tensor if axis is None else tensor.chunk(count, axis)[rank].clone()
        torch.save(held, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def small(folder: Path) -> Path:
    """Two files, cut as for Llama 3."""
    return write(folder, PARAMS, random_weights(PARAMS, VOCAB_SIZE, FFN), 2, 0)


def change(folder: Path, rank: int, edit: Callable[[Weights], Any]) -> None:
    """Change the tensors of a file."""
    path = folder / f"consolidated.{rank:02d}.pth"
    held = torch.load(path, weights_only=True)
    edit(held)
    torch.save(held, path)


def read(folder: Path, table: int) -> Weights:
    """All files joined, by torch.load."""
    files = [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pth"))]
    joined = {}
    for name in files[0]:
        parts, axis = [file[name] for file in files], cut_dimension(name, table)
        if axis is None:
            assert all(torch.equal(parts[0], part) for part in parts), name
        joined[name] = parts[0] if axis is None else torch.cat(parts, axis)
    return joined


def frequencies(head: int, theta: float, factor: float | None) -> Tensor:
    """Of the rotary embedding; with a factor, stretched as since Llama 3.1."""
    found = []
    for i in range(0, head, 2):
        frequency = theta ** (-i / head)
        length = 2 * math.pi / frequency
        if factor is not None and length > 8192:
            frequency /= factor
        elif factor is not None and length >= 8192 / 4:
            smooth = (8192 / length - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        found.append(frequency)
    return torch.tensor(found, dtype=torch.float64)


def logits(weights: Weights, params: dict[str, Any], tokens_S: Tensor, factor: float | None = None) -> Tensor:
    """What Meta's code computes, in float64: rotary embeddings turn neighbouring elements of a head."""
    w = {name.removesuffix(".weight"): tensor.double() for name, tensor in weights.items()}
    heads, length = params["n_heads"], len(tokens_S)
    repeat = heads // params.get("n_kv_heads", heads)
    angles = torch.outer(
        torch.arange(length).double(),
        frequencies(params["dim"] // heads, params.get("rope_theta", 10000.0), factor),
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + params["norm_eps"]) * weight

    def turned(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    x = w["tok_embeddings"][tokens_S]
    mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    for layer in range(params["n_layers"]):
        at = f"layers.{layer}."
        y = norm(x, w[at + "attention_norm"])
        q, k, v = (
            (y @ w[f"{at}attention.{name}"].T).unflatten(-1, (-1, params["dim"] // heads))
            for name in ("wq", "wk", "wv")
        )
        q, k = turned(q), turned(k).repeat_interleave(repeat, 1)
        scores = torch.einsum("shd,thd->hst", q, k) / math.sqrt(q.shape[-1]) + mask
        mixed = torch.einsum("hst,thd->shd", softmax(scores, -1), v.repeat_interleave(repeat, 1))
        x = x + mixed.flatten(1) @ w[at + "attention.wo"].T
        y = norm(x, w[at + "ffn_norm"])
        x = (
            x
            + (silu(y @ w[at + "feed_forward.w1"].T) * (y @ w[at + "feed_forward.w3"].T)) @ w[at + "feed_forward.w2"].T
        )
    return norm(x, w["norm"]) @ w["output"].T
