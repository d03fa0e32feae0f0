"""What NeuronX Distributed's Llama computes on each rank, and how it cuts a model, in plain torch.

Written from the public description of its layers; neither uses anything of megatron_cpt.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

Weights = dict[str, Tensor]


def load_ranks(tag: Path) -> list[Weights]:
    """The tensors of each tensor-parallel rank, of all pipeline stages together."""
    ranks: dict[int, Weights] = {}
    for path in sorted((tag / "model").glob("*.pt")):
        rank = int(re.fullmatch(r"dp_rank_00_tp_rank_(\d+)_pp_rank_\d+\.pt", path.name)[1])
        held = torch.load(path, weights_only=True)
        assert not held.keys() & ranks.get(rank, {}).keys()
        ranks.setdefault(rank, {}).update(held)
    return [ranks[rank] for rank in range(len(ranks))]


def rank_logits(ranks: list[Weights], config: dict[str, Any], tokens_BS: Tensor) -> Tensor:
    """fp32 logits; ranks meet only where NxD has a collective: the embedding, o_proj, down_proj and the logits."""
    ranks = [{name: tensor.float() for name, tensor in rank.items()} for rank in ranks]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    cos_sin = _rotary(config, head_dim, tokens_BS.shape[1])
    rows = len(ranks[0]["model.embed_tokens.weight"])
    hidden = torch.zeros(*tokens_BS.shape, config["hidden_size"])
    for number, rank in enumerate(ranks):
        local = tokens_BS - number * rows
        ours = (local >= 0) & (local < rows)
        hidden += rank["model.embed_tokens.weight"][local.clamp(0, rows - 1)] * ours[..., None]

    def norm(name: str, rank: Weights) -> Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * rank[name]

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        attended = [
            _attention(rank, at + "self_attn.", norm(at + "input_layernorm.weight", rank), head_dim, cos_sin)
            for rank in ranks
        ]
        hidden = hidden + sum(attended)
        fed = []
        for rank in ranks:
            both = linear(norm(at + "post_attention_layernorm.weight", rank), rank[at + "mlp.gate_up_proj.weight"])
            gate, up = both.chunk(2, dim=-1)
            fed.append(linear(silu(gate) * up, rank[at + "mlp.down_proj.weight"]))
        hidden = hidden + sum(fed)
    return torch.cat([linear(norm("model.norm.weight", rank), rank["lm_head.weight"]) for rank in ranks], dim=-1)


def _attention(rank: Weights, at: str, x: Tensor, head_dim: int, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
    """A rank's share of attention: its query heads meet its own key-value heads, in their stored order."""
    output = rank[at + "o_proj.weight"]
    fused = next(rank[at + name] for name in ("qkv_proj.weight_qkv", "qkv_proj.weight") if at + name in rank)
    query_rows = output.shape[1]
    kv_rows = (len(fused) - query_rows) // 2
    q, k, v = (
        y.unflatten(-1, (-1, head_dim)).transpose(1, 2)
        for y in linear(x, fused).split([query_rows, kv_rows, kv_rows], dim=-1)
    )
    q, k = (
        y * cos_sin[0] + torch.cat([-y[..., head_dim // 2 :], y[..., : head_dim // 2]], -1) * cos_sin[1] for y in (q, k)
    )
    k, v = (y.repeat_interleave(query_rows // kv_rows, dim=1) for y in (k, v))
    scores = (q @ k.transpose(2, 3)) / head_dim**0.5
    scores += torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), output)


def _rotary(config: dict[str, Any], head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    frequencies = config["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(length), frequencies)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def cut(
    weights: Weights, config: dict[str, Any], tp: int, form: str, times: int = 1, order: str = "trn1"
) -> list[Weights]:
    """A model as NxD holds it on one pipeline stage.

    Args:
        weights: by HF name.
        config: content of config.json.
        tp: tensor-parallel size.
        form: "A" to "D" of docs/formats/nxd.md.
        times: how often key-value heads are stored.
        order: "trn1" or "trn2".
    """
    groups, hidden = config["num_key_value_heads"], config["hidden_size"]
    ranks: list[Weights] = [{} for _ in range(tp)]

    def share(name: str, tensor: Tensor, dim: int) -> None:
        for rank, part in zip(ranks, tensor.chunk(tp, dim=dim), strict=True):
            rank[name] = part.contiguous()

    def repeated(kv: Tensor) -> Tensor:
        heads = kv.unflatten(0, (groups, -1))
        return (heads.repeat(times, 1, 1) if order == "trn1" else heads.repeat_interleave(times, 0)).flatten(0, 1)

    for name, tensor in weights.items():
        if "norm" in name:
            for rank in ranks:
                rank[name] = tensor.clone()
        elif name.endswith("q_proj.weight"):
            at = name.removesuffix("q_proj.weight")
            q, k, v = tensor, repeated(weights[at + "k_proj.weight"]), repeated(weights[at + "v_proj.weight"])
            if order == "trn1":
                q = q.view(groups, times, -1, hidden).transpose(0, 1).reshape(-1, hidden)
            if form in "AD":
                for letter, part in (("q", q), ("k", k), ("v", v)):
                    share(at + (f"qkv_proj.weight_{letter}" if form == "A" else f"{letter}_proj.weight"), part, 0)
            else:
                parts = zip(*(part.chunk(tp) for part in (q, k, v)), strict=True)
                for rank, part in zip(ranks, parts, strict=True):
                    rank[at + ("qkv_proj.weight_qkv" if form == "B" else "qkv_proj.weight")] = torch.cat(part)
        elif name.endswith("o_proj.weight"):
            if order == "trn1":
                tensor = tensor.view(hidden, groups, times, -1).transpose(1, 2).reshape(hidden, -1)
            share(name, tensor, 1)
        elif name.endswith("down_proj.weight"):
            share(name, tensor, 1)
        elif name.endswith("gate_proj.weight"):
            up = weights[name.replace("gate_proj", "up_proj")]
            for rank, gate, other in zip(ranks, tensor.chunk(tp), up.chunk(tp), strict=True):
                rank[name.replace("gate_proj", "gate_up_proj")] = torch.cat([gate, other])
        elif "embed_tokens" in name or "lm_head" in name:
            share(name, tensor, 0)
    return ranks


def save_ranks(folder: Path, ranks: list[Weights]) -> None:
    """The files of `model`, one for each rank."""
    folder.mkdir(parents=True)
    for number, rank in enumerate(ranks):
        torch.save(rank, folder / f"dp_rank_00_tp_rank_{number:02d}_pp_rank_00.pt")


def save_ranks_xser(folder: Path, ranks: list[Weights], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as torch_xla writes them: references, with each tensor in a file of its own."""
    folder.mkdir(parents=True)

    class TensorReference:
        def __init__(self, tid: int) -> None:
            self.tid = tid

    TensorReference.__module__, TensorReference.__qualname__ = "torch_xla.utils.serialization", "TensorReference"
    modules = {name: ModuleType(name) for name in ("torch_xla", "torch_xla.utils", "torch_xla.utils.serialization")}
    modules["torch_xla.utils.serialization"].TensorReference = TensorReference
    with monkeypatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        for number, rank in enumerate(ranks):
            path = folder / f"dp_rank_00_tp_rank_{number:02d}_pp_rank_00.pt"
            tensors = path.with_name(path.name + ".tensors")
            tensors.mkdir()
            for tid, tensor in enumerate(rank.values()):
                torch.save(tensor, tensors / f"tensor_{tid}.pt")
            torch.save({name: TensorReference(tid) for tid, name in enumerate(rank)}, path)
            info = {tid: {"dtype": t.dtype, "shape": t.shape} for tid, t in enumerate(rank.values())}
            torch.save(info, path.with_name(path.name + ".info.pt"))
