"""Whether a tokenizer is the one that a model was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from megatron_cpt.checkpoint.opening import read_shape
from megatron_cpt.checkpoint.tokenizer_files import recorded_tokenizer
from megatron_cpt.errors import CheckpointError


class KnownTokenizer(Protocol):
    """What is asked of a tokenizer here; `tokenizer.Tokenizer` is one."""

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""

    @property
    def sha256(self) -> str:
        """Hash of the model file."""

    @property
    def path(self) -> Path:
        """The model file."""


def check_belongs(model_folder: str | Path, tokenizer: KnownTokenizer, *, padded: bool = False) -> None:
    """Refuse a tokenizer that is not the model's: by its size, then by its hash where the model's is known.

    Args:
        model_folder: a Hugging Face or torch_dist folder.
        tokenizer: what would make the ids that the model reads.
        padded: allow rows beyond the tokenizer's pieces where the hash proves that it is the model's.

    Raises:
        CheckpointError: they do not belong together, or the folder holds no Llama.
    """
    folder = Path(model_folder)
    _, vocab_size = read_shape(folder)
    made_for = recorded_tokenizer(folder)
    padding = vocab_size - tokenizer.vocab_size
    if padding and not (padded and padding > 0 and made_for == tokenizer.sha256):
        raise CheckpointError(
            f"{folder} has {vocab_size} vocabulary rows but the tokenizer {tokenizer.path} has "
            f"{tokenizer.vocab_size} pieces; they are not of the same model: run surgery first, or give its tokenizer"
        )
    if made_for is not None and made_for != tokenizer.sha256:
        raise CheckpointError(
            f"{folder} was made for another tokenizer (SHA-256 {made_for[:12]}...) than "
            f"{tokenizer.path} ({tokenizer.sha256[:12]}...), though their sizes agree; give the one it was made for"
        )
