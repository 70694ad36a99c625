"""Conversations to text through a chat template, every character of it accounted for.

    layout = ChatTemplate(tokenizer).layout(conversation)
    layout.text                # what the template wrote
    layout.pieces              # the same in pieces: the template's own text, and the data's
    layout.answers             # where each answer begins (the inference prompt ends there) and ends

A template is a program that may cut, trim, escape or insert. So each conversation is rendered twice: once as
it is, and once with every text replaced by a mark, which shows where the texts go (the frame). The two must
agree, text by text, or the conversation is Unproven, with what differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from burnish.data.conversation import Conversation, Turn
from burnish.models.tokenizer import Refused, Tokenizer

_MARK = re.compile(r"xBURNISH(\d+)x")
_MOST_FRAMES = 4096  # kept for conversations of the same shape; most files have a handful
PROBE = (Turn("user", "u"), Turn("assistant", "a"))


# Spelled so that nobody means text by it, even where a tokenizer does not call it special (`<|fim_prefix|>`).
_SPELLED = re.compile(r"<[|｜].*[|｜]>")
# Reasoning is marked by these; in an answer they are meant, even where a tokenizer calls them special.
MEANT = ("<think>", "</think>")


class Unproven(Exception):
    """Why a template does not render a conversation as it must."""


@dataclass(frozen=True)
class Piece:
    text: str
    origin: Literal["template", "asked", "answered"]  # "asked": any text of the data but the assistant's


@dataclass(frozen=True)
class Answer:
    """Characters start…end of a layout's text: an assistant turn, from the end of its prompt to its end."""

    turn: int
    start: int
    end: int
    header: str  # what the template opens an answer with by a special token of its own (gpt-oss: its channel)


@dataclass(frozen=True)
class Layout:
    pieces: tuple[Piece, ...]
    answers: tuple[Answer, ...]
    trimmed: int = 0  # texts whose outer white space the template removes

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.pieces)


class Control:
    """Tokens that only a template may write, and their places in a text."""

    def __init__(self, tokens: Mapping[str, int], meant: Collection[str] = MEANT) -> None:
        self.tokens = dict(tokens)
        self.ids = frozenset(tokens.values())
        self.pattern = alternatives(tokens)
        self.meant = {t: i for t, i in tokens.items() if t in meant}  # may stand in an answer

    def found(self, text: str) -> list[int]:
        return [self.tokens[m[0]] for m in self.pattern.finditer(text)]


@dataclass(frozen=True)
class Frame:
    """texts[0] slots[0] texts[1] … texts[n]: the template's own text around the data's, which slot names."""

    texts: tuple[str, ...]
    slots: tuple[tuple[int, str], ...]  # (turn, "content" or "reasoning")

    def filled(self, values: Sequence[str]) -> str:
        return "".join(t + v for t, v in zip(self.texts, [*values, ""], strict=True))

    def begins(self, other: Frame) -> bool:
        n = len(self.slots)
        if self.slots != other.slots[:n] or self.texts[:n] != other.texts[:n]:
            return False
        return other.texts[n].startswith(self.texts[n])


@dataclass(frozen=True)
class _Way:
    """How a message is given to the template: they expect different things."""

    arguments: str = "object"  # or "text"
    nothing: str | None = ""  # the content of a message without any
    reasoning: str = "reasoning_content"


