"""Rows that ask and answer: instructions, questions, reasoning columns, nested questions, code and text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from burnish.data.conversation import Conversation, Turn
from burnish.data.formats.beside import REASONING, beside
from burnish.data.formats.columns import match, one
from burnish.data.formats.values import BadRow, File, Format, conversation, listed, optional, text
from burnish.data.rows import Row

_OUTPUTS = ("output", "response", "completion", "answer")
_BEFORE = ("context", "input")  # what a question may be about
_PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("question", "response"),
    ("query", "response"), ("query", "answer"), ("problem", "solution"), ("prompt", "answer"),
    ("prompt", "output"), ("input", "output"),
)  # fmt: skip
EXACT = ("template", "text", "prompt/completion", "code")  # prompt and completion stand as they are
PLAIN = ("text", "code")  # never through a chat template


def _how(file: File) -> str:
    return "through the chat template" if file.chat else "as plain text, a new line between the two"


def find_instances(file: File) -> Format | None:
    """instruction + instances ([{"input", "output"}]): a conversation for each instance."""
    found = match(file.columns, ("instruction",), ("instances",))
    if not found:
        return None
    asked, nested = found.names
    extra = beside(file, found.names)

    def read(row: Row) -> tuple[Conversation, ...]:
        instruction = text(row.values, asked)
        several = []
        for i, item in enumerate(_items(row, nested, "{input, output}"), 1):
            try:
                prompt = _joined(instruction, optional(item, "input"))
                turns = (*extra.opening(row), Turn("user", prompt), Turn("assistant", text(item, "output")))
                several.append(conversation(turns, row, file.settings, file.chat))
            except BadRow as e:
                raise BadRow(f"instance {i} of `{nested}`: {e}") from e
        return tuple(several)

    why = f"the columns {listed(found.names)}: each instance is one, {_how(file)}{extra.note}"
    return Format("instances", why, read)


def find_alpaca(file: File) -> Format | None:
    """instruction, input (often empty), output; perhaps system, history and reasoning."""
    found = match(file.columns, ("instruction",), _OUTPUTS)
    if not found:
        return None
    asked, answered = found.names
    given = one(file.every, "input", "context")
    extra = beside(file, (*found.names, given or ""), history=True, reasoning=True)
    shared = given is not None and _one_instruction(file, asked, given)
    why = f"the columns {listed([asked, *([given] if given else []), answered])}, {_how(file)}"
    if shared and given:
        place = "is the system message" if file.chat else "stands before each"
        why += f"; all rows have the same `{asked}`, so it {place} and `{given}` the question"
        why += ", also of questions asked later" if file.chat else ""
    elif given:
        why += f"; `{given}` follows `{asked}` on a new line, where there is one"

    def read(row: Row) -> tuple[Conversation, ...]:
        instruction, more = text(row.values, asked), optional(row.values, given)
        turns = extra.opening(row)
        if shared:
            own = turns.pop(0).content if turns and turns[0].role == "system" else ""
            turns.insert(0, Turn("system", "\n".join(s for s in (own, instruction) if s)))
            instruction, more = more, ""
        answer = extra.answer(row, text(row.values, answered))
        turns += [Turn("user", _joined(instruction, more)), answer]
        return (conversation(turns, row, file.settings, file.chat),)

    return Format("alpaca", why + found.note + extra.note, read)


def _joined(instruction: str, more: str) -> str:
    return f"{instruction}\n{more}" if more.strip() else instruction


def _one_instruction(file: File, asked: str, given: str) -> bool:
    """One instruction over many questions is a persona or a task: what a system message is for."""
    first = file.rows[0].values.get(asked)
    return isinstance(first, str) and len(file.rows) > 1 and all(
        row.values.get(asked) == first and str(row.values.get(given) or "").strip() for row in file.rows
    )  # fmt: skip


def find_reasoning(file: File) -> Format | None:
    """Question, Complex_CoT, Response and the like: the reasoning stands apart from the answer."""
    found = match(
        file.columns,
        ("question", "problem", "query", "prompt"),
        REASONING,
        ("response", "answer", "completion", "solution"),
    )
    if not found:
        return None
    asked, thought, answered = found.names
    how = _how(file) if file.chat else "as plain text, the reasoning between <think> and </think>"
    extra = beside(file, found.names, before=_BEFORE, history=True)
    why = f"the columns {listed(found.names)}, `{thought}` as reasoning, {how}{found.note}{extra.note}"

    def read(row: Row) -> tuple[Conversation, ...]:
        answer = Turn("assistant", text(row.values, answered), optional(row.values, thought))
        question = extra.asked(row, text(row.values, asked))
        turns = (*extra.opening(row), Turn("user", question), answer)
        return (conversation(turns, row, file.settings, file.chat),)

    return Format("reasoning", why, read)


def find_questions(file: File) -> Format | None:
    """A list of questions and answers about one description: a conversation of several turns.

    A title beside the description is left out: it often names the answer, as a case's title its diagnosis.
    """
    nested = one(file.columns, "qa_pairs", "qas", "qa")
    if nested is None:
        return None
    about = one(file.columns, "description", "context", "title")
    names = [c for c in (about, nested) if c]
    used, extra = listed(names), beside(file, names)
    how = "one conversation a row" if file.chat else "one conversation a question"
    why = f"the columns {used}: {how}, {_how(file)}{extra.note}"
    title = one(file.columns, "title")
    if title and title != about:
        why += f"; `{title}` is left out: it may name the answer"

    def read(row: Row) -> tuple[Conversation, ...]:
        before, opening = optional(row.values, about), extra.opening(row)
        pairs: list[tuple[Turn, Turn]] = []
        for i, item in enumerate(_items(row, nested, "{question, answer}"), 1):
            try:
                question, answer = text(item, "question"), text(item, "answer")
            except BadRow as e:
                raise BadRow(f"question {i} of `{nested}`: {e}") from e
            if not answer.strip():
                raise BadRow(f"question {i} of `{nested}` has an empty answer")
            if before.strip() and (not pairs or not file.chat):
                question = f"{before}\n{question}"
            pairs.append((Turn("user", question), Turn("assistant", answer)))
        if file.chat:
            turns = [*opening, *(turn for pair in pairs for turn in pair)]
            return (conversation(turns, row, file.settings, True),)
        return tuple(conversation((*opening, *pair), row, file.settings, False) for pair in pairs)

    return Format("questions", why, read)


def _items(row: Row, key: str, of: str) -> list[Mapping[str, Any]]:
    """The objects in a column that is a list of them."""
    items = row.values.get(key)
    if not isinstance(items, list) or not items or not all(isinstance(i, dict) for i in items):
        got = "is missing" if key not in row.values else f"is {items!r:.60}"
        raise BadRow(f"`{key}` {got}; expected a list of {of}")
    return items


def find_pairs(file: File) -> Format | None:
    """Two columns; prompt and completion, and code in HumanEval's form, stand byte for byte where plain."""
    code = match(file.columns, ("prompt",), ("canonical_solution",))
    if code and not one(file.columns, "completion"):
        return _pair(file, "code", code.names, "code, as they stand", False)
    found = next((f for f in (match(file.columns, (a,), (b,)) for a, b in _PAIRS) if f), None)
    if not found:
        return None
    name = "/".join(found.names).lower()
    how = "as they stand" if name in EXACT and not file.chat else _how(file)
    return _pair(file, name, found.names, how + found.note, file.chat)


