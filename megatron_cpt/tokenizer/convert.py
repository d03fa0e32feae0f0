"""A tokenizer.model alone to a whole Hugging Face folder, whose fast tokenizer gives SentencePiece's ids."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.base_model import read_base
from megatron_cpt.tokenizer.hf_files import write_hf_files
from megatron_cpt.tokenizer.loading import SENTENCEPIECE_FILE
from megatron_cpt.tokenizer.training import write_tokenizer_manifest


def convert_tokenizer(model: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the Hugging Face files of an unchanged tokenizer.model.

    A conversion that ranks merges by id, or reads a text's spaces by other rules, gives ids the model was
    not trained on; these files give SentencePiece's on every text.

    Args:
        model: a SentencePiece BPE tokenizer.model, or the folder of a model that holds it. Length limit, chat
            template and padding of that folder are kept; its own tokenizer.json is not looked at but for
            tokens that it adds.
        output: a new or empty folder.

    Returns:
        `vocab_size`, and the `sha256` of tokenizer.model, which is copied as it is.

    Raises:
        TokenizerError: the model cannot be expressed as a tokenizer.json, the folder adds tokens that the
            model lacks, or the output is taken.
    """
    output = Path(output)
    check_free(output, TokenizerError)
    tokenizer, _ = read_base(model)
    with new_folder(output, TokenizerError) as folder:
        shutil.copyfile(tokenizer.path, folder / SENTENCEPIECE_FILE)
        write_hf_files(folder, tokenizer.path.parent)
        write_tokenizer_manifest(folder, {"base": tokenizer.sha256}, vocab_size=tokenizer.vocab_size)
    return {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
