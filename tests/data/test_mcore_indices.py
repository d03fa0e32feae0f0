"""Index files against those that megatron-core builds itself, byte for byte, and read by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.data import Document, IndexedDataset, build_dataset
from megatron_cpt.data.mcore_indices import McoreSettings, split_matrix, write_mcore_indices
from megatron_cpt.errors import DataError
from tests.data.conftest import largest_file
from tests.data.test_windows import write_dataset


@pytest.fixture(scope="module")
def prefix(documents: list[Document], tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("mcore") / "x"
    build_dataset(documents, tokenizer, prefix, "xx")
    return prefix


def of_megatron(prefix: Path, tokenizer: Path, cache: Path, settings: McoreSettings) -> list[Any]:
    """Megatron's datasets of the three splits, with their indices in `cache`."""
    from megatron_cpt.runtime.engine import install_engine

    install_engine("cpu")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    config = GPTDatasetConfig(
        random_seed=settings.seed,
        sequence_length=settings.seq_length,
        blend=([str(prefix)], None),
        split=settings.split,
        path_to_cache=str(cache),
        tokenizer=MegatronTokenizer.from_pretrained(str(tokenizer), metadata_path={"library": "sentencepiece"}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return list(BlendedMegatronDatasetBuilder(GPTDataset, list(settings.num_samples), lambda: True, config).build())


def compare(prefix: Path, tokenizer: Path, folder: Path, settings: McoreSettings) -> dict[str, Any]:
    """Write our files and let Megatron build its own; they are the same. What is returned is our report."""
    ours, theirs = folder / "ours", folder / "theirs"
    written = write_mcore_indices(IndexedDataset(prefix), ours, settings)
    built = of_megatron(prefix, tokenizer, theirs, settings)
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    for path in theirs.iterdir():
        assert (ours / path.name).read_bytes() == path.read_bytes(), path.name
    assert [len(dataset) for dataset in built if dataset is not None] == [each["samples"] for each in written.values()]
    return written


@pytest.mark.parametrize(
    "settings",
    [
        McoreSettings(32, (100, 5, 2), split="900,60,40"),
        McoreSettings(32, (100, 5, 2), seed=7, split="1"),
        McoreSettings(16, (1111, 1, 90), seed=2**32 - 1, split="50,0,50"),
        McoreSettings(64, (None, None, None), split="0.8,0.15,0.05"),
        McoreSettings(1, (5, 3000, 20_000), split="98,1,1"),
        McoreSettings(7, (2, 3, 4), split="99,1,1"),
        McoreSettings(1000, (9, 9, 9), split="1,1,1"),
    ],
    ids=str,
)
def test_files_are_megatrons_byte_for_byte(
    settings: McoreSettings, prefix: Path, tokenizer: Path, tmp_path: Path
) -> None:
    compare(prefix, tokenizer, tmp_path, settings)


def test_a_short_last_epoch_is_shuffled_by_itself(prefix: Path, tokenizer: Path, tmp_path: Path) -> None:
    dataset = IndexedDataset(prefix)
    two, three = ((epochs * dataset.num_tokens - 1) // 16 for epochs in (2, 3))
    for num_samples, alone in ((two + 2, True), (three, False)):
        settings = McoreSettings(16, (num_samples, None, None), split="1")
        written = compare(prefix, tokenizer, tmp_path / str(num_samples), settings)["train"]
        index = np.load(f"{written['name']}-document_index.npy").reshape(3, -1)
        assert written["epochs"] == 3
        assert (sorted(index[-1].tolist()) == list(range(dataset.num_documents))) == alone


def test_megatron_reads_them_without_building(
    prefix: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = McoreSettings(32, (300, 5, 2), split="900,60,40")
    expected = of_megatron(prefix, tokenizer, tmp_path / "theirs", settings)
    write_mcore_indices(IndexedDataset(prefix), tmp_path / "ours", settings)
    from megatron.core.datasets import gpt_dataset

    monkeypatch.setattr(gpt_dataset, "_build_document_index", lambda *_: pytest.fail("it builds"))
    read = of_megatron(prefix, tokenizer, tmp_path / "ours", settings)
    for ours, theirs in zip(read, expected, strict=True):
        assert len(ours) == len(theirs)
        for number in range(0, len(ours), 37):
            assert all((ours[number][name] == theirs[number][name]).all() for name in ("tokens", "labels"))


def test_another_name_and_tokenizer_stand_in_the_description(prefix: Path, tmp_path: Path) -> None:
    dataset = IndexedDataset(prefix)
    names = {
        write_mcore_indices(dataset, tmp_path, settings)["train"]["name"]
        for settings in (
            McoreSettings(32, [9]),
            McoreSettings(32, [9], dataset_path="/elsewhere/x"),
            McoreSettings(32, [9], tokenizer={"class": "_Llama2Tokenizer", "tokenizer_path": ["t.model"]}),
        )
    }
    assert len(names) == 3
    written = [Path(f"{name}-description.txt").read_text() for name in names]
    assert sum('"/elsewhere/x"' in text for text in written) == sum("_Llama2Tokenizer" in text for text in written) == 1
    assert not list(tmp_path.glob(".*"))


def test_impossible_settings_are_refused(prefix: Path, tmp_path: Path) -> None:
    dataset = IndexedDataset(prefix)
    for settings, message in (
        (McoreSettings(0, [1]), "seq_length 0"),
        (McoreSettings(8, [1], seed=2**32), "expected at least 1, 0 to"),
        (McoreSettings(8, []), "0 numbers of samples"),
        (McoreSettings(8, [0]), "0 samples of train"),
        (McoreSettings(10**6, [None]), "has no sample of 1000000 tokens"),
        (McoreSettings(8, [1, 1], split="1000,1"), "the valid split of .* 0 tokens"),
    ):
        with pytest.raises(DataError, match=message):
            write_mcore_indices(dataset, tmp_path / "none", settings)
    with pytest.raises(DataError, match="does not say which tokenizer"):
        write_mcore_indices(write_dataset(tmp_path / "x", [50]), tmp_path / "none", McoreSettings(8, [1], split="1"))
    assert not list(tmp_path.glob("none/*"))


@pytest.mark.parametrize("split", ["", "a", "1,2,3,4", "0,0", "1.2.3", ".,1"])
def test_impossible_splits_are_refused(split: str) -> None:
    with pytest.raises(DataError, match="expected one to three shares"):
        split_matrix(split)


def test_the_command(prefix: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["data", "indices", str(prefix), "--seq-length", "32", "--split", "900,60,40"]
    words = [*common, "--num-samples", "100,all", "--output", str(tmp_path / "ours"), "--json"]
    assert main([*words, "--mcore-compat"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert list(written) == ["train", "valid"]
    of_megatron(prefix, tokenizer, tmp_path / "theirs", McoreSettings(32, (100, None, 2), split="900,60,40"))
    for each in written.values():
        name = Path(each["name"]).name + "-sample_index.npy"
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    for path in (tmp_path / "ours").iterdir():
        path.unlink()
    assert main(words) == 0, "there is one kind, which need not be named"
    assert json.loads(capsys.readouterr().out) == written
    assert main([*common, "--num-samples", "1,-3", "--output", "x", "--mcore-compat"]) == 2
    assert "--num-samples 1,-3: expected up to three" in capsys.readouterr().err


def test_the_identifiers_of_another_tokenizer(prefix: Path, tmp_path: Path) -> None:
    identifiers = {"class": "_Llama2Tokenizer", "tokenizer_path": ["t.model"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(identifiers))
    words = ["data", "indices", str(prefix), "--seq-length", "32", "--num-samples", "9", "--output", str(tmp_path)]
    assert main([*words, "--mcore-compat", "--tokenizer-identifiers", str(tmp_path / "tokenizer.json")]) == 0
    (description,) = tmp_path.glob("*-description.txt")
    assert json.loads(description.read_text())["tokenizer"] == identifiers


def test_a_full_disk_is_told_with_the_path_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "x", [5] * 20_000)
    (tmp_path / "identifiers.json").write_text('{"class": "Other"}')
    words = ["data", "indices", tmp_path / "x", "--seq-length", "8", "--num-samples", "all", "--output", tmp_path / "o"]
    words += ["--split", "1", "--tokenizer-identifiers", tmp_path / "identifiers.json"]
    with largest_file(20_000):
        code = main([str(word) for word in words])
    said = capsys.readouterr().err
    assert code == 1 and said.startswith(f"error: {tmp_path / 'o'}/"), said
    assert "-GPTDataset-train-document_index.npy: File too large; " in said
    assert not list((tmp_path / "o").iterdir())
