"""What the readers share: the text of a column, what is wrong with a row, and turns to a conversation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from burnish.data.conversation import Conversation, Turn
from burnish.data.names import kind
from burnish.data.rows import Row
from burnish.recipe import Data

Reader = Callable[[Row], tuple[Conversation, ...]]


class BadRow(Exception):
    """Why one row cannot be used. Caught where rows are read; nobody else sees it."""


@dataclass(frozen=True)
class Format:
    """How the rows of a file are read. read raises BadRow, and nothing else, for any value of a row.

    why names, between back-quotes, each column that is read: what it does not name is told as not used.
    """

    name: str
    why: str
    read: Reader


@dataclass(frozen=True)
class File:
    """What a format is found from. columns: those of the first 100 rows, in order, which decide it. every:
    those that hold something in some row of all, for what is optional in it.
    """

    rows: Sequence[Row]
    columns: tuple[str, ...]
    every: tuple[str, ...]
    settings: Data
    chat: bool  # conversations may go through the chat template
    path: str


def text(values: Mapping[str, Any], key: str) -> str:
    """The text of a column; a number is written out. Raises BadRow for anything else."""
    value = values.get(key)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and finite(value):
        return str(value)
    raise BadRow(f"`{key}` " + ("is missing" if key not in values else f"is {kind(value)}, expected text"))


def optional(values: Mapping[str, Any], key: str | None) -> str:
    """As `text`, and "" where the column is absent or null."""
    return "" if key is None or values.get(key) is None else text(values, key)


def finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def parsed(value: Any, what: str) -> Any:
    """JSON text as its value; a value that is no text as it is. Raises BadRow naming `what`."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as e:
        raise BadRow(f"{what} is not JSON: {value!r:.60}") from e


def canonical(value: Any, what: str) -> str:
    """JSON text of a value. Raises BadRow where JSON has no word for it (NaN, bytes)."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as e:
        raise BadRow(f"{what} cannot be written as JSON: {value!r:.60}") from e


def conversation(
    turns: Sequence[Turn], row: Row, settings: Data, chat: bool, apart: str = "\n"
) -> Conversation:
    """Turns that end with an answer, for the chat template or (not chat) as prompt and completion.

    apart: what stands between prompt and completion where the prompt does not end with it. A plain
    conversation has one answer, so earlier turns become part of its prompt, and reasoning is written out.
    """
    answer = turns[-1]
    if not answer.content.strip():
        raise BadRow("the completion is empty, so there is nothing to train")
    if chat:
        return Conversation(with_system(turns, settings), False, row.at)
    prompt = ended("\n".join(t.content for t in turns[:-1]), apart)
    if answer.reasoning.strip():
        thought = f"<think>\n{answer.reasoning}\n</think>\n\n{answer.content}"
        answer = replace(answer, content=thought, reasoning="")
    return Conversation((Turn("user", prompt), answer), True, row.at)


def ended(prompt: str, apart: str) -> str:
    """A prompt with what stands between it and the completion."""
    return prompt if not prompt or prompt.endswith(apart) else prompt + apart


def with_system(turns: Sequence[Turn], settings: Data) -> tuple[Turn, ...]:
    """data.system first, where the conversation does not begin with a system message of its own."""
    if settings.system and turns[0].role != "system":
        return (Turn("system", settings.system), *turns)
    return tuple(turns)


def check_texts(found: Conversation) -> None:
    """JSON can hold one half of a surrogate pair (cut text does); no tokenizer can. Raises BadRow."""
    for turn in found.turns:
        called = [t for call in turn.calls for t in (call.name, call.arguments, call.id)]
        for one in (turn.content, turn.reasoning, turn.name, turn.id, *called):
            _check(one)
    for tool in found.tools:
        _check(tool)


def _check(one: str) -> None:
    try:
        one.encode()
    except UnicodeEncodeError as e:
        raise BadRow(f"half a character (\\u{ord(one[e.start]):04x}); expected whole Unicode text") from e


def listed(names: Sequence[str]) -> str:
    """`a`, `b` and `c`"""
    quoted = [f"`{n}`" for n in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
