"""CSV, TSV, Parquet and plain text: told apart by content, every row with its line."""

from __future__ import annotations

import csv
import gzip
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.rows import Found, read_rows
from burnish.data.tabular import delimited, plain
from burnish.errors import UserError


def read(tmp_path: Path, text: str | bytes, name: str = "rows.csv", names: tuple[str, ...] = ()) -> Found:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_rows(path, names=names)


def shown(found: Found) -> list[tuple[Any, ...]]:
    return [(*row.values.values(), row.line) for row in found.rows]


def columns(found: Found) -> list[str]:
    return list(found.rows[0].values)


# ---- CSV and TSV


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.txt", "rows.json", "rows"])
@pytest.mark.parametrize(
    ("delimiter", "container"),
    [(",", "CSV with a header"), (";", "CSV (semicolons) with a header"), ("\t", "TSV with a header")],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_header_is_known_by_its_names_whatever_the_file_is_called(
    tmp_path: Path, name: str, delimiter: str, container: str, end: str, mark: bytes
) -> None:
    lines = [
        "question,answer", "q1,007", '"say ""x"",', ' twice",a2', "", "q3,", "", "q4,a4"
    ]  # fmt: skip
    text = end.join(lines).replace(",", delimiter).replace(f"{delimiter}{end} tw", f",{end} tw")
    found = read(tmp_path, mark + text.encode(), name)
    assert found.container == container and columns(found) == ["question", "answer"]
    assert shown(found) == [("q1", "007", 2), ('say "x",\n twice', "a2", 3), ("q3", "", 6), ("q4", "a4", 8)]
    assert found.bad == ()


def test_lines_of_an_old_mac(tmp_path: Path) -> None:
    assert shown(read(tmp_path, "question,answer\rq1,a1\rq2,a2\r")) == [("q1", "a1", 2), ("q2", "a2", 3)]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("Question,Complex_CoT,Response", ["Question", "Complex_CoT", "Response"]),
        ("nr,question,datum,answer,quelle", ["nr", "question", "datum", "answer", "quelle"]),
        (",question,answer", ["column 1", "question", "answer"]),  # an index as pandas writes it
        ("question,answer,", ["question", "answer", "column 3"]),
        ('question, "answer"', ["question", "answer"]),
        ("text", ["text"]),
        ('"question\nin two lines",question,answer', ["question\nin two lines", "question", "answer"]),
    ],
)
def test_headers(tmp_path: Path, header: str, expected: list[str]) -> None:
    found = read(tmp_path, f"{header}\n{','.join('x' for _ in expected)}\n")
    assert found.container == "CSV with a header" and columns(found) == expected
    assert found.rows[0].line == 2 + header.count("\n")


def test_spaces_after_delimiters_belong_to_the_cell_unless_the_header_has_them(tmp_path: Path) -> None:
    assert shown(read(tmp_path, 'question, answer\nq, "a, b"\n')) == [("q", "a, b", 2)]
    assert shown(read(tmp_path, "question,answer\nq, a\n")) == [("q", " a", 2)]


def test_names_of_the_recipe_make_a_header(tmp_path: Path) -> None:
    text = "frage,antwort,quelle\nf1,a1,q1\n"
    assert columns(read(tmp_path, text)) == ["instruction", "input", "output"]
    named = read(tmp_path, text, names=("frage", "antwort"))
    assert columns(named) == ["frage", "antwort", "quelle"] and shown(named) == [("f1", "a1", "q1", 2)]


@pytest.mark.parametrize("name", ["rows.csv", "rows.txt"])
@pytest.mark.parametrize(
    "header",
    ["QUESTION,ANSWER", "Prompt,Completion", "Instruction,Input,Output", "Problem,Solution", "Text,Label"],
)
def test_letter_case_of_a_header_does_not_count(tmp_path: Path, header: str, name: str) -> None:
    found = read(tmp_path, f"{header}\n{','.join('x' for _ in header.split(','))}\n", name)
    assert found.container == "CSV with a header" and columns(found) == header.split(",")
    assert len(found.rows) == 1


