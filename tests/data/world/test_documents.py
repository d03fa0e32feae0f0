"""The documents of the built-in world: the same everywhere, disjoint between the splits, well formed."""

import hashlib
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from megatron_cpt.data.world import World
from megatron_cpt.data.world.words import entities
from megatron_cpt.errors import DataError

ROOT = Path(__file__).parents[3]
COUNTS = {"train": 2500, "held_out": 1000}
INFORMATIVE = {"en": 32, "ja": 16}


@cache
def texts(language, split="train", seed=1):
    return tuple(document.text for document in World(seed).documents(language, COUNTS[split], split))


def sentences(text, language):
    """A reading of what a sentence is that is not the generator's: a run of text up to its closing marks."""
    marks = ".!?\n" if language == "en" else "。！？\n"
    return {found.strip(" \"'「」\n") for found in re.findall(rf"[^{marks}]+[{marks}]*", text)}


def all_sentences(language, split, seed=1):
    found = set().union(*(sentences(text, language) for text in texts(language, split, seed)))
    return {sentence for sentence in found if len(sentence) >= INFORMATIVE[language]}


def test_first_documents_are_the_same_in_every_process():
    code = (
        "import hashlib; from megatron_cpt.data.world import World\n"
        "for language in ('en', 'ja'):\n"
        "    texts = [d.id + d.text for s in ('train', 'held_out') for d in World(3).documents(language, 100, s)]\n"
        "    print(hashlib.sha256(''.join(texts).encode()).hexdigest())"
    )
    outputs = set()
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        outputs.add(run.stdout)
    here = [
        hashlib.sha256(
            "".join(d.id + d.text for s in ("train", "held_out") for d in World(3).documents(language, 100, s)).encode()
        ).hexdigest()
        for language in ("en", "ja")
    ]
    assert outputs == {"\n".join(here) + "\n"}


def test_a_document_depends_on_its_number_alone():
    few, many = (list(World(5).documents("ja", count)) for count in (5, 40))
    assert few == many[:5]
    assert [document.text for document in few] != [document.text for document in World(6).documents("ja", 5)]


@pytest.mark.parametrize("language", ["en", "ja"])
def test_documents_have_the_promised_size_name_and_variety(language):
    documents = list(World(1).documents(language, 2000))
    assert all(200 <= len(document.text.encode()) <= 1200 for document in documents)
    assert {document.language for document in documents} == {language}
    assert len({document.id for document in documents}) == len(documents)
    assert not any("#" in document.id for document in documents)
    assert len({document.text for document in documents}) >= 0.998 * len(documents)
    assert len(set().union(*(sentences(document.text, language) for document in documents))) > 9000


@pytest.mark.parametrize("language", ["en", "ja"])
@pytest.mark.parametrize("other_seed", [1, 2])
def test_no_informative_sentence_is_in_both_splits(language, other_seed):
    train, held_out = all_sentences(language, "train"), all_sentences(language, "held_out", other_seed)
    assert len(train) > 5000 and len(held_out) > 2000
    assert not train & held_out


@pytest.mark.parametrize("language", ["en", "ja"])
def test_no_entity_has_facts_in_both_splits(language):
    names = {entity.name for entity in entities() if entity.kind != "town"}  # towns are also places of stories
    seen = {
        split: names & set(re.findall(r"[A-Z][a-z]+", " ".join(texts(language, split))))
        for split in ("train", "held_out")
    }
    assert len(seen["train"]) > 3 * len(seen["held_out"]) > 60
    assert not seen["train"] & seen["held_out"]


@pytest.mark.parametrize("language", ["en", "ja"])
def test_no_problem_is_in_both_splits(language):
    pattern = r"(\d+) ?(\+|x|×|＋|plus|times|足す|かける) ?(\d+)"
    train, held_out = (set(re.findall(pattern, " ".join(texts(language, split)))) for split in ("train", "held_out"))
    assert len(train) > 100 and len(held_out) > 30
    assert not train & held_out


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_english_is_plain_ascii_without_template_marks(split):
    for text in texts("en", split):
        assert text.isascii(), text
        assert not re.search(r"[{}\[\]<>|_]|  | [,.!?]|\.\.|,,", text), text
        assert not re.search(r"\b(\w+) \1\b", text.replace("that that", "")), text
        assert text[0].isupper() or text[0] in '"0123456789', text


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_japanese_holds_no_latin_words_but_names(split):
    names = {entity.name for entity in entities()}
    for text in texts("ja", split):
        assert set(re.findall(r"[A-Za-z]+", text)) <= names, text
        assert not re.search(r"[{}\[\]<>|_/ ]|。。|、、|、。|はは、", text), text
        assert not re.search(r"[ㄱ-ㆎ가-힣]", text), text
        assert text.count("「") == text.count("」"), text
        assert re.search(r"[。」？]$|より$", text), text


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_a_japanese_document_keeps_to_one_style(split):
    polite = r"(です|ます|でした|ました|ません|でしょう|ましょう|ください|なさい)か?。"
    plain = r"([うくぐすつぬぶむるただ]|[^でま]す|[^せ]ん|ない|[暖涼暑寒]い|しい|よい|さい)。"
    for text in texts("ja", split):
        outside = re.sub(r"「[^「」]*」|おやすみなさい。|答え[^\n]*|問い[^\n]*|質問[^\n]*", "", text)
        ends = [found[-8:] for found in re.findall(r"[^。\n]+。", outside)]
        styles = {
            "polite" if re.search(polite, end) else "plain" for end in ends if re.search(f"{polite}|{plain}", end)
        }
        assert len(styles) < 2, text


def test_unknown_language_and_split_are_refused():
    with pytest.raises(DataError, match="language 'de'"):
        World(1).documents("de", 1)
    with pytest.raises(DataError, match="split 'test'"):
        World(1).documents("en", 1, "test")
