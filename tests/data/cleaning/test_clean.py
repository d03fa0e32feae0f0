"""Cleaning of files from beginning to end."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_cpt.cli.main import main
from megatron_cpt.data import blocks, ordered, read_documents
from megatron_cpt.data.cleaning import Profile, clean_files, load_profile
from megatron_cpt.errors import ConfigError, CptError, DataError

WORDS = ["river", "town", "quiet", "old", "goes", "nobody", "asks", "where", "runs", "past", "winter", "water", "snow"]
PROFILE = """
about: texts of this test
normalise: [line_ends, controls]
rules:
  short: {metric: characters, at_least: 40, reason: "fragments"}
  figures: {metric: letter_share, at_least: 0.5, reason: "figures alone"}
  runs: {metric: longest_run, at_most: 20, reason: "rulers"}
duplicates: {threshold: 0.8}
"""


def text_of(draw: random.Random) -> str:
    kind = draw.randrange(10)
    if kind == 0:
        return " ".join(draw.choices(WORDS, k=3))
    if kind == 1:
        return " ".join(str(draw.randrange(1000)) for _ in range(30))
    if kind == 2:
        return " ".join(draw.choices(WORDS, k=20)) + "-" * 30
    words = " ".join(draw.choices(WORDS, k=draw.randint(15, 60)))
    return words.replace(" ", "\r\n", 2) if kind == 3 else words


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three files of all kinds, with texts that come again exactly, nearly, and across files."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(5)
    texts = [text_of(draw) for _ in range(300)]
    texts += draw.sample(texts, 20)
    texts += [text.replace("river", "stream", 1) for text in draw.sample(texts, 20) if len(text) > 250]
    draw.shuffle(texts)
    third = len(texts) // 3
    first, second, last = folder / "a.jsonl.gz", folder / "b.txt", folder / "c.parquet"
    lines = [
        json.dumps({"url": f"u{k}", "text": text, "id": f"w#{k}"}, ensure_ascii=k % 2 == 0) + "\n"
        for k, text in enumerate(texts[:third])
    ]
    with gzip.open(first, "wb") as file:
        file.write("".join(lines).encode())
    second.write_bytes("\n\n".join(texts[third : 2 * third]).encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[2 * third :]}), last)
    return [first, second, last]


@pytest.fixture
def profile(tmp_path: Path) -> Profile:
    path = tmp_path / "profile.yaml"
    path.write_text(PROFILE)
    return load_profile(path).config


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, and a journal after each, as in files of gigabytes."""
    monkeypatch.setattr(blocks, "CUT_BYTES", 4096)
    monkeypatch.setattr(ordered, "COMMIT_BYTES", 1)


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder but the plots, hashed."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".png")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shingles(text: str) -> set[str]:
    text = " ".join(text.split())
    return {text[k : k + 5] for k in range(max(1, len(text) - 4))}


