"""What becomes of reasoning: kept as given, cut out, or asked of every answer (data.thinking).

Reasoning stands apart (`Turn.reasoning`) or opens the answer, between `<think>` and `</think>`; both count.
Further on in an answer the tags are what it speaks of.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from burnish.data.conversation import Conversation, Turn
from burnish.data.rows import Bad

_BLOCK = re.compile(r"<think>(.*?)</think>\s*", re.DOTALL)
_OPENING = re.compile(r"\s*(?:<think>.*?</think>\s*)+", re.DOTALL)
_TAG = re.compile(r"</?think>")


def apply_thinking(
    conversation: Conversation, policy: Literal["keep", "drop", "require"]
) -> Conversation | Bad:
    """The conversation under a policy, or why it does not go with it.

    drop: without reasoning, and without `<think>…</think>` and the white space around it where it opens
    what the assistant says; a tag without its partner, and an answer that was nothing else, are Bad. require:
    every answer that is trained and calls no tool has reasoning, or is Bad.
    """
    if policy == "keep":
        return conversation
    turns: list[Turn] = []
    for i, turn in enumerate(conversation.turns):
        if turn.role != "assistant":
            turns.append(turn)
        elif policy == "drop":
            cut = replace(turn, reasoning="", content=turn.content[len(_opening(turn)) :])
            wrong = _wrong_after_cut(cut)
            if wrong:
                return Bad(conversation.at, f"message {i + 1} (assistant) {wrong} (data.thinking=drop)")
            turns.append(cut)
        else:
            before = conversation.turns[i - 1].content if i else ""
            if turn.weight > 0 and not turn.calls and not _thinks(turn, before):
                why = f"message {i + 1} (assistant) has no reasoning; expected some (data.thinking=require)"
                return Bad(conversation.at, why)
            turns.append(turn)
    return replace(conversation, turns=tuple(turns))


def thoughts_cut(before: Conversation, after: Conversation) -> int:
    """How many turns had reasoning, which `after` (the same under a policy) has no more."""
    pairs = zip(before.turns, after.turns, strict=True)
    return sum(old != new and _reasons(old) for old, new in pairs)


def _opening(turn: Turn) -> str:
    """The blocks that open a turn, with the white space around them; '' where none does."""
    found = _OPENING.match(turn.content)
    return found[0] if found else ""


def _reasons(turn: Turn) -> bool:
    """Whether there is reasoning, apart or in the opening blocks: an empty block is none."""
    return bool(turn.reasoning.strip()) or any(m[1].strip() for m in _BLOCK.finditer(_opening(turn)))


def _wrong_after_cut(turn: Turn) -> str:
    left = _TAG.search(_BLOCK.sub("", turn.content))
    if left:
        return f"has {left[0]} without its partner, so where the reasoning ends is not known"
    if turn.weight > 0 and not turn.calls and not turn.content.strip():
        return "holds reasoning and no answer"
    return ""


def _thinks(turn: Turn, before: str) -> bool:
    """Also where the prompt ends with `<think>`, as templates for reasoning models write it."""
    if _reasons(turn):
        return True
    thought, closed, _ = turn.content.partition("</think>")
    return bool(closed and thought.strip()) and before.rstrip().endswith("<think>")
