"""JSON text to rows, in every form that people keep rows in, each row with the line it starts on.

    container, items = json_rows(text, known)     # container: a phrase for people, such as "JSON Lines"

An item is (line, values), or (line, what is wrong there). What is broken in a pretty-printed file does not
hide what follows: reading goes on at the next line that starts as the first row did.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from typing import Any

from burnish.data.names import kind

Item = tuple[int, dict[str, Any] | str]

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_START = re.compile(r'\{\s*["}]|\[\s*[\[{"]|\[\s*\]\s*\Z')
_LINE = re.compile(r"[^\n]*\S[^\n]*")
_OBJECT = re.compile(r'\s*\{\s*["}]')
_OBJECTS = re.compile(r"\[[ \t]*\{")
# Keys that rows have and that files of rows have at their top as well: they do not make an object a row.
_METADATA = {"category", "description", "id", "name", "source", "test", "title"}
_MESSAGE_KEYS = {
    "role": {
        "role", "content", "name", "id", "weight", "tool_calls", "tool_call_id", "function_call", "refusal",
        "reasoning", "reasoning_content", "thinking",
    },
    "from": {"from", "value", "name", "id", "weight"},
}  # fmt: skip
_COLUMN = {"role": "messages", "from": "conversations"}


class _Broken(str):
    """What is wrong where JSON was expected."""


def looks_like_json(text: str) -> bool:
    """Whether the text starts as rows in JSON do, or most of its first lines do."""
    return bool(_START.match(text, _skip(text, 0))) or _mostly(text, _OBJECT)


def json_rows(text: str, known: Collection[str]) -> tuple[str, list[Item] | Iterator[Item]]:
    """What holds the rows, and the rows. known: names of columns, by which one row is told from a file of
    rows.
    """
    at = _skip(text, 0)
    if text.startswith("[", at):
        return _array_or_lines(text, at)
    if not text.startswith("{", at):
        return "JSON Lines", _lines(text)
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        if _mostly(text, _OBJECT):
            return "JSON Lines", _lines(text)
    else:
        if _skip(text, end) == len(text):
            return _object(text, at, value, set(known) - _METADATA)
        if "\n" not in text[at:end]:
            return "JSON Lines", _lines(text)
    values, _ = _values(text, at, array=False)
    container = "JSON objects one after another" if len(values) > 1 else "one JSON object"
    return container, [(line, _row(value)) for line, value in values]


def _lines(text: str) -> Iterator[Item]:
    """JSON Lines. Split at newlines only: U+2028 and its like may stand inside a JSON string."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            value = _broken(e)
        yield number, _row(value)


def _array_or_lines(text: str, at: int) -> tuple[str, list[Item] | Iterator[Item]]:
    """The array at `at`; or JSON Lines, if each line is an array."""
    values, end = _values(text, at + 1, array=True)
    if end is None:
        if _mostly(text, _OBJECTS) and "\n" in text.strip():
            return "JSON Lines", _lines(text)
    elif (rest := _skip(text, end)) < len(text):
        if "\n" not in text[at:end] and text.startswith(("[", "{"), rest):
            return "JSON Lines", _lines(text)
        wrong = f"not JSON: expected nothing after the closing ']', got {text[rest]!r}"
        values.append((_line_counter(text)(rest), _Broken(wrong)))
    return _array("JSON array", values, _line_counter(text)(at))


def _array(container: str, values: list[tuple[int, Any]], line: int) -> tuple[str, list[Item]]:
    """Rows from the items of an array that starts on `line`; one row, if the items are single messages."""
    good = [value for _, value in values if not isinstance(value, _Broken)]
    speakers = {_speaker(value) for value in good}
    if len(speakers) == 1 and (speaker := speakers.pop()):
        # A conversation with a hole is no conversation: where a message is broken, that alone is said.
        broken: list[Item] = [(at, str(v)) for at, v in values if isinstance(v, _Broken)]
        return f"{container} of messages, one conversation", broken or [(line, {_COLUMN[speaker]: good})]
    return container, [(at, _row(value)) for at, value in values]


