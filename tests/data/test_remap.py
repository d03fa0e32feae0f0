"""Ids moved to a new tokenizer equal a dataset that was built with it, or are refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.data import Document, build_dataset, remap_dataset, verify_dataset
from megatron_cpt.errors import DataError, TokenizerError
from megatron_cpt.tokenizer import VocabMap, extend_tokenizer, load_tokenizer, train_tokenizer
from megatron_cpt.tokenizer.vocab_map import map_vocabularies

WORDS = "the river runs past a quiet town and nobody asks where it goes in winter".split()
JAPANESE = "静かな 川が 町を 流れて いる 冬の 朝 光が 窓から 差し込む".split()


def lines(words: list[str], seed: int, count: int, glue: str = " ") -> list[str]:
    draw = random.Random(seed)
    return [glue.join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer, its extension, one trained anew (with the map), and datasets of the first."""
    root = tmp_path_factory.mktemp("remap")
    found = {name: root / name for name in ("old", "extended", "other", "english", "mixed")}
    train_tokenizer(lines(WORDS, 1, 300), 320, found["old"])
    extend_tokenizer(found["old"], lines(JAPANESE, 2, 200, ""), 60, "ja", 8, found["extended"])
    train_tokenizer(lines(WORDS[:9], 3, 300), 310, found["other"])
    old, other = (load_tokenizer(found[name]) for name in ("old", "other"))
    map_vocabularies(old, other).save(found["other"] / "vocab_map.json")
    english = [Document(text, "x", str(number)) for number, text in enumerate(lines(WORDS, 4, 400))]
    japanese = [Document(text, "x", f"j{number}") for number, text in enumerate(lines(JAPANESE, 5, 20, ""))]
    build_dataset(english, found["old"], found["english"], "en")
    build_dataset(english + japanese, found["old"], found["mixed"], "en")
    build_dataset(english, found["extended"], root / "built", "en")
    return {**found, "built": root / "built"}


def test_as_if_built_with_the_new_tokenizer(folders: dict[str, Path], tmp_path: Path) -> None:
    manifest = remap_dataset(folders["english"], folders["extended"], tmp_path / "moved")
    for ending in ("bin", "idx"):
        assert Path(f"{tmp_path / 'moved'}.{ending}").read_bytes() == Path(f"{folders['built']}.{ending}").read_bytes()
    assert verify_dataset(tmp_path / "moved", inputs=True)["inputs_checked"] == 1
    built = json.loads(Path(f"{folders['built']}.manifest.json").read_text())
    differ = {name for name in built if built[name] != manifest.get(name)}
    assert differ == {"inputs", "encoder", "checked_documents"}
    assert manifest["remapped"] == {"checked_documents": 400, "exact_text": 400, "same_cut": 400, "seed": 1}
    assert manifest["inputs"]["tokenizer"] == load_tokenizer(folders["extended"]).sha256
    with pytest.raises(DataError, match="already holds a dataset"):
        remap_dataset(folders["english"], folders["extended"], tmp_path / "moved")


def test_a_wrong_map_is_found(folders: dict[str, Path], tmp_path: Path) -> None:
    """Every id in use is kept by it, and the numbers are others."""
    swapped = shutil.copytree(folders["extended"], tmp_path / "swapped")
    vocab_map = VocabMap.load(swapped)
    entries = list(vocab_map.entries)
    one, other = load_tokenizer(folders["old"]).encode("river town")[-2:]
    entries[one], entries[other] = entries[other], entries[one]
    VocabMap(320, vocab_map.new_size, vocab_map.old_sha256, vocab_map.new_sha256, tuple(entries)).save(
        swapped / "vocab_map.json"
    )
    with pytest.raises(DataError, match=r"in another way, the first is document \d+: build the dataset again"):
        remap_dataset(folders["english"], swapped, tmp_path / "moved")
    assert not list(tmp_path.glob("moved*"))


def test_what_cannot_be_remapped(folders: dict[str, Path], tmp_path: Path) -> None:
    cases = [
        ("mixed", "extended", DataError, r"cuts 20 of 420 documents .* \(4.8%\) in another way"),
        ("english", "other", DataError, r"pieces that the new tokenizer lacks .* build the dataset again"),
        ("built", "extended", TokenizerError, "give the tokenizer that was made from the dataset's"),
        ("english", "old", TokenizerError, "vocab_map.json"),
    ]
    for dataset, tokenizer, error, message in cases:
        with pytest.raises(error, match=message):
            remap_dataset(folders[dataset], folders[tokenizer], tmp_path / "moved")
        assert not list(tmp_path.iterdir())


def test_the_verb(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "remap", str(folders["english"]), "--tokenizer", str(folders["extended"])]
    assert main([*words, "--output", str(tmp_path / "moved"), "--documents", "50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["remapped"]["same_cut"] == 50
    assert main([*words[:3], "--tokenizer", str(folders["old"]), "--output", str(tmp_path / "again")]) == 2
    assert "vocab_map.json" in capsys.readouterr().err
