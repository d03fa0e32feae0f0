"""Steps are done once, again when what they were made from has changed, and when something wanted is missing."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_cpt.config.schema import CorpusConfig
from megatron_cpt.errors import CptError, TrainingError
from megatron_cpt.pipeline.corpus import open_corpora
from megatron_cpt.pipeline.steps import Steps


class Kitchen:
    """Three steps that each make a file: flour -> dough -> bread, bread being the result."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: list[str] = []
        self.fails: str | None = None

    def cook(self, grain: str = "rye", resumable: bool = False) -> dict[str, Any]:
        steps = Steps(self.root)
        needs: Sequence[tuple[str, tuple[str, ...]]] = (("flour", ()), ("dough", ("flour",)), ("bread", ("dough",)))
        for name, needed in needs:
            folder = self.root / name
            steps.add(
                name,
                f"make {name}",
                {"grain": grain} if name == "flour" else {},
                needed,
                lambda name=name: self.make(name),
                makes=(folder,),
                resumable=folder if resumable else None,
                is_result=name == "bread",
            )
        self.done.clear()
        return steps.run()

    def make(self, name: str) -> dict[str, Any]:
        self.done.append(name)
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        pieces = len(list(folder.iterdir()))
        (folder / f"{pieces}").touch()
        if self.fails == name:
            raise KeyboardInterrupt
        return {"pieces": pieces + 1}

    def lose(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(self.root / name)


@pytest.fixture
def kitchen(tmp_path: Path) -> Kitchen:
    made = Kitchen(tmp_path)
    assert made.cook() == {"pieces": 1}
    assert made.done == ["flour", "dough", "bread"]
    return made


def test_done_once(kitchen: Kitchen, capsys: pytest.CaptureFixture[str]) -> None:
    assert kitchen.cook() == {"pieces": 1}
    assert kitchen.done == []
    assert capsys.readouterr().out == "".join(
        f"[{number}/3] make {name}: done before\n" for number, name in enumerate(("flour", "dough", "bread"), 1)
    )


def test_another_setting_does_everything_behind_it_again(kitchen: Kitchen) -> None:
    kitchen.cook("wheat")
    assert kitchen.done == ["flour", "dough", "bread"]
    assert [path.name for path in (kitchen.root / "bread").iterdir()] == ["0"]  # begun anew, not added to


def test_what_nobody_needs_any_more_may_be_deleted(kitchen: Kitchen) -> None:
    kitchen.lose("flour", "dough")
    kitchen.cook()
    assert kitchen.done == []


def test_a_missing_result_is_made_from_what_is_there(kitchen: Kitchen) -> None:
    kitchen.lose("bread")
    kitchen.cook()
    assert kitchen.done == ["bread"]
    kitchen.lose("bread", "dough")
    kitchen.cook()
    assert kitchen.done == ["dough", "bread"]


def test_a_lost_record_is_a_lost_step(kitchen: Kitchen) -> None:
    (kitchen.root / "steps" / "dough.json").unlink()
    kitchen.cook()
    assert kitchen.done == ["dough"]  # the bread is known to be of this dough


@pytest.mark.parametrize("resumable", [False, True])
def test_what_was_cut_off_begins_anew_or_goes_on(kitchen: Kitchen, resumable: bool) -> None:
    kitchen.fails = "dough"
    with pytest.raises(KeyboardInterrupt):
        kitchen.cook("wheat", resumable)
    kitchen.fails = None
    assert not (kitchen.root / "bread" / "1").exists()
    kitchen.cook("wheat", resumable)
    assert kitchen.done == ["dough", "bread"]
    assert len(list((kitchen.root / "dough").iterdir())) == (2 if resumable else 1)


def test_what_fails_stops_only_what_needs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: list[str] = []

    def add(steps: Steps, name: str, needs: tuple[str, ...], fails: bool = False) -> None:
        def act() -> dict[str, Any]:
            done.append(name)
            if fails:
                raise TrainingError("no yeast")
            return {}

        steps.add(name, f"make {name}", {}, needs, act)

    def bake(fails: bool) -> dict[str, CptError]:
        done.clear()
        steps = Steps(tmp_path)
        add(steps, "flour", ())
        add(steps, "dough", ("flour",), fails)
        add(steps, "bread", ("dough",))
        add(steps, "soup", ("flour",))
        return steps.run_all()

    assert {name: str(error) for name, error in bake(fails=True).items()} == {"dough": "no yeast", "bread": "no yeast"}
    assert done == ["flour", "dough", "soup"] and "left out, for dough has failed" in capsys.readouterr().out
    assert bake(fails=False) == {} and done == ["dough", "bread"]


def test_times_and_facts_are_kept(kitchen: Kitchen) -> None:
    steps = Steps(kitchen.root)
    steps.add("flour", "make flour", {"grain": "rye"}, (), dict)
    assert steps.facts("flour") == {"pieces": 1} and steps.seconds().keys() == {"flour"}


def test_files_are_known_by_content_whatever_their_names(tmp_path: Path) -> None:
    """The same name in two folders, as corpora often have it."""
    paths = [tmp_path / language / "train.txt" for language in ("en", "ja")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"text of {path.parent.name}\n")
    config = CorpusConfig(source=str(paths[0]), target=str(paths[1]))

    def hashes() -> list[list[str]]:
        return [corpus.hashes() for corpus in open_corpora(config)]

    before = hashes()
    paths[0].write_text("another text\n")
    assert hashes()[0] != before[0] and hashes()[1] == before[1]
