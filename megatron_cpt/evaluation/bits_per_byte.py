"""Bits per byte: the one loss that can be compared across tokenizers.

    bits per byte = summed loss of the text's tokens in nats / ln 2 / UTF-8 bytes of the text

Every token of the text is scored exactly once. BOS is never scored and EOS is not text. A document
longer than the context is scored window by window; the first token of a window sees nothing before
the window's first input token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_cpt.checkpoint import LlamaForward, check_belongs, read_shape
from megatron_cpt.data import (
    IGNORED,
    Document,
    IndexedDataset,
    build_dataset,
    open_windows,
    scored_bytes,
    validation_batch,
)
from megatron_cpt.planning.parameters import count_parameters
from megatron_cpt.runtime.device import current_device
from megatron_cpt.tokenizer import load_tokenizer

TOKENS_PER_PASS = 4096  # scored in one pass over the layers; bounds the activations


def score_dataset(
    forward: LlamaForward,
    dataset: IndexedDataset,
    seq_length: int,
    eos_id: int | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score a held-out indexed dataset, the same windows as validation during training.

    Args:
        forward: the model.
        dataset: built with the model's tokenizer.
        seq_length: context in tokens.
        eos_id: the label that is not text, or None.
        on_progress: called with (windows done, windows in all).

    Returns:
        `bits_per_byte`, `nats_per_token`, `tokens` scored, `text_bytes`, `bytes_per_token`.

    Raises:
        DataError: the dataset was built without bos, or does not know its bytes of text.
    """
    windows, text_bytes = open_windows(dataset, seq_length), scored_bytes(dataset)
    per_pass = max(1, TOKENS_PER_PASS // seq_length)
    nats, tokens = 0.0, 0
    for first in range(0, len(windows), per_pass):
        last = min(first + per_pass, len(windows))
        packed = validation_batch(windows, first, last - first)
        labels_N = torch.from_numpy(packed.labels_N)
        if eos_id is not None:
            labels_N = labels_N.masked_fill(labels_N == eos_id, IGNORED)
        tokens_1N = torch.from_numpy(packed.tokens_N)[None]
        nats += forward.token_nats(tokens_1N, labels_N[None], torch.from_numpy(packed.cu_seqlens)).double().sum().item()
        tokens += int((labels_N != IGNORED).sum())
        if on_progress is not None:
            on_progress(last, len(windows))
    return {
        "bits_per_byte": nats / math.log(2) / text_bytes,
        "nats_per_token": nats / max(1, tokens),
        "tokens": tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": text_bytes / max(1, tokens),
    }


def bits_per_byte(
    model: str | Path,
    documents: Iterable[Document],
    seq_length: int,
    tokenizer: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score texts with a model on disk (Hugging Face or torch_dist folder), on the accelerator where there is one.

    Args:
        model: folder of the model.
        documents: the texts, each a document of its own.
        seq_length: context in tokens.
        tokenizer: folder or file; None: the model's folder.
        on_progress: called with (windows done, windows in all).

    Returns:
        what `score_dataset` returns.

    Raises:
        CheckpointError: the tokenizer is not the model's.
    """
    path = tokenizer if tokenizer is not None else model
    loaded = load_tokenizer(path)
    check_belongs(model, loaded, padded=True)
    device = current_device()
    # Weights that the device has no room for are read again in each pass, layer by layer.
    weight_bytes = 4 * count_parameters(*read_shape(model)).total
    fits = device.memory_bytes is None or weight_bytes < 0.8 * device.memory_bytes
    forward = LlamaForward(model, cache=fits, device=device.torch_device())
    with TemporaryDirectory(prefix="megatron-cpt-") as folder:
        prefix = Path(folder) / "text"
        build_dataset(documents, path, prefix, "")
        return score_dataset(forward, IndexedDataset(prefix), seq_length, loaded.eos_id, on_progress)
