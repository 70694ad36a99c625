"""What live model and export are asked, both alike: rows to score, and prompts to answer.

questions = ask_about(source)
questions.save(path)            # JSON: the ones who answer are other processes
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from burnish.data.conversation import Conversation
from burnish.data.prepare import Prepared, prepare
from burnish.data.render import Renderer
from burnish.errors import UserError
from burnish.export.source import Source

TARGETS = 512  # scored tokens, at the least
ROWS = 8  # and conversations: one long answer says little of the others
TOKENS = 16_384  # read by a model, at the most: a proof is minutes, not hours
PROMPTS = 8
NEW_TOKENS = 48
DRAWN_TOKENS = 64  # of each prompt's drawn answer, on which the divergence is measured


@dataclass(frozen=True)
class Asked:
    """A prompt that the program has to make tokens of by itself."""

    tokens: tuple[int, ...]  # ours
    messages: tuple[Mapping[str, str], ...]  # of a chat; empty where the prompt is plain text
    text: str  # the prompt as text, special tokens written out; beginning-of-sequence left out


@dataclass(frozen=True)
class Questions:
    rows: tuple[tuple[int, ...], ...]  # tokens of whole conversations
    targets: tuple[tuple[int, ...], ...]  # for each row the places of the tokens that count
    asked: tuple[Asked, ...]
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    drawn_tokens: int
    origin: str  # 'validation rows' or 'training rows'
    ends: tuple[int, ...] = ()  # the tokens that end the rows' answers

    @property
    def n_targets(self) -> int:
        return sum(map(len, self.targets))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Questions:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        asked = tuple(Asked(tuple(a["tokens"]), tuple(a["messages"]), a["text"]) for a in raw["asked"])
        rows, targets = (tuple(tuple(row) for row in raw[key]) for key in ("rows", "targets"))
        stops = {key: tuple(raw[key]) for key in ("stop_ids", "ends")}
        return replace(cls(**raw), rows=rows, targets=targets, asked=asked, **stops)


def ask_about(source: Source) -> Questions:
    """From the run's validation rows, or where it has none from its training rows, in their order.

    Raises UserError where the data cannot be read any more, or holds too little.
    """
    try:
        prepared = prepare(source.recipe, source.tokenizer)
    except UserError as e:
        raise UserError(
            f"the data that the export is to be compared on: {e.message}",
            "name it where it is now (data.train=FILE data.valid=FILE), or pass --no-proof",
        ) from e
    origin, part = ("validation rows", prepared.valid) if len(prepared.valid.examples) else (
        "training rows", prepared.train
    )  # fmt: skip
    rows, targets, count, read = [], [], 0, 0
    for example in part.examples:
        at = np.flatnonzero(example.weights)
        if rows and read + len(example.tokens) > TOKENS:
            continue
        rows.append(tuple(map(int, example.tokens)))
        targets.append(tuple(map(int, at)))
        count, read = count + len(at), read + len(example.tokens)
        if count >= TARGETS and len(rows) >= ROWS:
            break
    if not count:
        raise UserError(f"the {origin} hold nothing to score", "burnish data RECIPE   shows what is trained")
    asked = _asked(source, prepared, part.conversations, max(len(row) for row in rows))
    stop_ids = source.tokenizer.stop_ids
    ends = {row[at[-1]] for row, at in zip(rows, targets, strict=True)} & set(stop_ids)
    return Questions(
        tuple(rows), tuple(targets), asked, stop_ids, NEW_TOKENS, DRAWN_TOKENS, origin, tuple(sorted(ends))
    )


def _asked(
    source: Source, prepared: Prepared, conversations: Sequence[Conversation], longest: int
) -> tuple[Asked, ...]:
    renderer, found = Renderer(prepared.tokenizer, source.recipe.data.loss_on), []
    for conversation in conversations:
        asking = conversation.prompt
        if not _plain_words(asking, prepared):
            continue
        tokens = renderer.prompt(asking)
        if len(tokens) > max(longest, 512):
            continue
        messages = () if asking.plain else tuple({"role": t.role, "content": t.content} for t in asking.turns)
        bos = prepared.tokenizer.bos_id
        begins = bool(tokens) and tokens[0] == bos
        text = prepared.tokenizer.decode(tokens[1:] if begins else tokens, True)
        found.append(Asked(tuple(tokens), messages, text))
        if len(found) == PROMPTS:
            break
    return tuple(found)


def _plain_words(asking: Conversation, prepared: Prepared) -> bool:
    """Nothing that programs write each in its own way: tools, results, reasoning, special tokens in text."""
    turns = asking.turns
    if asking.tools or any(t.role == "tool" or t.calls or t.reasoning for t in turns):
        return False
    return asking.markup or not any(s in t.content for s in prepared.tokenizer.special for t in turns)
