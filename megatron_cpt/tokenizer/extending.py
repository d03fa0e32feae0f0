"""Append pieces of a target language to a base vocabulary without touching what it does elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.config.manifest import sha256_json
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.base_model import is_byte_level, read_base
from megatron_cpt.tokenizer.byte_level import ByteLevelExtendReport, extend_byte_level
from megatron_cpt.tokenizer.choosing import Choice, lost_pieces
from megatron_cpt.tokenizer.hf_files import write_hf_files
from megatron_cpt.tokenizer.loading import SENTENCEPIECE_FILE, load_tokenizer
from megatron_cpt.tokenizer.model_file import SPACE, ModelFile, Piece, PieceType
from megatron_cpt.tokenizer.piece_list import offered_pieces
from megatron_cpt.tokenizer.presegment import load_presegmenter
from megatron_cpt.tokenizer.scripts import script_rule
from megatron_cpt.tokenizer.training import train_model, write_tokenizer_manifest
from megatron_cpt.tokenizer.vocab_map import VOCAB_MAP_FILE, map_vocabularies

_EXAMPLES = 20
_LEAST_COUNT = 2  # a pair of a byte-level base that comes up once is not worth a merge


@dataclass(frozen=True)
class ExtendReport:
    """What an extension did.

    Attributes:
        old_size: ids of the base.
        new_size: ids of the extended vocabulary.
        num_new: appended pieces, `new_size - old_size`.
        num_ascii: those of ASCII alone, which only script "any" lets in: text of the base's languages that holds
            what they join is cut anew.
        requested: pieces asked of the target-language model, or named in a list.
        offered: pieces it has; less than `requested` when the text has no more to offer.
        dropped: pieces not taken, by reason: "in_base", "script" (no character of the target script),
            "unreachable" (no sequence of merges leads to it), "rare" (used too seldom), "divisor" (the last
            merges, to round the size).
        examples: up to 20 of the pieces not taken, by reason.
        lost: pieces of the base that the new vocabulary no longer produces; 0 with rank-tail scores.
        scores: how the new pieces are scored.
        fast_file: whether there is a tokenizer.json; there is none with zero scores, whose ties it cannot express.
        lines: lines of text the target-language model was trained on; 0 for a list.
        text_bytes: their bytes in UTF-8.
    """

    old_size: int
    new_size: int
    num_new: int
    num_ascii: int
    requested: int
    offered: int
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    lost: int
    scores: str
    fast_file: bool
    lines: int
    text_bytes: int


def extend_tokenizer(
    base: str | Path,
    texts: Iterable[str],
    num_pieces: int,
    script: str,
    divisor: int,
    output: str | Path,
    language: str = "",
    character_coverage: float = 0.9995,
    *,
    scores: str = "rank-tail",
    min_count: int = 0,
    pieces: Sequence[str] | None = None,
    presegment: str = "",
) -> ExtendReport | ByteLevelExtendReport:
    """Extend a tokenizer with pieces of a target language.

    A byte-level base (Llama 3's kind) goes the way of `extend_byte_level`; of SentencePiece bases:

    The base's own ids, pieces and scores stay byte for byte. With "rank-tail" the new pieces follow the
    base's in the order of the target-language model, with scores below every score of the base. So all
    merges of the base still come first, and a text without a character of the script is cut as before.

    Args:
        base: a folder with tokenizer.model or (byte-level) tokenizer.json, or that file.
        texts: documents of the target language; read twice where `min_count` is above 0.
        num_pieces: pieces to train and offer (without the special and byte pieces). Those that the base
            has, or that are not of the script, are not appended. Not used with `pieces`.
        script: "ja", "ko", "de" or "any"; see `scripts`.
        divisor: the new size is a multiple of it, reached by dropping the last merged pieces.
        output: a new or empty folder.
        language: recorded in the manifest.
        character_coverage: share of the text's characters that are offered as pieces.
        scores: "rank-tail", "own-rank" or "zero"; see `Choice`. "zero" is the common recipe, as a control: it
            recuts the base's languages, and only tokenizer.model is written.
        min_count: pieces used fewer times in the texts by the extended tokenizer are not appended, unless
            a piece that is appended is merged through them. Byte-level: how often a pair has to come up to be
            merged, at least 2. There all characters are covered, and the following, like `scores`, has no meaning.
        pieces: offered instead of trained ones, the most important first.
        presegment: finds words whose boundaries no piece crosses; see `load_presegmenter`.

    Returns:
        The counts; `output` holds tokenizer.model, the Hugging Face files, vocab_map.json and manifest.json.

    Raises:
        TokenizerError: the base is not a Llama-like SentencePiece model or has tokens outside of it, the
            text is empty or gives no new piece of the script, the list has duplicates, the output is taken, or
            an option is given that has no meaning for a byte-level base.
    """
    if is_byte_level(base, scores=scores != "rank-tail", pieces=pieces is not None, presegment=bool(presegment)):
        least = max(min_count, _LEAST_COUNT)
        return extend_byte_level(base, texts, num_pieces, script, divisor, output, language, min_count=least)
    check_free(Path(output), TokenizerError)
    old, model = read_base(base)
    _check_options(model, texts, num_pieces, script, divisor, scores, min_count)
    listed = None if pieces is None else Offer(offered_pieces(pieces), sha256_json(list(pieces)))
    offer = listed or train_offer(model, texts, num_pieces, character_coverage, presegment)
    choice = choose(model, offer.pieces, script, divisor, scores, texts if min_count else (), min_count)
    data = model.with_appended(new := choice.scored())
    report = ExtendReport(
        old_size=len(model.pieces),
        new_size=len(model.pieces) + len(new),
        num_new=len(new),
        num_ascii=sum(piece.text.replace(SPACE, "").isascii() for piece in new),
        requested=num_pieces if pieces is None else len(pieces),
        offered=len(offer.pieces),
        dropped=choice.counts(),
        examples={reason: left[:_EXAMPLES] for reason, left in choice.dropped.items() if left},
        lost=lost_pieces(model, data),
        scores=scores,
        fast_file=scores != "zero",
        lines=offer.lines,
        text_bytes=offer.text_bytes,
    )
    with new_folder(Path(output), TokenizerError) as folder:
        (folder / SENTENCEPIECE_FILE).write_bytes(data)
        if report.fast_file:
            write_hf_files(folder, old.path.parent)
        map_vocabularies(old, load_tokenizer(folder)).save(folder / VOCAB_MAP_FILE)
        write_tokenizer_manifest(
            folder,
            {"base": old.sha256, "texts" if pieces is None else "pieces": offer.sha256},
            vocab_size=report.new_size,
            old_size=report.old_size,
            requested=report.requested,
            script=script,
            divisor=divisor,
            scores=scores,
            min_count=min_count,
            character_coverage=character_coverage,
            presegment=presegment,
            language=language,
        )
    return report


def _check_options(
    model: ModelFile, texts: Iterable[str], num_pieces: int, script: str, divisor: int, scores: str, min_count: int
) -> None:
    """Refuse what cannot be meant before the training, which takes long."""
    if divisor < 1 or num_pieces < 1 or min_count < 0:
        raise TokenizerError(
            f"num_pieces is {num_pieces}, divisor {divisor} and min_count {min_count}: expected the first two to be at "
            "least 1 and min_count at least 0"
        )
    if min_count and iter(texts) is texts:
        raise TypeError("min_count needs texts that can be read twice: give a list or an object that begins again")
    script_rule(script)
    Choice(model, (), scores)


@dataclass(frozen=True)
class Offer:
    """Pieces that may join a base, with the SHA-256 and the size of what they come from."""

    pieces: list[Piece]
    sha256: str
    lines: int = 0
    text_bytes: int = 0


def train_offer(
    model: ModelFile, texts: Iterable[str], num_pieces: int, character_coverage: float, presegment: str
) -> Offer:
    """The pieces of a model of the target language that is trained by the base's rules."""
    reserved = 3 + (256 if model.rules.byte_fallback else 0)
    presegmenter = load_presegmenter(presegment) if presegment else None
    size = num_pieces + reserved
    trained = train_model(texts, size, model.rules, model.normalizer, character_coverage, presegmenter=presegmenter)
    pieces = [piece for piece in trained.model.pieces if piece.type is PieceType.NORMAL]
    return Offer(pieces, trained.text_sha256, trained.lines, trained.text_bytes)


def choose(
    model: ModelFile,
    offered: Sequence[Piece],
    script: str,
    divisor: int,
    scores: str,
    texts: Iterable[str] = (),
    min_count: int = 0,
) -> Choice:
    """The offered pieces to append; the arguments are those of `extend_tokenizer`.

    Raises:
        TokenizerError: none is left.
    """
    choice = Choice(model, offered, scores)
    choice.new_to_the_base()
    choice.of_script(script)
    choice.reachable()
    if min_count:
        choice.frequent(texts, min_count)
    choice.rounded(divisor)
    if not choice.pieces:
        dropped = choice.counts()
        raise TokenizerError(
            f"no piece is left to append: of {len(offered)} offered pieces {dropped['in_base']} are in the base, "
            f"{dropped['script']} have no character of script {script!r}, {dropped['unreachable']} are unreachable, "
            f"{dropped.get('rare', 0)} are used fewer than {min_count} times and {dropped['divisor']} were dropped to "
            f"make the size a multiple of {divisor}; check the corpus and the script, ask for more pieces, use a "
            "smaller divisor, or list beside an unreachable piece the two that it is merged from"
        )
    return choice
