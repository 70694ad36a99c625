"""Rows to conversations: `messages`, `prompt`/`completion`, `text`, and the recipe's own column templates.

The format is found from the columns, once for a file, and said. A row that does not fit is reported with its
line; nothing is dropped.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.data.conversation import Conversation, Turn
from burnish.data.rows import Row
from burnish.errors import UserError, all_problems
from burnish.recipe import Data

ROLES = ("system", "user", "assistant")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


@dataclass(frozen=True)
class Read:
    """What was found in the rows. format: 'messages', 'prompt/completion', 'text' or 'template'."""

    format: str
    why: str
    conversations: tuple[Conversation, ...]


def read_conversations(rows: Sequence[Row], settings: Data, chat_template: bool) -> Read:
    """All rows as conversations. chat_template: whether the tokenizer has one.

    Raises UserError that lists every bad row with file and line, or that says which columns were expected.
    """
    name, why, reader = _choose(rows, settings, chat_template)
    conversations: list[Conversation] = []
    problems: list[str] = []
    for row in rows:
        try:
            conversation = reader(row)
            for turn in conversation.turns:
                _check_text(turn.content)
            conversations.append(conversation)
        except _Bad as e:
            problems.append(f"{row.at}: {e}")
    if problems:
        raise all_problems(
            f"{rows[0].file}: {len(problems)} of {len(rows)} rows cannot be used ({why}):",
            problems,
            "correct or remove those rows",
        )
    return Read(name, why, tuple(conversations))


class _Bad(Exception):
    """Why one row cannot be used."""


_Reader = Callable[[Row], Conversation]


def _choose(rows: Sequence[Row], settings: Data, chat_template: bool) -> tuple[str, str, _Reader]:
    columns = list(dict.fromkeys(k for row in rows[:100] for k in row.values))
    if settings.chat_template == "always" and not chat_template:
        raise UserError(
            "data.chat_template: always, but this model's tokenizer has no chat template",
            "set data.chat_template=never, or use an instruct model",
        )
    chat = takes_chat(settings, chat_template)
    if settings.prompt is not None and settings.completion is not None:
        for template, key in ((settings.prompt, "prompt"), (settings.completion, "completion")):
            _check_fields(template, columns, f"data.{key}", rows[0].file)
        chat = settings.chat_template == "always"
        return "template", "the recipe's prompt and completion templates", _template_reader(settings, chat)
    if "messages" in columns:
        if not chat:
            raise UserError(
                f"{rows[0].file} holds `messages`, which need a chat template; "
                + ("this model's tokenizer has none" if not chat_template else "the recipe says never"),
                "use an instruct model, or data.prompt and data.completion templates",
            )
        return "messages", "the column `messages`", lambda row: _messages(row, settings)
    if {"prompt", "completion"} <= set(columns):
        how = "through the chat template" if chat else "as they stand"
        return (
            "prompt/completion",
            f"the columns `prompt` and `completion`, {how}",
            lambda row: _pair(row, settings, chat),
        )
    if "text" in columns:
        return "text", "the column `text`", lambda row: _text(row, settings)
    raise UserError(
        f"{rows[0].file}: the columns are {', '.join(columns)}; "
        "expected `messages`, `prompt` and `completion`, or `text`",
        "or say in the recipe how to read them, such as data.prompt='Q: {"
        + (columns or ["question"])[0]
        + "}' data.completion='{"
        + (columns or ["answer"])[-1]
        + "}'",
    )


def takes_chat(settings: Data, chat_template: bool) -> bool:
    """Whether conversations may go through the tokenizer's chat template (chat_template: it has one)."""
    return chat_template and settings.chat_template != "never"


def fields(template: str) -> list[str]:
    """Columns that a template names."""
    return [m[1] for m in _FIELD.finditer(template) if m[1] is not None]


def fill(template: str, values: Mapping[str, Any]) -> str:
    """`{column}` replaced by the column's text; `{{` and `}}` are braces. Raises KeyError for an absent
    column.
    """

    def one(m: re.Match[str]) -> str:
        return str(values[m[1]]) if m[1] is not None else m[0][0]

    return _FIELD.sub(one, template)


def _check_fields(template: str, columns: Sequence[str], key: str, file: str) -> None:
    wrong = [f for f in fields(template) if f not in columns]
    if wrong:
        near = difflib.get_close_matches(wrong[0], columns, 1)
        did = f"; did you mean {{{near[0]}}}?" if near else ""
        raise UserError(
            f"{key} names {{{wrong[0]}}}, which is no column of {file}{did}",
            f"its columns are {', '.join(columns)}; write {{{{ and }}}} for braces of the text itself",
        )


