"""Reasoning kept, cut out, or asked of every answer."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.data.conversation import Conversation, ToolCall, Turn
from burnish.data.rows import Bad
from burnish.data.thinking import apply_thinking
from burnish.recipe import Data
from tests.data.reading import PQ, read, why_bad

BLOCK = "<think>\nhm\n</think>\n\nb"


def thought(policy: Any, *turns: Turn) -> Conversation | Bad:
    return apply_thinking(Conversation((Turn("user", "a"), *turns), False, "f:1"), policy)


def test_thinking_dropped() -> None:
    given_ = [Turn("assistant", BLOCK), Turn("user", "<think>mine</think>"), Turn("assistant", "b", "hm")]
    found = thought("drop", *given_)
    assert isinstance(found, Conversation)
    assert [(t.content, t.reasoning) for t in found.turns[1:]] == [
        ("b", ""), ("<think>mine</think>", ""), ("b", "")]  # fmt: skip
    assert thought("keep", *given_) == Conversation((Turn("user", "a"), *given_), False, "f:1")


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("use the <think>x</think> tag", "use the <think>x</think> tag"),
        ("<think>hm</think>use the <think>x</think> tag", "use the <think>x</think> tag"),
        (" \n<think>a</think>\n<think>b</think> c", "c"),
    ],
)
def test_only_the_block_that_opens_an_answer_is_cut(content: str, left: str) -> None:
    found = thought("drop", Turn("assistant", content))
    assert isinstance(found, Conversation) and found.answer == left


def test_a_tag_further_on_is_no_reasoning() -> None:
    found = thought("require", Turn("assistant", "use the <think>x</think> tag"))
    assert isinstance(found, Bad) and "has no reasoning" in found.why


def test_answers_that_lost_their_reasoning_are_counted() -> None:
    several = {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": BLOCK},
        {"role": "user", "content": "<think>mine</think>"},
        {"role": "assistant", "content": "b", "reasoning": "hm"},
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\n</think>b"},
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "the <think>x</think> tag"},
    ]}  # fmt: skip
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b"}]}
    found = read(several, bad, several, data=Data(thinking="drop"))
    assert len(found.bad) == 1 and found.thoughts_dropped == 4
    assert read(several, data=Data(thinking="keep")).thoughts_dropped == 0
    assert read(PQ, data=Data(thinking="drop")).thoughts_dropped == 0


@pytest.mark.parametrize(
    "content", ["<think>b", "hm</think>b", "<think>a<think>b</think>c</think>d", "<think>b</think>"]
)
def test_thinking_that_cannot_be_dropped(content: str) -> None:
    found = thought("drop", Turn("assistant", content))
    assert isinstance(found, Bad) and found.at == "f:1" and "message 2 (assistant)" in found.why
    read_ = read({"prompt": "p", "completion": content}, data=Data(thinking="drop"))
    assert len(read_.bad) == 1 and not read_.conversations


def test_thinking_required() -> None:
    call_ = Turn("assistant", calls=(ToolCall("f", "{}"),))
    good = [Turn("assistant", BLOCK), Turn("assistant", "b", "hm"), Turn("assistant", "b", weight=0), call_]
    assert isinstance(thought("require", *good), Conversation)
    assert isinstance(
        thought("require", Turn("user", "Q <think>\n"), Turn("assistant", "hm\n</think>\nb")), Conversation
    )
    for bare in (
        Turn("assistant", "b"),
        Turn("assistant", "<think>\n</think>b"),
        Turn("assistant", "x</think>b"),
    ):
        found = thought("require", *good, bare)
        assert isinstance(found, Bad) and "message 6 (assistant) has no reasoning" in found.why


def test_thinking_is_applied_to_rows() -> None:
    row = {"question": "q", "cot": "c", "answer": "r"}
    for chat in (True, False):
        found = read(row, data=Data(thinking="drop"), chat=chat)
        assert found.conversations[0].turns[-1] == Turn("assistant", "r")
        assert not read(row, data=Data(thinking="require"), chat=chat).bad
    assert "no reasoning" in why_bad(read(PQ, data=Data(thinking="require")))