class ChatTemplate:
    """One tokenizer's chat template. Owns the frames seen so far."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._frames: dict[Any, Frame] = {}
        special = tokenizer.special
        self._special = alternatives(special)
        self.end = self._end(special)
        self._ends = {self.end, *(t for t, i in special.items() if i in tokenizer.stop_ids)} - {""}
        self._closing = alternatives(self._ends)
        # Some tokenizers call what opens a turn an ordinary token; typed by a user, it must not open one.
        openings = "".join(self._openings())
        own = {t for t in tokenizer.added if t in special or t in openings or _SPELLED.fullmatch(t)}
        # Of the others, a template's own (`<tool_call>`) may stand in an answer, which a model may write.
        meant = {t for t in tokenizer.added if t not in own and t in tokenizer.template} | {*MEANT}
        self.control = Control({t: i for t, i in tokenizer.added.items() if t in own or t in meant}, meant)

    def layout(self, conversation: Conversation) -> Layout:
        """Raises Unproven."""
        return self._first(conversation, self._laid_out)

    def prompt(self, conversation: Conversation) -> Layout:
        """Text up to where the next answer begins, with the answers before it. Raises Unproven."""
        asked = self._first(conversation, self._asked)
        last = max((i for i, t in enumerate(conversation.turns) if t.role == "assistant"), default=-1)
        if last < 1:
            return asked
        try:
            before = self.layout(replace(conversation, turns=conversation.turns[: last + 1]))
        except Unproven:  # no row of this template would be trained so; it can be asked all the same
            return asked
        return replace(asked, answers=before.answers) if asked.text.startswith(before.text) else asked

    def frame(self, turns: Sequence[Turn], ask: bool = False, reasoning: str = "reasoning_content") -> Frame:
        """What the template writes around these turns' texts. Raises Unproven, Refused."""
        return self._frame(turns, (), ask, _Way(reasoning=reasoning))

    def special_in(self, text: str) -> bool:
        return self._special.search(text) is not None

    def _first(self, conversation: Conversation, make: Any) -> Layout:
        first: Exception | None = None
        for way in self._ways(conversation):
            try:
                made = make(conversation, way)
            except (Refused, Unproven) as e:
                first = first or e
                continue
            return made
        if isinstance(first, Refused):
            raise Unproven(f"the chat template refuses it: {first}") from first
        assert first is not None
        raise first

    def _ways(self, conversation: Conversation) -> Iterator[_Way]:
        calls = any(t.calls for t in conversation.turns)
        thinks = any(t.reasoning for t in conversation.turns)
        silent = any(not t.content for t in conversation.turns)
        for values in product(
            ("object", "text") if calls else ("object",),
            ("", None) if silent else ("",),
            ("reasoning_content", "thinking", "reasoning") if thinks else ("reasoning_content",),
        ):
            yield _Way(*values)

    # --- text ---

    def _laid_out(self, conversation: Conversation, way: _Way) -> Layout:
        turns = conversation.turns
        if turns[0].role == "assistant" or all(t.role != "assistant" for t in turns):
            raise Unproven("expected a question and then an answer")
        self._check_tools(conversation, way)  # first: the reason that helps most
        frame = self._frame(turns, conversation.tools, False, way)
        values, trimmed = self._values(conversation, frame, False, way)
        starts = [sum(map(len, frame.texts[:n])) + sum(map(len, values[:n])) for n in range(len(frame.texts))]
        answers, tail = [], ""
        for i, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            before = self._frame(turns[:i], conversation.tools, True, way)
            if not before.begins(frame):
                raise Unproven(
                    f"the prompt of turn {i + 1} is no beginning of the conversation: the template writes "
                    f"{_difference(before, frame)}"
                )
            self._values(replace(conversation, turns=turns[:i]), before, True, way)
            n, at = len(before.slots), len(before.texts[-1])
            header = self._header(turn, frame, n, at)
            m = max((k + 1 for k, s in enumerate(frame.slots) if s[0] == i), default=n)
            if any(s[0] != i for s in frame.slots[n:m]):
                raise Unproven(f"the template writes another turn's text into the answer of turn {i + 1}")
            begin = at if m == n else 0
            end, tail = self._close(turn, i == len(turns) - 1, frame.texts[m], begin)
            self._check_calls(turn, frame.texts[m][begin:end])
            answers.append(Answer(i, starts[n] + at, starts[m] + end + len(tail), header))
        pieces = _cut(list(_pieces(frame, values, turns)), answers[-1].end - len(tail))
        return Layout((*pieces, Piece(tail, "template")), tuple(answers), trimmed)

    def _asked(self, conversation: Conversation, way: _Way) -> Layout:
        frame = self._frame(conversation.turns, conversation.tools, True, way)
        values, trimmed = self._values(conversation, frame, True, way)
        return Layout(tuple(_pieces(frame, values, conversation.turns)), (), trimmed)

    def _frame(self, turns: Sequence[Turn], tools: Sequence[str], ask: bool, way: _Way) -> Frame:
        shape = tuple((t.role, bool(t.content), bool(t.reasoning), t.calls, t.name, t.id) for t in turns)
        key = (shape, tuple(tools), ask, way)
        if key in self._frames:
            return self._frames[key]
        slots = [(i, f) for i, t in enumerate(turns) for f in ("reasoning", "content") if getattr(t, f)]
        marks = {s: f"xBURNISH{n}x" for n, s in enumerate(slots)}
        marked = [
            replace(t, content=marks.get((i, "content"), ""), reasoning=marks.get((i, "reasoning"), ""))
            for i, t in enumerate(turns)
        ]
        text = self.tokenizer.chat([_message(t, way) for t in marked], ask, _tools(tools))
        parts = _MARK.split(text)
        found = [slots[int(n)] for n in parts[1::2]]
        for i, field in slots:
            if found.count((i, field)) != 1:
                what = "reasoning" if field == "reasoning" else "text"
                how = "leaves out" if (i, field) not in found else "repeats"
                raise Unproven(f"the template {how} the {what} of turn {i + 1} ({turns[i].role})")
        if len(self._frames) >= _MOST_FRAMES:
            self._frames.clear()
        self._frames[key] = Frame(tuple(parts[0::2]), tuple(found))
        return self._frames[key]

    def _values(
        self, conversation: Conversation, frame: Frame, ask: bool, way: _Way
    ) -> tuple[list[str], int]:
        """The text of each slot as the template wrote it, and how many of them it trimmed."""
        turns = conversation.turns
        text = self.tokenizer.chat([_message(t, way) for t in turns], ask, _tools(conversation.tools))
        given = [getattr(turns[i], field) for i, field in frame.slots]
        for trim, escape in product((False, True), (None, False, True)):
            values = [v.strip() for v in given] if trim else given
            if escape is not None:  # results of tools, which some templates write as JSON text
                values = [
                    json.dumps(v, ensure_ascii=escape)[1:-1] if turns[s[0]].role == "tool" else v
                    for v, s in zip(values, frame.slots, strict=True)
                ]
            if frame.filled(values) == text:
                return values, sum(a.strip() != a for a in given) if trim else 0
        raise Unproven(f"the template changes the texts: {_changed(frame.filled(given), text)}")

    # --- what an answer is made of ---

    def _header(self, turn: Turn, frame: Frame, n: int, at: int) -> str:
        """What the template puts between a prompt and its answer. Raises Unproven where it may not stand."""
        glue = frame.texts[n][at:]
        if turn.reasoning or turn.calls or not glue.strip():
            return ""
        if self._special.search(glue):
            return glue
        raise Unproven(f"the template writes {glue!r} before the answer, which no prompt ends with")

    def _close(self, turn: Turn, last: bool, text: str, at: int) -> tuple[int, str]:
        """Where the answer ends within `text`, the template's own after it, and what must be added to it."""
        special = self._closing if turn.calls else self._special  # calls may be written with special tokens
        found = special.search(text, at)
        if found is not None and found[0] in self._ends:
            if text[at : found.start()].strip() and not turn.calls:
                raise Unproven(f"the template writes {text[at : found.start()]!r} after the answer")
            return found.end(), ""
        rest = text[at : found.start()] if found else text[at:]
        if last and found is None and (turn.calls or not rest.strip()):
            if not self.end:
                raise Unproven("nothing ends an answer: the tokenizer has no end-of-sequence token")
            return at + len(rest) if turn.calls else at, self.end
        raise Unproven(f"no token ends the answer: it is followed by {text[at : at + 40]!r}")

    def _check_calls(self, turn: Turn, text: str) -> None:
        """text: what the template writes after all that the turn says, up to its end."""
        for call in turn.calls:
            missing = [w for w in _words(call.name, json.loads(call.arguments)) if not _stands(w, text)]
            if missing:
                raise Unproven(
                    f"the template does not write {missing[0]!r:.60} of the call of {call.name} last"
                )

    def _check_tools(self, conversation: Conversation, way: _Way) -> None:
        texts = [*conversation.tools, *(c.arguments for t in conversation.turns for c in t.calls)]
        for text in texts:
            if found := self._special.search(text):
                raise Unproven(f"a tool's JSON holds the special token {found[0]}")
        if conversation.tools:
            asked = next(i for i, t in enumerate(conversation.turns) if t.role == "assistant")
            shown = "".join(self._frame(conversation.turns[:asked], conversation.tools, True, way).texts)
            for tool in _tools(conversation.tools):
                if tool["function"]["name"] not in shown:
                    raise Unproven(f"the template does not show the tool {tool['function']['name']}")

    def _end(self, special: dict[str, int]) -> str:
        """The token that ends an answer, as text; the tokenizer's own where the template writes none."""
        stop = [t for t, i in special.items() if i in self.tokenizer.stop_ids]
        for turns, allowed in ((PROBE, special), ((*PROBE, *PROBE), stop)):
            try:
                frame = self._frame(turns, (), False, _Way())
            except (Refused, Unproven):
                continue
            after = frame.texts[frame.slots.index((1, "content")) + 1]
            found = self._special.search(after)
            if found and found[0] in allowed and not after[: found.start()].strip():
                return found[0]
        own = [t for t, i in special.items() if i == self.tokenizer.eos_id]
        return own[0] if own else ""

    def _openings(self) -> Iterator[str]:
        for turns in ((*PROBE, *PROBE), (Turn("system", "s"), *PROBE)):
            try:
                yield from self._frame(turns, (), False, _Way()).texts
            except (Refused, Unproven):
                continue


