"""Methods that read text, against plain loops and dense matrices in float64."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_cpt.config.surgery import FocusMethod, parse_method
from megatron_cpt.errors import InputError
from megatron_cpt.surgery import Inputs, MatrixPlan, SurgeryPlan, plan_surgery
from megatron_cpt.surgery.methods.inputs import Reading
from megatron_cpt.surgery.methods.similarity import sparsemax_weights, unit
from megatron_cpt.surgery.methods.static_vectors import static_vectors
from megatron_cpt.tokenizer import Tokenizer, VocabMap, load_tokenizer, map_vocabularies
from tests.surgery.conftest import ENGLISH, JAPANESE


def sentences(words: Sequence[str], joint: str, count: int, seed: int) -> list[str]:
    """Words and parts of words, which follow each other by a rule more often than not.

    So most pieces occur, and their surroundings tell them apart.
    """
    draw = random.Random(seed)
    words = [*words, *(word[:cut] for word in words for cut in range(1, len(word)))]
    lines = []
    for _ in range(count):
        place = draw.randrange(len(words))
        line = []
        for _ in range(9):
            line.append(words[place])
            place = (place + draw.choice((1, 1, 2))) % len(words) if draw.random() < 0.8 else draw.randrange(len(words))
        lines.append(joint.join(line))
    return lines


ENGLISH_TEXT = sentences(ENGLISH, " ", 300, 3)
JAPANESE_TEXT = sentences(JAPANESE, "", 300, 4)
BOTH = [
    *ENGLISH_TEXT,
    *JAPANESE_TEXT,
    *(f"{a} {b}" for a, b in zip(ENGLISH_TEXT[:40], JAPANESE_TEXT[:40], strict=True)),
]


def read_texts(files: Sequence[str], side: str) -> list[str]:
    return ENGLISH_TEXT if side == "source" else BOTH


@pytest.fixture(scope="module")
def inputs(old_tokenizer: Path, new_tokenizer: Path) -> Callable[[], Inputs]:
    old, new = load_tokenizer(old_tokenizer), load_tokenizer(new_tokenizer)
    return lambda: Inputs(old, new, read_texts)


def planned(vocab_map: VocabMap, inputs: Inputs, **settings: Any) -> SurgeryPlan:
    method = parse_method(settings)
    return plan_surgery(vocab_map, method, method, inputs)


def dense_vectors(tokenizer: Tokenizer, texts: Sequence[str], settings: FocusMethod) -> np.ndarray:
    """The definition of `static_vectors`, pair by pair and with a full decomposition."""
    size = tokenizer.vocab_size
    together, occurs = np.zeros((size, size)), np.zeros(size, int)
    for text in texts:
        ids = tokenizer.encode(text)
        for place, id in enumerate(ids):
            occurs[id] += 1
            for other in range(max(0, place - settings.window), min(len(ids), place + settings.window + 1)):
                if other != place:
                    together[id, ids[other]] += settings.window + 1 - abs(place - other)
    rare = occurs < settings.min_count
    together[rare] = together[:, rare] = 0
    frequency = together.sum(1)
    smoothed = np.where(frequency > 0, frequency, 0) ** 0.75
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi = np.log(together * smoothed.sum() / (frequency[:, None] * smoothed[None]))
    ppmi = np.where(together > 0, pmi.clip(min=0), 0)
    left, values, _ = np.linalg.svd(ppmi)
    vectors = (left * np.sqrt(values))[:, : settings.dimension]
    vectors[rare] = 0
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 1e-9, length, 1)


def simplex_by_search(scores: list[float]) -> list[float]:
    """The nearest point of the simplex: of all sets that may be the support, the one whose point is nearest."""
    z, best, found = np.array(scores), np.inf, None
    for size in range(1, len(z) + 1):
        for support in itertools.combinations(range(len(z)), size):
            point = np.zeros(len(z))
            point[list(support)] = z[list(support)] + (1 - z[list(support)].sum()) / size
            distance = ((point - z) ** 2).sum()
            if (point >= 0).all() and distance < best:
                best, found = distance, point
    assert found is not None
    return found.tolist()


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    generator = torch.Generator().manual_seed(6)
    new, old = unit(torch.randn(40, 3, generator=generator)), unit(torch.randn(8, 3, generator=generator))
    for row, (places, weights) in enumerate(sparsemax_weights(new, old)):
        point = np.zeros(8)
        point[np.asarray(places)] = weights
        truth = simplex_by_search((new[row].double() @ old.double().T).tolist())
        assert point.tolist() == pytest.approx(truth, abs=1e-6) and (np.asarray(weights) > 0).all()


@pytest.mark.parametrize(("spread", "longest"), [(1.0, 300), (0.0, 700)])
def test_sparsemax_of_any_support(spread: float, longest: int) -> None:
    """Supports far beyond the first guess, up to all pieces, against bisection of the threshold."""
    generator = torch.Generator().manual_seed(7)
    new = unit(torch.randn(5, 200, generator=generator))
    old = unit(spread * torch.randn(700, 200, generator=generator) + new[0])
    for row, (places, weights) in enumerate(sparsemax_weights(new, old)):
        z = (new[row].double() @ old.double().T).numpy()
        low, high = z.max() - 1, z.max()
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (z - middle).clip(min=0).sum() > 1 else (low, middle)
        truth = (z - low).clip(min=0)
        point = np.zeros(700)
        point[np.asarray(places)] = weights
        assert np.abs(point - truth).max() < 1e-6
        assert len(places) <= longest and (spread or len(places) == 700)


@pytest.mark.parametrize("dimension", [400, 12])
def test_static_vectors(inputs: Callable[[], Inputs], dimension: int) -> None:
    settings = FocusMethod(method="focus", dimension=dimension, window=3, min_count=6)
    tokenizer = inputs().new
    made = static_vectors(tokenizer, Reading(BOTH, 1 << 30), settings).numpy()
    truth = dense_vectors(tokenizer, BOTH, settings)
    known = np.abs(truth).sum(1) > 0
    assert 40 < known.sum() < tokenizer.vocab_size and ((np.abs(made).sum(1) > 0) == known).all()
    # All that is used of vectors is their cosines.
    assert np.abs(made @ made.T - truth @ truth.T).max() < (1e-4 if dimension == 400 else 2e-2)


@pytest.mark.parametrize("target_only", [False, True])
def test_focus(target_only: bool, vocab_map: VocabMap, inputs: Callable[[], Inputs]) -> None:
    settings = {"method": "focus", "dimension": 400, "window": 3, "min_count": 25, "target_only": target_only}
    plan = planned(vocab_map, inputs(), **settings)
    read = BOTH if target_only else [*ENGLISH_TEXT, *BOTH]
    vectors = dense_vectors(inputs().new, read, FocusMethod(**settings))
    known = np.abs(vectors).sum(1) > 0
    vectors[known] -= vectors[known].mean(0)
    vectors[known] /= np.linalg.norm(vectors[known], axis=1, keepdims=True)
    shared = [(id, entry.old_id) for id, entry in enumerate(vocab_map.entries) if entry.origin == "kept" and known[id]]
    fell = [id for id in plan.head.new_rows.tolist() if not known[id]]
    assert 3 < len(fell) < len(plan.head.new_rows) - 10
    for id in plan.head.new_rows.tolist():
        described = plan.row(id)["head"]
        assert described == plan.row(id)["embedding"] and sum(described["weights"]) == pytest.approx(1)
        if id in fell:
            assert described["fallback"] == "mean of pieces"
            assert described["old_ids"] == list(vocab_map.entries[id].old_pieces)
            continue
        z = vectors[[new for new, _ in shared]] @ vectors[id]
        ordered = np.sort(z)[::-1]
        support = max(k for k in range(1, len(z) + 1) if 1 + k * ordered[k - 1] > ordered[:k].sum())
        weights = (z - (ordered[:support].sum() - 1) / support).clip(min=0)
        truth = {old: weight for (_, old), weight in zip(shared, weights.tolist(), strict=True) if weight > 1e-3}
        made = dict(zip(described["old_ids"], described["weights"], strict=True))
        assert {old: made.get(old) for old in truth} == pytest.approx(truth, abs=1e-3)
    assert plan.facts()["methods"]["head"]["fallback_rows"] == len(fell)
    facts = plan.facts()["methods"]["head"]
    assert facts["target_corpus"]["texts"] == len(BOTH) and bool(facts["source_corpus"]) is not target_only


def test_wechsel(vocab_map: VocabMap, inputs: Callable[[], Inputs], tmp_path: Path) -> None:
    dictionary = tmp_path / "pairs.tsv"
    words = list(zip(ENGLISH, JAPANESE, strict=False))
    dictionary.write_text("".join(f"{a}\t{b}\n" for a, b in words) + "\nnowhere\t無無\n", encoding="utf-8")
    settings = {"dimension": 20, "window": 3, "min_count": 10}
    own = {"top_k": 4, "temperature": 0.2, "dictionary": str(dictionary)}
    plan = planned(vocab_map, inputs(), method="wechsel", **settings, **own)

    given, vectors_of = inputs(), FocusMethod(method="focus", **settings)
    x = static_vectors(given.old, Reading(ENGLISH_TEXT, 1 << 30), vectors_of).double().numpy()
    y = static_vectors(given.new, Reading(BOTH, 1 << 30), vectors_of).double().numpy()
    pairs = [(x[e.old_id], y[id]) for id, e in enumerate(vocab_map.entries) if e.origin == "kept"]
    for english, japanese in words:
        for tokenizer, table, word in ((given.old, x, english), (given.new, y, japanese)):
            forms = [tokenizer.encode_bytes(form.encode()) for form in (" " + word, word)]
            mean = table[min(forms, key=len)].sum(0)
            pairs.append(mean / max(np.linalg.norm(mean), 1e-30))  # type: ignore[arg-type]
    paired = [pair for pair in pairs if isinstance(pair, tuple)]
    loose = [pair for pair in pairs if not isinstance(pair, tuple)]
    paired += list(zip(loose[::2], loose[1::2], strict=True))
    used = [(a, b) for a, b in paired if a.any() and b.any()]
    facts = plan.facts()["methods"]["embedding"]
    assert facts["pairs"] == len(used) and facts["source_corpus"]["texts"] == len(ENGLISH_TEXT)
    left, right = np.stack([a for a, _ in used]), np.stack([b for _, b in used])
    turn, _, other = np.linalg.svd(left.T @ right, full_matrices=False)
    turned = x @ turn @ other
    # Procrustes: no other rotation brings the pairs nearer.
    for angle in (0.05, -0.05):
        turned_away = np.eye(20)
        turned_away[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        nearest, another = (np.linalg.norm(left @ q - right) for q in (turn @ other, turn @ other @ turned_away))
        assert nearest < another
    known = [id for id in range(len(x)) if x[id].any()]
    count = 0
    for id in plan.embedding.new_rows.tolist():
        made = plan.row(id)["embedding"]
        if not y[id].any():
            assert made["fallback"] == "mean of pieces"
            continue
        count += 1
        cosine = turned[known] @ y[id]
        best = np.argsort(-cosine)[:4]
        weights = np.exp(cosine[best] / 0.2) / np.exp(cosine[best] / 0.2).sum()
        assert made["old_ids"] == [known[place] for place in best]
        assert made["weights"] == pytest.approx(weights.tolist(), abs=1e-4)
    assert count > 10


def test_too_little_for_wechsel(vocab_map: VocabMap, inputs: Callable[[], Inputs], tmp_path: Path) -> None:
    settings = {"method": "wechsel", "min_count": 10}
    with pytest.raises(InputError, match="give a dictionary, more text, or a smaller dimension"):
        apart = Inputs(
            inputs().old, inputs().new, lambda files, side: ENGLISH_TEXT if side == "source" else JAPANESE_TEXT
        )
        planned(vocab_map, apart, **settings, dimension=20)
    broken = tmp_path / "broken.tsv"
    broken.write_text("river\t川\nriver 川\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"broken.tsv:2 holds 'river 川', expected two words"):
        planned(vocab_map, inputs(), **settings, dictionary=str(broken))
    with pytest.raises(InputError, match="missing.tsv cannot be read"):
        planned(vocab_map, inputs(), **settings, dictionary=str(tmp_path / "missing.tsv"))
    with pytest.raises(InputError, match="occurs 100000 times"):
        planned(vocab_map, inputs(), method="focus", min_count=100_000)
    nothing = Inputs(inputs().old, inputs().new, lambda files, side: iter(["", ""]))
    for method in ("focus", "wechsel", "aligned"):
        with pytest.raises(InputError, match="holds no text"):
            planned(vocab_map, nothing, method=method)


def places(tokenizer: Tokenizer, text: str) -> list[tuple[int, int, int]]:
    """(id, first byte, last byte + 1) of each piece; the space put before a text is byte -1."""
    spans, end = [], 0
    pieces = [(id, tokenizer.piece_bytes(id) or b"") for id in tokenizer.encode(text)]
    end = len(text.encode()) - sum(len(data) for _, data in pieces)
    for id, data in pieces:
        spans.append((id, end, end + len(data)))
        end += len(data)
    return spans


@pytest.mark.parametrize("other_family", [False, True])
def test_aligned(
    other_family: bool, vocab_map: VocabMap, inputs: Callable[[], Inputs], byte_level: Path, tmp_path: Path
) -> None:
    given = inputs()
    texts = [*JAPANESE_TEXT[:30], "", "river 川 é", *ENGLISH_TEXT[:5], " 川が"]
    if other_family:
        given = Inputs(given.old, load_tokenizer(byte_level), lambda files, side: texts)
        vocab_map = map_vocabularies(given.old, given.new)
    else:
        given = Inputs(given.old, given.new, lambda files, side: texts)
    plan = planned(vocab_map, given, method="aligned")
    overlaps: dict[int, Counter[int]] = defaultdict(Counter)
    for text in texts:
        for id, start, stop in places(given.new, text):
            for old, old_start, old_stop in places(given.old, text):
                if max(start, old_start) < min(stop, old_stop):
                    overlaps[id][old] += 1
    seen = 0
    for id in plan.head.new_rows.tolist():
        made = plan.row(id)["head"]
        if id not in overlaps:
            assert made["fallback"] == "mean of pieces"
            continue
        seen += 1
        truth = {old: count / overlaps[id].total() for old, count in overlaps[id].items()}
        assert dict(zip(made["old_ids"], made["weights"], strict=True)) == pytest.approx(truth, abs=1e-6)
    assert seen > 10 and plan.head.method["target_corpus"]["skipped"] == 0


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of Japanese and English."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(BOTH, trainer)
    folder = tmp_path_factory.mktemp("bytes")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_texts_that_are_spelt_in_two_ways(inputs: Callable[[], Inputs], tmp_path: Path) -> None:
    """A normalising tokenizer changes the text; what it changes is counted and left out."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(ENGLISH_TEXT, tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    made.save(str(tmp_path / "tokenizer.json"))
    new, old = load_tokenizer(tmp_path), inputs().old
    vocab_map = map_vocabularies(old, new)
    some = Inputs(old, new, lambda files, side: ["River", "the river", "THE"])
    assert planned(vocab_map, some, method="aligned").head.method["target_corpus"]["skipped"] == 2
    with pytest.raises(InputError, match="spell none of 1 texts alike"):
        planned(vocab_map, Inputs(old, new, lambda files, side: ["River"]), method="aligned")


