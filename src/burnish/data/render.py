"""Conversations to tokens and weights, and the inference prompt, from one renderer; each one proven.

    renderer = Renderer(tokenizer, loss_on="assistant")
    example = renderer.example(conversation)             # which tokens are trained is decided here alone
    prompt = renderer.prompt(conversation.prompt)

A text is tokenised as a whole, as every server does it, where the prompt's tokens then come out as a prefix
of it. Where they do not (a tokenizer merges across the border), or where the data holds what looks like a
special token, it is cut there and tokenised in pieces: the look-alike, cut in two, as plain text.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np

from burnish.data.batches import Example
from burnish.data.conversation import Conversation
from burnish.data.proof import prove
from burnish.data.template import Answer, ChatTemplate, Control, Layout, Piece, Unproven, alternatives
from burnish.errors import UserError
from burnish.models.tokenizer import Tokenizer


class Renderer:
    def __init__(self, tokenizer: Tokenizer, loss_on: Literal["assistant", "last", "all"]) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self.trimmed = 0  # texts so far whose outer white space the template removed
        self.template = ChatTemplate(tokenizer) if tokenizer.has_chat_template else None
        self._control = self.template.control if self.template else Control(tokenizer.special)
        unmeant = [t for t in self._control.tokens if t not in self._control.meant]
        self._hidden = {"asked": self._control.pattern, "answered": alternatives(unmeant)}

    def example(self, conversation: Conversation, layout: Layout | None = None) -> Example:
        """Tokens and weights of a whole conversation, every answer closed by a token that ends it.

        layout: the conversation's, where it is known already.
        Raises Unproven where template and tokenizer do not give it back, character by character.
        """
        layout = layout or self.layout(conversation)
        self.trimmed += layout.trimmed
        bos = self._bos(conversation)
        tokens, spans = self._tokens(layout)
        if len(spans) > 1 and tokens != self._encode(layout.pieces):
            self._check_prompts(layout, tokens, spans)
        tokens = [*bos, *tokens]
        weights = np.zeros(len(tokens), np.float32)
        for answer, (start, end) in zip(layout.answers, spans, strict=True):
            last = answer is layout.answers[-1]
            if self._loss_on != "last" or last:
                weights[len(bos) + start : len(bos) + end] = conversation.turns[answer.turn].weight
        if self._loss_on == "all":
            weights[:] = 1
        if len(weights):
            weights[0] = 0  # nothing precedes the first token, so nothing predicts it
        example = Example(np.asarray(tokens, np.int32), weights)
        prove(conversation, layout, example, self._tokenizer, self._control, self._loss_on, len(bos))
        return example

    def layout(self, conversation: Conversation) -> Layout:
        """The conversation as text. Raises Unproven."""
        if not conversation.plain:
            if self.template is None:
                raise Unproven("the tokenizer has no chat template")
            return self.template.layout(conversation)
        asked = "".join(t.content for t in conversation.turns[:-1])
        answered = conversation.turns[-1].content
        eos = self._tokenizer.eos_id
        if eos is None:
            raise Unproven("nothing ends an answer: the tokenizer has no end-of-sequence token")
        ends = [self._tokenizer.decode([i], True) for i in (eos, *self._tokenizer.stop_ids)]
        end = "" if conversation.markup and answered.endswith(tuple(ends)) else ends[0]
        pieces = (*_plain(asked, "asked", conversation), *_plain(answered, "answered", conversation))
        whole = len(asked) + len(answered) + len(end)
        answer = Answer(len(conversation.turns) - 1, len(asked), whole, "")
        return Layout((*pieces, Piece(end, "template")), (answer,))

    def prompt(self, conversation: Conversation) -> list[int]:
        """Tokens up to where the assistant's next answer begins. Raises UserError where there is no such."""
        if conversation.plain:
            layout = Layout(_plain("".join(t.content for t in conversation.turns), "asked", conversation), ())
        else:
            try:
                if self.template is None:
                    raise Unproven("the tokenizer has no chat template")
                layout = self.template.prompt(conversation)
            except Unproven as e:
                raise UserError(
                    f"{conversation.at}: {e}", "ask it another way, or set data.chat_template=never"
                ) from e
        ids = self._bos(conversation) + self._tokens(layout)[0]
        if ids:
            return ids
        if self._tokenizer.eos_id is None:
            raise UserError("an empty prompt gives the model nothing to start from", "ask a question")
        return [self._tokenizer.eos_id]

    def _bos(self, conversation: Conversation) -> list[int]:
        """Chat templates write their own beginning-of-sequence token; plain text gets it here."""
        bos = self._tokenizer.bos_id
        return [bos] if conversation.plain and bos is not None else []

    def _tokens(self, layout: Layout) -> tuple[list[int], list[tuple[int, int]]]:
        """All tokens, and for each answer the range of its own."""
        whole = self._encode(layout.pieces)
        length, spans = sum(len(p.text) for p in layout.pieces), []
        tokens, at = 0, 0  # so many tokens are the text up to `at`, where an answer ended
        for answer in layout.answers:
            # An answer ends with a special token, at which every text is cut: what follows stands alone. The
            # last prompt, and any that does not come out so, is encoded from its beginning.
            part = self._encode(_first(layout.pieces, answer.start, at))
            if answer is layout.answers[-1] or whole[tokens : tokens + len(part)] != part:
                part, tokens = self._encode(_first(layout.pieces, answer.start)), 0
            start = tokens + len(part)
            rest = self._encode(_first(layout.pieces, answer.end, answer.start))
            if answer.end == length:
                rest = whole[start:]
            elif whole[start : start + len(rest)] != rest:
                rest = self._encode(_first(layout.pieces, answer.end))[start:]
            if whole[tokens:start] != part or whole[start : start + len(rest)] != rest:
                return self._in_pieces(layout)
            tokens, at = start + len(rest), answer.end
            spans.append((start, tokens))
        return whole, spans

    def _in_pieces(self, layout: Layout) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, cut wherever an answer begins or ends."""
        tokens: list[int] = []
        spans, at = [], 0
        for answer in layout.answers:
            tokens += self._encode(_first(layout.pieces, answer.start, at))
            start = len(tokens)
            tokens += self._encode(_first(layout.pieces, answer.end, answer.start))
            spans.append((start, len(tokens)))
            at = answer.end
        return tokens + self._encode(_first(layout.pieces, sys.maxsize, at)), spans

    def _check_prompts(self, layout: Layout, tokens: list[int], spans: Sequence[tuple[int, int]]) -> None:
        """A row that is cut at its answers: each prompt, which is cut at those before it, begins it."""
        for n, (answer, (start, _)) in enumerate(zip(layout.answers, spans, strict=True)):
            asked = Layout(tuple(_first(layout.pieces, answer.start)), layout.answers[:n])
            if self._tokens(asked)[0] != tokens[:start]:
                raise Unproven(
                    f"the tokens of the prompt of turn {answer.turn + 1} are no beginning of the row's: "
                    "the tokenizer merges across the end of an answer"
                )

    def _encode(self, pieces: Sequence[Piece]) -> list[int]:
        tokens: list[int] = []
        run = ""
        for p in pieces:
            hidden = self._hidden.get(p.origin)
            first, *others = [p.text] if hidden is None else _blind(p.text, hidden)
            run += first
            for part in others:
                tokens += self._tokenizer.encode(run)
                run = part
        return tokens + self._tokenizer.encode(run)


def _blind(text: str, control: re.Pattern[str]) -> list[str]:
    """The text in parts, none of which holds a control token: each is cut after its first character."""
    parts: list[str] = []
    while found := control.search(text):
        cut = found.start() + 1
        parts.append(text[:cut])
        text = text[cut:]
    return [*parts, text]


def _plain(text: str, origin: Literal["asked", "answered"], conversation: Conversation) -> tuple[Piece, ...]:
    return (Piece(text, "template" if conversation.markup else origin),)


def _first(pieces: Sequence[Piece], end: int, start: int = 0) -> list[Piece]:
    """Characters start…end, in their pieces."""
    kept, at = [], 0
    for p in pieces:
        text = p.text[max(0, start - at) : max(0, end - at)]
        if text:
            kept.append(Piece(text, p.origin))
        at += len(p.text)
        if at >= end:
            break
    return kept
