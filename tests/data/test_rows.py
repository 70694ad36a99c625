"""Rows keep their file and line, whatever the form of the file; JSON in all of its forms."""

from __future__ import annotations

import gzip
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.json_rows import json_rows
from burnish.data.rows import Found, read_rows
from burnish.data.tabular import COLUMNS
from burnish.errors import UserError

ASK = {"role": "user", "content": "Hi"}
SAY = {"role": "assistant", "content": "Hello"}


def written(tmp_path: Path, text: str | bytes, name: str = "rows.json") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(tmp_path: Path, text: str | bytes, name: str = "rows.json", first: int | None = None) -> Found:
    return read_rows(written(tmp_path, text, name), first)


def lines_of(found: Found) -> list[tuple[Any, int]]:
    return [(row.values.get("a"), row.line) for row in found.rows]


def bad_of(found: Found) -> list[str]:
    return [f"{bad.at.rpartition('/')[2]}: {bad.why}" for bad in found.bad]


# ---- forms


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.txt", "rows.csv", "rows"])
def test_json_lines_keep_their_line_and_blank_lines_are_not_rows(tmp_path: Path, name: str) -> None:
    found = read(tmp_path, '\n{"a": 1}\n\n{"a": 2}\r\n', name)
    assert (found.container, lines_of(found), found.bad) == ("JSON Lines", [(1, 2), (2, 4)], ())


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows"])
def test_an_array_is_found_by_content_and_its_items_keep_their_line(tmp_path: Path, name: str) -> None:
    text = "  \n" + json.dumps([{"a": "x\ny"}, {"a": [1, {"b": 2}]}, {"a": 3}], indent=2)
    found = read(tmp_path, text, name)
    at = [i for i, line in enumerate(text.split("\n"), 1) if line == "  {"]
    assert (found.container, [r.line for r in found.rows]) == ("JSON array", at)
    assert found.rows[0].values["a"] == "x\ny"
    assert found.rows[0].at == f"{tmp_path / name}:{at[0]}"


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_row(tmp_path: Path, indent: int | None) -> None:
    row = {"id": "1", "messages": [ASK, SAY]}
    found = read(tmp_path, "\n" + json.dumps(row, indent=indent) + "\n")
    assert (found.container, found.rows[0].values, found.rows[0].line) == ("one JSON object", row, 2)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": {"a": 1}, "completion": {"b": 2}},  # every value an object, but a row
        {"title": "x", "QA_pairs": [{"question": "q", "answer": "a"}]},  # its only list, but a known column
        {"instruction": "x", "examples": [{"input": "q", "output": "a"}]},  # a known column stands beside it
        {"a": 1, "data": ["x", "y"]},
        {"a": [{"b": 1}], "c": [{"b": 1}]},
    ],
)
def test_an_object_with_the_columns_of_a_row_holds_no_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    found = read(tmp_path, json.dumps(row))
    assert (found.container, [r.values for r in found.rows]) == ("one JSON object", [row])


def test_columns_that_the_recipe_names_make_an_object_a_row(tmp_path: Path) -> None:
    path = written(tmp_path, '{"frage": {"text": "q"}, "antwort": {"text": "a"}}')
    assert len(read_rows(path).rows) == 2
    assert len(read_rows(path, names={"frage"}).rows) == 1


def test_an_object_keyed_by_id_gives_its_values_with_their_lines(tmp_path: Path) -> None:
    text = '{\n "q1": {"a": 1},\n "q2": {\n  "a": 2\n },\n "q1": {"a": 3}\n}'
    found = read(tmp_path, text)
    assert found.container == "JSON object keyed by id"
    assert lines_of(found) == [(1, 2), (2, 3), (3, 6)]  # an id that stands twice is two rows


@pytest.mark.parametrize("key", ["data", "train", "test", "rows", 'odd "name"'])
def test_rows_under_one_key(tmp_path: Path, key: str) -> None:
    text = (
        f'{{"version": "1",\n "title": "x", "{json.dumps(key)[1:-1]}": [\n{{"a": 1}},\n"no",\n{{"a": 2}}]}}'
    )
    found = read(tmp_path, text)
    assert found.container == f"JSON object with its rows under `{key}`"
    assert lines_of(found) == [(1, 3), (2, 5)]
    assert bad_of(found) == ["rows.json:4: expected an object {…}, got a string"]