def _check_text(text: str) -> None:
    """JSON can hold one half of a surrogate pair (cut text does); no tokenizer can."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise _Bad(f"half a character (\\u{ord(text[e.start]):04x}); expected whole Unicode text") from e


def _string(row: Row, key: str) -> str:
    value = row.values.get(key)
    if not isinstance(value, str):
        got = "is missing" if key not in row.values else f"is {type(value).__name__}, expected text"
        raise _Bad(f"`{key}` {got}")
    return value


def _template_reader(settings: Data, chat: bool) -> _Reader:
    prompt, completion = settings.prompt or "", settings.completion or ""
    needed = dict.fromkeys(fields(prompt) + fields(completion))

    def read(row: Row) -> Conversation:
        values = {k: _scalar(row, k) for k in needed}
        return _conversation(fill(prompt, values), fill(completion, values), row, settings, chat)

    return read


def _scalar(row: Row, key: str) -> str:
    value = row.values.get(key)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise _Bad(
        f"column `{key}` "
        + ("is missing" if key not in row.values else f"holds {value!r:.60}, expected text")
    )


def _conversation(prompt: str, completion: str, row: Row, settings: Data, chat: bool) -> Conversation:
    if not completion.strip():
        raise _Bad("the completion is empty, so there is nothing to train")
    turns = [Turn("user", prompt), Turn("assistant", completion)]
    if chat and settings.system:
        turns.insert(0, Turn("system", settings.system))
    return Conversation(tuple(turns), not chat, row.at)


def _pair(row: Row, settings: Data, chat: bool) -> Conversation:
    return _conversation(_string(row, "prompt"), _string(row, "completion"), row, settings, chat)


def _text(row: Row, settings: Data) -> Conversation:
    text = _string(row, "text")
    if settings.answer_after is None:
        if not text.strip():
            raise _Bad("`text` is empty")
        return Conversation((Turn("user", ""), Turn("assistant", text)), True, row.at)
    head, separator, tail = text.rpartition(settings.answer_after)
    if not separator:
        raise _Bad(f"`text` does not contain {settings.answer_after!r} (data.answer_after)")
    # Spaces between the two belong to the answer: tokenizers join a space to the word after it.
    head += separator
    prompt = head.rstrip(" ")
    return _conversation(prompt, head[len(prompt) :] + tail, row, settings, chat=False)


def _messages(row: Row, settings: Data) -> Conversation:
    messages = row.values.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Bad("`messages` is not a list of {role, content}")
    turns = []
    for i, m in enumerate(messages):
        role, content = (m.get("role"), m.get("content")) if isinstance(m, dict) else (None, None)
        if role not in ROLES:
            raise _Bad(f"message {i + 1} has role {role!r}; expected one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise _Bad(f"message {i + 1} ({role}) has no text in `content`")
        turns.append(Turn(role, content))
    if turns[-1].role != "assistant":
        raise _Bad(f"the last message is the {turns[-1].role}'s; expected the assistant's answer")
    if settings.system and turns[0].role != "system":
        turns.insert(0, Turn("system", settings.system))
    return Conversation(tuple(turns), False, row.at)


def question(asked: str | Mapping[str, str], settings: Data, format: str, chat: bool) -> Conversation:
    """A question of the recipe's `ask:` as a conversation that waits for its answer.

    With column templates a plain string fills the prompt's one column. Raises UserError where it has several.
    """
    if format == "template" and settings.prompt is not None:
        names = list(dict.fromkeys(fields(settings.prompt)))
        if isinstance(asked, str):
            if len(names) != 1:
                raise UserError(
                    f"ask: data.prompt has the columns {', '.join(names) or '(none)'}, so a question must "
                    f"give each, as in {{{', '.join(f'{n}: …' for n in names)}}}; got {asked!r:.60}",
                    "write the question as a mapping of columns",
                )
            asked = {names[0]: asked}
        missing = [n for n in names if n not in asked]
        if missing:
            raise UserError(
                f"ask: this question gives no value for {', '.join(missing)}: {dict(asked)!r:.80}",
                f"data.prompt has the columns {', '.join(names)}",
            )
        text = fill(settings.prompt, asked)
        chat = settings.chat_template == "always"
    elif not isinstance(asked, str):
        raise UserError(
            f"ask: a question is text for {format} rows; got columns {', '.join(asked)}",
            "columns are for recipes with data.prompt and data.completion",
        )
    else:
        text = asked
    plain = format == "text" or not chat
    turns = [Turn("user", text)]
    if not plain and settings.system:
        turns.insert(0, Turn("system", settings.system))
    return Conversation(tuple(turns), plain, "ask")
