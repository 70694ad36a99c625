"""`messages` and ShareGPT: roles, parts, reasoning, tools, weights, and what is told of bad ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from burnish.data.conversation import ToolCall, Turn
from burnish.errors import UserError
from burnish.recipe import Data
from tests.data.reading import ANSWER, PQ, USER, read, said, why_bad

# ---- messages


def one_turn(message: Mapping[str, Any]) -> Turn:
    found = read({"messages": [USER, message]})
    assert found.bad == ()
    return found.conversations[0].turns[1]


def test_every_bad_row_is_listed_with_its_line() -> None:
    found = read(
        {"messages": [USER, ANSWER]},
        {"messages": [USER]},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": "text"},
        {},
    )
    assert [b.at for b in found.bad] == [f"f.jsonl:{line}" for line in (2, 3, 4, 5)]
    assert found.bad[0].why == "the last message is the user's; expected the assistant's answer"
    assert "message 1 has role 'robot'; expected one of system, user, assistant, tool" in found.bad[1].why
    assert [c.at for c in found.conversations] == ["f.jsonl:1"]


def test_roles_and_tool_results() -> None:
    found = read({"messages": [
        {"role": "developer", "content": "s"}, USER,
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"name": "g", "arguments": {"y": "é"}}]},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": [{"type": "text", "text": "r"}]},
        {"role": "function", "name": "g", "content": "q"}, ANSWER]}, data=Data(system="no"))  # fmt: skip
    roles = ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert said(found) == list(zip(roles, ["s", "a", "", "r", "q", "b"], strict=True))
    turns = found.conversations[0].turns
    assert turns[2].calls == (ToolCall("f", '{"x": 1}', "1"), ToolCall("g", '{"y": "é"}'))
    assert (turns[3].id, turns[3].name, turns[4].name) == ("1", "f", "g")


def test_parts_of_content() -> None:
    turn = one_turn({"role": "assistant", "content": [
        {"type": "reasoning", "value": "hm"}, {"type": "text", "text": "b"}, {"type": "text", "value": "c"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'}]})  # fmt: skip
    assert turn == Turn("assistant", "bc", "hm", (ToolCall("f", '{"x": 1}'),))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_content(key: str) -> None:
    assert one_turn({**ANSWER, key: "hm"}).reasoning == "hm"
    assert one_turn({**ANSWER, key: None}).reasoning == ""


@pytest.mark.parametrize(
    ("extra", "weight"),
    [({}, 1), ({"weight": 0}, 0), ({"weight": 0.5}, 0.5), ({"weight": 1e-6}, 1e-6), ({"weight": 10**6}, 1e6),
     ({"train": False}, 0), ({"train": True}, 1),
     ({"train": False, "weight": 2}, 0), ({"train": None, "weight": None}, 1)],
)  # fmt: skip
def test_weights(extra: dict[str, Any], weight: float) -> None:
    assert one_turn({**ANSWER, **extra}).weight == weight


def call(arguments: object) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({**ANSWER, "weight": -1}, "`weight` is -1; expected 0, or a number from 0.000001 to 1000000"),
        ({**ANSWER, "weight": 1e39}, "`weight` is 1e+39"),
        ({**ANSWER, "weight": 1e-50}, "`weight` is 1e-50"),
        ({**ANSWER, "weight": True}, "`weight` is True"),
        ({**ANSWER, "weight": float("nan")}, "`weight` is nan"),
        ({**ANSWER, "weight": 10**400}, "`weight` is 1000"),
        ({**ANSWER, "train": 1}, "`train` is 1; expected true or false"),
        ({**ANSWER, "reasoning": 1.5, "content": [3]}, "a part that is a number"),
        (call("[1]"), "the arguments of 'f' are '[1]'; expected JSON of an object"),
        (call("{x"), "the arguments of 'f' is not JSON"),
        (call("[" * 100_000), "is not JSON"),
        (call({"x": float("nan")}), "cannot be written as JSON"),
        ({"role": "assistant", "tool_calls": [{"arguments": {}}]}, "a tool call is"),
        ({"role": "assistant", "tool_calls": {}, "content": 1}, "`content` is a number"),
        ({"role": "assistant"}, "message 2 (assistant) has no text in `content`"),
        ({"role": "assistant", "content": ""}, "says nothing"),
        ({"role": "user", "content": "x", "reasoning": "y"}, "only the assistant can"),
        ({"role": "assistant", "content": [{"type": "video_url"}]}, "of type 'video_url'; burnish"),
        ({"role": "assistant", "content": "\ud83d"}, "half a character (\\ud83d)"),
        ({**ANSWER, "reasoning": "\ud83d"}, "half a character"),
        (call({"x": "\ud83d"}), "half a character"),
    ],
)  # fmt: skip
def test_bad_messages(message: dict[str, Any], why: str) -> None:
    good = {"messages": [USER, ANSWER]}
    padding = [good] * 100  # whole-file refusals look at the first 100 rows
    found = read(*padding, {"messages": [USER, message]})
    assert len(found.conversations) == 100 and [b.at for b in found.bad] == ["f.jsonl:101"]
    assert why in found.bad[0].why


FORMS = [{"type": "function", "function": {"name": "f"}}, {"name": "f"}]


@pytest.mark.parametrize("tool", FORMS)
def test_tools_in_every_form_are_one(tool: dict[str, Any]) -> None:
    for given_ in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        found = read({"messages": [USER, ANSWER], "tools": given_})
        assert found.conversations[0].tools == ('{"type": "function", "function": {"name": "f"}}',)


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_no_tools(nothing: object) -> None:
    assert read({"messages": [USER, ANSWER], "tools": nothing}).conversations[0].tools == ()


@pytest.mark.parametrize("tools", ["{", {"name": "f"}, [3], [{"function": {}}], [{"name": "\udc00"}]])
def test_bad_tools(tools: object) -> None:
    assert why_bad(read({"messages": [USER, ANSWER], "tools": tools}))


def test_messages_need_a_chat_template() -> None:
    for column in ("messages", "conversations"):
        with pytest.raises(
            UserError, match=f"`{column}`, which need a chat template; this model's tokenizer"
        ):
            read({column: [USER, ANSWER]}, chat=False)
    with pytest.raises(UserError, match="the recipe says never"):
        read({"messages": [USER, ANSWER]}, data=Data(chat_template="never"))
    with pytest.raises(UserError, match="always"):
        read({"prompt": "a", "completion": "b"}, data=Data(chat_template="always"), chat=False)


def test_prompt_and_completion_of_messages_train_the_completion() -> None:
    found = read({"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "content": "c"}]})
    assert [t.weight for t in found.conversations[0].turns if t.role == "assistant"] == [0, 1]
    assert said(found)[-1] == ("assistant", "c")
    for chat in (True, False):  # the first row says which it is
        mixed = read(PQ, {"prompt": [USER], "completion": [ANSWER]}, chat=chat)
        assert [b.why for b in mixed.bad] == ["`prompt` is an array, expected text"]


def test_a_system_column_is_the_system_message_of_messages() -> None:
    for row in (
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"conversations": [USER, ANSWER]},
    ):
        found = read({**row, "system": "s"}, {**row, "system": " "}, data=Data(system="recipe's"))
        assert said(found) == [("system", "s"), ("user", "a"), ("assistant", "b")]
        assert said(found, 1)[0] == ("system", "recipe's") and "`system` is the system message" in found.why


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_two_system_messages_are_one_only_where_they_say_the_same(column: str) -> None:
    own = [{"role": "system", "content": "s"}, USER, ANSWER]
    assert said(read({column: own, "system": "s\n"}))[0] == ("system", "s")
    empty = [{"role": "system", "content": ""}, USER, ANSWER]
    assert said(read({column: empty, "system": "t"}))[:2] == [("system", "t"), ("user", "a")]
    assert "`system` is 't', and the first message is the system's, 's'" in why_bad(
        read({column: own, "system": "t"})
    )


def test_tools_and_what_is_not_used_are_told() -> None:
    found = read({"messages": [USER, ANSWER], "tools": FORMS, "prompt": "a", "id": 3, "source": "x"})
    assert found.why == "the column `messages`; `tools`: what may be called; not used: `prompt`, `source`"
    named = read({"messages": [{**USER, "name": "n"}, {**ANSWER, "reasoning": "hm"}]})
    assert named.why == "the column `messages`"


# ---- ShareGPT


@pytest.mark.parametrize("who", ["gpt", "assistant", "bot", "model", "chatgpt"])
def test_sharegpt(who: str) -> None:
    found = read(
        {"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": who, "value": "b"}]}
    )
    assert found.format == "sharegpt"
    assert said(found) == [("system", "s"), ("user", "a"), ("assistant", "b")]
    assert said(read({"conversation": [USER, ANSWER]})) == [("user", "a"), ("assistant", "b")]


def test_sharegpt_tools() -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]
    found = read({"tools": '[{"name": "f"}]', "conversations": [
        {"from": "user", "value": "a"}, {"from": "function_call", "value": json.dumps(calls)},
        {"from": "observation", "value": "r"}, {"from": "function_response", "value": "q"},
        {"from": "function_call", "value": json.dumps(calls[0])}, {"from": "tool", "value": "r"},
        {"from": "gpt", "value": "b"}]})  # fmt: skip
    turns = found.conversations[0].turns
    assert [t.role for t in turns] == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
    assert turns[1].calls == (ToolCall("f", '{"x": 1}'), ToolCall("g", "{}")) and len(turns[4].calls) == 1
    assert found.conversations[0].tools == ('{"type": "function", "function": {"name": "f"}}',)
    broken = {"conversations": [{"from": "function_call", "value": "{"}]}
    assert "the value of a function_call is not JSON" in why_bad(read(broken))
