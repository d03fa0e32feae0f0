"""The proof finds and lists every difference, counted again here by the libraries themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.errors import TokenizerError, VerificationError
from megatron_cpt.tokenizer import Peer, convert_tokenizer, fast_slow_mismatches, load_tokenizer, verify_tokenizer
from megatron_cpt.tokenizer.verify import HARD_TEXTS, differing_spans

SPACES = [" " * length + "x" for length in range(40)]


def with_merges_by_id(folder: Path, copy: Path) -> Path:
    """The folder with the merge list ranked by id, as a conversion that never sees the scores ranks it."""
    shutil.copytree(folder, copy)
    value = json.loads((copy / "tokenizer.json").read_text())
    vocabulary, merges = value["model"]["vocab"], value["model"]["merges"]
    merges.sort(key=lambda merge: vocabulary[merge.replace(" ", "")])
    (copy / "tokenizer.json").write_text(json.dumps(value))
    return copy


def test_every_wrong_merge_is_listed(with_runs: Path, tmp_path: Path, english: list[str]) -> None:
    assert fast_slow_mismatches(with_runs, english) == {"mismatches": 0, "total": 400, "examples": []}
    wrong = with_merges_by_id(with_runs, tmp_path / "wrong")
    texts = [*HARD_TEXTS, *english, *SPACES]
    slow = sentencepiece.SentencePieceProcessor(model_file=str(wrong / "tokenizer.model"))
    fast = tokenizers.Tokenizer.from_file(str(wrong / "tokenizer.json"))
    differing = {
        number: (slow.encode(text, out_type=str), fast.encode(text, add_special_tokens=False).tokens)
        for number, text in enumerate(texts, start=1)
        if slow.encode(text) != fast.encode(text, add_special_tokens=False).ids
    }
    listed: list[dict[str, Any]] = []
    result = verify_tokenizer(wrong, [*english, *SPACES], on_mismatch=listed.append)
    assert {item["number"]: (item["expected"], item["got"]) for item in listed} == differing
    assert result["mismatches"] == result["readers"]["tokenizer.json"] == len(differing) > 10
    assert result["total"] == len(texts) and not result["manifest"]
    for item in listed:
        assert item["text"] == texts[item["number"] - 1]
        for span in item["differences"]:
            assert "".join(span["expected"]) == "".join(span["got"]) and span["expected"] != span["got"]
    few = fast_slow_mismatches(wrong, [*english, *SPACES])
    assert 5 == len(few["examples"]) < few["mismatches"] == sum(number > len(HARD_TEXTS) for number in differing)


def test_hard_texts_cover_what_is_known_to_part() -> None:
    together = "\n".join(HARD_TEXTS)
    for needed in (
        "   ",
        "\t",
        "\r\n",
        "\u2581",
        "</s>",
        "<unk>",
        "<0x41>",
        "\u200d",
        "\uff21",
        "\u3000",
        "\x00",
        "\ufffd",
    ):
        assert needed in together
    assert any(text.startswith(" l") for text in HARD_TEXTS) and "" in HARD_TEXTS


def test_peers(extended: Path, japanese: list[str]) -> None:
    reference = load_tokenizer(extended)

    def encode(texts: Any) -> list[list[int]]:
        return [
            ids[:-1] if text == japanese[7] else ids
            for text, ids in zip(texts, reference.encode_batch(texts), strict=True)
        ]

    peers = [
        Peer("the same", reference.encode_batch, reference.decode),
        Peer("shorter", encode),
        Peer("decodes wrongly", reference.encode_batch, lambda ids: reference.decode(ids).replace("\t", " ")),
    ]
    listed: list[dict[str, Any]] = []
    result = verify_tokenizer(extended, japanese, peers, listed.append)
    tabs = sum("\t" in text for text in HARD_TEXTS)
    assert result["readers"] == {
        "tokenizer.json": 0,
        "the same": 0,
        "shorter": japanese.count(japanese[7]),
        "decodes wrongly": tabs,
    }
    assert all("got_text" in item and not item["differences"] for item in listed if item["peer"] == "decodes wrongly")


def test_spans() -> None:
    first, second = ["\u2581a", "b", "c", "de", "<0x0A>", "f"], ["\u2581a", "bc", "de", "<0x0A>", "f"]
    assert list(differing_spans(first, second)) == [(["b", "c"], ["bc"])]
    assert list(differing_spans(["ab", "c", "de", "f"], ["a", "bc", "d", "ef"])) == [
        (["ab", "c"], ["a", "bc"]),
        (["de", "f"], ["d", "ef"]),
    ]
    assert list(differing_spans(["x", "a"], ["x", "bb"])) == [(["a"], ["bb"])]
    assert list(differing_spans([], ["a"])) == [([], ["a"])]
    assert list(differing_spans(["a"], ["a"])) == []


def test_whole_folder(extended: Path, tmp_path: Path, japanese: list[str]) -> None:
    result = verify_tokenizer(extended, japanese)
    assert result["mismatches"] == 0 and result["total"] == 400 + len(HARD_TEXTS) and result["manifest"]
    assert result["vocab_size"] == load_tokenizer(extended).vocab_size
    assert result["vocab_map"]["special"] == 3
    copy = tmp_path / "copy"
    shutil.copytree(extended, copy)
    (copy / "tokenizer.json").write_text((extended / "tokenizer.json").read_text() + " ")
    with pytest.raises(VerificationError, match="tokenizer.json is not the file"):
        verify_tokenizer(copy, [])
    (copy / "manifest.json").unlink()
    with pytest.raises(TokenizerError, match="unfinished"):
        verify_tokenizer(copy, [])


def test_a_map_of_another_vocabulary(extended: Path, base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(extended, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name in ("tokenizer.model", "tokenizer.json"):
        shutil.copy(base / name, copy)
        manifest["outputs"][name] = sha256_file(copy / name)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(VerificationError, match="another vocabulary"):
        verify_tokenizer(copy, [])


def test_folders_of_others(base: Path, tmp_path: Path, english: list[str]) -> None:
    """A model's folder with a manifest of its own, a tokenizer.model alone, a tokenizer.json alone."""
    for name in ("tokenizer.model", "tokenizer.json"):
        shutil.copy(base / name, tmp_path)
    (tmp_path / "manifest.json").write_text('{"kind": "checkpoint"}')
    result = verify_tokenizer(tmp_path, english)
    assert result["readers"] == {"tokenizer.json": 0} and not result["manifest"]
    alone = verify_tokenizer(tmp_path / "tokenizer.model", english)
    assert alone["readers"] == {} and alone["reference"] == "tokenizer.model"
    (tmp_path / "tokenizer.model").unlink()
    assert verify_tokenizer(tmp_path, english)["reference"] == "tokenizer.json"
    with pytest.raises(TokenizerError, match=r"no tokenizer\.model"):
        fast_slow_mismatches(tmp_path, ["text"])


def test_convert(with_runs: Path, tmp_path: Path, english: list[str]) -> None:
    """The files of a bare model agree with it; a folder that adds tokens is refused."""
    model = tmp_path / "tokenizer.model"
    shutil.copy(with_runs / "tokenizer.model", model)
    made = convert_tokenizer(model, tmp_path / "new")
    assert made["sha256"] == sha256_file(tmp_path / "new" / "tokenizer.model") == sha256_file(model)
    result = verify_tokenizer(tmp_path / "new", [*english, *SPACES])
    assert result["mismatches"] == 0 and result["manifest"]
    with pytest.raises(TokenizerError, match="already holds files"):
        convert_tokenizer(model, tmp_path / "new")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": made["vocab_size"]}))
    with pytest.raises(TokenizerError, match="adds 1 tokens"):
        convert_tokenizer(tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()
