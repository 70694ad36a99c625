"""Files to rows: JSON in its many forms, CSV, TSV, Parquet, plain text, or a hub's data set.

    found = read_rows("rows.jsonl")      # or "hf:OWNER/NAME"
    found.container                      # "JSON Lines": told by content, the name only breaks ties
    found.rows, found.bad                # each with file and line

A row keeps its place so that whatever is wrong with it later can be said with file and line. Lines that
cannot be read are listed, not raised: whether they end the run is the caller's business. The whole file is in
memory while it is read, as text and as rows.
"""

from __future__ import annotations

import difflib
import gzip
import zlib
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from burnish.data.hub import hub_rows
from burnish.data.json_rows import Item, json_rows, looks_like_json
from burnish.data.tabular import COLUMNS, delimited, parquet, plain
from burnish.errors import UserError
from burnish.recipe import is_hub_id

_EXPECTED = "expected rows as JSON, JSON Lines, CSV, TSV, Parquet or plain text"
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt", ".gz")
_JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_PARQUET, _GZIP = b"PAR1", b"\x1f\x8b"
# What other files start with, and how to make text of them.
_OTHERS = {
    b"PK\x03\x04": ("a zip archive or an Excel workbook", "unzip it; from Excel, save as “CSV UTF-8”"),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "open it and save as “CSV UTF-8”"),
    b"BZh": ("compressed with bzip2", "bunzip2 {}"),
    b"\xfd7zXZ": ("compressed with xz", "unxz {}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unzstd {}"),
    b"\xff\xfe": ("UTF-16 text", "iconv -f utf-16 -t utf-8 {} > utf8.txt"),
    b"\xfe\xff": ("UTF-16 text", "iconv -f utf-16 -t utf-8 {} > utf8.txt"),
}


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    file: str
    line: int  # on which the row starts; of Parquet and of hubs its number, from 1
    number: int = 0  # of the row in its file, from 1, where several start on one line

    @property
    def at(self) -> str:
        return f"{self.file}:{self.line}" + (f" (row {self.number})" if self.number else "")


@dataclass(frozen=True)
class Bad:
    """A row that cannot be used."""

    at: str  # file:line
    why: str


@dataclass(frozen=True)
class Found:
    """What a file holds. container: what holds the rows, for people: "JSON Lines, gzip"."""

    rows: tuple[Row, ...]
    container: str
    bad: tuple[Bad, ...]


def read_rows(source: str | Path, first: int | None = None, names: Collection[str] = ()) -> Found:
    """All rows of a file or of a hub's data set, or the `first` so many of them, good and bad together.

    names: columns that the recipe names, so that a CSV header is known by them. Raises UserError where the
    whole cannot be read or holds no rows.
    """
    file = str(source)
    if is_hub_id(file):
        container, items = hub_rows(file, first)
    else:
        container, items = _read_file(Path(source), names)
    rows: list[Row] = []
    bad: list[Bad] = []
    found = list(islice(items, first))
    on_line = Counter(line for line, _ in found)
    for number, (line, values) in enumerate(found, 1):
        if isinstance(values, str):
            bad.append(Bad(f"{file}:{line}", str(values)))
        else:
            rows.append(Row(values, file, line, number if on_line[line] > 1 else 0))
    if not rows and not bad:
        raise UserError(f"{file} holds no rows (it was read as {container})", _EXPECTED)
    return Found(tuple(rows), container, tuple(bad))


def _read_file(path: Path, names: Collection[str]) -> tuple[str, Iterable[Item]]:
    raw = _read_bytes(path)
    if isinstance(raw, Path):
        return parquet(raw, str(path))
    compressed = raw.startswith(_GZIP)
    if compressed:
        raw = _decompress(raw, path)
    if raw.startswith(_PARQUET):
        container, items = parquet(raw, str(path))
    else:
        container, items = _read_text(_decode(raw, path), path, names)
    return container + ", gzip" * compressed, items


def _read_text(text: str, path: Path, names: Collection[str]) -> tuple[str, Iterable[Item]]:
    """JSON, a table or prose, by what it looks like; a name in .json is never prose."""
    name = path.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    known = {*COLUMNS, *names}
    if looks_like_json(text):
        return json_rows(text, known)
    if suffix in _JSON_SUFFIXES and text.lstrip().startswith(("{", "[")):
        return json_rows(text, known)
    table = delimited(text, str(path), suffix, names)
    if table:
        return table
    return json_rows(text, known) if suffix in _JSON_SUFFIXES else plain(text)


def _read_bytes(path: Path) -> bytes | Path:
    """The file's bytes; or its path, if it is Parquet, which is read by parts."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file of rows", "name the file inside it")
    try:
        with path.open("rb") as f:
            head = f.read(len(_PARQUET))
            return path if head == _PARQUET else head + f.read()
    except FileNotFoundError as e:
        raise UserError(f"data file {path} does not exist", _what_is_there(path)) from e
    except OSError as e:
        hint = f"chmod u+r {path}" if isinstance(e, PermissionError) else "name another file in data.train"
        raise UserError(f"data file {path} cannot be read: {e.strerror}", hint) from e


def _what_is_there(path: Path) -> str:
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    there = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in _SUFFIXES)
    if not there:
        return f"{path.parent} holds no data files"
    near = difflib.get_close_matches(path.name, there, 8, cutoff=0.5)
    return f"in {path.parent} there is: {', '.join([*near, *(t for t in there if t not in near)][:8])}"


def _decompress(raw: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(raw)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        why = "it ends too early" if isinstance(e, EOFError) else str(e)
        raise UserError(
            f"{path} is a broken gzip file: {why}", f"copy or download it again; gzip -t {path} tests it"
        ) from e


def _decode(raw: bytes, path: Path) -> str:
    for magic, (what, how) in _OTHERS.items():
        if raw.startswith(magic):
            raise UserError(f"{path} is {what}; {_EXPECTED}", how.format(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[e.start]:02x})",
            f"iconv -f {_likely(raw)} -t utf-8 {path} > utf8{path.suffix}   if it is text in that encoding",
        ) from e
    if not text.strip():
        raise UserError(f"{path} is empty", _EXPECTED)
    if "\0" in text[:10_000]:
        raise UserError(f"{path} holds NUL bytes, so it is no UTF-8 text; {_EXPECTED}", f"file {path}")
    # Lines of old Mac programs end with CR alone.
    return text if "\n" in text else text.replace("\r", "\n")


def _likely(raw: bytes) -> str:
    """The encoding of text that is not UTF-8: Chinese has its bytes beyond ASCII two and two."""
    high = [b > 0x7F for b in raw[:100_000]]
    together = sum(a and (b or c) for a, b, c in zip(high[1:], high, high[2:], strict=False))
    return "gb18030" if together > sum(high) // 2 else "cp1252"
