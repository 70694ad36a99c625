"""Rows keep their file and line, whatever the form of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.data.rows import read_rows
from burnish.errors import UserError


def written(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "rows.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_json_lines_keep_their_line_and_blank_lines_are_not_rows(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, '\n{"a": 1}\n\n{"a": 2}\n'))
    assert [(r.values["a"], r.line) for r in rows] == [(1, 2), (2, 4)]


def test_an_array_is_found_by_content_and_its_items_keep_their_line(tmp_path: Path) -> None:
    text = json.dumps([{"a": "x\ny"}, {"a": [1, {"b": 2}]}, {"a": 3}], indent=2)
    rows = read_rows(written(tmp_path, "  \n" + text))
    at = [i for i, line in enumerate(("  \n" + text).split("\n"), 1) if line == "  {"]
    assert [r.line for r in rows] == at
    assert rows[0].values["a"] == "x\ny"


def test_first_rows_only(tmp_path: Path) -> None:
    lines = "".join(f'{{"a": {i}}}\n' for i in range(5))
    assert [r.values["a"] for r in read_rows(written(tmp_path, lines), 2)] == [0, 1]
    array = json.dumps([{"a": i} for i in range(5)])
    assert [r.values["a"] for r in read_rows(written(tmp_path, array), 2)] == [0, 1]


def test_a_byte_order_mark_and_a_line_separator_inside_a_string(tmp_path: Path) -> None:
    rows = read_rows(written(tmp_path, b"\xef\xbb\xbf" + '{"a": "x\u2028y"}\n{"a": "z"}\n'.encode()))
    assert [r.values["a"] for r in rows] == ["x\u2028y", "z"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a": \n{"a": 3}\n', "rows.json:2: not JSON"),
        ('{"a": 1}\n[1, 2]\n', "rows.json:2: expected an object {…}, got an array"),
        ('[\n{"a": 1},\n{"a": 2}\n{"a": 3}]', "rows.json:4: not JSON: expected ',' or ']'"),
        ('[{"a": 1},\n "x"]', "rows.json:2: expected an object {…}, got a string"),
        ('[{"a": 1},', "not JSON"),
        ("[]", "holds no rows"),
        ("  \n", "is empty"),
        ('{"a": "高血压病"}'.encode("gbk"), "rows.json:1: not UTF-8"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, text: str | bytes, expected: str) -> None:
    with pytest.raises(UserError) as e:
        read_rows(written(tmp_path, text))
    assert expected in str(e.value)


def test_every_bad_line_is_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as e:
        read_rows(written(tmp_path, '{"a": 1}\nnot\n{"a": 2}\nnor this\n'))
    assert "2 bad rows" in str(e.value) and ":2:" in str(e.value) and ":4:" in str(e.value)
