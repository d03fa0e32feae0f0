"""What a profile of cleaning says: how texts are normalised, which documents stay, what counts as a duplicate."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import Field

from megatron_cpt.config.layers import recipe_names
from megatron_cpt.config.loading import Resolved, load_config
from megatron_cpt.config.schema import Language, Section
from megatron_cpt.data import _native
from megatron_cpt.data.cleaning.normalise import STEPS
from megatron_cpt.errors import ConfigError

PROFILES = Path(__file__).parent / "profiles"


class Rule(Section):
    """A document stays while its metric lies between the bounds, both included.

    Args:
        metric: a figure of `_native.text_metrics` (csrc/text_stats.hpp says what each means), or a scorer's name.
        at_least: lower bound; None for none.
        at_most: upper bound; None for none.
        reason: why the rule is there, for whoever reads the report.
    """

    metric: str
    at_least: float | None = None
    at_most: float | None = None
    reason: str

    @property
    def condition(self) -> str:
        """The rule in signs, such as "0.2 <= hiragana_of_japanese"."""
        low = "" if self.at_least is None else f"{self.at_least:g} <= "
        high = "" if self.at_most is None else f" <= {self.at_most:g}"
        return f"{low}{self.metric}{high}"


class NearDuplicates(Section):
    """Of documents alike in their character shingles the first stays (`cleaning.duplicates`).

    Args:
        threshold: least estimated Jaccard index.
        num_permutations: MinHash values a document.
        shingle: characters of a shingle.
        seed: chooses the hash functions.
    """

    threshold: float = Field(default=0.8, gt=0.0, le=1.0)
    num_permutations: int = Field(default=128, ge=1, le=4096)
    shingle: int = Field(default=5, ge=1, le=64)
    seed: int = Field(default=0, ge=0)


class ScorerConfig(Section):
    """A model that gives each text a number (`cleaning.plugins`).

    Args:
        use: "kenlm", "fasttext", or "module:attribute" of your own.
        options: what it is called with.
    """

    use: str
    options: dict[str, str | float | bool] = {}


class Profile(Section):
    """How texts of one language and kind are cleaned.

    Args:
        about: what texts it is for.
        language: short name of their language; None where it is for any.
        sources: where the rules come from.
        deviations: what differs from the sources, and why.
        normalise: names of `normalise.STEPS`, in order; rules see the texts that these give.
        stop_words: words counted by the metric `stop_words`, in lower case.
        scorers: name of a metric -> the model that gives it.
        rules: name -> rule; a document goes by the first rule it breaks. None switches a rule off.
        duplicates: how duplicates are found; None leaves them in.
    """

    about: str
    language: Language | None = None
    sources: tuple[str, ...] = ()
    deviations: tuple[str, ...] = ()
    normalise: tuple[str, ...] = ()
    stop_words: tuple[str, ...] = ()
    scorers: dict[str, ScorerConfig | None] = {}
    rules: dict[str, Rule | None] = {}
    duplicates: NearDuplicates | None = None

    @property
    def active_rules(self) -> dict[str, Rule]:
        """The rules that are not switched off, in order."""
        return {name: rule for name, rule in self.rules.items() if rule is not None}

    @property
    def active_scorers(self) -> dict[str, ScorerConfig]:
        """The scorers that are not switched off, in order."""
        return {name: scorer for name, scorer in self.scorers.items() if scorer is not None}


def profile_names() -> list[str]:
    """Names of the profiles that come with the package."""
    return recipe_names(PROFILES)


def load_profile(source: str | Path, overrides: Sequence[str] = ()) -> Resolved[Profile]:
    """Load a profile by name or from a YAML file; either may extend another.

    Args:
        source: one of `profile_names()`, or a path.
        overrides: `path.to.key=value` each, such as `rules.short.at_least=200` or `rules.short=null`.

    Raises:
        ConfigError: no such profile, or one that cannot mean anything.
    """
    resolved = load_config(source, Profile, overrides, shelf=PROFILES)
    _check(resolved.config, str(source))
    return resolved


def _check(profile: Profile, name: str) -> None:
    problems = [
        f"normalise: no step {step!r}; {_nearest(step, STEPS)}" for step in profile.normalise if step not in STEPS
    ]
    figures = _native.metric_names()
    problems += [
        f"scorers.{scorer}: a figure of that name exists; choose another name"
        for scorer in profile.active_scorers
        if scorer in figures
    ]
    known = [*figures, *profile.active_scorers]
    for title, rule in profile.active_rules.items():
        if rule.metric not in known:
            problems.append(f"rules.{title}.metric: no figure {rule.metric!r}; {_nearest(rule.metric, known)}")
        low, high = rule.at_least, rule.at_most
        if low is None and high is None:
            problems.append(f"rules.{title}: neither at_least nor at_most; give one, or null for the whole rule")
        elif low is not None and high is not None and low > high:
            problems.append(f"rules.{title}: at_least {low:g} is above at_most {high:g}; no text could stay")
    if any(rule.metric == "stop_words" for rule in profile.active_rules.values()) and not profile.stop_words:
        problems.append("stop_words: a rule counts them and none is given; list them")
    if len(profile.active_rules) > MOST_RULES:
        problems.append(f"rules: {len(profile.active_rules)} of them, expected at most {MOST_RULES}")
    if problems:
        raise ConfigError(f"profile {name}: " + "\n  ".join(problems))


MOST_RULES = 200  # a verdict is one byte


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