def alike(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def expected_verdict(text: str, kept: list[str]) -> str:
    text = text.replace("\r\n", "\n")
    if len(text) < 40:
        return "short"
    if sum(c.isalpha() for c in text) < 0.5 * sum(not c.isspace() for c in text):
        return "figures"
    if "-" * 21 in text:
        return "runs"
    if text in kept:
        return "exact"
    return "near" if any(alike(text, other) >= 0.8 for other in kept) else ""


def test_what_stays_is_what_rules_and_duplicates_say(corpus: list[Path], profile: Profile, tmp_path: Path) -> None:
    report = clean_files(corpus, tmp_path / "out", profile)
    kept: list[str] = []
    verdicts = []
    for document in read_documents(corpus):
        verdicts.append(expected_verdict(document.text, kept))
        if not verdicts[-1]:
            kept.append(document.text.replace("\r\n", "\n"))
    written = list(read_documents([tmp_path / "out" / name for name in ("a.jsonl.zst", "b.jsonl.zst", "c.jsonl.zst")]))
    assert [document.text for document in written] == kept
    assert {name: rule["documents"] for name, rule in report["rules"].items()} == {
        name: verdicts.count(name) for name in ("short", "figures", "runs")
    }
    assert verdicts.count("exact") > 5 and verdicts.count("near") > 2, "the corpus has duplicates of both kinds"
    for kind in ("exact", "near"):
        assert report["duplicates"][kind]["documents"] == verdicts.count(kind)
    assert report["totals"]["kept_bytes"] == sum(len(text.encode()) for text in kept)
    assert report["totals"]["documents"] == len(verdicts)


def test_records_keep_their_bytes_and_fields(corpus: list[Path], profile: Profile, tmp_path: Path) -> None:
    clean_files(corpus, tmp_path / "out", profile)
    lines = gzip.decompress(corpus[0].read_bytes()).decode().splitlines(keepends=True)
    before = {json.loads(line)["id"]: line for line in lines}
    cleaned = pyarrow.CompressedInputStream(str(tmp_path / "out" / "a.jsonl.zst"), "zstd").read().decode()
    changed = 0
    for line in cleaned.splitlines(keepends=True):
        original = before[json.loads(line)["id"]]
        if "\\r\\n" in original:
            changed += 1
            want = json.loads(original)
            assert json.loads(line) == {**want, "text": want["text"].replace("\r\n", "\n")}
        else:
            assert line == original
    assert changed > 3


def test_threads_shards_and_order_of_work_change_nothing(
    corpus: list[Path], profile: Profile, tmp_path: Path, small_blocks: None
) -> None:
    clean_files(corpus, tmp_path / "one", profile)
    clean_files(corpus, tmp_path / "four", profile, workers=4)
    assert clean_files(corpus, tmp_path / "shards", profile, shard=(1, 2)) == {"judged_files": 1, "files_left": 2}
    assert clean_files(corpus, tmp_path / "shards", profile, shard=(0, 2)) == {"judged_files": 3, "files_left": 0}
    clean_files(corpus, tmp_path / "shards", profile)
    assert contents(tmp_path / "one") == contents(tmp_path / "four") == contents(tmp_path / "shards")
    assert not (tmp_path / "one" / ".work").exists()


class _Killed(BaseException):
    pass


def _stopping_after(steps: int) -> Any:
    left = iter(range(steps))

    def advance(done: int, total: int) -> None:
        if next(left, None) is None:
            raise _Killed

    return advance


def test_stopped_anywhere_and_continued_gives_the_same_bytes(
    corpus: list[Path], profile: Profile, tmp_path: Path, small_blocks: None
) -> None:
    clean_files(corpus, tmp_path / "whole", profile)
    stops = 0
    for steps in (0, 1, 2, 5, 3, 8, 1, 100):
        try:
            clean_files(corpus, tmp_path / "stopped", profile, on_progress=_stopping_after(steps))
            break
        except _Killed:
            stops += 1
    else:
        clean_files(corpus, tmp_path / "stopped", profile)
    assert stops > 4
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_killed_while_it_finishes(
    corpus: list[Path], profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_cpt.data.cleaning import run

    clean_files(corpus, tmp_path / "whole", profile)
    for name in ("find_duplicates", "make_report", "write_report", "write_manifest"):
        with monkeypatch.context() as patched:
            patched.setattr(run, name, lambda *_, **__: (_ for _ in ()).throw(_Killed()))
            with pytest.raises(_Killed):
                clean_files(corpus, tmp_path / "stopped", profile)
        assert not (tmp_path / "stopped" / "manifest.json").exists()
    clean_files(corpus, tmp_path / "stopped", profile)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_an_input_that_changes_meanwhile_is_judged_again(corpus: list[Path], profile: Profile, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_bytes(corpus[1].read_bytes())
    clean_files([mine], tmp_path / "out", profile, shard=(0, 1))
    mine.write_text("an entirely different text of more than forty characters\n")
    notices: list[str] = []
    report = clean_files([mine], tmp_path / "out", profile, notice=notices.append)
    assert report["totals"]["documents"] == report["totals"]["kept_documents"] == 1
    assert any("has changed" in notice for notice in notices)


def test_bad_records_stop_the_work_or_are_counted(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    good = json.dumps({"text": "a text that is quite long enough to be kept by the rules"})
    path.write_text(f'{good}\n{{"title": 1}}\nnot json\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2: "):
        clean_files([path], tmp_path / "out", profile)
    assert not (tmp_path / "out").exists(), "what has come to nothing leaves nothing behind"
    report = clean_files([path], tmp_path / "skip", profile, on_error="skip")
    assert report["totals"]["documents"] == 1 and report["totals"]["faults"] == 2
    log = (tmp_path / "skip" / "faults.log").read_text().splitlines()
    assert [line.split(": ")[0] for line in log] == [f"{path}:2", f"{path}:3"]
    assert "## Records left out" in (tmp_path / "skip" / "report.md").read_text()


def test_folders_in_use_are_left_alone(corpus: list[Path], profile: Profile, tmp_path: Path) -> None:
    out = tmp_path / "out"
    clean_files(corpus[1:], out, profile)
    before = contents(out)
    with pytest.raises(DataError, match="holds a finished cleaning that differs .it is of 2 files, now 3 or others"):
        clean_files(corpus, out, profile)
    assert contents(out) == before
    clean_files(corpus[:1], out, profile, overwrite=True)
    assert [path.name for path in out.glob("*.zst")] == ["a.jsonl.zst"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    with pytest.raises(DataError, match="not empty"):
        clean_files(corpus, other, profile)


def test_an_unfinished_job_with_other_rules_is_refused(corpus: list[Path], profile: Profile, tmp_path: Path) -> None:
    clean_files(corpus, tmp_path / "out", profile, shard=(0, 3))
    other = profile.model_copy(update={"duplicates": None})
    with pytest.raises(DataError, match=r"unfinished job that differs \(profile.duplicates"):
        clean_files(corpus, tmp_path / "out", other)


def test_files_of_one_name_and_files_of_which_nothing_stays(profile: Profile, tmp_path: Path) -> None:
    for folder, text in (("x", "a long text, long enough for the rule of forty"), ("y", "short")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "part.txt").write_text(text)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    files = [tmp_path / "x" / "part.txt", tmp_path / "y" / "part.txt", empty]
    report = clean_files(files, tmp_path / "out", profile)
    assert [file["output"] for file in report["files"]] == ["00000-part.jsonl.zst", "", ""]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    written = tmp_path / "out" / "00000-part.jsonl.zst"
    assert manifest["outputs"].keys() == {written.name}
    assert manifest["outputs"][written.name]["sha256"] == hashlib.sha256(written.read_bytes()).hexdigest()
    assert manifest["inputs"][str(files[0])] == hashlib.sha256(files[0].read_bytes()).hexdigest()


def test_the_report_shows_what_was_dropped_and_why(corpus: list[Path], profile: Profile, tmp_path: Path) -> None:
    clean_files(corpus, tmp_path / "out", profile)
    text = (tmp_path / "out" / "report.md").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    documents = {f"{d.source}": d.text for d in read_documents(corpus)}
    for name, rule in report["rules"].items():
        assert f"| {name} | `{rule['condition']}` | {rule['documents']}" in text
        for sample in rule["samples"]:
            assert documents[f"{sample['file']}:{sample['line']}"].startswith(sample["text"].removesuffix("..."))
            assert not rule["at_least"] or sample["value"] < rule["at_least"]
    for sample in [s for kind in ("exact", "near") for s in report["duplicates"][kind]["samples"]]:
        text_here = documents[f"{sample['file']}:{sample['line']}"].replace("\r\n", "\n")
        assert alike(text_here, documents[sample["original"]].replace("\r\n", "\n")) >= 0.75
    for histogram in report["histograms"].values():
        assert sum(histogram["kept"]) + sum(histogram["dropped"]) == report["totals"]["documents"]
    assert report["changes"]["line_ends"]["documents"] > 0 and "<U+000D>" in text
    for plot in (tmp_path / "out" / "plots").iterdir():
        assert plot.read_bytes().startswith(b"\x89PNG") and f"(plots/{plot.name})" in text


SCORER = """
class Vowels:
    scale = "share"

    def __init__(self, letters="aeiou"):
        self.letters = letters

    def score(self, texts):
        return [sum(c in self.letters for c in text) / max(len(text), 1) for text in texts]


def wrong():
    scorer = Vowels()
    scorer.score = lambda texts: [0.0]
    return scorer
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = f"scorer_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name


def with_scorer(tmp_path: Path, use: str, options: str = "{}") -> Profile:
    path = tmp_path / "scored.yaml"
    rule = 'rules: {vowels: {metric: vowels, at_least: 0.3, reason: "few vowels"}}'
    path.write_text(f"about: scored\nscorers: {{vowels: {{use: '{use}', options: {options}}}}}\n{rule}\n")
    return load_profile(path).config


def test_a_model_of_your_own_is_a_metric_like_others(corpus: list[Path], tmp_path: Path, module: str) -> None:
    report = clean_files(corpus, tmp_path / "out", with_scorer(tmp_path, f"{module}:Vowels", "{letters: aeio}"))
    texts = [document.text for document in read_documents(corpus)]
    few = [text for text in texts if sum(c in "aeio" for c in text) / len(text) < 0.3]
    assert 0 < report["rules"]["vowels"]["documents"] == len(few) < len(texts)
    assert (tmp_path / "out" / "plots" / "scores.png").exists()


def test_models_that_cannot_be_used(corpus: list[Path], tmp_path: Path, module: str) -> None:
    cases = [
        ("kenlm", "{model: missing.arpa}", "needs a library|does not exist"),
        ("fasttext", "{model: missing.bin, language: ja}", "needs a library|does not exist"),
        ("kenlmm", "{}", "did you mean 'kenlm'"),
        (f"{module}:Nothing", "{}", "cannot load"),
        (f"{module}:Vowels", "{colour: red}", "cannot be made with these options"),
    ]
    for use, options, message in cases:
        with pytest.raises(DataError, match=message):
            clean_files(corpus, tmp_path / "out", with_scorer(tmp_path, use, options))
    with pytest.raises(CptError, match="gave 1 numbers for"):
        clean_files(corpus, tmp_path / "out2", with_scorer(tmp_path, f"{module}:wrong"))
    unused = "scorers: {x: {use: kenlm}}\nabout: nothing asks for x\n"
    (tmp_path / "unused.yaml").write_text(unused)
    clean_files(corpus[1:2], tmp_path / "out3", load_profile(tmp_path / "unused.yaml").config)


def test_the_command(corpus: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, out = [str(path) for path in corpus], str(tmp_path / "out")
    options = ["data", "clean", *files, "--profile", "short", "--output", out]
    assert main([*options, "--dry-run"]) == 0
    assert "rules:" in capsys.readouterr().out and not Path(out).exists()
    assert main([*options, "--set", "rules.empty.at_least=30", "--workers", "2"]) == 0
    assert "report.md" in capsys.readouterr().out
    assert main([*options, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["totals"]["documents"] > 300
    for words, message in (
        (["--shard", "3/2"], "shard 3/2"),
        (["--shard", "x"], "expected I/N"),
        (["--on-error", "maybe"], "expected 'stop' or 'skip'"),
    ):
        assert main([*options, "--overwrite", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["data", "clean", str(tmp_path / "none.txt"), "--profile", "short", "--output", out + "2"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not Path(out + "2").exists(), "wrong input leaves nothing behind"


def test_profiles_are_found_by_name_only_where_they_are() -> None:
    with pytest.raises(ConfigError, match="neither a profile nor a file"):
        load_profile("quickstart")


def test_the_report_begins_with_what_dropped_most(corpus: list[Path], profile: Profile, tmp_path: Path) -> None:
    report = clean_files(corpus, tmp_path / "out", profile)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    dropped = {name: rule["documents"] for name, rule in report["rules"].items()}
    dropped |= {f"{kind} duplicates": report["duplicates"][kind]["documents"] for kind in ("exact", "near")}
    said = next(line for line in text.splitlines() if line.startswith("What dropped most: "))
    assert sorted(dropped, key=lambda name: -dropped[name])[:3] == said.split("**")[1::2]
    assert text.index(said) < text.index("| read |")


def test_rules_that_came_too_late_and_figures_that_tell_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["short", "a text of some length", "another of such a length"]))
    (tmp_path / "profile.yaml").write_text(
        "about: all\nrules:\n"
        "  short: {metric: characters, at_least: 10, reason: fragments}\n"
        "  few: {metric: words, at_least: 2, reason: fragments}\n"
        "  broken: {metric: control_share, at_most: 0.1, reason: damage}\n"
    )
    clean_files([tmp_path / "a.txt"], tmp_path / "out", load_profile(tmp_path / "profile.yaml").config)
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "Broken only by documents that an earlier rule had dropped: few (1)." in text
    assert "Broken by no document: broken." in text and "| few |" not in text
    assert [path.name for path in (tmp_path / "out" / "plots").iterdir()] == ["sizes.png"], "control_share is 0 for all"
