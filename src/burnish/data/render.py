"""Conversations to tokens and weights, and the inference prompt, from one renderer; each one proven.

    renderer = Renderer(tokenizer, loss_on="assistant")
    example = renderer.example(conversation)             # which tokens are trained is decided here alone
    prompt = renderer.prompt(conversation.prompt)

A text is tokenised as a whole, as every server does it, where the prompt's tokens then come out as a prefix
of it. Where they do not (a tokenizer merges across the border), or where the data holds what looks like a
special token, it is cut there and tokenised in pieces: the look-alike as plain text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from burnish.data.batches import Example
from burnish.data.conversation import Conversation
from burnish.data.proof import prove
from burnish.data.template import MEANT, Answer, ChatTemplate, Control, Layout, Piece, Unproven
from burnish.errors import UserError
from burnish.models.tokenizer import Tokenizer


class Renderer:
    def __init__(self, tokenizer: Tokenizer, loss_on: Literal["assistant", "last", "all"]) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on
        self.trimmed = 0  # texts so far whose outer white space the template removed
        self.template = ChatTemplate(tokenizer) if tokenizer.has_chat_template else None
        self._control = self.template.control if self.template else Control(tokenizer.special)
        meant = {t: i for t, i in self._control.tokens.items() if t not in MEANT}
        self._asked = _Blind(tokenizer, self._control)
        self._answered = _Blind(tokenizer, Control(meant))

    def example(self, conversation: Conversation, layout: Layout | None = None) -> Example:
        """Tokens and weights of a whole conversation, every answer closed by a token that ends it.

        layout: the conversation's, where it is known already.
        Raises Unproven where template and tokenizer do not give it back, character by character.
        """
        layout = layout or self.layout(conversation)
        self.trimmed += layout.trimmed
        bos = self._bos(conversation)
        tokens, spans = self._tokens(layout)
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
        if self._loss_on != "all":
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
            pieces = _plain("".join(t.content for t in conversation.turns), "asked", conversation)
        else:
            try:
                if self.template is None:
                    raise Unproven("the tokenizer has no chat template")
                pieces = self.template.prompt(conversation).pieces
            except Unproven as e:
                raise UserError(
                    f"{conversation.at}: {e}", "ask it another way, or set data.chat_template=never"
                ) from e
        ids = self._bos(conversation) + self._encode(pieces)
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
        for answer in layout.answers:
            before = self._encode(_first(layout.pieces, answer.start))
            upto = whole if answer.end == length else self._encode(_first(layout.pieces, answer.end))
            if whole[: len(before)] != before or whole[: len(upto)] != upto:
                return self._in_pieces(layout)
            spans.append((len(before), len(upto)))
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
        return tokens, spans

    def _encode(self, pieces: Sequence[Piece]) -> list[int]:
        tokens: list[int] = []
        run = ""
        for p in pieces:
            blind = {"template": None, "asked": self._asked, "answered": self._answered}[p.origin]
            if blind is None or not blind.needed(p.text):
                run += p.text
                continue
            tokens += self._tokenizer.encode(run) + blind.encode(p.text)
            run = ""
        return tokens + self._tokenizer.encode(run)


class _Blind:
    """Encodes text in which control tokens are ordinary characters. Made when first needed."""

    def __init__(self, tokenizer: Tokenizer, control: Control) -> None:
        self._tokenizer, self._control = tokenizer, control
        self._made: Tokenizer | None = None

    def needed(self, text: str) -> bool:
        return self._control.pattern.search(text) is not None

    def encode(self, text: str) -> list[int]:
        if self._made is None:
            self._made = self._tokenizer.without(self._control.tokens)
        return self._made.encode(text)


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