def _message(turn: Turn, way: _Way) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content or way.nothing}
    if turn.reasoning:
        message[way.reasoning] = turn.reasoning
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": c.id or f"call_{n}",
                "type": "function",
                "function": {
                    "name": c.name,
                    "arguments": c.arguments if way.arguments == "text" else json.loads(c.arguments),
                },
            }
            for n, c in enumerate(turn.calls, 1)
        ]
    if turn.role == "tool":
        message |= {"name": turn.name, "tool_call_id": turn.id}
    return message


def _tools(tools: Sequence[str]) -> list[Any]:
    return [json.loads(t) for t in tools]


def _pieces(frame: Frame, values: Sequence[str], turns: Sequence[Turn]) -> Iterator[Piece]:
    for n, text in enumerate(frame.texts):
        yield Piece(text, "template")
        if n < len(values):
            theirs = turns[frame.slots[n][0]].role == "assistant"
            yield Piece(values[n], "answered" if theirs else "asked")


def _cut(pieces: Sequence[Piece], length: int) -> tuple[Piece, ...]:
    """The first `length` characters."""
    kept: list[Piece] = []
    for p in pieces:
        if p.text[:length]:
            kept.append(replace(p, text=p.text[:length]))
        length -= len(kept[-1].text) if p.text[:length] else 0
    return tuple(kept)