def _pair(file: File, name: str, columns: tuple[str, ...], how: str, chat: bool) -> Format:
    asked, answered = columns
    extra = beside(file, columns, before=_BEFORE, history=True, reasoning=True)

    def read(row: Row) -> tuple[Conversation, ...]:
        question = extra.asked(row, text(row.values, asked))
        answer = extra.answer(row, text(row.values, answered))
        turns = (*extra.opening(row), Turn("user", question), answer)
        return (conversation(turns, row, file.settings, chat, "" if name in EXACT else "\n"),)

    return Format(name, f"the columns {listed(columns)}, {how}{extra.note}", read)


def find_text(file: File) -> Format | None:
    """`text` as it stands; with data.answer_after, cut into prompt and completion."""
    column = one(file.columns, "text")
    if column is None:
        return None
    after = file.settings.answer_after

    def read(row: Row) -> tuple[Conversation, ...]:
        whole = text(row.values, column)
        if after is None:
            if not whole.strip():
                raise BadRow(f"`{column}` is empty")
            return (Conversation((Turn("user", ""), Turn("assistant", whole)), True, row.at, markup=True),)
        head, separator, tail = whole.rpartition(after)
        if not separator:
            raise BadRow(f"`{column}` does not contain {after!r} (data.answer_after)")
        # Spaces between the two belong to the answer: tokenizers join a space to the word after it.
        head += separator
        prompt = head.rstrip(" ")
        turns = (Turn("user", prompt), Turn("assistant", head[len(prompt) :] + tail))
        return (replace(conversation(turns, row, file.settings, False, ""), markup=True),)

    return Format("text", f"the column `{column}`, special tokens in it taken as such", read)
