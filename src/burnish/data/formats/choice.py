"""Multiple choice: a question, its options and which is right.

Every option is asked as a line `(A) text`, and the completion is the right one's line. So the letter comes
first, where a score finds it, and the words after it teach what it stands for. An explanation (`exp`) is not
trained: it is often missing or cut, and it would follow the letter, too late to help find it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from burnish.data.conversation import Conversation, Turn
from burnish.data.formats.beside import beside
from burnish.data.formats.columns import match, one
from burnish.data.formats.values import BadRow, File, Format, conversation, listed, optional, text
from burnish.data.names import kind
from burnish.data.rows import Row

_LINE = re.compile(r"\(([A-Z])\)\s*|([A-Z])\s*[.:、．：)）]\s*")
_LETTER = re.compile(r"\(?([A-Za-z])\)?[.:]?")
_EXPLANATIONS = ("exp", "explanation", "rationale", "solution")


def find(file: File) -> Format | None:
    """question + options + answer (or answer_idx), or question + opa…opd + cop."""
    columns = file.columns
    exam = match(columns, ("question",), ("opa",), ("opb",), ("cop",))
    listed_options = match(
        columns, ("question",), ("options", "choices"), ("answer_idx", "answer", "answerkey")
    )
    if exam:
        asked, right = exam.names[0], exam.names[3]
        options = [c for c in (one(columns, f"op{letter}") for letter in "abcde") if c]
        used, note = [asked, *options, right], exam.note + f" (`{right}` counts from 1)"
    elif listed_options:
        asked, right = listed_options.names[0], listed_options.names[2]
        options = [listed_options.names[1]]
        used, note = [asked, *options, right], "; a number as answer counts from 0"
    else:
        return None
    extra = beside(file, used, before=("context",), history=True)
    note += extra.note
    explanation = one(tuple(c for c in file.every if c not in used), *_EXPLANATIONS)
    if explanation:
        note += f"; `{explanation}` is not trained"
    why = f"the columns {listed(used)}, multiple choice: the completion is such as '(D) text'{note}"

    def read(row: Row) -> tuple[Conversation, ...]:
        values = row.values
        choices = _exam_options(values, options) if exam else _options(values.get(options[0]), options[0])
        letters = _right(values, right, choices, 1 if exam else 0)
        lines = {letter: f"({letter}) {words}" for letter, words in choices.items()}
        prompt = extra.asked(row, "\n".join([text(values, asked), *lines.values()]))
        answer = "\n".join(lines[letter] for letter in letters)
        turns = (*extra.opening(row), Turn("user", prompt), Turn("assistant", answer))
        return (conversation(turns, row, file.settings, file.chat),)

    return Format("choice", why, read)


def _exam_options(values: Mapping[str, Any], columns: list[str]) -> dict[str, str]:
    words = [(c[-1].upper(), optional(values, c)) for c in columns]
    return {letter: said for letter, said in words if said}


def _options(value: Any, key: str) -> dict[str, str]:
    """Letter → text, from a mapping, a list, lists of text and label, or lines such as `(A) text`."""
    if (
        isinstance(value, dict)
        and isinstance(value.get("text"), list)
        and isinstance(value.get("label"), list)
    ):
        value = {str(k): v for k, v in zip(value["label"], value["text"], strict=False)}
    if isinstance(value, str):
        return _option_lines(value, key)
    if isinstance(value, list):
        value = {chr(ord("A") + i): v for i, v in enumerate(value[:26])}
    if not isinstance(value, dict):
        raise BadRow(f"`{key}` is {kind(value)}; expected a list, a mapping, or lines '(A) …'")
    found = {str(letter): optional(value, letter) for letter in value}
    return _at_least_two({k: v for k, v in found.items() if v}, key)


def _option_lines(value: str, key: str) -> dict[str, str]:
    found: dict[str, str] = {}
    letter = ""
    for line in value.split("\n"):
        m = _LINE.match(line)
        label = (m[1] or m[2]) if m else ""
        if m and label == chr(ord("A") + len(found)):
            letter = label
            found[letter] = line[m.end() :]
        elif letter:
            found[letter] += "\n" + line  # an option of several lines
        elif line.strip():
            raise BadRow(f"`{key}` begins {line!r:.40}; expected lines '(A) …', '(B) …'")
    return _at_least_two({k: v.rstrip() for k, v in found.items()}, key)


def _at_least_two(found: dict[str, str], key: str) -> dict[str, str]:
    if len(found) < 2:
        raise BadRow(f"`{key}` gives {len(found)} options; expected at least 2")
    return found


def _right(values: Mapping[str, Any], key: str, options: Mapping[str, str], start: int) -> list[str]:
    """Letters of the right options. A number counts from `start`."""
    value = values.get(key)
    letters = list(options)
    if isinstance(value, str) and value.isdecimal() and value not in options and len(value) < 4:
        value = int(value)  # CSV has no numbers
    if isinstance(value, int) and not isinstance(value, bool):
        if start <= value < start + len(letters):
            return [letters[value - start]]
    elif isinstance(value, str):
        said = value.strip()
        m = _LETTER.fullmatch(said) or _LINE.match(said)
        same = [k for k, words in options.items() if words.strip().rstrip(".") == said.rstrip(".")]
        letter = next((g for g in m.groups() if g), "") if m else ""
        if said in options:
            return [said]
        if letter.upper() in options and (_LETTER.fullmatch(said) or not same):
            return [letter.upper()]
        if same:
            return same[:1]
        several = [c for c in said if c not in ",，、 "]
        if len(several) > 1 and len(set(several)) == len(several) and all(c in options for c in several):
            return several
    expected = f"one of {', '.join(letters)}, or a number from {start} to {start + len(letters) - 1}"
    raise BadRow(f"`{key}` is {value!r:.40}; expected {expected}")