def _object(text: str, at: int, value: dict[str, Any], known: set[str]) -> tuple[str, list[Item]]:
    """The text's only value: a row, or an object that holds the rows."""
    line_of = _line_counter(text)
    if known.isdisjoint(value):
        under = [key for key, inner in value.items() if _holds_rows(inner)]
        if len(under) == 1:
            container = f"JSON object with its rows under `{under[0]}`"
            # The last of two equal keys is the one that `value` has.
            start = [start for key, start, _ in _members(text, at) if key == under[0]][-1]
            values, _ = _values(text, start + 1, array=True)
            return _array(container, values, line_of(start))
        if all(isinstance(inner, dict) for inner in value.values()):
            found = [(line_of(start), inner) for _, start, inner in _members(text, at)]
            return "JSON object keyed by id", found
    return "one JSON object", [(line_of(at), value)]


def _members(text: str, at: int) -> Iterator[tuple[str, int, Any]]:
    """(key, where its value starts, value) of the object at `at`, which is known to be JSON."""
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = _skip(text, _skip(text, at) + 1)
        value, at = _DECODER.raw_decode(text, start)
        yield key, start, value
        at = _skip(text, at)
        at = _skip(text, at + 1) if text[at] == "," else at


def _values(text: str, at: int, array: bool) -> tuple[list[tuple[int, Any]], int | None]:
    """Values from `at` on, each with its line: of an array up to its ']' (whose end comes second, None if it
    is not reached), else one after another up to the end of the text.
    """
    line_of = _line_counter(text)
    found: list[tuple[int, Any]] = []
    at = _skip(text, at)
    alike = _starts_alike(text, at)
    while at < len(text):
        if array and text[at] == "]":
            return found, at + 1
        start = at
        try:
            value, at = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError) as e:
            wrong = _broken(e)
            at = e.pos if isinstance(e, json.JSONDecodeError) else start
        else:
            found.append((line_of(start), value))
            at = _skip(text, at)
            if not array or text.startswith(("]", ","), at):
                at = _skip(text, at + 1) if text.startswith(",", at) else at
                continue
            if at == len(text):
                break
            wrong = _Broken(f"not JSON: expected ',' or ']' after an item, got {text[at]!r}")
        again = alike and alike.search(text, max(start + 1, text.rfind("\n", 0, at) + 1))
        found.append((line_of(at), wrong if again else _Broken(f"{wrong}; nothing after it was read")))
        if not again:
            return found, None
        at = again.end() - 1
    if array:
        wrong = _Broken("not JSON: expected ',' or ']' after an item, got the end of the file")
        found.append((line_of(len(text)), wrong))
    return found, None


def _starts_alike(text: str, at: int) -> re.Pattern[str] | None:
    """Finds lines that start as the one of the value at `at`, if that stands first on its line."""
    indent = text[text.rfind("\n", 0, at) + 1 : at]
    return re.compile(f"^{indent}{re.escape(text[at])}", re.M) if text[at:] and not indent.strip() else None


def _line_counter(text: str) -> Callable[[int], int]:
    """Line of a place in the text. Ask in rising order: each newline is counted once."""
    line, counted = 1, 0

    def line_of(at: int) -> int:
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, at), max(counted, at)
        return line

    return line_of


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    assert space
    return space.end()


def _mostly(text: str, pattern: re.Pattern[str]) -> bool:
    """Whether most of the first lines that are not blank start with the pattern."""
    starts = [bool(pattern.match(text, line.start())) for line in islice(_LINE.finditer(text), 20)]
    return 2 * sum(starts) > len(starts)


def _row(value: Any) -> dict[str, Any] | str:
    if isinstance(value, dict | _Broken):
        return value
    speaker = _bare(value)
    return {_COLUMN[speaker]: value} if speaker else f"expected an object {{…}}, got {kind(value)}"


def _bare(value: Any) -> str:
    """'role' or 'from' for a list of messages that stands where a row is expected; else ''."""
    if not isinstance(value, list) or not all(isinstance(m, dict) for m in value):
        return ""
    return next((key for key in _COLUMN if any(key in m for m in value)), "")


def _holds_rows(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    return 2 * sum(isinstance(item, dict) or bool(_bare(item)) for item in value) > len(value)


def _speaker(value: Any) -> str:
    """'role' or 'from' for an object that is one message and nothing else; else ''."""
    if isinstance(value, dict):
        for key, allowed in _MESSAGE_KEYS.items():
            says = ("content", "tool_calls", "function_call") if key == "role" else ("value",)
            if key in value and any(k in value for k in says) and value.keys() <= allowed:
                return key
    return ""


def _broken(error: ValueError | RecursionError) -> _Broken:
    if isinstance(error, json.JSONDecodeError):
        return _Broken(f"not JSON: {error.msg} at column {error.colno}")
    return _Broken(f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}")