def alternatives(tokens: Collection[str]) -> re.Pattern[str]:
    """Finds any of the tokens; the longest first, as tokenizers do. Of none, nothing."""
    return re.compile("|".join(re.escape(t) for t in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def _words(name: str, value: Any) -> Iterator[str]:
    """Name and every leaf of the arguments, as text."""
    yield name
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _words(str(key), inner)
    elif isinstance(value, list):
        for inner in value:
            yield from list(_words("", inner))[1:]
    elif isinstance(value, str):
        yield value
    elif not isinstance(value, bool) and value is not None:  # Python's True and JSON's true are both in use
        yield json.dumps(value)


def _stands(word: str, region: str) -> bool:
    forms = (word, json.dumps(word, ensure_ascii=False)[1:-1], json.dumps(word)[1:-1], word.strip())
    return any(f in region for f in forms)


def _difference(prompt: Frame, whole: Frame) -> str:
    a = prompt.filled(["…"] * len(prompt.slots))
    return _changed(a, whole.filled(["…"] * len(whole.slots))[: len(a) + 40])


def _changed(expected: str, got: str) -> str:
    n = next((i for i, (x, y) in enumerate(zip(expected, got, strict=False)) if x != y), None)
    n = min(len(expected), len(got)) if n is None else n
    return f"expected {expected[n : n + 40]!r}, got {got[n : n + 40]!r} after {got[max(0, n - 20) : n]!r}"
