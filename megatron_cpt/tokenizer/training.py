"""Train SentencePiece BPE models, byte for byte the same from the same text."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.config.manifest import MANIFEST, sha256_file, write_manifest
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.hf_files import write_hf_files
from megatron_cpt.tokenizer.loading import JSON_FILE, SENTENCEPIECE_FILE
from megatron_cpt.tokenizer.model_file import ModelFile, Normalizer, TrainingRules, parse_model

# Llama's rules: single digits, runs of spaces as pieces, bytes for what is unknown, spaces kept.
LLAMA_RULES = TrainingRules(split_digits=True, allow_whitespace_only_pieces=True, byte_fallback=True)
LLAMA_NORMALIZER = Normalizer(remove_extra_whitespaces=False)
_SPECIALS = 3  # <unk>, <s>, </s>
_NO_LIMIT = 1 << 30  # SentencePiece silently skips lines of more bytes than this


@dataclass(frozen=True)
class TrainReport:
    """What a training made.

    Attributes:
        vocab_size: ids of the model, less than `requested` when the text has no more pieces to offer.
        requested: ids asked for.
        lines: lines of text that were not empty.
        text_bytes: their bytes in UTF-8.
    """

    vocab_size: int
    requested: int
    lines: int
    text_bytes: int


@dataclass(frozen=True)
class TrainedModel:
    """A model in memory, with the facts and the SHA-256 of the text it was trained on."""

    model: ModelFile
    lines: int
    text_bytes: int
    text_sha256: str


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, output: Path, *, character_coverage: float = 0.9995, language: str = ""
) -> TrainReport:
    """Train a Llama-like tokenizer and write it as a complete Hugging Face tokenizer folder.

    Identity normalizer, dummy prefix, all spaces kept, single digits, byte fallback; ids 0 `<unk>`, 1 `<s>`,
    2 `</s>`. One thread, so that the same text gives the same bytes.

    Args:
        texts: documents, consumed once; each line is one training sentence.
        vocab_size: ids to aim at, the 259 special and byte ids included. A text that cannot fill them
            gives a smaller model, and the report says so.
        output: a new or empty folder.
        character_coverage: share of the text's characters that get a piece; the others are spelt in bytes.
        language: recorded in the manifest.

    Raises:
        TokenizerError: no text, a vocabulary smaller than the text's alphabet, or an output that is taken.
    """
    output = Path(output)
    check_free(output, TokenizerError)
    trained = train_model(texts, vocab_size, LLAMA_RULES, LLAMA_NORMALIZER, character_coverage)
    report = TrainReport(len(trained.model.pieces), vocab_size, trained.lines, trained.text_bytes)
    with new_folder(output, TokenizerError) as folder:
        (folder / SENTENCEPIECE_FILE).write_bytes(trained.model.data)
        write_hf_files(folder)
        write_tokenizer_manifest(
            folder,
            {"texts": trained.text_sha256},
            vocab_size=report.vocab_size,
            language=language,
            character_coverage=character_coverage,
        )
    return report


def train_model(
    texts: Iterable[str], vocab_size: int, rules: TrainingRules, normalizer: Normalizer, character_coverage: float
) -> TrainedModel:
    """Train a SentencePiece BPE model in memory; `vocab_size` is an upper bound.

    Raises:
        TokenizerError: there is no text, or `vocab_size` is smaller than its alphabet.
    """
    if not 0.9 <= character_coverage <= 1.0:
        raise TokenizerError(f"character_coverage is {character_coverage}, expected 0.9 to 1.0 (Llama: 0.9995)")
    reserved = _SPECIALS + (256 if rules.byte_fallback else 0)
    if vocab_size <= reserved:
        raise TokenizerError(f"vocab_size is {vocab_size}, expected more than the {reserved} special and byte ids")
    lines = _Lines(texts)
    written = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
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
    return TrainedModel(parse_model(written.getvalue()), lines.count, lines.bytes, lines.digest.hexdigest())


class _Lines:
    """The lines of texts, counted and hashed while they pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.count = 0
        self.bytes = 0
        self.digest = hashlib.sha256()
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[str]:
        # An exception does not cross SentencePiece's C++: it is kept and the text ends here.
        try:
            for text in self._texts:
                for line in text.split("\n"):
                    line = line.rstrip("\r")
                    if line.strip():
                        data = line.encode()
                        self.count += 1
                        self.bytes += len(data)
                        self.digest.update(data + b"\n")
                        yield line
        except UnicodeEncodeError as caught:
            self.failure = TokenizerError(f"a text is not valid Unicode ({caught}): remove lone surrogates first")
        except Exception as caught:
            self.failure = caught


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
