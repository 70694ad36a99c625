"""Rows that are conversations already: `messages` (role, content) and ShareGPT (from, value)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from burnish.data.conversation import Conversation, Role, ToolCall, Turn
from burnish.data.formats.columns import one
from burnish.data.formats.values import (
    BadRow,
    File,
    Format,
    Reader,
    canonical,
    listed,
    optional,
    parsed,
    text,
    with_system,
)
from burnish.data.names import kind as kind_of
from burnish.data.rows import Row
from burnish.errors import UserError
from burnish.recipe import Data

_OPENAI: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "developer": "system", "function": "tool",
}  # fmt: skip
_SHAREGPT: dict[str, Role] = {
    **_OPENAI, "human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_REASONING = ("reasoning_content", "reasoning", "thinking")
_LIGHTEST, _HEAVIEST = 1e-6, 1_000_000  # weights become float32, in which 1e39 is inf and 1e-50 is 0


def find(file: File) -> Format | None:
    """`messages`, or `conversations`. Raises UserError where they can go through no chat template."""
    column = one(file.columns, "messages", "conversations", "conversation")
    paired = column is None and _paired(file)
    if column is None and not paired:
        return None
    if not file.chat:
        never = file.settings.chat_template == "never"
        raise UserError(
            f"{file.path} holds `{column or 'prompt'}`{'' if column else ' of messages'}, which need a chat "
            "template; " + ("the recipe says never" if never else "this model's tokenizer has none"),
            "use an instruct model, or data.prompt and data.completion templates",
        )
    note = _beside(file)
    if column is None:
        why = "the columns `prompt` and `completion`, both lists of messages"
        return Format("messages", why + note, _pair_reader(file))
    if column.lower() == "messages":
        why = f"the column `{column}`"
        return Format("messages", why + note, lambda row: _messages(row, column, file.settings))
    why = f"the column `{column}`, as ShareGPT has it"
    return Format("sharegpt", why + note, lambda row: _sharegpt(row, column, file.settings))


def _beside(file: File) -> str:
    """A word on the columns that are read beside the messages; often empty."""
    tools = [c for c in ("tools", "functions") if c in file.every]
    system = "; `system` is the system message" if "system" in file.every else ""
    return system + (f"; {listed(tools)}: what may be called" if tools else "")


def _paired(file: File) -> bool:
    """prompt and completion that are lists of messages in the first row, which TRL writes."""
    first = file.rows[0].values
    return isinstance(first.get("prompt"), list) and isinstance(first.get("completion"), list)


def _pair_reader(file: File) -> Reader:
    def read(row: Row) -> tuple[Conversation, ...]:
        asked, answered = row.values.get("prompt"), row.values.get("completion")
        if not isinstance(asked, list) or not isinstance(answered, list):
            raise BadRow("`prompt` and `completion` are not both lists of {role, content}")
        messages = [{**m, "train": False} if isinstance(m, dict) else m for m in asked] + answered
        turns = [_turn(m, i, _OPENAI) for i, m in enumerate(messages, 1)]
        return (_whole(turns, row, file.settings),)

    return read


def _messages(row: Row, column: str, settings: Data) -> tuple[Conversation, ...]:
    messages = row.values.get(column)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"`{column}` is not a list of {{role, content}}")
    return (_whole([_turn(m, i, _OPENAI) for i, m in enumerate(messages, 1)], row, settings),)


def _sharegpt(row: Row, column: str, settings: Data) -> tuple[Conversation, ...]:
    messages = row.values.get(column)
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"`{column}` is not a list of {{from, value}}")
    turns = [_turn(_openai(m), i, _SHAREGPT) for i, m in enumerate(messages, 1)]
    return (_whole(turns, row, settings),)


def _openai(message: Any) -> Any:
    """A ShareGPT message under the names of `messages`."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    role, value = message["from"], message.get("value")
    named = {k: v for k, v in message.items() if k not in ("from", "value")} | {"role": role}
    if role == "function_call":
        calls = parsed(value, "the value of a function_call")
        return {**named, "tool_calls": calls if isinstance(calls, list) else [calls]}
    return {**named, "content": value}


def _whole(turns: list[Turn], row: Row, settings: Data) -> Conversation:
    if not turns:
        raise BadRow("there are no messages")
    if turns[-1].role != "assistant":
        raise BadRow(f"the last message is the {turns[-1].role}'s; expected the assistant's answer")
    turns = _with_column(turns, optional(row.values, "system"))
    value, key = next(
        ((row.values[k], k) for k in ("tools", "functions") if row.values.get(k) is not None), (None, "tools")
    )
    return Conversation(with_system(turns, settings), False, row.at, _tools(value, key))


def _with_column(turns: list[Turn], system: str) -> list[Turn]:
    """The text of the column `system` first. Raises BadRow where the conversation begins with another."""
    own = turns[0].content.strip() if turns[0].role == "system" else ""
    if not system.strip() or own == system.strip():
        return turns
    if own:
        raise BadRow(
            f"`system` is {system!r:.40}, and the first message is the system's, {own!r:.40}; expected one "
            "of the two, or the same text in both"
        )
    return [Turn("system", system), *turns[turns[0].role == "system" :]]


