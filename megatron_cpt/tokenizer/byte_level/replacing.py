"""Replace a byte-level vocabulary by one trained on several languages, keeping the ids of shared pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.byte_alphabet import CHARACTERS
from megatron_cpt.tokenizer.byte_level.json_model import JsonModel, read_json_model, write_folder
from megatron_cpt.tokenizer.byte_level.training import train_value
from megatron_cpt.tokenizer.byte_level.words import Texts
from megatron_cpt.tokenizer.loading import load_tokenizer
from megatron_cpt.tokenizer.training import write_tokenizer_manifest
from megatron_cpt.tokenizer.vocab_map import VOCAB_MAP_FILE, map_vocabularies


@dataclass(frozen=True)
class ByteLevelReplaceReport:
    """What a replacement did.

    Attributes:
        old_size: ids of the base.
        new_size: ids of the new vocabulary; less than `requested` when the text has no more pieces to offer.
        requested: ids asked for.
        num_kept: byte pieces and added tokens, which the base has at the same ids.
        num_shared: merged pieces that the base has at the same ids.
        num_moved: pieces that the base has at ids beyond the new size; they have other ids here.
        num_new: pieces that the base does not have.
        lines: lines of text that the vocabulary was trained on.
        text_bytes: their bytes in UTF-8.
    """

    old_size: int
    new_size: int
    requested: int
    num_kept: int
    num_shared: int
    num_moved: int
    num_new: int
    lines: int
    text_bytes: int


def replace_byte_level(
    base: str | Path, texts: Iterable[str], vocab_size: int, divisor: int, output: str | Path, language: str = ""
) -> ByteLevelReplaceReport:
    """Train a new vocabulary by a byte-level base's rules and give shared pieces the base's ids.

    Normalizer, words and special tokens stay those of the base. Added tokens keep their ids, and so does every
    trained piece that the base has at an id below the new size; the others fill the ids that are left, in the
    order of their merges. The merges are those of the training: texts are cut by them, whatever the ids are.

    Args:
        base: a folder with tokenizer.json, or that file.
        texts: documents of all languages.
        vocab_size: ids of the new vocabulary, more or fewer than the base's or as many.
        divisor: `vocab_size` is a multiple of it; where the text offers fewer pieces, the last merges go.
        output: a new or empty folder.
        language: recorded in the manifest.

    Returns:
        The counts; `output` holds tokenizer.json, the Hugging Face files, vocab_map.json and manifest.json.

    Raises:
        TokenizerError: the base is not a byte-level BPE tokenizer, the size cannot hold its bytes and added tokens
            or is no multiple of the divisor, the text is empty, or the output is taken.

    Source: the re-ordered ids are those of the Llama 2 vocabulary replacement by Ricoh (NLP2024).
    """
    output = Path(output)
    check_free(output, TokenizerError)
    model = read_json_model(base)
    _check_size(model, vocab_size, divisor)
    read = Texts(texts)
    trained = train_value(read, vocab_size - len(model.added), model.value)
    # In the order of their ids: the bytes, then the pieces by their merges.
    ordered = sorted(trained["model"]["vocab"].items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in ordered if piece not in model.added]
    excess = (len(pieces) + len(model.added)) % divisor
    pieces = pieces[: len(pieces) - excess]
    there = set(pieces)
    merges = [(left, right) for left, right in trained["model"]["merges"] if there >= {left, right, left + right}]
    ids = _placed(model, pieces)
    with new_folder(output, TokenizerError) as folder:
        write_folder(folder, model.with_pieces(ids, merges), model.tokenizer.path.parent, {})
        vocab_map = map_vocabularies(model.tokenizer, load_tokenizer(folder))
        vocab_map.save(folder / VOCAB_MAP_FILE)
        origins = vocab_map.counts()
        report = ByteLevelReplaceReport(
            old_size=model.tokenizer.vocab_size,
            new_size=vocab_map.new_size,
            requested=vocab_size,
            num_kept=len(CHARACTERS) + len(model.added),
            num_shared=sum(model.vocab.get(piece) == id for piece, id in ids.items()) - len(CHARACTERS),
            num_moved=sum(model.vocab.get(piece, id) != id for piece, id in ids.items()),
            num_new=origins["new"],
            lines=read.lines,
            text_bytes=read.bytes,
        )
        write_tokenizer_manifest(
            folder,
            {"base": model.tokenizer.sha256, "texts": read.sha256},
            vocab_size=report.new_size,
            old_size=report.old_size,
            requested=vocab_size,
            divisor=divisor,
            language=language,
        )
    return report


def _check_size(model: JsonModel, vocab_size: int, divisor: int) -> None:
    if divisor < 1 or vocab_size % divisor:
        raise TokenizerError(f"vocab_size is {vocab_size}, expected a multiple of the divisor {divisor}")
    fixed = [*model.added.values(), *(model.vocab[character] for character in CHARACTERS)]
    least = max(max(fixed) + 1, len(fixed))
    if vocab_size < least:
        raise TokenizerError(
            f"vocab_size is {vocab_size}, expected at least {least}: bytes and added tokens keep the base's ids"
        )


def _placed(model: JsonModel, pieces: Sequence[str]) -> dict[str, int]:
    """The id of each piece."""
    size = len(pieces) + len(model.added)
    if max([*model.added.values(), *(model.vocab[character] for character in CHARACTERS)]) >= size:
        raise TokenizerError(
            f"the text offers {len(pieces)} pieces only, and a token that keeps the base's id would lie beyond them: "
            "give more text"
        )
    ids = {piece: model.vocab[piece] for piece in pieces if model.vocab.get(piece, size) < size}
    taken = {*ids.values(), *model.added.values()}
    free = (id for id in range(size) if id not in taken)
    return ids | {piece: next(free) for piece in pieces if piece not in ids}
