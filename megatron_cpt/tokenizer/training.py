"""Train SentencePiece models, byte for byte the same from the same text."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.config.manifest import MANIFEST, sha256_file, write_manifest
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.hf_files import write_hf_files
from megatron_cpt.tokenizer.loading import JSON_FILE, SENTENCEPIECE_FILE
from megatron_cpt.tokenizer.mixture import TextMixture, lines_of
from megatron_cpt.tokenizer.model_file import ModelFile, Normalizer, PieceType, TrainingRules, parse_model
from megatron_cpt.tokenizer.presegment import BOUNDARY, Presegmenter, load_presegmenter

MODEL_TYPES = ("bpe", "unigram")
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc")
# Llama's rules: single digits, runs of spaces as pieces, bytes for what is unknown, spaces kept.
LLAMA_RULES = TrainingRules(split_digits=True, allow_whitespace_only_pieces=True, byte_fallback=True)
LLAMA_NORMALIZER = Normalizer(remove_extra_whitespaces=False)
_SPECIALS = 3  # <unk>, <s>, </s>
_NO_LIMIT = 1 << 30  # SentencePiece silently skips lines of more bytes than this
# Scores of a Unigram model are sums of these, so that 32-bit sums (SentencePiece) and 64-bit sums (tokenizers) of a
# text of up to about 26,000 tokens are the same number.
_SCORE_GRID = 1 / 64
# The characters that special and byte pieces are spelt with: where each is a piece, a text that spells one of them
# has another reading.
_SPELLING = "</>0123456789ABCDEFbknsux"


@dataclass(frozen=True)
class TrainReport:
    """What a training made.

    Attributes:
        vocab_size: ids of the model, less than `requested` when the text has no more pieces to offer.
        requested: ids asked for.
        lines: lines of text that were not empty.
        text_bytes: their bytes in UTF-8.
        languages: of a mixture, for each language its bytes `available` and `taken` and its `share`.
    """

    vocab_size: int
    requested: int
    lines: int
    text_bytes: int
    languages: dict[str, Any]


@dataclass(frozen=True)
class TrainedModel:
    """A model in memory, with the facts and the SHA-256 of the text it was trained on."""

    model: ModelFile
    lines: int
    text_bytes: int
    text_sha256: str


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | Path,
    *,
    character_coverage: float = 0.9995,
    language: str = "",
    model_type: str = "bpe",
    normalization: str = "identity",
    model_only: bool = False,
    presegment: str = "",
) -> TrainReport:
    """Train a Llama-like tokenizer and write it as a complete Hugging Face tokenizer folder.

    Dummy prefix, all spaces kept, single digits, byte fallback; ids 0 `<unk>`, 1 `<s>`, 2 `</s>`. One
    thread, so that the same text gives the same bytes.

    Args:
        texts: documents, each line of which is one training sentence; a `TextMixture` for several languages.
        vocab_size: ids to aim at, the 259 special and byte ids included. A text that cannot fill them
            gives a smaller model, and the report says so.
        output: a new or empty folder.
        character_coverage: share of the text's characters that get a piece; the others are spelt in bytes.
        language: recorded in the manifest.
        model_type: "bpe", as Llama's, or "unigram".
        normalization: what happens to a text before it is cut: "identity" (nothing), or SentencePiece's "nfkc"
            or "nmt_nfkc", which no tokenizer.json can express.
        model_only: write tokenizer.model without the Hugging Face files; needed for a normalization.
        presegment: finds words whose boundaries no piece crosses, in the training only; see `load_presegmenter`.

    Raises:
        TokenizerError: no text, a vocabulary smaller than the text's alphabet, an unknown setting, a
            normalization without `model_only`, a presegmenter that fails, or an output that is taken.
    """
    output = Path(output)
    check_free(output, TokenizerError)
    _check_choices(model_type, normalization, model_only)
    trained = train_model(
        texts,
        vocab_size,
        LLAMA_RULES,
        LLAMA_NORMALIZER,
        character_coverage,
        model_type=model_type,
        normalization=normalization,
        presegmenter=load_presegmenter(presegment) if presegment else None,
    )
    languages = languages_of(texts)
    report = TrainReport(len(trained.model.pieces), vocab_size, trained.lines, trained.text_bytes, languages)
    with new_folder(output, TokenizerError) as folder:
        (folder / SENTENCEPIECE_FILE).write_bytes(trained.model.data)
        if not model_only:
            write_hf_files(folder)
        write_tokenizer_manifest(
            folder,
            {"texts": trained.text_sha256},
            vocab_size=report.vocab_size,
            language=language,
            character_coverage=character_coverage,
            model_type=model_type,
            normalization=normalization,
            presegment=presegment,
            languages=languages,
        )
    return report


def _check_choices(model_type: str, normalization: str, model_only: bool) -> None:
    if model_type not in MODEL_TYPES:
        raise TokenizerError(f"model_type is {model_type!r}: expected one of {', '.join(MODEL_TYPES)}")
    if normalization not in NORMALIZATIONS:
        raise TokenizerError(f"normalization is {normalization!r}: expected one of {', '.join(NORMALIZATIONS)}")
    if normalization != "identity" and not model_only:
        raise TokenizerError(
            f"normalization {normalization!r} cannot be written as a tokenizer.json: SentencePiece replaces by code "
            "points, the tokenizers library by grapheme clusters, which drops marks and leaves U+304B U+3099 and "
            "half-width U+FF8A U+FF9E uncomposed, so ids would differ. Normalise the corpus (data clean) and keep "
            "'identity', or ask for tokenizer.model alone (--model-only)"
        )


def train_model(
    texts: Iterable[str],
    vocab_size: int,
    rules: TrainingRules,
    normalizer: Normalizer,
    character_coverage: float,
    *,
    model_type: str = "bpe",
    normalization: str = "identity",
    presegmenter: Presegmenter | None = None,
) -> TrainedModel:
    """Train a SentencePiece model in memory; `vocab_size` is an upper bound.

    Raises:
        TokenizerError: there is no text, or `vocab_size` is smaller than its alphabet.
    """
    if not 0.9 <= character_coverage <= 1.0:
        raise TokenizerError(f"character_coverage is {character_coverage}, expected 0.9 to 1.0 (Llama: 0.9995)")
    reserved = _SPECIALS + (256 if rules.byte_fallback else 0)
    if vocab_size <= reserved:
        raise TokenizerError(f"vocab_size is {vocab_size}, expected more than the {reserved} special and byte ids")
    lines = _Lines(texts, presegmenter)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            required_chars=_SPELLING if model_type == "unigram" else "",
            normalization_rule_name=normalization,
            pretokenization_delimiter=BOUNDARY if presegmenter else "",
            add_dummy_prefix=normalizer.add_dummy_prefix,
            remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
            max_sentencepiece_length=rules.max_piece_length,
            split_by_unicode_script=rules.split_by_unicode_script,
            split_by_number=rules.split_by_number,
            split_by_whitespace=rules.split_by_whitespace,
            split_digits=rules.split_digits,
            allow_whitespace_only_pieces=rules.allow_whitespace_only_pieces,
            byte_fallback=rules.byte_fallback,
            max_sentence_length=_NO_LIMIT,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as caught:
        raise _explained(caught, lines, vocab_size, reserved) from None
    if lines.failure:
        raise lines.failure
    model = parse_model(written.getvalue())
    model = _on_grid(model) if model.type == "unigram" else model
    return TrainedModel(model, lines.count, lines.bytes, lines.digest.hexdigest())


def _on_grid(model: ModelFile) -> ModelFile:
    """The same Unigram model with each score rounded to a multiple of the grid."""
    pieces = [
        replace(piece, score=round(piece.score / _SCORE_GRID) * _SCORE_GRID)
        if piece.type is PieceType.NORMAL
        else piece
        for piece in model.pieces
    ]
    return parse_model(model.with_pieces(pieces))


def languages_of(texts: Iterable[str]) -> dict[str, Any]:
    """What a mixture's languages give, for a report; nothing for texts of one language."""
    if not isinstance(texts, TextMixture):
        return {}
    return {language: asdict(facts) for language, facts in texts.languages.items()}


