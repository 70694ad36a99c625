"""Errors as sentences on stderr with their exit codes, and what the catalogue knows of them, in the person's
language.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from burnish.errors import EXIT_BAD_INPUT, EXIT_FAILED, UserError, in_words
from burnish.machine.diagnosis import LANGUAGES, Diagnosis, Language, diagnose

REMEDIES = 5
_WORDS = {"en": ("why", "try"), "zh": ("原因", "可尝试")}


def language_asked(arguments: Sequence[str], usual: Language) -> tuple[Language, list[str]]:
    """The language of `--lang en|zh`, which may stand anywhere, and the arguments without it."""
    left = list(arguments)
    for i, argument in enumerate(left):
        if argument == "--":
            break
        if argument == "--lang" or argument.startswith("--lang="):
            value = argument[7:] if "=" in argument else (left[i + 1 : i + 2] or [""])[0]
            del left[i : i + (1 if "=" in argument else 2)]
            for known in LANGUAGES:
                if value == known:
                    return known, left
            expected = " or ".join(LANGUAGES)
            raise UserError(f"--lang: expected {expected}, got {value!r}", "left out, $LANG says it")
    return usual, left


def exit_code_of(error: Exception, language: Language) -> int:
    """Say the error, and what is known of it; its exit code. A defect of ours, or an error that nobody knows,
    keeps its own text.
    """
    said = in_words(error)
    if said is None:
        traceback.print_exception(error)
        text, code = "".join(traceback.format_exception(error)), EXIT_FAILED
        found = diagnose(text, language)
    else:
        print(f"burnish: {said.message}", file=sys.stderr)
        if said.hint:
            print(f"  → {said.hint}", file=sys.stderr)
        code = said.exit_code
        found = diagnose(said.message, language) or diagnose("\n".join(said.log), language)
        if language == "en" and code == EXIT_BAD_INPUT:  # the hint says it, in the same language
            found = None
    if found is not None:
        print(told(found, language), file=sys.stderr)
    return code


def told(found: Diagnosis, language: Language) -> str:
    why, try_ = _WORDS[language]
    remedies = [f"  {try_}: {remedy.words}" for remedy in found.remedies[:REMEDIES]]
    return "\n".join([f"  {why}: {found.cause}", *remedies])
