"""Building: the ids are the tokenizer's, the bytes are counted, and a failure leaves nothing to load."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import megatron_cpt.data.writing
from megatron_cpt.config.manifest import sha256_file
from megatron_cpt.data import (
    Document,
    IndexedDataset,
    SamplePlan,
    build_dataset,
    describe_document,
    describe_sample,
    tokenizer_of,
    verify_dataset,
)
from megatron_cpt.errors import DataError, VerificationError


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False)])
def test_every_document_is_what_sentencepiece_gives(
    bos: bool, eos: bool, documents: list[Document], tokenizer: Path, tmp_path: Path
) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx", append_bos=bos, append_eos=eos)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    dataset = IndexedDataset(tmp_path / "x")
    assert dataset.num_documents == len(documents)
    for number, document in enumerate(documents):
        assert dataset.document(number).tolist() == [1] * bos + reference.encode(document.text) + [2] * eos


def test_the_manifest_counts_exactly(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    with_empty = [*documents[:3], Document("", "xx", "m"), *documents[3:], Document("", "xx", "m")]
    manifest = build_dataset(iter(with_empty), tokenizer, tmp_path / "x", "xx", inputs={"corpus": "ab"})
    assert manifest == json.loads((tmp_path / "x.manifest.json").read_text())
    dataset = IndexedDataset(tmp_path / "x")
    text_bytes = sum(len(document.text.encode()) for document in documents)
    tokens = sum(len(dataset.document(number)) for number in range(len(documents)))
    assert (manifest["documents"], manifest["empty_documents"]) == (len(documents), 2)
    assert (manifest["text_bytes"], manifest["tokens"]) == (text_bytes, tokens)
    assert manifest["bytes_per_token"] == text_bytes / tokens
    assert (manifest["language"], manifest["vocab_size"], dataset.language) == ("xx", dataset.vocab_size, "xx")
    assert manifest["tokenizer_sha256"] == sha256_file(tokenizer) == manifest["inputs"]["tokenizer"]
    assert manifest["inputs"]["corpus"] == "ab"
    for ending in ("bin", "idx"):
        path = tmp_path / f"x.{ending}"
        assert manifest["outputs"][ending] == {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx", "x.manifest.json"]


def test_the_result_does_not_depend_on_batches(
    documents: list[Document], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_dataset(documents, tokenizer, tmp_path / "a", "xx")
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("megatron_cpt.data.build_memory._BATCH_CHARACTERS", 500)
    second = build_dataset(documents, tokenizer, tmp_path / "b", "xx", on_progress=lambda *at: seen.append(at))
    assert first.pop("checked_documents") < second.pop("checked_documents")
    assert first == second
    assert len(seen) > 10 and seen[-1] == (len(documents), len(documents))


def test_a_failure_leaves_the_dataset_that_stood_there(
    documents: list[Document], tokenizer: Path, tmp_path: Path
) -> None:
    def failing() -> Iterator[Document]:
        yield from documents
        raise DataError("corpus.jsonl:121: not a line of JSON")

    with pytest.raises(DataError, match=":121:"):
        build_dataset(failing(), tokenizer, tmp_path / "x", "xx")
    assert not list(tmp_path.iterdir())
    build_dataset(documents[:5], tokenizer, tmp_path / "x", "xx")
    with pytest.raises(DataError, match=":121:"):
        build_dataset(failing(), tokenizer, tmp_path / "x", "xx", overwrite=True)
    assert len(list(tmp_path.iterdir())) == 3
    assert verify_dataset(tmp_path / "x")["documents"] == 5


@pytest.mark.parametrize("step", ["replace", "write_manifest"])
def test_a_crash_while_files_are_moved_leaves_nothing_loadable(
    step: str, documents: list[Document], tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset(documents[:5], tokenizer, tmp_path / "x", "xx")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    owner = megatron_cpt.data.writing.os if step == "replace" else megatron_cpt.data.writing
    monkeypatch.setattr(owner, step, crash)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(documents, tokenizer, tmp_path / "x", "xx", overwrite=True)
    monkeypatch.undo()
    with pytest.raises(DataError, match="unfinished"):
        IndexedDataset(tmp_path / "x")
    assert build_dataset(documents, tokenizer, tmp_path / "x", "xx")["documents"] == len(documents)


def test_bad_requests_are_refused_and_write_nothing(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    for nothing in ([], [Document("", "xx", "m")]):
        with pytest.raises(DataError, match="the corpus is empty"):
            build_dataset(nothing, tokenizer, tmp_path / "x", "xx")
    assert not list(tmp_path.iterdir())
    build_dataset(documents, tokenizer, tmp_path / "x", "xx")
    with pytest.raises(DataError, match="already holds a dataset"):
        build_dataset(documents[:5], tokenizer, tmp_path / "x", "xx")
    assert IndexedDataset(tmp_path / "x").num_documents == len(documents)


def test_a_tokenizer_without_bos_is_refused_where_bos_is_wanted(documents: list[Document], tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([document.text for document in documents]),
        model_prefix=str(tmp_path / "bare"),
        vocab_size=80,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(DataError, match="has no bos piece"):
        build_dataset(documents, tmp_path / "bare.model", tmp_path / "x", "xx")
    manifest = build_dataset(documents, tmp_path / "bare.model", tmp_path / "x", "xx", append_bos=False)
    assert verify_dataset(tmp_path / "x")["tokens"] == manifest["tokens"]


def test_verify_finds_what_the_sizes_do_not_show(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx")
    seen: list[tuple[int, int]] = []
    facts = verify_dataset(tmp_path / "x", on_progress=lambda *at: seen.append(at))
    stream = IndexedDataset(tmp_path / "x").stream
    assert facts["largest_id"] == stream.max() and facts["distinct_ids"] == len(np.unique(stream))
    assert seen[-1] == (facts["tokens"], facts["tokens"])
    sound = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(sound[:-5] + bytes([sound[-5] ^ 1]) + sound[-4:])
    with pytest.raises(VerificationError, match=r"x\.bin was changed"):
        verify_dataset(tmp_path / "x")
    for content, error, message in (
        (b"\x07\x00" + sound[2:], VerificationError, "document 0 .* lacks its bos"),
        (sound[:-2] + b"\x07\x00", VerificationError, "document 119 .* lacks its eos"),
        (sound[:4] + b"\xff\xff" + sound[6:], DataError, "token id 65535 at token 2"),
    ):
        (tmp_path / "x.bin").write_bytes(content)
        manifest = json.loads((tmp_path / "x.manifest.json").read_text())
        manifest["outputs"]["bin"]["sha256"] = sha256_file(tmp_path / "x.bin")
        (tmp_path / "x.manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(error, match=message):
            verify_dataset(tmp_path / "x")


def test_a_document_and_a_sample_are_shown_decoded(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx")
    dataset = IndexedDataset(tmp_path / "x")
    loaded = tokenizer_of(dataset)
    shown = describe_document(dataset, loaded, 17)
    assert shown["text"] == documents[17].text and shown["start"] == dataset.document_starts[17]
    sample = describe_sample(SamplePlan([(dataset, "xx")], 64, 5), loaded, 3)
    ids = [id for piece in sample["pieces"] for id in piece["ids"]]
    start = sample["pieces"][0]["start"]
    assert start == sample["window"] * 64 and ids == dataset.stream[start : start + 65].tolist()
    assert [piece["ids"][0] for piece in sample["pieces"][1:]] == [1] * (len(sample["pieces"]) - 1)


def test_another_tokenizer_is_refused(documents: list[Document], tokenizer: Path, tmp_path: Path) -> None:
    build_dataset(documents, tokenizer, tmp_path / "x", "xx")
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.read_bytes() + b"\x9a\x06\x00")  # an unknown empty record: another file, same pieces
    dataset = IndexedDataset(tmp_path / "x")
    with pytest.raises(DataError, match="was built with tokenizer"):
        tokenizer_of(dataset, other)
    assert tokenizer_of(dataset, tokenizer).sha256 == sha256_file(tokenizer)
