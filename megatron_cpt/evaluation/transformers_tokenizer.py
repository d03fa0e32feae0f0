"""The tokenizer that users of transformers get from a folder, to be compared with the one that trained the model."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.errors import InputError, TokenizerError
from megatron_cpt.tokenizer.loading import SENTENCEPIECE_FILE, tokenizer_file
from megatron_cpt.tokenizer.verify import Peer

DEFAULT_CLASS = "AutoTokenizer"


@contextlib.contextmanager
def transformers_peer(path: str | Path, class_name: str = DEFAULT_CLASS) -> Iterator[Peer]:
    """A tokenizer as transformers reads it from its folder, or makes it of a tokenizer.model alone.

    Special tokens that a text spells out are left to be text, as in training (`split_special_tokens`).

    Args:
        path: a tokenizer folder, or a tokenizer.model, which is then all that transformers sees.
        class_name: the class of transformers that reads it.

    Raises:
        InputError: transformers has no such class.
        TokenizerError: it cannot read the folder.
    """
    import transformers

    found = getattr(transformers, class_name, None)
    if not hasattr(found, "from_pretrained"):
        raise InputError(
            f"transformers {transformers.__version__} has no tokenizer class {class_name!r}: try AutoTokenizer or "
            "LlamaTokenizer"
        )
    with tempfile.TemporaryDirectory() as alone:
        folder = Path(path)
        if not folder.is_dir():
            shutil.copyfile(tokenizer_file(path), Path(alone) / SENTENCEPIECE_FILE)
            folder = Path(alone)
        yield _open(transformers, found, folder)


def _open(transformers: Any, found: Any, folder: Path) -> Peer:
    name = f"transformers {transformers.__version__} {found.__name__}"
    try:
        tokenizer = found.from_pretrained(str(folder), split_special_tokens=True, local_files_only=True)
    except Exception as caught:  # of whatever class: it is the library's word on the folder
        raise TokenizerError(
            f"{name} cannot read {folder} ({type(caught).__name__}: {caught}): name another class, or compare without "
            "transformers"
        ) from None

    made = type(tokenizer).__name__
    name += "" if made == found.__name__ else f" ({made})"

    def encode_batch(texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return ids

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    return Peer(name, encode_batch, decode)
