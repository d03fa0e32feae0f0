"""Append merges of a target language to a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cpt.config.folders import check_free, new_folder
from megatron_cpt.errors import TokenizerError
from megatron_cpt.tokenizer.byte_alphabet import unwritten, written
from megatron_cpt.tokenizer.byte_level.json_model import JsonModel, Merge, bare, read_json_model, write_folder
from megatron_cpt.tokenizer.byte_level.learning import Learned, learn_merges
from megatron_cpt.tokenizer.byte_level.scripts import byte_rule, num_characters
from megatron_cpt.tokenizer.byte_level.words import Texts, count_words, cut_words
from megatron_cpt.tokenizer.loading import load_tokenizer
from megatron_cpt.tokenizer.training import write_tokenizer_manifest
from megatron_cpt.tokenizer.vocab_map import VOCAB_MAP_FILE, VocabMap, kept_entries, new_entry

_MOST_CHARACTERS = 16  # of a new piece, as in Llama 2: longer ones are rulers and names of the corpus


@dataclass(frozen=True)
class ByteLevelExtendReport:
    """What an extension did.

    Attributes:
        old_size: ids of the base.
        new_size: ids of the extended vocabulary.
        num_new: appended pieces, `new_size - old_size`.
        num_merges: appended merges; some lead to a piece that another merge made, or that the base has.
        requested: pieces asked for.
        dropped: pieces learned but not taken, by reason: "unreachable" (no text gives them), "divisor" (the last
            merges, to round the size).
        num_inner: new pieces that the corpus has inside longer pieces alone, such as the first two of three bytes.
        lines: lines of text that the merges were learned on.
        text_bytes: their bytes in UTF-8.
    """

    old_size: int
    new_size: int
    num_new: int
    num_merges: int
    requested: int
    dropped: dict[str, int]
    num_inner: int
    lines: int
    text_bytes: int


def extend_byte_level(
    base: str | Path,
    texts: Iterable[str],
    num_pieces: int,
    script: str,
    divisor: int,
    output: str | Path,
    language: str = "",
    *,
    min_count: int = 2,
) -> ByteLevelExtendReport:
    """Extend a byte-level BPE tokenizer by continued BPE.

    The texts are cut by the base, and training goes on from there: the most frequent pair of pieces is merged,
    again and again. The new merges rank below all of the base, so they join what the base has finished. With a
    script, every merge holds a character of it (or a beginning that only its characters have), so a text
    without the script is cut exactly as before. Each new piece is what some merges make, so none is dead.
    The base's pieces, merges and special tokens keep their ids; new ids follow the last of them.

    Args:
        base: a folder with tokenizer.json, or that file.
        texts: documents of the target language, consumed once.
        num_pieces: new pieces to learn; fewer where no pair comes up `min_count` times.
        script: "ja", "ko", "de" or "any"; see `tokenizer.scripts`.
        divisor: the new size is a multiple of it, reached by dropping the last pieces.
        output: a new or empty folder.
        language: recorded in the manifest.
        min_count: how often a pair comes up, at least, when it is merged.

    Returns:
        The counts; `output` holds tokenizer.json, the Hugging Face files, vocab_map.json and manifest.json.

    Raises:
        TokenizerError: the base is not a byte-level BPE tokenizer, the text is empty or gives no new piece, or the
            output is taken.

    Source: Purason et al. 2025 (arXiv 2512.03989), continued BPE.
    Deviates: the filter by script, inside the learning.
    """
    output = Path(output)
    check_free(output, TokenizerError)
    if min(num_pieces, divisor, min_count) < 1:
        raise TokenizerError(
            f"num_pieces is {num_pieces}, divisor {divisor} and min_count {min_count}: expected all to be at least 1"
        )
    model = read_json_model(base)
    read = Texts(texts)
    learned = _learn(model, read, num_pieces, script, min_count)
    old = model.tokenizer
    new, merges, dropped = _chosen(model, learned, script, divisor)
    ids = {piece: id for id, piece in enumerate(new, start=old.vocab_size)}
    used = {written(learned.pieces[id - old.vocab_size]) for id in learned.used if id >= old.vocab_size}
    report = ByteLevelExtendReport(
        old_size=old.vocab_size,
        new_size=old.vocab_size + len(new),
        num_new=len(new),
        num_merges=len(merges),
        requested=num_pieces,
        dropped=dropped,
        num_inner=len(ids.keys() - used),
        lines=read.lines,
        text_bytes=read.bytes,
    )
    with new_folder(output, TokenizerError) as folder:
        value = model.with_pieces({**model.vocab, **ids}, [*model.merges, *merges])
        write_folder(folder, value, old.path.parent, {})
        _check_specials(model, folder)
        _vocab_map(model, folder, new).save(folder / VOCAB_MAP_FILE)
        write_tokenizer_manifest(
            folder,
            {"base": old.sha256, "texts": read.sha256},
            vocab_size=report.new_size,
            old_size=report.old_size,
            requested=num_pieces,
            script=script,
            divisor=divisor,
            min_count=min_count,
            language=language,
        )
    return report


def _learn(model: JsonModel, texts: Iterable[str], num_pieces: int, script: str, min_count: int) -> Learned:
    rule = byte_rule(script)
    counts = count_words(model.tokenizer.backend, texts)
    # A word that is not of the script has no merge to learn.
    of_script = {word: count for word, count in counts.items() if rule(unwritten(word) or b"")}
    pieces = {id: data for piece, id in model.vocab.items() if (data := unwritten(piece)) is not None}
    return learn_merges(
        cut_words(bare(model.value), of_script),
        pieces,
        {(model.vocab[left], model.vocab[right]) for left, right in model.merges},
        model.tokenizer.vocab_size,
        num_pieces,
        lambda data: num_characters(data) <= _MOST_CHARACTERS and rule(data),
        min_count,
    )


def _chosen(
    model: JsonModel, learned: Learned, script: str, divisor: int
) -> tuple[list[str], list[Merge], dict[str, int]]:
    """The pieces to append, their merges, and how many were dropped for which reason."""
    spelled, merges = _spelled(model, learned)
    new = reachable = _reachable(model, spelled, merges)
    while new and (excess := (model.tokenizer.vocab_size + len(new)) % divisor):
        new = _reachable(model, new[: max(0, len(new) - excess)], merges)
    dropped = {"unreachable": len(spelled) - len(reachable), "divisor": len(reachable) - len(new)}
    if not new:
        raise TokenizerError(
            f"no piece is left to append: of {len(spelled)} learned ones {dropped['unreachable']} are unreachable and "
            f"{dropped['divisor']} were dropped to make the size a multiple of {divisor}; check the corpus and the "
            f"script {script!r}, or use a smaller divisor"
        )
    return new, _among(model, new, merges), dropped


def _spelled(model: JsonModel, learned: Learned) -> tuple[list[str], list[Merge]]:
    """The pieces and merges in the byte alphabet."""
    new = [written(data) for data in learned.pieces]
    names = {id: piece for piece, id in model.vocab.items()}
    names |= dict(enumerate(new, start=model.tokenizer.vocab_size))
    return new, [(names[left], names[right]) for left, right, _ in learned.merges]


def _reachable(model: JsonModel, new: Sequence[str], merges: Sequence[Merge]) -> list[str]:
    """Those of the new pieces that merges make of their own bytes, and whose parts are of that kind too."""
    kept = list(new)
    while True:
        kept = _closed(model, kept, merges)
        ids = {piece: id for id, piece in enumerate(kept, start=model.tokenizer.vocab_size)}
        value = model.with_pieces({**model.vocab, **ids}, [*model.merges, *_among(model, kept, merges)])
        encoded = bare(value, ignore_merges=False).encode_batch_fast(kept, add_special_tokens=False)
        alive = [piece for piece, encoding in zip(kept, encoded, strict=True) if encoding.ids == [ids[piece]]]
        if len(alive) == len(kept):
            return kept
        kept = alive


def _closed(model: JsonModel, new: Sequence[str], merges: Sequence[Merge]) -> list[str]:
    """Those of the pieces that a merge of pieces which are there makes."""
    kept, before = list(new), -1
    while len(kept) != before:
        before = len(kept)
        made = {left + right for left, right in _among(model, kept, merges)}
        kept = [piece for piece in kept if piece in made]
    return kept


def _among(model: JsonModel, new: Collection[str], merges: Iterable[Merge]) -> list[Merge]:
    """The merges whose pieces are all there."""
    there = model.vocab.keys() | set(new)
    return [pair for pair in merges if there.issuperset((*pair, "".join(pair)))]


def _check_specials(model: JsonModel, folder: Path) -> None:
    """Special tokens stand in the vocabulary now: see that no text can give them."""
    made = load_tokenizer(folder)
    taken = [token for token, id in model.added.items() if made.kind(id) == "special" and id in made.encode(token)]
    if taken:
        raise TokenizerError(
            f"the spelling of the special token {taken[0]!r} is one word, so that a text which holds it would give the "
            "special token: rename it in the base, as Llama 3 writes <|name|>"
        )


def _vocab_map(model: JsonModel, folder: Path, new: Sequence[str]) -> VocabMap:
    old, made = model.tokenizer, load_tokenizer(folder)
    appended = [new_entry(old, unwritten(piece) or b"") for piece in new]
    entries = (*kept_entries(old), *appended)
    return VocabMap(old.vocab_size, made.vocab_size, old.sha256, made.sha256, entries)
