"""Training equals transformers' LlamaForCausalLM with torch.optim.AdamW, packed documents included."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_cpt.data import SamplePlan, batch
from tests.training.conftest import GLOBAL_BATCH, STEPS, Tiny, make_tiny

LEARNING_RATE, MINIMUM, WARMUP = 3e-3, 3e-4, 2
SEQ_LENGTH = 32


def transformers_curve(tiny: Tiny) -> list[float]:
    """Losses of the same steps, computed without any of this project's training code."""
    model = LlamaForCausalLM.from_pretrained(tiny.hf, attn_implementation="eager")
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    plan = SamplePlan([(tiny.root / "a", "a", 3.0), (tiny.root / "b", "b", 1.0)], SEQ_LENGTH, seed=1)
    losses = []
    for step in range(STEPS):
        span = STEPS - 1 - WARMUP
        cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / span))
        rate = LEARNING_RATE * (step + 1) / WARMUP if step < WARMUP else MINIMUM + (LEARNING_RATE - MINIMUM) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        packed = batch([plan.sample(step * GLOBAL_BATCH + number) for number in range(GLOBAL_BATCH)])
        document_N = torch.from_numpy(np.repeat(np.arange(len(packed.cu_seqlens) - 1), np.diff(packed.cu_seqlens)))
        num = len(document_N)
        allowed = (document_N[:, None] == document_N[None]) & torch.ones(num, num, dtype=torch.bool).tril()
        logits = model(
            torch.from_numpy(packed.tokens_N)[None],
            attention_mask=torch.zeros(1, 1, num, num).masked_fill(~allowed, torch.finfo(torch.float32).min),
            position_ids=torch.from_numpy(packed.position_ids_N)[None],
        ).logits[0]
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(packed.labels_N), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("vocab_size", [250, 256])
def test_ten_steps_equal_transformers(
    vocab_size: int, tiny: Tiny, reference: list[dict[str, Any]], tmp_path: Path
) -> None:
    """With a vocabulary that is padded and with one that is not."""
    metrics = reference
    if vocab_size != 250:
        tiny = make_tiny(tmp_path, vocab_size)
        metrics = tiny.train_many({"run": {}}, 1)["run"]
    ours = [record["loss"] for record in metrics if "loss" in record]
    theirs = transformers_curve(tiny)
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    print(f"vocabulary {vocab_size}: step 0 {differences[0]:.1e}, all steps {max(differences):.1e}")
    assert differences[0] <= 1e-5
    assert max(differences) <= 5e-5