def test_one_name_with_a_capital_makes_a_header_only_in_a_table(tmp_path: Path) -> None:
    prose = "Problem, as they say.\nNo, none.\n"
    assert read(tmp_path, prose, "rows.txt").container == "plain text, one row a line"
    assert columns(read(tmp_path, "Text\nOne.\n")) == ["Text"]


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("Berlin,Germany\nParis,France\n", "rows.csv", ["prompt", "completion"]),
        ("Berlin;Germany, north\nParis;France\n", "rows.csv", ["prompt", "completion"]),
        ("Add,1 2,3\nAdd,2 2,4\n", "rows.csv", ["instruction", "input", "output"]),
        ('Once upon a time\n"Then, later"\n', "rows.csv", ["text"]),
        ("Berlin\tGermany\nParis\tFrance\n", "rows.tsv", ["prompt", "completion"]),
        ("Berlin\tGermany, north\nParis, Texas\tUSA\n", "rows.txt", ["prompt", "completion"]),
    ],
)
def test_without_a_header_the_number_of_cells_names_them(
    tmp_path: Path, text: str, name: str, expected: list[str]
) -> None:
    found = read(tmp_path, text, name)
    assert "without a header" in found.container and columns(found) == expected
    assert [row.line for row in found.rows] == [1, 2] and found.bad == ()


def test_the_suffix_decides_between_prose_and_a_table(tmp_path: Path) -> None:
    text = "Oh, no.\nWell, yes.\n"
    assert columns(read(tmp_path, text, "rows.csv")) == ["prompt", "completion"]
    assert columns(read(tmp_path, text, "rows.CSV")) == ["prompt", "completion"]
    assert shown(read(tmp_path, text, "rows.txt")) == [("Oh, no.", 1), ("Well, yes.", 2)]
    squeezed = read(tmp_path, gzip.compress(text.encode()), "rows.csv.gz")
    assert squeezed.container == "CSV without a header, gzip" and len(squeezed.rows) == 2


def test_rows_with_a_wrong_number_of_cells_are_bad(tmp_path: Path) -> None:
    found = read(tmp_path, "question,answer\nq1,a1\nq2\nq3,a,b\nq4,a4\n")
    assert [line for *_, line in shown(found)] == [2, 5]
    quote = "a cell with a delimiter in it goes in quotation marks"
    assert [(b.at.rpartition(":")[2], b.why) for b in found.bad] == [
        ("3", "got 1 cell, expected 2 (question, answer)"),
        ("4", f"got 3 cells, expected 2 (question, answer); {quote}"),
    ]


def test_a_quotation_mark_that_never_closes_does_not_swallow_the_file(tmp_path: Path) -> None:
    found = read(tmp_path, 'question,answer\nq1,"a1\nq2,a2\nq3,a3\n')
    assert shown(found) == [("q2", "a2", 3), ("q3", "a3", 4)]
    assert [(b.at.rpartition(":")[2], b.why) for b in found.bad] == [
        ("2", "a quotation mark opens a cell and none closes it")
    ]


def test_tsv_written_without_quoting(tmp_path: Path) -> None:
    found = read(tmp_path, 'question\tanswer\n"Hi" is what?\ta "word"\nq2\ta2\n', "rows.tsv")
    assert shown(found) == [('"Hi" is what?', 'a "word"', 2), ("q2", "a2", 3)] and found.bad == ()


def test_the_separator_line_of_excel(tmp_path: Path) -> None:
    found = read(tmp_path, "sep=;\r\nquestion;answer\r\nq1;a1\r\n")
    assert shown(found) == [("q1", "a1", 3)]


def test_a_cell_longer_than_the_limit_of_csv_and_the_limit_afterwards(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    found = read(tmp_path, f"question,answer\nq,{'x' * (before + 1)}\n")
    assert len(found.rows[0].values["answer"]) == before + 1 and csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a,b,c,d\n1,2,3,4\n", "has 4 cells a row and no header with a known column"),
        ("question,answer,answer\n1,2,3\n", "names `answer` twice"),
        ("question,answer\n", "holds no rows"),
    ],
)
def test_trouble_with_the_whole_table(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        read(tmp_path, text)


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from('\n\t",; '))