@pytest.mark.parametrize("method", ["focus", "wechsel", "aligned"])
def test_the_same_bytes_every_time(
    method: str, vocab_map: VocabMap, inputs: Callable[[], Inputs], tmp_path: Path
) -> None:
    """Also with another number of threads; and a saved plan keeps what fell back."""
    settings = {} if method == "aligned" else {"dimension": 20, "min_count": 10}
    threads, plans = torch.get_num_threads(), []
    for number, count in enumerate((1, 2, 2)):
        torch.set_num_threads(count)
        try:
            plan = planned(vocab_map, inputs(), method=method, **settings)
        finally:
            torch.set_num_threads(threads)
        plan.save(tmp_path / str(number))
        plans.append((tmp_path / str(number) / "plan.safetensors").read_bytes())
    assert plans[0] == plans[1] == plans[2]
    loaded = SurgeryPlan.load(tmp_path / "0")
    assert loaded.facts() == plan.facts()
    assert [loaded.row(id) for id in range(vocab_map.new_size)] == [plan.row(id) for id in range(vocab_map.new_size)]


def test_only_so_much_is_read(inputs: Callable[[], Inputs], vocab_map: VocabMap) -> None:
    taken = 0

    def endless(files: Sequence[str], side: str) -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield JAPANESE_TEXT[taken % 100]

    given = Inputs(inputs().old, inputs().new, endless)
    plan: MatrixPlan = planned(vocab_map, given, method="aligned", max_bytes=20_000).embedding
    facts = plan.method["target_corpus"]
    assert 19_000 < facts["bytes"] <= 20_000 and facts["texts"] == taken - 1  # and once for both matrices
