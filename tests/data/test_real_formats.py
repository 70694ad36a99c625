"""Every real file (the folder BURNISH_DATA names, or `../shared/data`) is found to be what it is."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from burnish.data.formats import Read, read_conversations
from burnish.data.rows import read_rows
from burnish.recipe import Data

DATA = Path(os.environ.get("BURNISH_DATA", Path(__file__).parents[3] / "shared" / "data"))

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}: set BURNISH_DATA")

FILES = [  # file, format, conversations through a chat template, as plain text (0: cannot be)
    ("alpaca/identity.json", "alpaca", 46, 46),
    ("alpaca/train_en.json", "alpaca", 685, 685),
    ("alpaca/train_zh.json", "alpaca", 700, 700),
    ("alpaca/valid_en.json", "alpaca", 50, 50),
    ("alpaca/valid_zh.json", "alpaca", 50, 50),
    ("cmb-clin/cases.json", "questions", 40, 110),
    ("code-alpaca/train.json", "alpaca", 1499, 1499),
    ("code-alpaca/valid.json", "alpaca", 100, 100),
    ("gsm8k/train.jsonl", "question/answer", 2000, 2000),
    ("gsm8k/valid.jsonl", "question/answer", 200, 200),
    ("mbpp/train.jsonl", "code", 327, 327),
    ("medical-mcq/train_en.jsonl", "choice", 700, 700),
    ("medical-mcq/train_zh.json", "choice", 1000, 1000),
    ("medical-mcq/valid_en.json", "choice", 326, 326),
    ("medical-mcq/valid_zh.json", "choice", 263, 263),
    ("medical-o1-en/train.json", "reasoning", 120, 120),
    ("medical-o1-en/valid.json", "reasoning", 18, 18),
    ("medical-o1-zh/train.jsonl", "alpaca", 566, 566),
    ("medical-o1-zh/valid.jsonl", "alpaca", 60, 60),
    ("messages/train.jsonl", "messages", 140, 0),
    ("messages/train_reason_tools.jsonl", "messages", 20, 0),
    ("messages/train_tools.jsonl", "messages", 65, 0),
    ("prompt-completion/train.jsonl", "prompt/completion", 1455, 1455),
    ("prompt-completion/valid.jsonl", "prompt/completion", 144, 144),
    ("self-instruct-seed/train.jsonl", "instances", 115, 115),
    ("sharegpt/train_chat.json", "sharegpt", 87, 0),
    ("sharegpt/train_tools_en.json", "sharegpt", 151, 0),
    ("sharegpt/train_tools_zh.json", "sharegpt", 156, 0),
    ("wikisql/train.jsonl", "text", 1000, 1000),
    ("wikisql/valid.jsonl", "text", 100, 100),
]
# code-alpaca's row 238 has an empty output: nothing to learn but to say nothing.
BAD = {"code-alpaca/train.json": 1}


def read(file: str, chat: bool, data: Data | None = None) -> Read:
    return read_conversations(read_rows(DATA / file).rows, data or Data(), chat)


@pytest.mark.parametrize(("file", "format", "chat", "plain"), FILES)
def test_the_format_and_every_row(file: str, format: str, chat: int, plain: int) -> None:
    for count, has_template in ((chat, True), (plain, False)):
        if count:
            found = read(file, has_template)
            assert (found.format, len(found.conversations)) == (format, count), found.why
            assert [b.why for b in found.bad] == BAD.get(file, 0) * [
                "the completion is empty, so there is nothing to train"
            ]
            assert all(c.turns[-1].role == "assistant" for c in found.conversations)


def test_the_table_names_every_file() -> None:
    here = sorted(str(p.relative_to(DATA)) for p in DATA.rglob("*.json*"))
    assert here == [file for file, *_ in FILES]


def test_tool_calls_and_reasoning_are_kept_apart() -> None:
    counts = {}
    for file in (
        "sharegpt/train_tools_zh.json",
        "messages/train_reason_tools.jsonl",
        "messages/train_tools.jsonl",
    ):
        turns = [t for c in read(file, True).conversations for t in c.turns]
        counts[file] = (
            Counter(t.role for t in turns)["tool"],
            sum(len(t.calls) for t in turns),
            sum(bool(t.reasoning) for t in turns),
        )
    assert counts == {
        "sharegpt/train_tools_zh.json": (130, 130, 0),
        "messages/train_reason_tools.jsonl": (21, 34, 50),
        "messages/train_tools.jsonl": (0, 65, 0),
    }


def test_medical_reasoning_is_the_open_question_and_can_be_dropped() -> None:
    row = read_rows(DATA / "medical-o1-en/valid.json").rows[0].values
    turns = read("medical-o1-en/valid.json", True).conversations[0].turns
    assert [t.content for t in turns] == [row["Question"], row["Response"]]
    assert turns[1].reasoning == row["Complex_CoT"] and row["question"] != row["Question"]
    for file in ("medical-o1-en/valid.json", "medical-o1-zh/valid.jsonl"):
        for chat in (True, False):
            required = read(file, chat, Data(thinking="require"))
            dropped = read(file, chat, Data(thinking="drop"))
            assert not required.bad and not dropped.bad
            assert not any("think>" in c.answer or c.turns[-1].reasoning for c in dropped.conversations)


@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("medical-o1-en/valid.json", "`options`, `answer_idx`"),
        ("medical-mcq/valid_zh.json", "`source`"),
        ("medical-mcq/train_en.jsonl", ""),
        ("sharegpt/train_tools_en.json", ""),
        ("mbpp/train.jsonl", ""),
        ("cmb-clin/cases.json", ""),
    ],
)
def test_what_is_not_used_is_told_once(file: str, left: str) -> None:
    why = read(file, True).why
    assert why.partition("; not used: ")[2] == left
    assert ("`question` and `answer` could serve too" in why) == file.startswith("medical-o1-en")


def test_the_right_option_is_the_line_of_the_answer() -> None:
    for file in ("medical-mcq/valid_zh.json", "medical-mcq/valid_en.json"):
        rows = read_rows(DATA / file).rows
        for row, conversation in zip(rows, read(file, True).conversations, strict=True):
            assert conversation.answer.startswith(row.values["answer"] + " ")
            assert conversation.answer in row.values["options"].split("\n")
            assert conversation.turns[-2].content.endswith(row.values["options"])
