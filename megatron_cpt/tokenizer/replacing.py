"""Replace a base vocabulary by one trained on several languages, keeping the ids of shared pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.base_model import is_byte_level, read_base
from megatron_cpt.tokenizer.byte_level import ByteLevelReplaceReport, replace_byte_level
from megatron_cpt.tokenizer.hf_files import write_hf_files
from megatron_cpt.tokenizer.loading import SENTENCEPIECE_FILE, load_tokenizer
from megatron_cpt.tokenizer.model_file import ModelFile, Piece, PieceType
from megatron_cpt.tokenizer.presegment import load_presegmenter
from megatron_cpt.tokenizer.training import languages_of, train_model, write_tokenizer_manifest
from megatron_cpt.tokenizer.vocab_map import VOCAB_MAP_FILE, map_vocabularies

_FIXED = (PieceType.UNKNOWN, PieceType.CONTROL, PieceType.BYTE)


@dataclass(frozen=True)
class ReplaceReport:
    """What a replacement did.

    Attributes:
        old_size: ids of the base.
        new_size: ids of the new vocabulary; less than `requested` when the text has no more pieces to offer.
        requested: ids asked for.
        num_kept: special and byte pieces, which the base has at the same ids.
        num_shared: trained pieces that the base has at the same ids.
        num_moved: trained pieces that the base has at ids beyond the new size; they have other ids here.
        num_new: trained pieces that the base does not have.
        lines: lines of text the model was trained on.
        text_bytes: their bytes in UTF-8.
        languages: of a mixture, for each language its bytes `available` and `taken` and its `share`.
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
    languages: dict[str, Any]


def replace_tokenizer(
    base: str | Path,
    texts: Iterable[str],
    vocab_size: int,
    divisor: int,
    output: str | Path,
    language: str = "",
    character_coverage: float = 0.9995,
    *,
    presegment: str = "",
) -> ReplaceReport | ByteLevelReplaceReport:
    """Train a new vocabulary by a base's rules and give shared pieces the base's ids.

    A byte-level base (Llama 3's kind) goes the way of `replace_byte_level`; of SentencePiece bases:

    Special and byte pieces keep their ids, and so does every trained piece that the base has at an id below
    the new size. The other trained pieces fill the ids that are left, in the order of their scores; so a
    new piece at an id below the base's size takes the place of a base piece that is gone. The scores are
    those of the trained model: texts are cut as it cuts them, whatever the ids are.

    Args:
        base: a folder with tokenizer.model or (byte-level) tokenizer.json, or that file.
        texts: documents of all languages; a `TextMixture` gives each its share.
        vocab_size: ids of the new vocabulary, more or fewer than the base's or as many.
        divisor: `vocab_size` is a multiple of it; where the text offers fewer pieces, the last merges go.
        output: a new or empty folder.
        language: recorded in the manifest.
        character_coverage: share of the text's characters that get a piece; the others are spelt in bytes.
        presegment: finds words whose boundaries no piece crosses; see `load_presegmenter`.

    Returns:
        The counts; `output` holds tokenizer.model, the Hugging Face files, vocab_map.json and manifest.json.

    Raises:
        TokenizerError: the base is not a Llama-like SentencePiece BPE model or has tokens outside of it,
            the size cannot hold its special and byte ids or the text's alphabet or is no multiple of the
            divisor, the text is empty, the output is taken, or `presegment` is given for a byte-level base.

    Source: the re-ordered ids are those of the Llama 2 vocabulary replacement by Ricoh (NLP2024).
    """
    if is_byte_level(base, presegment=bool(presegment)):
        return replace_byte_level(base, texts, vocab_size, divisor, output, language)
    check_free(Path(output), TokenizerError)
    old, model = read_base(base)
    fixed = {id: piece for id, piece in enumerate(model.pieces) if piece.type in _FIXED}
    _check_size(vocab_size, divisor, fixed)
    reserved = 3 + (256 if model.rules.byte_fallback else 0)
    trained = train_model(
        texts,
        vocab_size - len(fixed) + reserved,
        model.rules,
        model.normalizer,
        character_coverage,
        presegmenter=load_presegmenter(presegment) if presegment else None,
    )
    offered = _offered(trained.model, fixed)
    pieces = _placed(model, fixed, _rounded(offered, len(fixed), divisor))
    old_ids = {piece.text: id for id, piece in enumerate(model.pieces)}
    same = sum(old_ids.get(piece.text) == id for id, piece in enumerate(pieces))
    shared = sum(piece.text in old_ids for piece in pieces)
    report = ReplaceReport(
        old_size=len(model.pieces),
        new_size=len(pieces),
        requested=vocab_size,
        num_kept=len(fixed),
        num_shared=same - len(fixed),
        num_moved=shared - same,
        num_new=len(pieces) - shared,
        lines=trained.lines,
        text_bytes=trained.text_bytes,
        languages=languages_of(texts),
    )
    with new_folder(Path(output), TokenizerError) as folder:
        (folder / SENTENCEPIECE_FILE).write_bytes(model.with_pieces(pieces))
        write_hf_files(folder, old.path.parent)
        map_vocabularies(old, load_tokenizer(folder)).save(folder / VOCAB_MAP_FILE)
        write_tokenizer_manifest(
            folder,
            {"base": old.sha256, "texts": trained.text_sha256},
            vocab_size=report.new_size,
            old_size=report.old_size,
            requested=vocab_size,
            divisor=divisor,
            character_coverage=character_coverage,
            presegment=presegment,
            language=language,
            languages=report.languages,
        )
    return report