class _Lines:
    """The lines of texts, counted and hashed while they pass, then given to the presegmenter."""

    def __init__(self, texts: Iterable[str], presegmenter: Presegmenter | None) -> None:
        self._texts = texts
        self._presegmenter = presegmenter
        self.count = 0
        self.bytes = 0
        self.digest = hashlib.sha256()
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        # An exception does not cross SentencePiece's C++: it is kept and the text ends here.
        try:
            yield from self._counted() if self._presegmenter is None else self._presegmenter(self._counted())
        except UnicodeEncodeError as caught:
            self.failure = TokenizerError(f"a text is not valid Unicode ({caught}): remove lone surrogates first")
        except Exception as caught:
            self.failure = caught

    def _counted(self) -> Iterator[str]:
        for line in lines_of(self._texts):
            data = line.encode()
            self.count += 1
            self.bytes += len(data)
            self.digest.update(data + b"\n")
            yield line


def _explained(caught: RuntimeError, lines: _Lines, vocab_size: int, reserved: int) -> Exception:
    """SentencePiece's refusal in the words of this tool."""
    if lines.failure:
        return lines.failure
    if lines.count == 0:
        return TokenizerError("the text to train on is empty: check the corpus files and the name of their text field")
    sizes = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", str(caught))
    if sizes:
        needed = int(sizes[2]) - reserved
        return TokenizerError(
            f"{vocab_size - reserved} pieces cannot hold the text's alphabet of {needed} characters: "
            f"ask for more than {needed} pieces, or lower the character coverage"
        )
    return TokenizerError(f"SentencePiece cannot train on this text ({caught}); {lines.count} lines were read")


def write_tokenizer_manifest(folder: Path, inputs: dict[str, str], **fields: object) -> None:
    """Write the manifest that finishes a tokenizer folder; it holds the hash of each vocabulary file."""
    names = [name for name in (SENTENCEPIECE_FILE, JSON_FILE) if (folder / name).is_file()]
    files = {name: sha256_file(folder / name) for name in names}
    write_manifest(folder / MANIFEST, "tokenizer", inputs, **fields, outputs=files)
