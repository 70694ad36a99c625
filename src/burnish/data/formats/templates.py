"""The recipe's own templates over the columns: data.prompt and data.completion."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from burnish.data.conversation import Conversation, Turn
from burnish.data.formats.values import BadRow, File, Format, conversation, finite, listed
from burnish.data.rows import Row
from burnish.errors import UserError
from burnish.recipe import Data

# How models spell the special tokens between turns: a template that holds one writes a chat by itself.
_MARKUP = re.compile(r"<[|｜]|\[/?INST\]|</?s>|<(?:start|end)_of_turn>")
_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def find(file: File) -> Format | None:
    """The format of a recipe with templates. Raises UserError where they name a column that is not there."""
    prompt, completion = file.settings.prompt, file.settings.completion
    if prompt is None or completion is None:
        return None
    for template, key in ((prompt, "prompt"), (completion, "completion")):
        _check_fields(template, file.columns, f"data.{key}", file.path)
    chat = file.settings.chat_template == "always"
    markup = is_markup(file.settings)
    needed = dict.fromkeys(fields(prompt) + fields(completion))

    def read(row: Row) -> tuple[Conversation, ...]:
        values = {k: _scalar(row, k) for k in needed}
        turns = (Turn("user", fill(prompt, values)), Turn("assistant", fill(completion, values)))
        return (replace(conversation(turns, row, file.settings, chat, apart=""), markup=markup),)

    why = f"the recipe's prompt and completion templates, with {listed(list(needed)) or 'no column'}"
    return Format("template", why, read)


def is_markup(settings: Data) -> bool:
    """Whether the recipe's own templates spell special tokens, which are meant as such then."""
    fixed = _FIELD.sub("", (settings.prompt or "") + (settings.completion or ""))
    return settings.chat_template != "always" and _MARKUP.search(fixed) is not None


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


def _scalar(row: Row, key: str) -> str:
    value = row.values.get(key)
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and finite(value):
        return str(value)
    raise BadRow(
        f"column `{key}` "
        + ("is missing" if key not in row.values else f"holds {value!r:.60}, expected text")
    )
