"""The report of a tokenizer beside its base: report.json for programs, report.md and its pictures for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_cpt.config.manifest import write_json_atomic, write_text_atomic
from megatron_cpt.config.schema import LlamaShape
from megatron_cpt.planning import tensor_parallel_fit, vocabulary_costs
from megatron_cpt.reporting.markdown import binary_size, code, percent, table
from megatron_cpt.reporting.tokenizer_pictures import draw_pictures

SEQ_LENGTH = 4096  # of the micro-batch of one sequence that memory and FLOPs are stated for
_LINE = 60  # characters of an example's line
_CUT = 40  # pieces of an example
_FEW = 3  # examples

# Llama 2's own shapes, for a base that is a tokenizer alone.
_SHAPES = {
    "Llama 2 7B": (32, 4096, 11008, 32, 32),
    "Llama 2 70B": (80, 8192, 28672, 64, 8),
}


def usual_shapes() -> dict[str, LlamaShape]:
    """Two models that a vocabulary's cost is stated for where the base's own shape is not known."""
    return {
        name: LlamaShape(
            num_layers=layers,
            hidden_size=hidden,
            ffn_hidden_size=ffn,
            num_attention_heads=heads,
            num_query_groups=groups,
            head_dim=hidden // heads,
        )
        for name, (layers, hidden, ffn, heads, groups) in _SHAPES.items()
    }


def add_costs(
    report: Mapping[str, Any], shapes: Mapping[str, LlamaShape], tensor_sizes: Sequence[int], divisor: int
) -> dict[str, Any]:
    """A report of `compare_tokenizers` with what both vocabularies cost.

    Args:
        report: the facts of the two tokenizers.
        shapes: models by name.
        tensor_sizes: values of TP to state.
        divisor: the vocabulary is padded to a multiple of it.

    Returns:
        The report with `costs`: `tensor_parallel` (of the adapted vocabulary), and for each of `models` the costs
        `base` and `adapted`, and by language the ratio of training FLOPs per byte of text (`flops_per_byte`,
        `ratio` below 1 where the adapted one is cheaper).
    """
    sizes = report["vocab_size"]
    models = {}
    for name, shape in shapes.items():
        base, adapted = (vocabulary_costs(shape, sizes[side], SEQ_LENGTH) for side in ("base", "adapted"))
        per_byte = {}
        for language, facts in report["languages"].items():
            before = _per_byte(base, facts["base"])
            after = _per_byte(adapted, facts["adapted"])
            per_byte[language] = {"base": before, "adapted": after, "ratio": after / before if before else 1.0}
        models[name] = {"base": base, "adapted": adapted, "flops_per_byte": per_byte}
    costs = {
        "seq_length": SEQ_LENGTH,
        "micro_batch_size": 1,
        "vocab_divisor": divisor,
        "tensor_parallel": tensor_parallel_fit(sizes["adapted"], tensor_sizes, divisor, SEQ_LENGTH),
        "models": models,
    }
    return {**report, "costs": costs}


def write_tokenizer_report(report: Mapping[str, Any], folder: str | Path) -> None:
    """Write `report.md` with its pictures under `plots/`, and `report.json` last.

    Args:
        report: what `add_costs` returns, with `name` and `base_name`.
        folder: made where it is missing; the files of an earlier report are replaced.
    """
    folder = Path(folder)
    pictures = dict(draw_pictures(report, folder / "plots"))
    write_text_atomic(folder / "report.md", "\n".join(_lines(report, pictures)) + "\n")
    write_json_atomic(folder / "report.json", report)


def _per_byte(costs: Mapping[str, Any], density: Mapping[str, Any]) -> float:
    per_token = density["bytes_per_token"]
    return float(costs["flops_per_token"] / per_token) if per_token else 0.0


def _lines(report: Mapping[str, Any], pictures: Mapping[str, str]) -> Iterator[str]:
    sizes = report["vocab_size"]
    yield f"# Tokenizer: {report['name']} beside {report['base_name']}"
    yield ""
    yield f"{sizes['adapted']:,} ids, of which {report['vocabulary']['new']:,} are new; the base has {sizes['base']:,}."
    yield ""
    yield from (f"- {sentence}" for sentence in _findings(report))
    yield ""
    yield from _density(report["languages"], pictures)
    yield from _recut(report["languages"])
    yield from _new_pieces(report, pictures)
    yield from _size(report)


def _findings(report: Mapping[str, Any]) -> Iterator[str]:
    """What the page says, a sentence a language."""
    models = report["costs"]["models"]
    for language, facts in report["languages"].items():
        changed, saved = facts["lines_changed"], facts["tokens_saved"]
        if not changed["changed"]:
            yield f"**{language}** is cut exactly as before, on all {changed['total']:,} lines."
            continue
        less = f"{percent(abs(saved))} {'fewer' if saved >= 0 else 'more'} tokens for the same text"
        cost = [f"{model['flops_per_byte'][language]['ratio'] - 1:+.1%} at {name}" for name, model in models.items()]
        yield (
            f"**{language}**: {less} ({facts['base']['bytes_per_token']:.2f} -> "
            f"{facts['adapted']['bytes_per_token']:.2f} bytes per token); {changed['changed']:,} of "
            f"{changed['total']:,} lines are cut differently. Training FLOPs per byte of text, the larger head "
            f"included: {', '.join(cost)}."
        )
    dead = report["new_pieces"]["dead"]
    if report["new_pieces"]["count"]:
        unused, count = report["new_pieces"]["unused"], report["new_pieces"]["count"]
        yield (
            f"{'No new piece is' if not dead else f'**{dead:,} new pieces are**'} dead; {unused:,} of {count:,} "
            "do not come up in these texts."
        )


def _density(languages: Mapping[str, Any], pictures: Mapping[str, str]) -> Iterator[str]:
    yield from ("## How densely text is written", "")
    yield from _picture("bytes_per_token.png", pictures)
    rows = []
    for language, facts in languages.items():
        base, adapted = facts["base"], facts["adapted"]
        rows.append(
            (
                language,
                f"{base['bytes'] / 1e6:.2f} MB",
                _change(base, adapted, "tokens", ","),
                _change(base, adapted, "bytes_per_token", ".3f"),
                _change(base, adapted, "tokens_per_character", ".3f"),
                "-" if base["fertility"] is None else _change(base, adapted, "fertility", ".3f"),
                f"{percent(base['byte_fallback_share'])} -> {percent(adapted['byte_fallback_share'])}",
                f"{percent(base['line_end_share'])} -> {percent(adapted['line_end_share'])}",
                percent(facts["new_tokens"]),
            )
        )
    head = ("language", "text", "tokens", "bytes per token", "tokens per character", "fertility", "byte fallback",
            "line ends", "new pieces")  # fmt: skip
    yield from table(head, rows)
    yield (
        "Base -> adapted. *Fertility*: tokens per word, a word being a run of characters between white space; `-` for "
        "scripts that put no spaces between words, where tokens per character say it. *Byte fallback*: tokens that "
        "are one byte, or a part of a character, because no piece holds the character; bytes that end a line stand "
        "apart under *line ends*. *New pieces*: tokens of the adapted tokenizer that the base does not have."
    )
    yield ""


def _change(base: Mapping[str, Any], adapted: Mapping[str, Any], key: str, form: str) -> str:
    return f"{base[key]:{form}} -> {adapted[key]:{form}}"


def _recut(languages: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Lines that are cut differently", "")
    rows = [
        (
            language,
            f"{facts['lines_changed']['changed']:,} of {facts['lines_changed']['total']:,}",
            percent(facts["lines_changed"]["changed"] / max(facts["lines_changed"]["total"], 1)),
        )
        for language, facts in languages.items()
    ]
    yield from table(("language", "lines", "share"), rows)
    for language, facts in languages.items():
        changed = facts["lines_changed"]
        # Where nearly all lines change, as they should in the target language, a few show how.
        number = _FEW if 2 * changed["changed"] > changed["total"] else len(changed["examples"])
        for example in changed["examples"][:number]:
            yield f"**{language}** {code(_clipped(example['text']))}"
            yield ""
            yield from table(
                ("", "tokens", "pieces"),
                [(side, f"{len(example[side]):,}", _cut(example[side])) for side in ("old", "new")],
            )


def _new_pieces(report: Mapping[str, Any], pictures: Mapping[str, str]) -> Iterator[str]:
    facts, overlap, dead = report["new_pieces"], report["vocabulary"], report["dead"]
    yield from ("## Pieces", "")
    counts = [
        ("kept from the base", f"{overlap['kept']:,}"),
        ("of these at the base's id", f"{overlap['kept_at_their_id']:,}"),
        ("new", f"{overlap['new']:,}"),
        ("of the base, removed", f"{overlap['removed']:,}"),
        ("new, not met in these texts", f"{facts['unused']:,}"),
        ("new, dead", f"{facts['dead']:,}"),
        ("dead in the whole vocabulary", f"{dead['adapted']['count']:,}"),
        ("dead in the base", f"{dead['base']['count']:,}"),
    ]
    yield from table(("pieces", "number"), counts)
    yield (
        "*Dead*: not produced when its own text is encoded, neither alone nor at the beginning of a line, behind a "
        "letter, between a digit and a line end or between letters. Special tokens, bytes and parts of characters "
        "have no text of their own and are not judged."
    )
    yield ""
    for side in ("adapted", "base"):
        if dead[side]["count"]:
            examples = ", ".join(code(name) for name in dead[side]["examples"])
            yield from (f"Dead in the {side} vocabulary, for example: {examples}.", "")
    yield from _picture("coverage.png", pictures)
    yield from _picture("piece_lengths.png", pictures)
    titles = {
        "most_used": "Most used",
        "sample": "Drawn at random",
        "longest": "Longest",
        "rarest": "Rarest of those met",
    }
    for key, title in titles.items():
        if facts[key]:
            yield from (f"### {title}", "")
            rows = [
                (code(row["piece"]), f"{row['uses']:,}", f"{len(row['old'])}", _cut(row["old"])) for row in facts[key]
            ]
            yield from table(("new piece", "uses", "base tokens", "how the base cuts it"), rows)


def _size(report: Mapping[str, Any]) -> Iterator[str]:
    costs, sizes = report["costs"], report["vocab_size"]
    yield from ("## What the size costs", "")
    yield (
        f"Logits in fp32 of one micro-batch of {costs['micro_batch_size']} x {costs['seq_length']:,} tokens, if they "
        f"are held whole (this tool's loss does not); rows padded to a multiple of {costs['vocab_divisor']} and of TP."
    )
    yield ""
    rows = [
        (
            f"{fit['tensor_model_parallel_size']}",
            "yes" if fit["divides"] else f"no, {sizes['adapted'] % fit['tensor_model_parallel_size']} over",
            f"{fit['padded_vocab_size']:,} ({fit['padded_rows']:,} padded rows)",
            f"{fit['rows']:,}",
            binary_size(fit["logits_bytes"]),
        )
        for fit in costs["tensor_parallel"]
    ]
    yield from table(("TP", f"divides {sizes['adapted']:,}", "padded size", "rows a rank", "logits a rank"), rows)
    costs_of_models = [
        (
            name,
            f"{model['adapted']['hidden_size']:,}",
            *(
                f"{model[side]['parameters'] / 1e6:,.1f} M ({percent(model[side]['parameter_share'])})"
                for side in ("base", "adapted")
            ),
            f"{model['adapted']['flops_per_token'] / model['base']['flops_per_token'] - 1:+.1%}",
        )
        for name, model in costs["models"].items()
    ]
    head = ("model", "hidden size", "embedding and head, base", "adapted", "FLOPs per token")
    yield from table(head, costs_of_models)
    yield from ("### Training FLOPs per byte of text", "")
    ratios_of_languages = [
        (
            language,
            *(
                f"{ratios['base'] / 1e9:,.2f} -> {ratios['adapted'] / 1e9:,.2f} GFLOP ({ratios['ratio'] - 1:+.1%})"
                for ratios in (model["flops_per_byte"][language] for model in costs["models"].values())
            ),
        )
        for language in report["languages"]
    ]
    yield from table(("language", *costs["models"]), ratios_of_languages)
    yield (
        "Forward and backward, head included, causal attention over the stated length. The same context length also "
        "holds more text, by the change in bytes per token."
    )
    yield ""


def _picture(name: str, pictures: Mapping[str, str]) -> Iterator[str]:
    if name in pictures:
        yield from (f"![{pictures[name]}](plots/{name})", "")


def _clipped(text: str) -> str:
    return text if len(text) <= _LINE else text[:_LINE] + "..."


def _cut(pieces: Sequence[str]) -> str:
    """Pieces with a border between them; bytes in short form."""
    return code(" | ".join(pieces[:_CUT])) + (f" and {len(pieces) - _CUT:,} more" if len(pieces) > _CUT else "")
