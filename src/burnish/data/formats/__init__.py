"""Rows to conversations: the format is found from the columns, once for a file, and said.

    read = read_conversations(rows, recipe.data, tokenizer.has_chat_template)
    read.format, read.why     # 'alpaca', "the columns `instruction`, `input` and `output`, through …"
    read.conversations, read.bad

A row that does not fit is told with its line, and whether that ends the run is the caller's business. One row
may hold several conversations (`instances`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from burnish.data.conversation import Conversation, Turn
from burnish.data.formats import chat, choice, pairs, templates
from burnish.data.formats.columns import filled_in, names_in, renamed, unused
from burnish.data.formats.refusals import lone_preferences, refuse
from burnish.data.formats.templates import fields, fill
from burnish.data.formats.values import BadRow, File, Format, check_texts, ended, with_system
from burnish.data.names import STANDARD
from burnish.data.rows import Bad, Row
from burnish.data.thinking import apply_thinking, thoughts_cut
from burnish.errors import UserError
from burnish.recipe import Data

__all__ = ["Read", "fields", "fill", "question", "read_conversations", "takes_chat"]

# In this order: what says more comes first (`text` is beside many others, as a copy of them).
_FINDERS: tuple[Callable[[File], Format | None], ...] = (
    chat.find,
    pairs.find_instances,
    pairs.find_alpaca,
    pairs.find_reasoning,
    choice.find,
    pairs.find_questions,
    pairs.find_pairs,
    pairs.find_text,
)


@dataclass(frozen=True)
class Read:
    """What was found in the rows.

    format: 'template', 'messages', 'sharegpt', 'alpaca', 'instances', 'reasoning', 'choice', 'questions',
    'code', 'text', or two columns such as 'prompt/completion'. why: a sentence on how they are read, and on
    the columns of known names that are not. thoughts_dropped: answers of `conversations` from which reasoning
    was cut (data.thinking=drop).
    """

    format: str
    why: str
    conversations: tuple[Conversation, ...]
    bad: tuple[Bad, ...]
    thoughts_dropped: int = 0


def read_conversations(rows: Sequence[Row], settings: Data, chat_template: bool) -> Read:
    """All rows as conversations, and those that cannot be used. chat_template: whether the tokenizer has one.

    Raises UserError for what concerns the whole file: columns that say nothing, data that burnish cannot
    train on, settings that do not go with it.
    """
    if not rows:
        raise UserError("there are no rows to read", "name a file that holds some in data.train")
    if settings.chat_template == "always" and not chat_template:
        raise UserError(
            "data.chat_template: always, but this model's tokenizer has no chat template",
            "set data.chat_template=never, or use an instruct model",
        )
    rows = renamed(rows, settings.columns, keep=settings.prompt is not None)
    odd = [] if settings.columns or settings.prompt else lone_preferences(rows)
    rows = [row for row in rows if row not in odd] if odd else rows
    every = filled_in(rows)
    found = _choose(rows, every, settings, takes_chat(settings, chat_template))
    conversations: list[Conversation] = []
    bad = [Bad(row.at, "a preference pair (chosen, rejected); expected one answer") for row in odd]
    dropped = 0
    for row in rows:
        try:
            read = found.read(row)
            for conversation in read:
                check_texts(conversation)
        except BadRow as e:
            bad.append(Bad(row.at, str(e)))
            continue
        thought = [apply_thinking(c, settings.thinking) for c in read]
        wrong = next((t for t in thought if isinstance(t, Bad)), None)
        if wrong:
            bad.append(wrong)
        else:
            kept = [t for t in thought if isinstance(t, Conversation)]
            conversations += kept
            dropped += sum(thoughts_cut(*pair) for pair in zip(read, kept, strict=True))
    # under templates a renamed column stands under its old name too
    beside = [c for c in every if settings.prompt is None or c not in settings.columns.values()]
    why = found.why + unused(beside, found.why)
    return Read(found.name, why, tuple(conversations), tuple(bad), dropped)


def _choose(rows: Sequence[Row], every: tuple[str, ...], settings: Data, chat: bool) -> Format:
    everything = names_in(rows, filled=False)
    path = rows[0].file
    by_recipe = templates.find(File(rows, everything, every, settings, chat, path))
    if by_recipe:
        return by_recipe
    # A column that is empty in every row (as tables of several sources have them) says nothing of the format;
    # a file whose rows all lack one is still read, and told row by row.
    for columns in (names_in(rows, filled=True), everything):
        file = File(rows, columns, every, settings, chat, path)
        refuse(file)
        wants_text = settings.answer_after is not None
        found = pairs.find_text(file) if wants_text else None
        found = found or next((f for f in (find(file) for find in _FINDERS) if f), None)
        if found and wants_text and found.name != "text":
            raise UserError(
                f"data.answer_after is for `text` rows; {path} holds {found.why}",
                "remove data.answer_after (data.answer_after=null)",
            )
        if found:
            return found
    raise _unknown(path, everything)


def _unknown(path: str, columns: Sequence[str]) -> UserError:
    near = [
        (c, n[0])
        for c in columns
        if c not in STANDARD and (n := difflib.get_close_matches(c.lower(), STANDARD, 1, 0.8))
    ]
    spelt = f"; did you mean data.columns='{{{near[0][1]}: {near[0][0]}}}'?" if near else ""
    first, last = (columns or ("question",))[0], (columns or ("answer",))[-1]
    return UserError(
        f"{path}: the columns are {', '.join(columns)}; expected `messages`, `prompt` and `completion`, or "
        f"`text`, or `conversations`, `instruction` and `output`, `question` and `answer`{spelt}",
        f"or say in the recipe how to read them, such as data.prompt='Q: {{{first}}}' "
        f"data.completion='{{{last}}}', or name them: data.columns='{{prompt: {first}, completion: {last}}}'",
    )


def takes_chat(settings: Data, chat_template: bool) -> bool:
    """Whether conversations may go through the tokenizer's chat template (chat_template: it has one)."""
    return chat_template and settings.chat_template != "never"


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
    if format in pairs.PLAIN or not chat:
        # as the rows were trained: what stands between question and answer is part of the prompt
        turn = Turn("user", ended(text, "" if format in pairs.EXACT else "\n"))
        markup = format == "text" or (format == "template" and templates.is_markup(settings))
        return Conversation((turn,), True, "ask", markup=markup)
    return Conversation(with_system((Turn("user", text),), settings), False, "ask")
