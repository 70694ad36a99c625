"""The proof that an example trains what its conversation says: by decoding what came out, not by trust.

It looks at tokens and weights alone, and holds them against the conversation:

1. all tokens, decoded, are the text that the template wrote, so no text was lost on the way;
2. each stretch of trained tokens, decoded, is one answer (reasoning, text and calls in order, nothing else)
   and the token that ends it;
3. what stands before the first answer holds the system prompt and the question;
4. the control tokens are the template's own: none was made of the data's text, and no sequence begins twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import numpy as np

from burnish.data.batches import Example
from burnish.data.conversation import Conversation, Turn
from burnish.data.template import Control, Layout, Unproven
from burnish.models.tokenizer import Tokenizer


def prove(
    conversation: Conversation,
    layout: Layout,
    example: Example,
    tokenizer: Tokenizer,
    control: Control,
    loss_on: str,
    n_bos: int,
) -> None:
    """Raises Unproven with what differs. n_bos: beginning-of-sequence tokens put before the text."""
    ids = example.tokens.tolist()
    whole = tokenizer.decode(ids[n_bos:], True)
    _same(layout.text, whole, "the tokens do not give the text back")
    shift = len(whole) - len(layout.text)  # a space, at most, of a tokenizer made by SentencePiece
    _control(ids[n_bos:], layout, tokenizer, control)
    if len(ids) > 1 and ids[0] == ids[1] and (ids[0] in control.ids or n_bos):
        raise Unproven(f"the sequence begins twice, with {tokenizer.decode(ids[:1], True)}")
    if loss_on == "all":
        return
    turns = conversation.turns
    answers = [a for a in layout.answers if loss_on != "last" or a is layout.answers[-1]]
    trained = [a for a in answers if turns[a.turn].weight > 0]
    runs = _runs(example.weights > 0)
    if conversation.plain and runs and runs[0][0] == 1 and not turns[0].content and not n_bos:
        runs[0] = (0, runs[0][1])  # a whole text: its first token is given, not predicted
    if len(runs) != len(trained):
        raise Unproven(f"{len(runs)} stretches of tokens are trained; expected {len(trained)} answers")
    for (start, end), answer in zip(runs, trained, strict=True):
        turn = turns[answer.turn]
        if np.any(example.weights[max(1, start) : end] != np.float32(turn.weight)):
            raise Unproven(f"turn {answer.turn + 1}: its tokens have another weight than {turn.weight}")
        if ids[end - 1] not in (*tokenizer.stop_ids, *control.ids):
            raise Unproven(f"turn {answer.turn + 1}: its last trained token does not end the answer")
        closing = tokenizer.decode(ids[end - 1 : end], True)
        text = tokenizer.decode(ids[start:end], True)
        there = whole[answer.start + shift : answer.end + shift]
        _same(there, text, f"turn {answer.turn + 1}: what is trained stands elsewhere")
        _answer(turn, answer.turn, text.removeprefix(answer.header), closing, conversation.markup)
    before = whole[: trained[0].start + shift] if trained else whole
    for i, turn in enumerate(turns[: trained[0].turn if trained else len(turns)]):
        if turn.role in ("system", "user") and turn.content.strip() not in before:
            raise Unproven(f"the text of turn {i + 1} ({turn.role}) does not stand before the answer")


def _answer(turn: Turn, number: int, text: str, closing: str, markup: bool) -> None:
    """What was trained of one turn is that turn's, and its end; marked-up text may bring its own end."""
    own = markup and turn.content.endswith(closing)
    inner = text if own else text.removesuffix(closing)
    parts = [t.strip() for t in (turn.reasoning, turn.content) if t.strip()]
    if not (turn.reasoning or turn.calls):
        _same(turn.content.strip(), inner.strip(), f"turn {number + 1}: what is trained is not the answer")
    at = 0
    for part in parts:
        found = inner.find(part, at)
        if found < 0:
            raise Unproven(f"turn {number + 1}: {part[:40]!r} is not trained")
        at = found + len(part)


def _control(ids: Sequence[int], layout: Layout, tokenizer: Tokenizer, control: Control) -> None:
    own = [t for p in layout.pieces if p.origin == "template" for t in control.found(p.text)]
    meant = {*control.meant.values()}
    got = [t for t in ids if t in control.ids]
    if [t for t in got if t not in meant] != [t for t in own if t not in meant]:
        extra = sorted({tokenizer.decode([t], True) for t in got if got.count(t) != own.count(t)})
        raise Unproven(f"text of the data became control tokens: {', '.join(extra) or 'in another order'}")


def _runs(trained: np.ndarray) -> list[tuple[int, int]]:
    found, at = [], 0
    for on, group in groupby(trained.tolist()):
        n = len(list(group))
        if on:
            found.append((at, at + n))
        at += n
    return found


def _same(expected: str, got: str, what: str) -> None:
    # Tokenizers made by SentencePiece begin a text with a space, or take one away.
    if got == expected or got == expected.removeprefix(" ") or got == f" {expected}":
        return
    n = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
    n = min(len(expected), len(got)) if n is None else n
    raise Unproven(f"{what}: expected {expected[n : n + 40]!r}, got {got[n : n + 40]!r}")