def test_of_two_equal_keys_the_last_holds_the_rows_as_in_all_json(tmp_path: Path) -> None:
    assert lines_of(read(tmp_path, '{"data": [{"a": 1}],\n"data": [\n{"a": 2}]}')) == [(2, 3)]


def test_json_lines_are_known_by_most_of_their_first_lines(tmp_path: Path) -> None:
    found = read(tmp_path, 'no\n{"a": 1}\n{"a": 2}\n', "rows.txt")
    assert (found.container, lines_of(found), len(found.bad)) == ("JSON Lines", [(1, 2), (2, 3)], 1)


@pytest.mark.parametrize(
    ("message", "column"), [(ASK, "messages"), ({"from": "human", "value": "Hi"}, "conversations")]
)
def test_bare_lists_of_messages_are_rows(tmp_path: Path, message: dict[str, str], column: str) -> None:
    talk = [message, message]
    lines = read(tmp_path, "".join(json.dumps(t) + "\n" for t in (talk, [message])))
    array = read(tmp_path, "[\n" + json.dumps(talk) + ",\n" + json.dumps([message]) + "]")
    assert (lines.container, array.container) == ("JSON Lines", "JSON array")
    assert [(r.values, r.line) for r in lines.rows] == [({column: talk}, 1), ({column: [message]}, 2)]
    assert [(r.values, r.line) for r in array.rows] == [({column: talk}, 2), ({column: [message]}, 3)]


