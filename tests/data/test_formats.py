"""Rows that ask and answer to conversations, what is told of bad ones, and no value that breaks a reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.conversation import Turn
from burnish.data.formats import fields, fill, question, takes_chat
from burnish.data.rows import Bad
from burnish.errors import UserError
from burnish.recipe import Data
from tests.data.reading import ANSWER, LINES, USER, read, said, why_bad

# ---- templates, text, prompt and completion


def test_the_guides_medical_prompt() -> None:
    data = Data(
        prompt="### Question:\n  {Question}\n  <think>", completion="{Complex_CoT}\n  </think>\n  {Response}"
    )
    row = {"Question": "为什么？", "Complex_CoT": "想 {x}", "Response": "答", "question": "no"}
    found = read(row, data=data)
    assert found.format == "template" and found.conversations[0].plain
    assert [content for _, content in said(found)] == [
        "### Question:\n  为什么？\n  <think>", "想 {x}\n  </think>\n  答"]  # fmt: skip
    asked = question("怎么？", data, "template", True)
    assert asked.turns[0].content == "### Question:\n  怎么？\n  <think>"


def test_braces_and_fields() -> None:
    assert fill('{{"a": {x}}} {y}', {"x": 1, "y": "{z}"}) == '{"a": 1} {z}'
    assert fields("{{a}} {b} {c d}") == ["b", "c d"]


def test_text_rows_are_cut_after_the_last_separator() -> None:
    found = read({"text": "Q: a\nA: b\nQ: c\nA: SELECT d"}, data=Data(answer_after="\nA:"))
    assert said(found) == [("user", "Q: a\nA: b\nQ: c\nA:"), ("assistant", " SELECT d")]
    assert said(read({"text": "A:  x"}, data=Data(answer_after="A: "))) == [
        ("user", "A:"),
        ("assistant", "  x"),
    ]
    assert "does not contain 'B:'" in why_bad(read({"text": "A: x"}, data=Data(answer_after="B:")))


def test_answer_after_chooses_text_and_goes_with_nothing_else() -> None:
    row = {"instruction": "i", "output": "o", "text": "i A: o"}
    assert read(row).format == "alpaca"
    assert read(row, data=Data(answer_after="A:")).format == "text"
    with pytest.raises(
        UserError, match=r"answer_after is for `text` rows; f\.jsonl holds the columns `prompt`"
    ):
        read({"prompt": "a", "completion": "b"}, data=Data(answer_after="A:"))


def test_prompt_and_completion_take_the_chat_template_where_there_is_one() -> None:
    row = {"prompt": "p", "completion": "c"}
    assert not read(row).conversations[0].plain
    assert read(row, chat=False).conversations[0].plain
    assert read(row, data=Data(chat_template="never")).conversations[0].plain
    assert [role for role, _ in said(read(row, data=Data(system="s")))] == ["system", "user", "assistant"]
    assert not takes_chat(Data(chat_template="never"), True) and takes_chat(Data(), True)


@pytest.mark.parametrize(
    ("row", "format", "prompt"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt/completion", "p"),
        ({"prompt": "p", "canonical_solution": "c", "test": "t"}, "code", "p"),
        ({"prompt": "p", "response": "c"}, "prompt/response", "p\n"),
        ({"question": "p", "answer": "c"}, "question/answer", "p\n"),
        ({"Question": "p", "Answer": "c"}, "question/answer", "p\n"),
        ({"query": "p\n", "response": "c"}, "query/response", "p\n"),
        ({"instruction": "p", "output": "c"}, "alpaca", "p\n"),
    ],
)
def test_plain_question_and_answer_do_not_run_together(row: dict[str, str], format: str, prompt: str) -> None:
    found = read(row, chat=False)
    assert found.format == format
    assert said(found) == [("user", prompt), ("assistant", "c")]
    asked = question(prompt.rstrip("\n"), Data(), format, chat=False)
    assert asked.plain and asked.turns[0].content == prompt  # asked as it was trained


def test_code_is_plain_even_with_a_chat_template() -> None:
    found = read({"prompt": "def f():\n", "canonical_solution": "  return 1\n"})
    assert found.conversations[0].plain and said(found)[1] == ("assistant", "  return 1\n")
    assert question("def g():\n", Data(system="s"), "code", chat=True).plain


def test_a_number_as_answer_is_written_out() -> None:
    assert said(read({"question": "p", "answer": 72}))[1] == ("assistant", "72")


# ---- alpaca and its kin


def test_alpaca_joins_a_non_empty_input() -> None:
    found = read(
        {"instruction": "i", "input": "", "output": "o"}, {"instruction": "j", "input": "x", "output": "p"}
    )
    assert (said(found, 0)[0][1], said(found, 1)[0][1]) == ("i", "j\nx")
    late = read(
        *[{"instruction": "i", "output": "o"}] * 100, {"instruction": "j", "input": "x", "output": "p"}
    )
    assert said(late, 100)[0][1] == "j\nx"


def test_a_blank_input_is_none_and_one_row_has_no_common_instruction() -> None:
    assert said(read({"instruction": "i", "input": " \n", "output": "o"}))[0] == ("user", "i")
    assert said(read({"instruction": "i", "input": "x", "output": "o"}))[0] == ("user", "i\nx")


def test_alpaca_with_system_and_history() -> None:
    row = {"instruction": "i", "output": "o", "system": "s", "history": [["q", "a"]]}
    assert [content for _, content in said(read(row))] == ["s", "q", "a", "i", "o"]
    assert said(read(row, chat=False)) == [("user", "s\nq\na\ni\n"), ("assistant", "o")]
    assert "expected [question, answer]" in why_bad(read({**row, "history": [["q"]]}))


def test_one_instruction_for_all_rows_is_the_system_message() -> None:
    same = [{"instruction": "You are a doctor.", "input": x, "output": "<think>hm</think>\no"} for x in "ab"]
    found = read(*same)
    assert said(found)[:2] == [("system", "You are a doctor."), ("user", "a")]
    assert "is the system message" in found.why and "questions asked later" in found.why
    assert said(read(*same, chat=False))[0] == ("user", "You are a doctor.\na\n")
    for other in ({**same[0], "input": ""}, {**same[0], "instruction": "Translate."}):
        mixed = read(*same, other)
        assert said(mixed)[0] == ("user", "You are a doctor.\na") and "system" not in mixed.why


def test_nested_instances() -> None:
    row = {"instruction": "i", "instances": [{"input": "", "output": "o"}, {"input": "x", "output": "p"}]}
    found = read(row)
    assert found.format == "instances" and len(found.conversations) == 2
    assert said(found, 1) == [("user", "i\nx"), ("assistant", "p")]
    assert "instance 1 of `instances`: `output` is missing" in why_bad(
        read({**row, "instances": [{"input": ""}]})
    )


def test_reasoning_columns() -> None:
    row = {"Question": "q", "Complex_CoT": "c", "Response": "r"}
    found = read(row)
    assert found.format == "reasoning"
    assert found.conversations[0].turns[-1] == Turn("assistant", "r", "c")
    assert said(read(row, chat=False)) == [("user", "q\n"), ("assistant", "<think>\nc\n</think>\n\nr")]
    lower = read({"question": "q", "cot": "c", "answer": "r"})
    assert lower.conversations[0].turns[-1] == Turn("assistant", "r", "c")
    assert read({"question": "q", "reasoning": None, "answer": "r"}).format == "question/answer"


def test_columns_spelt_in_one_style_go_together() -> None:
    row = {"question": "exam", "options": {"A": "x", "B": "y"}, "answer": "x", "answer_idx": "A",
           "Question": "open", "Complex_CoT": "c", "Response": "r"}  # fmt: skip
    found = read(row)
    assert said(found) == [("user", "open"), ("assistant", "r")]
    assert "`question` and `answer` could serve too, not used" in found.why


# ---- multiple choice

OPTIONS = {"A": "one", "B": "two", "C": "three"}


@pytest.mark.parametrize(
    "row",
    [
        {"options": LINES, "answer": "(B)"},
        {"options": "A. one\nB. two\nC. three", "answer": "B"},
        {"options": OPTIONS, "answer": "b."},
        {"options": OPTIONS, "answer": "two"},
        {"options": OPTIONS, "answer": "two", "answer_idx": "B"},
        {"options": list(OPTIONS.values()), "answer_idx": 1, "answer": "two"},
        {"choices": {"text": list(OPTIONS.values()), "label": list(OPTIONS)}, "answerKey": "B"},
        {"opa": "one", "opb": "two", "opc": "three", "opd": None, "cop": 2, "exp": "because"},
        {"opa": "one", "opb": "two", "opc": "three", "cop": "2"},
    ],
)
def test_choice_in_every_form_is_one(row: dict[str, Any]) -> None:
    found = read({"question": "q?", **row})
    assert found.format == "choice"
    assert said(found) == [("user", f"q?\n{LINES}"), ("assistant", "(B) two")]
    assert ("`exp` is not trained" in found.why) == ("exp" in row)


def test_choice_with_context_and_several_right() -> None:
    row = {"question": "q?", "options": LINES}
    found = read({**row, "answer": "AC", "context": "c"}, {**row, "answer": "A", "context": ""})
    assert said(found, 0) == [("user", f"c\n\nq?\n{LINES}"), ("assistant", "(A) one\n(C) three")]
    assert said(found, 1)[0] == ("user", f"q?\n{LINES}")


@pytest.mark.parametrize("answer", ["(D)", "four", 3, -1, None, True, "AA", ""])
def test_bad_choice(answer: object) -> None:
    row = {"question": "q", "options": OPTIONS}
    found = read({**row, "answer": "A"}, {**row, "answer": answer})
    assert [b.why[:11] for b in found.bad] == ["`answer` is"]
    assert "expected one of A, B, C, or a number from 0 to 2" in found.bad[0].why
    assert "expected at least 2" in why_bad(read({"question": "q", "options": "(A) x", "answer": "A"}))


# ---- nested questions


def test_questions_about_one_description() -> None:
    row = {"title": "t", "description": "d", "QA_pairs": [
        {"question": "q", "answer": "a"}, {"question": "r", "answer": "b"}]}  # fmt: skip
    found = read(row)
    assert said(found) == [("user", "d\nq"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    assert "`title` is left out" in found.why
    plain = read(row, chat=False)
    assert [said(plain, i)[0] for i in (0, 1)] == [("user", "d\nq\n"), ("user", "d\nr\n")]
    assert "question 1 of `QA_pairs`: `answer` is missing" in why_bad(read({"QA_pairs": [{"question": "q"}]}))


# ---- columns


def test_columns_are_renamed_first() -> None:
    data = Data(columns={"prompt": "frage", "completion": "antwort"})
    assert said(read({"frage": "p", "antwort": "c"}, data=data)) == [("user", "p"), ("assistant", "c")]
    swapped = Data(columns={"prompt": "completion", "completion": "prompt"})
    assert said(read({"prompt": "p", "completion": "c"}, data=swapped)) == [("user", "c"), ("assistant", "p")]
    templates = Data(columns={"x": "frage"}, prompt="{x}/{frage}", completion="{antwort}")
    assert said(read({"frage": "p", "antwort": "c"}, data=templates))[0] == ("user", "p/p")
    missing = read({"frage": "p", "antwort": "c"}, {"frage": "p"}, data=data)
    assert missing.bad == (Bad("f.jsonl:2", "`completion` is missing"),)


def test_columns_with_no_such_name() -> None:
    with pytest.raises(UserError, match=r"promt is no standard name; did you mean prompt\?"):
        read({"frage": "p"}, data=Data(columns={"promt": "frage"}))
    with pytest.raises(UserError, match=r"fraeg, which is no column of f\.jsonl; did you mean frage\?"):
        read({"frage": "p"}, data=Data(columns={"prompt": "fraeg"}))


def test_unknown_columns() -> None:
    with pytest.raises(UserError) as e:
        read({"Promt": "a", "b": "c"})
    assert "the columns are Promt, b; expected `messages`, `prompt` and `completion`, or `text`" in str(
        e.value
    )
    assert "did you mean data.columns='{prompt: Promt}'?" in str(e.value)
    assert "data.prompt='Q: {Promt}' data.completion='{b}'" in str(e.value)
    with pytest.raises(UserError, match="no rows"):
        read()


def test_an_empty_column_says_nothing_of_the_format() -> None:
    assert (
        read({"messages": None, "images": [], "prompt": "a", "completion": "b"}).format == "prompt/completion"
    )
    assert why_bad(read({"prompt": "a", "completion": None})) == "`completion` is null, expected text"


# ---- anything at all

TAGS = ["role", "content", "from", "value", "type", "text", "name", "arguments", "function", "tool_calls",
        "input", "output", "question", "answer", "weight", "train", "reasoning", "A", "B"]  # fmt: skip
WORDS = ["user", "assistant", "gpt", "human", "function_call", "text", "tool_call", "reasoning",
         "(A) x\n(B) y", "(A)", "[]", "{", '{"name": "f"}', "\ud83d", "", "<think>", "1"]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TAGS), inner, max_size=4),
    max_leaves=12,
)
COLUMNS = [
    {"messages": [USER, ANSWER], "tools": [{"name": "f"}]},
    {"prompt": [USER], "completion": [ANSWER]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
     "system": "s", "tools": "[]"},
    {"instruction": "i", "input": "x", "output": "o", "history": [["a", "b"]], "system": "s"},
    {"instruction": "i", "instances": [{"input": "x", "output": "o"}]},
    {"Question": "q", "Complex_CoT": "c", "Response": "r"},
    {"question": "q", "options": LINES, "answer": "A", "context": "c"},
    {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 1, "exp": "e"},
    {"description": "d", "QA_pairs": [{"question": "q", "answer": "a"}]},
    {"prompt": "p", "completion": "c"},
    {"prompt": "p", "canonical_solution": "c"},
    {"text": "t"},
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(COLUMNS), st.data(), st.booleans(), st.sampled_from(["keep", "drop", "require"]))
def test_any_value_makes_conversations_or_a_bad_row(
    good: dict, data: st.DataObject, chat: bool, how: Any
) -> None:
    """A good row says the format; the one after it holds anything, in any of its columns."""
    chat = (
        chat or any(k in good for k in ("messages", "conversations")) or isinstance(good.get("prompt"), list)
    )
    odd = {k: data.draw(VALUES | st.just(v)) for k, v in good.items() if data.draw(st.integers(0, 5))}
    try:
        found = read(good, odd, data=Data(thinking=how), chat=chat)
    except UserError as e:  # a part of type image, say
        assert "these" in str(e)
        return
    assert all(b.at in ("f.jsonl:1", "f.jsonl:2") and b.why for b in found.bad)
    for conversation in found.conversations:
        assert conversation.turns[-1].role == "assistant"
        for turn in conversation.turns:
            assert turn.content.encode() is not None and turn.weight >= 0
            assert all(isinstance(json.loads(c.arguments), dict) for c in turn.calls)
        assert all(json.loads(t)["type"] is not None for t in conversation.tools)
