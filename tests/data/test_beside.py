"""Columns beside question and answer: read where the format has a place for them, else named as not used."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.data.conversation import Turn
from burnish.recipe import Data
from tests.data.reading import ANSWER, LINES, USER, read, said


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q", "context": "CREATE", "answer": "r"}, "CREATE\n\nq"),
        ({"prompt": "q", "input": "x", "output": "r"}, "x\n\nq"),
        ({"Question": "q", "Context": "x", "Complex_CoT": "hm", "Response": "r"}, "x\n\nq"),
        ({"prompt": "q", "completion": "r", "context": "x", "input": "y"}, "x\n\ny\n\nq"),
    ],
)
def test_what_a_question_is_about_stands_before_it(row: dict[str, str], prompt: str) -> None:
    for chat in (True, False):
        found = read(row, chat=chat)
        assert said(found)[0][1].rstrip("\n") == prompt
        assert "stands before the question, where there is one" in found.why
    bare = {k: " " if k.lower() in ("context", "input") else v for k, v in row.items()}
    assert said(read(row, bare), 1)[0] == ("user", "q")


def test_a_context_that_only_later_rows_have() -> None:
    found = read(*[{"question": "q", "answer": "r"}] * 100, {"question": "q", "context": "c", "answer": "r"})
    assert said(found, 0)[0] == ("user", "q") and said(found, 100)[0] == ("user", "c\n\nq")


@pytest.mark.parametrize(
    "row",
    [
        {"query": "q", "response": "r"},
        {"prompt": "q", "completion": "r"},
        {"question": "q", "cot": "hm", "answer": "r"},
        {"question": "q", "options": LINES, "answer": "A"},
        {"instruction": "q", "output": "r"},
    ],
)
@pytest.mark.parametrize("earlier", [[["e", "f"]], '[["e", "f"]]'])
def test_system_and_history_stand_first(row: dict[str, Any], earlier: object) -> None:
    found = read({**row, "system": "s", "history": earlier}, {**row, "system": None, "history": []})
    assert said(found, 0)[:3] == [("system", "s"), ("user", "e"), ("assistant", "f")]
    assert said(found, 0)[3][1].startswith("q") and len(said(found, 0)) == 5
    assert len(said(found, 1)) == 2 and "not used" not in found.why
    plain = read({**row, "system": "s", "history": earlier}, chat=False)
    assert said(plain)[0][1].startswith("s\ne\nf\nq")


def test_a_system_column_beside_nested_questions_and_instances() -> None:
    for row in (
        {"QA_pairs": [{"question": "q", "answer": "r"}]},
        {"instruction": "q", "instances": [{"input": "", "output": "r"}]},
    ):
        assert said(read({**row, "system": "s"})) == [("system", "s"), ("user", "q"), ("assistant", "r")]


def test_a_history_in_prose_is_no_conversation() -> None:
    found = read({"question": "q", "answer": "r", "history": "[2019] a fall"})
    assert said(found) == [("user", "q"), ("assistant", "r")] and "not used: `history`" in found.why


@pytest.mark.parametrize("key", ["reasoning", "thinking", "Complex_CoT"])
def test_reasoning_beside_any_pair(key: str) -> None:
    for row in ({"instruction": "q", "output": "r"}, {"input": "q", "output": "r"}):
        found = read({**row, key: "hm"}, {**row, key: None})
        assert [c.turns[-1] for c in found.conversations] == [
            Turn("assistant", "r", "hm"),
            Turn("assistant", "r"),
        ]
        assert f"`{key}` as reasoning" in found.why
        assert said(read({**row, key: "hm"}, chat=False))[1][1] == "<think>\nhm\n</think>\n\nr"


@pytest.mark.parametrize(
    ("row", "left"),
    [
        (
            {"prompt": "p", "completion": "c", "exp": "e", "source": "s", "id": 1, "title": "t"},
            "`exp`, `source`",
        ),
        ({"prompt": "p", "completion": "c", "exp": "", "source": None}, ""),
        ({"instruction": "i", "output": "o", "Context": "c", "input": "x"}, "`Context`"),
        ({"question": "q", "options": LINES, "answer": "A", "exp": "e", "solution": "s"}, "`solution`"),
        ({"text": "t", "prompt": "p"}, "`prompt`"),
        ({"prompt": "p", "canonical_solution": "c", "test": "t"}, ""),
    ],
)
def test_known_columns_that_are_not_used_are_named(row: dict[str, Any], left: str) -> None:
    assert read(row).why.partition("; not used: ")[2] == left
    late = read(*[{k: v for k, v in row.items() if f"`{k}`" not in left}] * 100, row)
    assert late.why.partition("; not used: ")[2] == left


def test_what_templates_leave_out_is_named() -> None:
    row = {"Question": "q", "Response": "r", "context": "c"}
    found = read(row, data=Data(prompt="{Question}", completion="{Response}"))
    assert found.why.endswith("templates, with `Question` and `Response`; not used: `context`")
    renamed = Data(columns={"x": "context"}, prompt="{x} {Question}", completion="{Response}")
    assert "not used" not in read(row, data=renamed).why


def test_names_of_columns_in_another_letter_case() -> None:
    assert said(read({"Text": "t"}))[1] == ("assistant", "t")
    assert said(read({"Messages": [USER, ANSWER]})) == [("user", "a"), ("assistant", "b")]
    assert read({"PROMPT": "p", "COMPLETION": "c"}).format == "prompt/completion"


@pytest.mark.parametrize("column", ["context", "system", "reasoning"])
def test_a_column_beside_that_is_never_text_is_left_and_named(column: str) -> None:
    row = {"input": "q", "output": "r", column: {"title": ["t"], "sentences": [["s"]]}}
    found = read(row)
    assert said(found) == [("user", "q"), ("assistant", "r")]
    assert found.why.endswith(f"; not used: `{column}`")
