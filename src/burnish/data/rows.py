"""Files to rows: JSON arrays and JSON Lines, told apart by content, every row with its file and line.

A row keeps its place so that whatever is wrong with it later can be said with file and line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.errors import UserError, all_problems


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    file: str
    line: int

    @property
    def at(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    at: str  # file:line
    why: str


def read_rows(path: Path, first: int | None = None) -> list[Row]:
    """All rows of a file (the first `first` of them). Raises UserError listing every line that is no JSON
    object.
    """
    text = _read_text(path)
    start = text.lstrip()
    found = _array(text, str(path), first) if start.startswith("[") else _lines(text, str(path), first)
    rows: list[Row] = []
    problems: list[str] = []
    for item, line in found:
        if isinstance(item, dict):
            rows.append(Row(item, str(path), line))
        else:
            what = item if isinstance(item, _Broken) else f"expected an object {{…}}, got {_kind(item)}"
            problems.append(f"{path}:{line}: {what}")
    if problems:
        raise all_problems(
            f"{path} has {len(problems)} bad row{'s' * (len(problems) > 1)}:",
            problems,
            "correct or remove those lines",
        )
    if not rows:
        raise UserError(
            f"{path} holds no rows", "expected a JSON array of objects, or one JSON object a line"
        )
    return rows


class _Broken(str):
    """What is wrong with a line that is not JSON."""


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a JSON or JSON Lines file", "name the file inside it")
    try:
        raw = path.read_bytes()
    except FileNotFoundError as e:
        near = sorted(p.name for p in path.parent.glob("*.json*")) if path.parent.is_dir() else []
        hint = (
            f"in {path.parent} there is: {', '.join(near[:8])}"
            if near
            else f"there is no folder {path.parent}"
            if (not path.parent.is_dir())
            else f"{path.parent} holds no JSON files"
        )
        raise UserError(f"data file {path} does not exist", hint) from e
    except OSError as e:
        hint = f"chmod u+r {path}" if isinstance(e, PermissionError) else "name another file in data.train"
        raise UserError(f"data file {path} cannot be read: {e.strerror}", hint) from e
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[e.start]:02x})",
            f"iconv -f gb18030 -t utf-8 {path} > utf8.json   if it is Chinese text in GBK",
        ) from e
    if not text.strip():
        raise UserError(f"{path} is empty", "expected a JSON array of objects, or one JSON object a line")
    return text


def _lines(text: str, file: str, first: int | None) -> Iterator[tuple[Any, int]]:
    """JSON Lines. Split at newlines only: U+2028 and its like may stand inside a JSON string."""
    n = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if first is not None and n >= first:
            return
        n += 1
        try:
            yield json.loads(line), number
        except (ValueError, RecursionError) as e:
            yield _broken(e), number


def _array(text: str, file: str, first: int | None) -> Iterator[tuple[Any, int]]:
    """The items of one JSON array, each with the line it starts on."""
    decoder, at, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip(i: int, characters: str) -> int:
        while i < len(text) and text[i] in characters:
            i += 1
        return i

    n = 0
    while True:
        at = skip(at, " \t\r\n")
        line, counted = line + text.count("\n", counted, at), at
        if at < len(text) and text[at] == "]":
            at = skip(at + 1, " \t\r\n")
            if at < len(text):
                what = _Broken(f"not JSON: expected nothing after the closing ']', got {text[at]!r}")
                yield what, text.count("\n", 0, at) + 1
            return
        if first is not None and n >= first:
            return
        try:
            item, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            yield _broken(e), e.lineno if isinstance(e, json.JSONDecodeError) else line
            return
        yield item, line
        n += 1
        at = skip(at, " \t\r\n")
        if at >= len(text) or text[at] not in ",]":
            got = "the end of the file" if at >= len(text) else repr(text[at])
            yield (
                _Broken(f"not JSON: expected ',' or ']' after an item, got {got}"),
                text.count("\n", 0, at) + 1,
            )
            return
        if text[at] == ",":
            at += 1


def _broken(error: ValueError | RecursionError) -> _Broken:
    if isinstance(error, json.JSONDecodeError):
        return _Broken(f"not JSON: {error.msg} at column {error.colno}")
    return _Broken(f"not JSON: {'nested too deeply' if isinstance(error, RecursionError) else error}")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", int: "a number", float: "a number", bool: "a truth value"}
    return names.get(type(value), "null")