def test_json_lines_of_lists_with_a_broken_first_line(tmp_path: Path) -> None:
    good = json.dumps([ASK, SAY])
    found = read(tmp_path, good[:-9] + "\n" + good + "\n" + good + "\n")
    assert found.container == "JSON Lines" and [r.line for r in found.rows] == [2, 3]
    assert [b.partition(": ")[0] for b in bad_of(found)] == ["rows.json:1"]


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_messages_is_one_conversation(tmp_path: Path, indent: int | None) -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    talk = [ASK, call, {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"}, SAY]
    found = read(tmp_path, "\n" + json.dumps(talk, indent=indent))
    assert [(r.values, r.line) for r in found.rows] == [({"messages": talk}, 2)]
    assert found.container == "JSON array of messages, one conversation"
    other = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert read(tmp_path, json.dumps(other)).rows[0].values == {"conversations": other}


def test_rows_with_more_than_a_message_are_rows(tmp_path: Path) -> None:
    rows = [{**ASK, "topic": "greeting"}, SAY]
    assert [r.values for r in read(tmp_path, json.dumps(rows)).rows] == rows


def test_a_conversation_with_a_broken_message_is_not_shortened(tmp_path: Path) -> None:
    found = read(tmp_path, f"[\n{json.dumps(ASK)},\n{{no}},\n{json.dumps(SAY)}\n]")
    assert found.rows == () and [b.partition(": ")[0] for b in bad_of(found)] == ["rows.json:3"]


def test_objects_one_after_another(tmp_path: Path) -> None:
    text = "\n".join(json.dumps({"a": i, "b": {"c": i}}, indent=2) for i in range(3))
    found = read(tmp_path, text)
    assert found.container == "JSON objects one after another"
    assert lines_of(found) == [(0, 1), (1, 7), (2, 13)]


def test_first_rows_good_and_bad_together(tmp_path: Path) -> None:
    lines = '{"a": 0}\nno\n{"a": 2}\nno\n{"a": 4}\n'
    found = read(tmp_path, lines, first=3)
    assert lines_of(found) == [(0, 1), (2, 3)] and len(found.bad) == 1
    array = json.dumps([{"a": i} for i in range(5)])
    assert [a for a, _ in lines_of(read(tmp_path, array, first=2))] == [0, 1]


def test_gzip_of_any_form(tmp_path: Path) -> None:
    found = read(tmp_path, gzip.compress(b'{"a": 1}\n{"a": 2}\n'), "rows.jsonl.gz")
    assert (found.container, lines_of(found)) == ("JSON Lines, gzip", [(1, 1), (2, 2)])


def test_a_byte_order_mark_and_a_line_separator_inside_a_string(tmp_path: Path) -> None:
    found = read(tmp_path, b"\xef\xbb\xbf" + '{"a": "x\u2028y"}\n{"a": "z"}\n'.encode())
    assert lines_of(found) == [("x\u2028y", 1), ("z", 2)]


def test_half_a_character_is_left_to_whoever_knows_what_the_text_is_for(tmp_path: Path) -> None:
    assert lines_of(read(tmp_path, '{"a": "\\ud83d"}')) == [("\ud83d", 1)]


# ---- what is wrong


@pytest.mark.parametrize(
    ("text", "good", "expected"),
    [
        ('{"a": 1}\n{"a": \n{"a": 3}\n', 2, ["rows.json:2: not JSON: Expecting value at column 7"]),
        ('{"a": 1}\n[1, 2]\n', 1, ["rows.json:2: expected an object {…}, got an array"]),
        ('{"a": 1}\n[]\nnull\n1\ntrue\n', 1, ["an array", "null", "a number", "a truth value"]),
        ('no\n{"a": 1}\n{"a": 2}\n', 2, ["rows.json:1: not JSON"]),
        ("just words\n", 0, ["rows.json:1: not JSON"]),
        ('[{"a": 1},\n "x"]', 1, ["rows.json:2: expected an object {…}, got a string"]),
        (
            '[{"a": 1},',
            1,
            ["rows.json:1: not JSON: expected ',' or ']' after an item, got the end of the file"],
        ),
        (
            '[{"a": 1}',
            1,
            ["rows.json:1: not JSON: expected ',' or ']' after an item, got the end of the file"],
        ),
        ('[{"a": 1}]\n}', 1, ["rows.json:2: not JSON: expected nothing after the closing ']', got '}'"]),
        ('[{"a": 1} {"a": 2}]', 1, ["expected ',' or ']' after an item, got '{'; nothing after it was read"]),
        ('{"a": ' + "[" * 200_000, 0, ["rows.json:1: not JSON: nested too deeply"]),
        ('{"a": 1}\n{"a": ' + "[" * 200_000 + "\n", 1, ["rows.json:2: not JSON: nested too deeply"]),
        ('{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", 1, ["rows.json:2: not JSON: Exceeds the limit"]),
        ('{\n "a": 1,\n b: 2\n}\n', 0, ["rows.json:3: not JSON"]),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_line(
    tmp_path: Path, text: str, good: int, expected: list[str]
) -> None:
    found = read(tmp_path, text)
    assert len(found.rows) == good
    assert len(found.bad) == len(expected)
    for bad, part in zip(bad_of(found), expected):
        assert part in bad


@pytest.mark.parametrize("indent", [None, 2])
def test_a_broken_item_does_not_hide_the_rest_of_an_array(tmp_path: Path, indent: int | None) -> None:
    items = [json.dumps({"a": i, "b": {"c": [{}]}}, indent=indent).replace("\n", "\n  ") for i in range(6)]
    items[1] = items[1].replace('"b"', "b")
    items[3] = items[3][:-1]  # its closing brace
    text = "[\n  " + ",\n  ".join(items) + "\n]"
    text = text.replace(items[4] + ",", items[4])  # the comma after it
    found = read(tmp_path, text)
    assert [a for a, _ in lines_of(found)] == [0, 2, 4, 5]
    assert len(found.bad) == 3 and not any("nothing after" in b for b in bad_of(found))
    starts = [i for i, line in enumerate(text.split("\n"), 1) if line.startswith("  {")]
    assert [line for _, line in lines_of(found)] == [starts[i] for i in (0, 2, 4, 5)]


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        ("[]", "rows.json", ["holds no rows", "JSON array"]),
        ("{}", "rows.json", ["holds no rows"]),
        ("  \n", "rows.json", ["is empty"]),
        ("", "rows.csv", ["is empty"]),
        (
            '{"a": "高血压病"}'.encode("gbk"),
            "rows.json",
            ["rows.json:1: not UTF-8", "iconv -f gb18030", "utf8.json"],
        ),
        (
            '{"a": 1}\n\n{"a": "é"}'.encode("latin-1"),
            "rows.json",
            ["rows.json:3: not UTF-8 text (byte 0xe9)"],
        ),
        ('{"a": 1}'.encode("utf-16"), "rows.json", ["is UTF-16 text", "iconv -f utf-16"]),
        ('{"a": 1}'.encode("utf-16-le"), "rows.json", ["NUL"]),
        (b"PK\x03\x04rest", "rows.xlsx", ["zip archive or an Excel workbook"]),
        (b"\x28\xb5\x2f\xfdrest", "rows.jsonl.zst", ["zstd", "unzstd"]),
        (gzip.compress(os.urandom(999))[:-20], "rows.gz", ["broken gzip file: it ends too early", "gzip -t"]),
        (b"\x1f\x8b\x08\x00garbage and more of it", "rows.gz", ["broken gzip file"]),
    ],
)
def test_trouble_with_the_whole_file(
    tmp_path: Path, content: str | bytes, name: str, expected: list[str]
) -> None:
    with pytest.raises(UserError) as e:
        read(tmp_path, content, name)
    for part in expected:
        assert part in str(e.value)


def test_a_missing_file_is_answered_with_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no data files"):
        read_rows(tmp_path / "train.jsonl")
    for name in ("a.json", "trian.jsonl", "b.csv", "notes.md"):
        written(tmp_path, "x", name)
    with pytest.raises(UserError) as e:
        read_rows(tmp_path / "train.jsonl")
    assert "does not exist" in e.value.message
    assert e.value.hint.endswith("there is: trian.jsonl, a.json, b.csv")
    with pytest.raises(UserError, match="there is no folder"):
        read_rows(tmp_path / "no" / "train.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        read_rows(tmp_path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = written(tmp_path, "{}")
    path.chmod(0)
    with pytest.raises(UserError, match=r"chmod u\+r"):
        read_rows(path)


# ---- properties

ROWS = st.lists(
    st.fixed_dictionaries({"a": st.text(), "b": st.recursive(st.integers(), st.lists)}), min_size=1
)


@given(ROWS, st.sampled_from([None, 0, 3]), st.booleans())
def test_every_form_gives_the_same_rows_on_the_lines_where_they_stand(
    rows: list[dict[str, Any]], indent: int | None, ascii: bool
) -> None:
    array = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    keyed = json.dumps({str(i): r for i, r in enumerate(rows)}, indent=indent, ensure_ascii=ascii)
    under = json.dumps({"n": 1, "data": rows}, indent=indent, ensure_ascii=ascii)
    lines = "\n".join(json.dumps(r, ensure_ascii=ascii) for r in rows)
    for text in (array, keyed, under, lines):
        items = list(json_rows(text, COLUMNS)[1])
        assert [values for _, values in items] == rows
        split = text.split("\n")
        if text is not lines and indent is not None:
            assert all(split[line - 1].rstrip().endswith("{") for line, _ in items)
            assert len({line for line, _ in items}) == len(rows)
        if text is lines:
            assert [line for line, _ in items] == list(range(1, len(rows) + 1))


PIECES = st.lists(
    st.sampled_from([*'[]{}:,"\n\t;\r ', '"a"', '{"a": 1}', "text", "answer", "1", "\\", "\ufeff", "é"])
)


@given(PIECES, st.sampled_from(["json", "csv", "tsv", "txt"]), st.sampled_from([None, 2]))
def test_whatever_a_file_holds_the_answer_is_rows_or_a_sentence(
    pieces: list[str], suffix: str, first: int | None
) -> None:
    text = "".join(pieces)
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), text, f"rows.{suffix}")
        try:
            found = read_rows(path, first)
        except UserError as e:
            assert e.hint
            return
    lines = [r.line for r in found.rows]
    assert lines == sorted(lines) and lines[-1:] <= [len(text.replace("\r", "\n").split("\n"))]
    assert len(found.rows) + len(found.bad) <= (first or len(text))


def test_lines_are_counted_once_each() -> None:
    """Counting from the start for each row would look at 10^10 characters here; once each is 10^6."""

    class Counting(str):
        looked = 0

        def count(self, x: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
            end = len(self) if end is None else end
            Counting.looked += max(0, end - start)
            return super().count(x, start, end)

    text = Counting("[\n" + ",\n".join('{"a": "' + "x" * 90 + '"}' for _ in range(10_000)) + "\n]")
    container, items = json_rows(text, COLUMNS)
    assert (container, list(items)[-1][0]) == ("JSON array", 10_001)
    assert 0 < Counting.looked <= 2 * len(text)
