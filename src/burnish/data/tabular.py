"""CSV, TSV, Parquet and plain text to rows, each row with its line.

    found = delimited(text, file, suffix, names)      # None: this is no table
    container, items = found or plain(text)

An item is (line, values) or (line, what is wrong there); all cells of CSV and TSV are strings. A header is
known by the names in it (names.COLUMNS in any letter case, and those that the recipe gives):
"Question,Answer" names columns and "Berlin,Germany" is a row, and no other rule told the two apart.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from burnish.data.names import COLUMNS, is_known
from burnish.errors import UserError

Item = tuple[int, dict[str, Any] | str]

_UNNAMED = {1: ("text",), 2: ("prompt", "completion"), 3: ("instruction", "input", "output")}
_TABLES = {".csv": ",;\t", ".tsv": "\t,;", ".tab": "\t,;"}  # delimiters in the order in which they are likely
_SEPARATOR_LINE = re.compile(r"sep=([,;\t])[ \t]*\n")  # Excel's own first line
_LONGEST_CELL = 2**31 - 1  # csv's own limit of 131,072 characters is shorter than a long document
_SAMPLED = 30
_A_NAME = re.compile(r"[^\W\d][\w.()/-]{0,23}(?: [\w.()/-]{1,23})?")


def delimited(
    text: str, file: str, suffix: str, names: Collection[str] = ()
) -> tuple[str, list[Item]] | None:
    """What holds the rows, and the rows, of CSV or TSV text; None where it is neither.

    suffix: of the file's name, which decides where a text could be prose or a table without a header. names:
    columns that the recipe names. Raises UserError for a header with a name twice, and for cells without
    names that are not one, two or three a row.
    """
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        return _delimited(text.replace("\r\n", "\n"), file, suffix, frozenset(names))
    finally:
        csv.field_size_limit(before)


def _delimited(text: str, file: str, suffix: str, names: frozenset[str]) -> tuple[str, list[Item]] | None:
    table = suffix in _TABLES
    said = _SEPARATOR_LINE.match(text)
    delimiters = said[1] if said else _TABLES.get(suffix, "\t,;")
    lines = text.split("\n")
    begin = 1 if said else 0
    header = _find_header(lines, begin, delimiters, names, alone=table)
    if header:
        delimiter, columns, begin, spaced = header
        _check_columns(columns, file)
    else:
        delimiter = _guess_delimiter(lines, begin, delimiters) if table else _tabbed(text)
        if not delimiter:
            return None
        spaced = False
        header = _foreign_header(lines, begin, delimiter)
        if header:
            _, columns, begin, _ = header
            _check_columns(columns, file)
        else:
            columns = _unnamed(_width(lines, begin, delimiter), file)
    items: list[Item] = []
    for line, cells in _records(lines, begin, delimiter, spaced):
        if isinstance(cells, str) and delimiter == "\t":
            # Many programs write TSV without quoting, so that a cell may start with a quotation mark.
            raw = lines[line - 1].split("\t")
            cells = raw if len(raw) == len(columns) else cells
        items.append((line, _named(cells, columns)))
    kind = "TSV" if delimiter == "\t" else "CSV"
    parted = " (semicolons)" if delimiter == ";" else ""
    return f"{kind}{parted} {'with' if header else 'without'} a header", items


def _records(
    lines: Sequence[str], begin: int, delimiter: str, spaced: bool = False
) -> Iterator[tuple[int, list[str] | str]]:
    """(line on which it starts, cells or what is wrong) of each record from line index `begin` on.

    spaced: spaces after a delimiter do not belong to the cell.
    """
    while begin < len(lines):
        feed = (lines[i] + "\n" for i in range(begin, len(lines)))
        reader = csv.reader(feed, delimiter=delimiter, strict=True, skipinitialspace=spaced)
        start = begin
        try:
            for cells in reader:
                if cells and (len(cells) > 1 or cells[0].strip()):
                    yield start + 1, cells
                start = begin + reader.line_num
            return
        except csv.Error as e:
            never = str(e) == "unexpected end of data"
            yield start + 1, "a quotation mark opens a cell and none closes it" if never else f"bad cell: {e}"
            begin = start + 1


def _find_header(
    lines: Sequence[str], begin: int, delimiters: str, names: frozenset[str], alone: bool
) -> tuple[str, tuple[str, ...], int, bool] | None:
    """Delimiter, columns, index of the line after the header, and whether spaces follow its delimiters.

    alone: one column is a header too.
    """
    found = []
    for delimiter in delimiters:
        records = _records(lines, begin, delimiter, spaced=True)
        line, cells = next(records, (0, ""))
        if isinstance(cells, str) or (len(cells) < 2 and not alone):
            continue
        columns = [cell.strip() for cell in cells]
        filled = [c for c in columns if c]
        hits = sum(c in names or is_known(c) for c in filled)
        # Prose begins with a capital: "Question, please." is a header only in a file that is called a table.
        sure = hits if alone else sum(c in names or c in COLUMNS for c in filled)
        if hits >= 2 or 2 * sure >= len(filled) > 0 or not names.isdisjoint(columns):
            # Python's pandas writes its index under no name, and Excel leaves empty columns at the end.
            named = tuple(c or f"column {i}" for i, c in enumerate(columns, 1))
            spaced = f"{delimiter} " in lines[line - 1]
            found.append((delimiter, named, line + sum(c.count("\n") for c in cells), spaced))
    return max(found, key=lambda f: len(f[1]), default=None)


def _foreign_header(
    lines: Sequence[str], begin: int, delimiter: str
) -> tuple[str, tuple[str, ...], int, bool] | None:
    """The first line as a header of names that nobody knows ("Frage;Antwort"): short words over sentences.

    A row of such words above rows of the same kind (a list of vocabulary) is a row.
    """
    sample = islice(_records(lines, begin, delimiter), _SAMPLED)
    whole = [(line, [c.strip() for c in cells]) for line, cells in sample if not isinstance(cells, str)]
    if len(whole) < 2:
        return None
    line, columns = whole[0]
    filled = [c for c in columns if c]
    if len(filled) < 2 or len({*filled}) < len(filled) or not all(map(_A_NAME.fullmatch, filled)):
        return None
    below = zip(columns, *(cells for _, cells in whole[1:] if len(cells) == len(columns)), strict=True)
    sentences = [sum(len(c.split()) > 2 for c in cells) > len(cells) // 2 for _, *cells in below]
    if not any(sentences):
        return None
    return delimiter, tuple(c or f"column {i}" for i, c in enumerate(columns, 1)), line, False


def _check_columns(columns: Sequence[str], file: str) -> None:
    twice = [c for c, n in Counter(columns).items() if n > 1]
    if twice:
        raise UserError(
            f"{file}: the header names {', '.join(f'`{c}`' for c in twice)} twice; expected different names",
            "rename one of the columns in the first line",
        )


def _guess_delimiter(lines: Sequence[str], begin: int, delimiters: str) -> str:
    """The delimiter by which most of the first records have one number of cells, which is more than one."""

    def fit(delimiter: str) -> int:
        width, count = _widths(lines, begin, delimiter)
        return count if width > 1 else 0

    return max(delimiters, key=fit)  # the first of equals


def _widths(lines: Sequence[str], begin: int, delimiter: str) -> tuple[int, int]:
    """The commonest number of cells among the first records, and how many of them have it."""
    sample = islice(_records(lines, begin, delimiter), _SAMPLED)
    counted = Counter(len(cells) for _, cells in sample if not isinstance(cells, str))
    return counted.most_common(1)[0] if counted else (1, 0)


def _width(lines: Sequence[str], begin: int, delimiter: str) -> int:
    return _widths(lines, begin, delimiter)[0]


def _tabbed(text: str) -> str:
    """A tab, if each of the first lines has as many (one or two) and none starts with one; else ''."""
    lines = [line for line in text[:1_000_000].split("\n") if line.strip()][:_SAMPLED]
    tabs = {line.count("\t") for line in lines}
    return "\t" if tabs in ({1}, {2}) and not any(line.startswith("\t") for line in lines) else ""


def _unnamed(width: int, file: str) -> tuple[str, ...]:
    if width not in _UNNAMED:
        expected = "; ".join(f"{n} ({', '.join(names)})" for n, names in _UNNAMED.items())
        raise UserError(
            f"{file} has {width} cells a row and no header with a known column; without one, expected "
            f"{expected}",
            "make the columns' names the first line, such as question,answer; or map them with "
            "data.columns='{prompt: NAME, completion: NAME}'",
        )
    return _UNNAMED[width]


def _named(cells: list[str] | str, columns: Sequence[str]) -> dict[str, Any] | str:
    if isinstance(cells, str):
        return cells
    if len(cells) != len(columns):
        got = f"{len(cells)} cell{'s' * (len(cells) > 1)}"
        more = "; a cell with a delimiter in it goes in quotation marks" * (len(cells) > len(columns))
        return f"got {got}, expected {len(columns)} ({', '.join(columns)}){more}"
    return dict(zip(columns, cells))


def plain(text: str) -> tuple[str, list[Item]]:
    """Rows {"text": …}: paragraphs where blank lines part them, else lines."""
    lines = text.replace("\r\n", "\n").split("\n")
    filled = [i for i, line in enumerate(lines) if line.strip()]
    if not filled or filled[-1] - filled[0] + 1 == len(filled):
        return "plain text, one row a line", [(i + 1, {"text": lines[i]}) for i in filled]
    items: list[Item] = []
    for n, i in enumerate(filled):
        if n == 0 or filled[n - 1] != i - 1:
            start = i
        if n + 1 == len(filled) or filled[n + 1] != i + 1:
            items.append((start + 1, {"text": "\n".join(lines[start : i + 1])}))
    return "plain text, rows parted by blank lines", items


def parquet(source: Path | bytes, file: str) -> tuple[str, Iterator[Item]]:
    """Rows of a Parquet file (its path or bytes), numbered from 1. Raises UserError, while iterating too."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ModuleNotFoundError as e:
        raise UserError(
            f"{file} is a Parquet file, and pyarrow, which reads it, is not installed",
            "pip install 'burnish[data]'",
        ) from e
    return "Parquet", _parquet_items(source, file)


def _parquet_items(source: Path | bytes, file: str) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        opened = pq.ParquetFile(pa.BufferReader(source) if isinstance(source, bytes) else source)
        for batch in opened.iter_batches(batch_size=1000):
            for values in batch.to_pylist():
                number += 1
                yield number, values
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{file} cannot be read as Parquet (after {number} rows): {str(e).splitlines()[0]}",
            "copy or download it again: it may be cut off",
        ) from e
