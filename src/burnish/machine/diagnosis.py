"""What a failure means and what to do about it: a catalogue asked with the words that a program ended with.

    found = diagnose(stderr_tail, language_of(os.environ))
    if found: print(found.cause, *(r.text for r in found.remedies))

The catalogue is data, `diagnoses.toml`, so that a new failure is some lines there and a recorded message in
`tests/machine/messages`. An entry matches where one of its patterns is found in the message and none of its
`unless`. Of several that match, the first in the file wins: the file goes from what names one cause to what
many causes share, and warnings, which a program survives, come last. A message that no entry knows gives
None; its own words then say more than a guess would.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
# The order in which the C library looks for the language of messages; the first that is not empty counts.
_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


@dataclass(frozen=True)
class Remedy:
    """text: what to do, in a person's language. try_: exactly what to type for it; '' where there is nothing
    to type. `key=value` is for a recipe, or the end of `burnish train RECIPE`.
    """

    text: str
    try_: str

    @property
    def words(self) -> str:
        """Both, on one line."""
        return f"{self.text}: {self.try_}" if self.try_ else self.text


@dataclass(frozen=True)
class Diagnosis:
    """source: where it is known from: documentation, a library's issue (`pytorch#133141`), a measurement.
    remedies: in the order to try them, those that cost the result least first.
    """

    id: str
    cause: str
    remedies: tuple[Remedy, ...]
    source: str


@dataclass(frozen=True)
class _Entry:
    """One `[[diagnosis]]` of the file. remedies: what to type, then the text by language."""

    id: str
    patterns: tuple[re.Pattern[str], ...]
    unless: tuple[re.Pattern[str], ...]
    cause: Mapping[str, str]
    remedies: tuple[tuple[str, Mapping[str, str]], ...]
    source: str

    def matches(self, message: str) -> bool:
        return any(p.search(message) for p in self.patterns) and not any(
            p.search(message) for p in self.unless
        )

    def spoken(self, language: str) -> Diagnosis:
        remedies = tuple(Remedy(text[language], typed) for typed, text in self.remedies)
        return Diagnosis(self.id, self.cause[language], remedies, self.source)


def diagnose(message: str, language: str = "en") -> Diagnosis | None:
    """What the message means; None where no entry knows it.

    message: an error's own words, a whole traceback, or the last lines of stderr. language: 'en' or 'zh'.
    """
    found = next(_matching(message), None)
    return None if found is None else found.spoken(language)


def matching(message: str) -> list[str]:
    """The ids of all entries that match, in the file's order; `diagnose` takes the first."""
    return [e.id for e in _matching(message)]


def entry(id: str, language: str = "en") -> Diagnosis:
    """One entry by its id, as it stands in a run's records. Raises KeyError where there is none."""
    return {e.id: e for e in _catalogue()}[id].spoken(language)


def entries(language: str = "en") -> list[Diagnosis]:
    """The whole catalogue, in the file's order."""
    return [e.spoken(language) for e in _catalogue()]


def language_of(environment: Mapping[str, str]) -> Language:
    """The language that a person set for messages: 'zh' for zh_CN.UTF-8, zh_TW and the like, else 'en'."""
    told = next((environment[v] for v in _VARIABLES if environment.get(v)), "")
    return "zh" if re.match(r"zh(?![a-z])", told.lower()) else "en"


def _matching(message: str) -> Iterator[_Entry]:
    return (e for e in _catalogue() if e.matches(message))


@cache
def _catalogue() -> tuple[_Entry, ...]:
    text = (files("burnish") / "machine" / "diagnoses.toml").read_text(encoding="utf-8")
    return tuple(_entry(written) for written in tomllib.loads(text)["diagnosis"])


def _entry(written: Mapping[str, Any]) -> _Entry:
    return _Entry(
        written["id"],
        tuple(re.compile(p, re.MULTILINE) for p in written["patterns"]),
        tuple(re.compile(p, re.MULTILINE) for p in written.get("unless", ())),
        {language: written[language] for language in LANGUAGES},
        tuple((typed, dict(zip(LANGUAGES, texts, strict=True))) for typed, *texts in written["remedies"]),
        written["source"],
    )
