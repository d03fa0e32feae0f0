"""The one rule for padded vocabulary rows."""

from __future__ import annotations

from megatron_cpt.errors import ConfigError

_LARGEST_DIVISOR = 1 << 20


def padded_vocab_size(vocab_size: int, divisor: int) -> int:
    """Rows of the embedding: the smallest multiple of `divisor` that holds the vocabulary.

    It does not depend on the tensor-parallel size, so a checkpoint keeps its shape at any layout;
    `planning.layout.check_layout` refuses a layout that cannot cut these rows evenly.

    Raises:
        ConfigError: a divisor below 1, or one of more rows than any vocabulary has.
    """
    if not 1 <= divisor <= _LARGEST_DIVISOR:
        raise ConfigError(f"got a vocabulary divisor of {divisor}, expected 1 or more, {_LARGEST_DIVISOR:,} at most")
    return -(-vocab_size // divisor) * divisor