@given(st.lists(st.tuples(CELL, CELL), min_size=1), st.sampled_from(",;\t"), st.booleans())
def test_what_csv_writes_is_what_is_read(
    rows: list[tuple[str, str]], delimiter: str, all_quoted: bool
) -> None:
    out = io.StringIO()
    writer = csv.writer(
        out,
        delimiter=delimiter,
        quoting=csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL,
        lineterminator="\n",
    )
    writer.writerow(("prompt", "completion"))
    starts = []
    for row in rows:
        starts.append(out.getvalue().count("\n") + 1)
        writer.writerow(row)
    found = delimited(out.getvalue(), "f", "")
    assert found
    expected = [(at, {"prompt": p, "completion": c}) for at, (p, c) in zip(starts, rows)]
    assert found[1] == expected


# ---- plain text


def test_lines_of_plain_text(tmp_path: Path) -> None:
    found = read(tmp_path, "\r\n  One.\r\nTwo, three; four.\r\n\r\n", "rows.txt")
    assert found.container == "plain text, one row a line"
    assert shown(found) == [("  One.", 2), ("Two, three; four.", 3)]


def test_paragraphs_of_plain_text(tmp_path: Path) -> None:
    found = read(tmp_path, "\nOne\n  and more.\n \n\nTwo.\n\nThree\n", "rows.txt")
    assert found.container == "plain text, rows parted by blank lines"
    assert shown(found) == [("One\n  and more.", 2), ("Two.", 6), ("Three", 8)]


@pytest.mark.parametrize(
    "text", ["[INST] Hi [/INST] Hello", "{name}: hello", '"Hi," he said.\n"No!"', "text\nmore"]
)
def test_prose_that_starts_like_something_else(tmp_path: Path, text: str) -> None:
    found = read(tmp_path, text, "rows.txt")
    assert found.container == "plain text, one row a line"
    assert [row.values["text"] for row in found.rows] == text.split("\n")


@given(st.text(st.sampled_from("ab \n"), min_size=1))
def test_no_word_of_plain_text_is_lost(text: str) -> None:
    _, items = plain(text)
    texts = [values["text"] for _, values in items if isinstance(values, dict)]
    assert " ".join(texts).split() == text.split()
    assert [text.split("\n")[line - 1] for line, _ in items] == [t.split("\n")[0] for t in texts]


# ---- Parquet


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    pa = pytest.importorskip("pyarrow", reason="no pyarrow: pip install 'burnish[data]'")
    pq = pytest.importorskip("pyarrow.parquet")
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=700)
    return sink.getvalue()


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json", "rows"])
def test_parquet_is_found_by_content(tmp_path: Path, name: str) -> None:
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}], "n": i, "none": None} for i in range(2500)]
    raw = parquet_bytes(rows)
    found = read(tmp_path, raw, name)
    assert found.container == "Parquet"
    assert [r.values for r in found.rows] == rows
    assert [r.line for r in found.rows] == list(range(1, 2501))
    assert [r.values for r in read_rows(tmp_path / name, 3).rows] == rows[:3]
    squeezed = read(tmp_path, gzip.compress(raw), "rows.parquet.gz")
    assert (squeezed.container, len(squeezed.rows)) == ("Parquet, gzip", 2500)


def test_a_parquet_file_that_is_cut_off(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(tmp_path, parquet_bytes([{"a": 1}])[:-10])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'burnish\[data\]'"):
        read(tmp_path, b"PAR1 and so on")


@pytest.mark.parametrize(
    ("text", "suffix", "columns", "rows"),
    [
        ("Frage;Antwort;Bearbeiter\nWas kostet das?;Es kostet zwei Euro.;Frau Meier\n", ".csv",
         ["Frage", "Antwort", "Bearbeiter"], 1),
        ("hello,bonjour\nthank you,merci\n", ".csv", ["prompt", "completion"], 2),
        ("What is it?,A lamp that burns.\nAnd this one?,A lamp that does not.\n", ".csv",
         ["prompt", "completion"], 2),
    ],
)  # fmt: skip
def test_a_header_in_words_that_nobody_knows_is_a_header(
    text: str, suffix: str, columns: list[str], rows: int
) -> None:
    found = delimited(text, "f" + suffix, suffix)
    assert found is not None
    assert [list(v) for _, v in found[1] if isinstance(v, dict)] == [columns] * rows


def test_a_table_of_one_broken_cell_is_a_bad_row() -> None:
    found = delimited('"', "f.csv", ".csv")
    assert found is not None and [isinstance(v, str) for _, v in found[1]] == [True]
