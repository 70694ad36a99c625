"""What live model and export are asked, both alike: rows to score, and prompts to answer.

questions = ask_about(source)
questions.save(path)            # JSON: the ones who answer are other processes
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from burnish.data.conversation import Conversation
from burnish.data.formats import fields, question
from burnish.data.prepare import Prepared, prepare
from burnish.data.render import Renderer
from burnish.errors import UserError
from burnish.export.source import Source

TARGETS = 512  # scored tokens, where the data has so many
ROWS = 8  # and conversations: one long answer says little of the others
TOKENS = 16_384  # read by a model, at the most: a proof is minutes, not hours
LONGEST = 2048  # tokens of a row: its logits are in memory
PROMPTS = 8
NEW_TOKENS = 48
DRAWN_TOKENS = 64  # of each prompt's drawn answer, on which the divergence is measured
# Asked where no prompt of the data can be: tools, reasoning and special tokens each program writes in its own
# way.
_SPARE = ("Why?", "Write one sentence about 1,234 birds.")


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
    """From the run's validation rows, in their order, and from its training rows where those are too few.

    Raises UserError where the data cannot be read any more, holds nothing to score, or would be rendered by
    another template than the one that is exported.
    """
    try:
        prepared = prepare(source.recipe, source.tokenizer)
    except UserError as e:
        raise UserError(
            f"the data that the export is to be compared on: {e.message}",
            "name it where it is now (data.train=FILE data.valid=FILE), or pass --no-proof",
        ) from e
    if prepared.tokenizer.template != source.tokenizer.template:
        raise UserError(
            f"{source.adapter}: the chat template there does not render this data ({prepared.template_why})",
            "name rows of the kind it was trained on (data.valid=FILE), or copy the adapter folder again",
        )
    rows, targets, origins = _rows(prepared)
    if not rows:
        raise UserError(
            f"no row has an answer within {LONGEST:,} tokens to score", "burnish data RECIPE   shows the rows"
        )
    conversations = (*prepared.valid.conversations, *prepared.train.conversations)
    asked = _asked(source, prepared, conversations, max(len(row) for row in rows))
    stop_ids = source.tokenizer.stop_ids
    ends = {row[p] for row, at in zip(rows, targets, strict=True) for p in at} & set(stop_ids)
    return Questions(
        tuple(rows), tuple(targets), asked, stop_ids, NEW_TOKENS, DRAWN_TOKENS, " and ".join(origins),
        tuple(sorted(ends)) or stop_ids[:1],
    )  # fmt: skip


def _rows(prepared: Prepared) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]], list[str]]:
    """Rows, the places of their targets, and where they are from."""
    rows: list[tuple[int, ...]] = []
    targets: list[tuple[int, ...]] = []
    origins: list[str] = []
    for origin, part in (("validation rows", prepared.valid), ("training rows", prepared.train)):
        short = [e for e in part.examples if len(e.tokens) <= LONGEST]
        for example in short or part.examples[:1]:
            if sum(map(len, targets)) >= TARGETS and len(rows) >= ROWS:
                return rows, targets, origins
            row = tuple(map(int, example.tokens[:LONGEST]))
            at = tuple(map(int, np.flatnonzero(example.weights[:LONGEST])))
            if at and sum(map(len, rows)) + len(row) <= TOKENS:
                rows.append(row)
                targets.append(at)
                origins = [*origins, *([] if origin in origins else [origin])]
    return rows, targets, origins


def _asked(
    source: Source, prepared: Prepared, conversations: Sequence[Conversation], longest: int
) -> tuple[Asked, ...]:
    tokenizer, renderer = prepared.tokenizer, Renderer(prepared.tokenizer, source.recipe.data.loss_on)

    def first(prompts: Iterable[Conversation]) -> tuple[Asked, ...]:
        found: list[Asked] = []
        for asking in prompts:
            tokens = renderer.prompt(asking)
            if len(tokens) > max(longest, 512):
                continue
            turns = () if asking.plain else asking.turns
            messages = tuple({"role": t.role, "content": t.content} for t in turns)
            text = tokenizer.decode(tokens[1:] if tokens[:1] == [tokenizer.bos_id] else tokens, True)
            found.append(Asked(tuple(tokens), messages, text))
            if len(found) == PROMPTS:
                break
        return tuple(found)

    return first(c.prompt for c in conversations if _plain_words(c.prompt, prepared)) or first(_spare(source))


def _spare(source: Source) -> Iterator[Conversation]:
    data = source.recipe.data
    for text in _SPARE:
        by_columns = source.format == "template" and data.prompt is not None
        asked = dict.fromkeys(fields(data.prompt or ""), text) if by_columns else text
        yield question(asked, data, source.format, source.chat)


def _plain_words(asking: Conversation, prepared: Prepared) -> bool:
    """Nothing that programs write each in its own way: tools, results, reasoning, special tokens in text."""
    turns = asking.turns
    if asking.tools or any(t.role == "tool" or t.calls or t.reasoning for t in turns):
        return False
    return asking.markup or not any(s in t.content for s in prepared.tokenizer.special for t in turns)
