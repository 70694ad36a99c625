"""Conversations to tokens and weights, and the inference prompt, from one renderer.

    renderer = Renderer(tokenizer, loss_on="assistant") example = renderer.example(conversation)     #
    (tokens, weights): which tokens are trained is decided here alone prompt =
    renderer.prompt(conversation.prompt)

The text is cut where an assistant's answer begins and ends, and the pieces are tokenised one by one. So the
inference prompt is a token prefix of the training sequence by construction, and what the model sees when
asked is what it saw when trained. Trade-off: a tokenizer that would merge characters across such a border
does not get to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from burnish.data.batches import Example
from burnish.data.conversation import Conversation
from burnish.errors import UserError
from burnish.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    text: str
    trained: bool


class Renderer:
    def __init__(self, tokenizer: Tokenizer, loss_on: Literal["assistant", "all"]) -> None:
        self._tokenizer = tokenizer
        self._loss_on = loss_on

    def example(self, conversation: Conversation) -> Example:
        """Tokens and weights of a whole conversation, its last answer closed by an end token that is trained.

        Raises UserError where the chat template loses a character of an assistant's answer.
        """
        ids: list[int] = self._bos(conversation)
        weights: list[float] = [0.0] * len(ids)
        everything = self._loss_on == "all"
        pieces = self._pieces(conversation)
        for piece in pieces:
            tokens = self._tokenizer.encode(piece.text)
            ids += tokens
            weights += [float(piece.trained or everything)] * len(tokens)
        if ids and ids[-1] not in self._tokenizer.stop_ids and pieces[-1].trained:
            if self._tokenizer.eos_id is None:
                raise UserError(
                    "this tokenizer has no end-of-sequence token, so answers would never end",
                    "set eos_token in the model's tokenizer_config.json",
                )
            ids.append(self._tokenizer.eos_id)
            weights.append(1.0)
        if weights:
            weights[0] = 0.0  # nothing precedes the first token, so nothing predicts it
        return Example(np.asarray(ids, np.int32), np.asarray(weights, np.float32))

    def prompt(self, conversation: Conversation) -> list[int]:
        """Tokens up to where the assistant's next answer begins."""
        if conversation.plain:
            text = "".join(t.content for t in conversation.turns)
        else:
            text = self._tokenizer.chat(_messages(conversation), ask=True)
        ids = self._bos(conversation) + self._tokenizer.encode(text)
        if ids:
            return ids
        if self._tokenizer.eos_id is None:
            raise UserError("an empty prompt gives the model nothing to start from", "ask a question")
        return [self._tokenizer.eos_id]

    def _bos(self, conversation: Conversation) -> list[int]:
        """Chat templates write their own beginning-of-sequence token; plain text gets it here."""
        bos = self._tokenizer.bos_id
        return [bos] if conversation.plain and bos is not None else []

    def _pieces(self, conversation: Conversation) -> list[Piece]:
        if conversation.plain:
            return [Piece(t.content, t.role == "assistant") for t in conversation.turns]
        messages, pieces, done = _messages(conversation), [], ""
        for i, turn in enumerate(conversation.turns):
            if turn.role != "assistant":
                continue
            before = self._tokenizer.chat(messages[:i], ask=True)
            after = self._tokenizer.chat(messages[: i + 1], ask=False)
            answer = after[len(before) :]
            if (
                not before.startswith(done)
                or not after.startswith(before)
                or not answer.startswith(turn.content)
            ):
                raise UserError(
                    f"{conversation.at}: the model's chat template does not keep the assistant's answer "
                    f"as written: expected {turn.content[:60]!r}…, got {answer[:60]!r}…",
                    "use data.prompt and data.completion templates, which are rendered as they stand",
                )
            end = len(answer.rstrip()) if answer != turn.content else len(answer)
            end = max(end, len(turn.content))
            pieces += [Piece(before[len(done) :], False), Piece(answer[:end], True)]
            done = before + answer[:end]
        return pieces


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    return [{"role": t.role, "content": t.content} for t in conversation.turns]
