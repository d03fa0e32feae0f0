"""Append pieces of a target language to a base vocabulary without touching what it does elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.config.manifest import read_json
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.hf_files import TOKENIZER_CONFIG, check_expressible, write_hf_files
from megatron_cpt.tokenizer.loading import JSON_FILE, SENTENCEPIECE_FILE, SentencePieceTokenizer, load_tokenizer
from megatron_cpt.tokenizer.model_file import ModelFile, Piece, PieceType, read_model_file, without_prefix
from megatron_cpt.tokenizer.scripts import script_rule
from megatron_cpt.tokenizer.training import train_model, write_tokenizer_manifest
from megatron_cpt.tokenizer.vocab_map import VOCAB_MAP_FILE, Entry, VocabMap, kept_entries

_RUN_SCORE = -1e9  # what Llama 2 gives to runs of spaces: far below every rank, so not part of the ranking


@dataclass(frozen=True)
class ExtendReport:
    """What an extension did.

    Attributes:
        old_size: ids of the base.
        new_size: ids of the extended vocabulary.
        num_new: appended pieces, `new_size - old_size`.
        requested: pieces asked of the target-language model.
        offered: pieces it has; less than `requested` when the text has no more to offer.
        dropped: pieces not taken, by reason: "in_base", "script" (no character of the target script),
            "unreachable" (no sequence of merges leads to it), "divisor" (the last merges, to round the size).
        lines: lines of text the target-language model was trained on.
        text_bytes: their bytes in UTF-8.
    """

    old_size: int
    new_size: int
    num_new: int
    requested: int
    offered: int
    dropped: dict[str, int]
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
) -> ExtendReport:
    """Extend a SentencePiece BPE tokenizer with pieces trained on a target language.

    The new pieces follow the base's in the order of the target-language model, with scores below every
    score of the base. So all merges of the base still come first, and a text without a character of the
    script is cut as before. The base's own ids, pieces and scores stay byte for byte.

    Args:
        base: a folder with tokenizer.model, or that file.
        texts: documents of the target language, consumed once.
        num_pieces: pieces to train and offer (without the special and byte pieces). Those that the base
            has, or that are not of the script, are not appended.
        script: "ja", "ko", "de" or "any"; see `scripts`.
        divisor: the new size is a multiple of it, reached by dropping the last merged pieces.
        output: a new or empty folder.
        language: recorded in the manifest.
        character_coverage: share of the text's characters that are offered as pieces.

    Returns:
        The counts; `output` holds tokenizer.model, the Hugging Face files, vocab_map.json and manifest.json.

    Raises:
        TokenizerError: the base is not a Llama-like SentencePiece model or has tokens outside of it, the
            text is empty or gives no new piece of the script, or the output is taken.
    """
    output = Path(output)
    check_free(output, TokenizerError)
    old, model = read_base(Path(base))
    if divisor < 1 or num_pieces < 1:
        raise TokenizerError(f"num_pieces is {num_pieces} and divisor {divisor}: expected both to be at least 1")
    script_rule(script)  # an unknown script is refused before the training
    reserved = 3 + (256 if model.rules.byte_fallback else 0)
    trained = train_model(texts, num_pieces + reserved, model.rules, model.normalizer, character_coverage)
    offered = [piece.text for piece in trained.model.pieces if piece.type is PieceType.NORMAL]
    new, dropped = _chosen(model, offered, script, divisor)
    report = ExtendReport(
        old_size=len(model.pieces),
        new_size=len(model.pieces) + len(new),
        num_new=len(new),
        requested=num_pieces,
        offered=len(offered),
        dropped=dropped,
        lines=trained.lines,
        text_bytes=trained.text_bytes,
    )
    with new_folder(output, TokenizerError) as folder:
        (folder / SENTENCEPIECE_FILE).write_bytes(model.with_appended(_scored(model, new)))
        write_hf_files(folder, old.path.parent)
        _vocab_map(old, model, folder, new).save(folder / VOCAB_MAP_FILE)
        write_tokenizer_manifest(
            folder,
            {"base": old.sha256, "texts": trained.text_sha256},
            vocab_size=report.new_size,
            old_size=report.old_size,
            requested=num_pieces,
            script=script,
            divisor=divisor,
            character_coverage=character_coverage,
            language=language,
        )
    return report


def read_base(path: Path) -> tuple[SentencePieceTokenizer, ModelFile]:
    """A SentencePiece model that Hugging Face files can express, with no token beyond its own.

    Raises:
        TokenizerError: it is another kind of tokenizer, cannot be expressed, or its folder adds tokens.
    """
    tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise TokenizerError(
            f"{path} has no {SENTENCEPIECE_FILE}, only a {tokenizer.path.name}: only SentencePiece tokenizers "
            "(Llama 1 and 2 and their kin) are read here"
        )
    model = read_model_file(tokenizer.path)
    check_expressible(model, str(tokenizer.path))
    added = _added_tokens(tokenizer.path.parent, tokenizer.vocab_size)
    if added:
        raise TokenizerError(
            f"{tokenizer.path.parent} adds {len(added)} tokens to its {tokenizer.path.name} (such as {added[0]!r}), "
            "which are not in its model: use the base model without them"
        )
    return tokenizer, model


def _added_tokens(folder: Path, vocab_size: int) -> list[str]:
    """Tokens that a model's folder defines beyond its SentencePiece vocabulary."""
    found: dict[int, str] = {}
    for name in ("added_tokens.json", JSON_FILE, TOKENIZER_CONFIG):
        if not (folder / name).is_file():
            continue
        value = read_json(folder / name, TokenizerError)
        try:
            if name == JSON_FILE:
                found |= {int(token["id"]): token["content"] for token in value.get("added_tokens") or ()}
            elif name == TOKENIZER_CONFIG:
                found |= {int(id): token["content"] for id, token in value.get("added_tokens_decoder", {}).items()}
            else:
                found |= {int(id): token for token, id in value.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as caught:
            raise TokenizerError(f"{folder / name} lists added tokens in an unknown form ({caught!r})") from None
    return [found[id] for id in sorted(found) if id >= vocab_size]


def _chosen(model: ModelFile, offered: Sequence[str], script: str, divisor: int) -> tuple[list[str], dict[str, int]]:
    """The pieces to append, and how many were dropped for which reason."""
    rule = script_rule(script)
    known = {piece.text for piece in model.pieces}
    unknown = [text for text in offered if text not in known]
    of_script = [text for text in unknown if rule.search(text)]
    reachable = _reachable(model, of_script)
    new = _rounded(model, reachable, divisor)
    dropped = {
        "in_base": len(offered) - len(unknown),
        "script": len(unknown) - len(of_script),
        "unreachable": len(of_script) - len(reachable),
        "divisor": len(reachable) - len(new),
    }
    if not new:
        raise TokenizerError(
            f"no piece is left to append: of {len(offered)} trained pieces {dropped['in_base']} are in the base, "
            f"{dropped['script']} have no character of script {script!r}, {dropped['unreachable']} are unreachable and "
            f"{dropped['divisor']} were dropped to make the size a multiple of {divisor}; check the corpus and the "
            "script, ask for more pieces, or use a smaller divisor"
        )
    return new, dropped


def _scored(model: ModelFile, texts: Sequence[str]) -> list[Piece]:
    """The pieces with scores that continue the base's ranking downwards."""
    lowest = min(piece.score for piece in model.pieces if piece.type is PieceType.NORMAL and piece.score > _RUN_SCORE)
    return [Piece(text, lowest - rank, PieceType.NORMAL) for rank, text in enumerate(texts, start=1)]


def _reachable(model: ModelFile, texts: Sequence[str]) -> list[str]:
    """Those of the new pieces that the extended model produces for their own surface.

    A piece that is not produced alone is produced nowhere: inside a longer text the same merges happen in
    the same order. So leaving it out changes no encoding. SentencePiece also merges through characters that
    are no pieces, which a tokenizer.json cannot: such pieces count as unreachable.
    """
    alphabet = model.alphabet().union(text for text in texts if len(text) == 1)
    spelled = [text for text in texts if alphabet.issuperset(text)]
    data = without_prefix(model.with_appended(_scored(model, spelled)))
    encoded = sentencepiece.SentencePieceProcessor(model_proto=data).encode(spelled)
    first = len(model.pieces)
    return [text for id, (text, ids) in enumerate(zip(spelled, encoded, strict=True), start=first) if ids == [id]]


def _rounded(model: ModelFile, texts: Sequence[str], divisor: int) -> list[str]:
    """The pieces without the last ones, so that the size is a multiple of `divisor`.

    The last merges go first: a dropped character would take with it every piece that contains it.
    """
    kept = list(texts)
    while kept and (excess := (len(model.pieces) + len(kept)) % divisor):
        dropped = set(sorted(range(len(kept)), key=lambda place: (len(kept[place]) > 1, place))[-excess:])
        # A dropped piece may have been a part of one that stays.
        kept = _reachable(model, [text for place, text in enumerate(kept) if place not in dropped])
    return kept


def _vocab_map(old: SentencePieceTokenizer, model: ModelFile, folder: Path, new: Sequence[str]) -> VocabMap:
    processor = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(model.data))
    entries = [*kept_entries(old), *(Entry("new", None, tuple(ids)) for ids in processor.encode(list(new)))]
    made = load_tokenizer(folder)
    return VocabMap(old.vocab_size, made.vocab_size, old.sha256, made.sha256, tuple(entries))