def _turn(message: Any, number: int, roles: Mapping[str, Role]) -> Turn:
    """One message of a row, the number-th of it. Raises BadRow."""
    given = message.get("role") if isinstance(message, dict) else None
    role = roles.get(given) if isinstance(given, str) else None
    if role is None:
        expected = ", ".join(dict.fromkeys((*_OPENAI.values(), *roles)))
        raise BadRow(f"message {number} has role {given!r:.40}; expected one of {expected}")
    where = f"message {number} ({given})"
    try:
        content, thoughts, calls = _content(message.get("content"))
        thoughts = thoughts or next((t for t in (optional(message, k) for k in _REASONING) if t), "")
        calls += _calls(message)
        weight = _weight(message)
        name, id = optional(message, "name"), optional(message, "tool_call_id")
    except BadRow as e:
        raise BadRow(f"{where}: {e}") from e
    if role != "assistant" and (calls or thoughts):
        raise BadRow(f"{where} holds {'a tool call' if calls else 'reasoning'}; only the assistant can")
    if message.get("content") is None and not calls:
        raise BadRow(f"{where} has no text in `content`")
    if role == "assistant" and weight and not content.strip() and not calls:
        raise BadRow(f"{where} says nothing, so there is nothing to train")
    if role != "tool":
        return Turn(role, content, thoughts, calls, weight)
    return Turn(role, content, weight=weight, name=name, id=id)


def _content(content: Any) -> tuple[str, str, tuple[ToolCall, ...]]:
    """Text, reasoning and tool calls of a message's `content`: null, text, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or "", "", ()
    if not isinstance(content, list):
        raise BadRow(f"`content` is {kind_of(content)}; expected text or a list of parts")
    said: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            said.append(_part_text(part, ("text", "value")))
        elif kind in ("reasoning", "thinking"):
            thoughts.append(_part_text(part, ("value", "text", kind)))
        elif kind == "tool_call":
            value = parsed(part.get("value"), "the value of a tool_call")
            calls += [_call(v) for v in (value if isinstance(value, list) else [value])]
        else:
            got = f"of type {kind!r:.40}" if isinstance(part, dict) else f"that is {kind_of(part)}"
            raise BadRow(f"a part {got}; burnish trains on text: expected text, reasoning or tool_call")
    return "".join(said), "".join(thoughts), tuple(calls)


def _part_text(part: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    return text(part, next((k for k in keys if part.get(k) is not None), keys[0]))


def _calls(message: Mapping[str, Any]) -> tuple[ToolCall, ...]:
    """`tool_calls`, or OpenAI's older `function_call`."""
    calls = parsed(message.get("tool_calls"), "`tool_calls`") or []
    if not isinstance(calls, list):
        raise BadRow(f"`tool_calls` is {kind_of(calls)}, expected a list")
    older = message.get("function_call")
    return tuple(_call(c) for c in itertools.chain(calls, [] if older is None else [older]))


def _call(value: Any) -> ToolCall:
    """{"id", "function": {"name", "arguments"}} or bare {"name", "arguments"}."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    name = inner.get("name") if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or not isinstance(name, str) or not name:
        raise BadRow(f'a tool call is {value!r:.60}; expected {{"name": …, "arguments": {{…}}}}')
    given = inner.get("arguments")
    arguments = parsed(given, f"the arguments of {name!r:.40}") if given not in (None, "") else {}
    if not isinstance(arguments, dict):
        raise BadRow(f"the arguments of {name!r:.40} are {given!r:.60}; expected JSON of an object")
    written = canonical(arguments, f"the arguments of {name!r:.40}")  # also where it was text: NaN is no JSON
    return ToolCall(name, given if isinstance(given, str) and given else written, optional(value, "id"))


def _weight(message: Mapping[str, Any]) -> float:
    weight, train = message.get("weight"), message.get("train")
    weight = 1.0 if weight is None else weight
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not number or not (weight == 0 or _LIGHTEST <= weight <= _HEAVIEST):
        expected = f"0, or a number from {_LIGHTEST:f} to {_HEAVIEST}"
        raise BadRow(f"`weight` is {weight!r:.40}; expected {expected}")
    if train is not None and not isinstance(train, bool):
        raise BadRow(f"`train` is {train!r:.40}; expected true or false")
    return 0.0 if train is False else float(weight)


def _tools(value: Any, key: str) -> tuple[str, ...]:
    """Each tool as JSON text in OpenAI's form. value: a list, JSON text of one, or nothing."""
    tools = parsed(value, f"`{key}`") if value != "" else None
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise BadRow(f"`{key}` is {kind_of(tools)}; expected a list of tools, or JSON text of one")
    found: list[str] = []
    for tool in (parsed(t, f"a tool of `{key}`") for t in tools):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            expected = '{"type": "function", "function": {"name": …}} or {"name": …}'
            raise BadRow(f"a tool of `{key}` is {tool!r:.60}; expected {expected}")
        whole = tool if inner is not tool else {"type": "function", "function": tool}
        found.append(canonical({"type": "function", **whole}, f"a tool of `{key}`"))
    return tuple(found)