def _check_size(vocab_size: int, divisor: int, fixed: dict[int, Piece]) -> None:
    if divisor < 1 or vocab_size % divisor:
        below = vocab_size // max(divisor, 1) * divisor
        raise TokenizerError(
            f"vocab_size is {vocab_size}, expected a multiple of the divisor {divisor}: take {below} or "
            f"{below + divisor}, or another divisor"
        )
    least = max(max(fixed, default=-1) + 1, len(fixed) + 1)
    if vocab_size <= least:
        raise TokenizerError(
            f"vocab_size is {vocab_size}, expected more than {least}: the base's special and byte pieces keep their ids"
        )


def _offered(trained: ModelFile, fixed: dict[int, Piece]) -> list[Piece]:
    """The trained pieces that are text: the base may have more special pieces than the trainer knows."""
    special = {piece.text for piece in fixed.values()}
    return [piece for piece in trained.pieces if piece.type is PieceType.NORMAL and piece.text not in special]


def _rounded(offered: Sequence[Piece], num_fixed: int, divisor: int) -> list[Piece]:
    """The offered pieces without the last merges, so that the size is a multiple of `divisor`."""
    merges = sum(len(piece.text) > 1 for piece in offered)
    excess = (num_fixed + len(offered)) % divisor
    if excess > merges:
        raise TokenizerError(
            f"the text offers {len(offered)} pieces, of which {merges} are no single characters: too few for a size "
            f"that is a multiple of {divisor}; give more text or a smaller divisor"
        )
    # The trainer gives the merges first, then the characters. A merge is made of earlier ones.
    return [*offered[: merges - excess], *offered[merges:]]


def _placed(model: ModelFile, fixed: dict[int, Piece], offered: Sequence[Piece]) -> list[Piece]:
    """The pieces of the new vocabulary by id."""
    size = len(fixed) + len(offered)
    old_ids = {piece.text: id for id, piece in enumerate(model.pieces) if piece.type is PieceType.NORMAL}
    # Where the text offered too few pieces, a fixed id may lie beyond the end.
    if max(fixed, default=-1) >= size:
        raise TokenizerError(
            f"the text offers {len(offered)} pieces only, and the base's special or byte piece {max(fixed)} would lie "
            "beyond them: give more text"
        )
    placed: list[Piece | None] = [fixed.get(id) for id in range(size)]
    homeless = []
    for piece in offered:
        id = old_ids.get(piece.text, size)
        if id < size:
            placed[id] = piece
        else:
            homeless.append(piece)
    left = iter(homeless)
    return [next(left) if piece is None else piece for piece in placed]
