"""Tokenizers: read, train and extend them, and prove what was made."""

from __future__ import annotations

from megatron_cpt.tokenizer.loading import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
