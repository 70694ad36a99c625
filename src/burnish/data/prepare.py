"""The whole way from files to examples: read, find the format, render, hold out, count.

    prepared = prepare(recipe, tokenizer)
    prepared.stats          # DataStats, for the plan
    prepared.train, prepared.valid

Everything that is dropped or cut is counted, and zero trained tokens is an error here, long before a NaN
could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from burnish.data.batches import Example
from burnish.data.conversation import Conversation
from burnish.data.formats import Read, read_conversations
from burnish.data.render import Renderer
from burnish.data.rows import read_rows
from burnish.errors import UserError, all_problems
from burnish.models.tokenizer import Tokenizer
from burnish.planning.plan import DataStats
from burnish.recipe import Recipe, expand


@dataclass(frozen=True)
class Part:
    """Training or validation rows: conversations[i] is what examples[i] was rendered from."""

    examples: tuple[Example, ...]
    conversations: tuple[Conversation, ...]
    dropped: int  # rows left out: longer than max_length, or without a token to train
    truncated: int  # rows longer than max_length that lost their end

    @property
    def tokens(self) -> int:
        return sum(len(e.tokens) for e in self.examples)

    @property
    def trained(self) -> int:
        return sum(e.trained for e in self.examples)

    @property
    def longest(self) -> int:
        return max((len(e.tokens) for e in self.examples), default=0)


@dataclass(frozen=True)
class Prepared:
    format: str
    why: str
    train: Part
    valid: Part
    held_out: bool  # the validation rows were taken from the training rows

    @property
    def stats(self) -> DataStats:
        longest = max(self.train.longest, self.valid.longest)
        return DataStats(len(self.train.examples), longest, self.train.tokens, self.train.trained)


def prepare(recipe: Recipe, tokenizer: Tokenizer) -> Prepared:
    """Raises UserError for anything wrong with the data, with files and lines."""
    settings = recipe.data
    if not settings.train:
        raise UserError("the recipe names no training data", "set data.train=FILE.jsonl")
    read = _read(settings.train, recipe, tokenizer, settings.rows)
    conversations, held = list(read.conversations), []
    if settings.valid:
        held = list(_read(settings.valid, recipe, tokenizer, None).conversations)
    elif settings.valid_share:
        conversations, held = _hold_out(conversations, settings.valid_share, recipe.train.seed)
    renderer = Renderer(tokenizer, settings.loss_on)
    train = _render(conversations, renderer, recipe)
    valid = _render(held, renderer, recipe)
    if not train.trained:
        raise UserError(
            f"{settings.train}: none of its {len(read.conversations)} rows leaves a token to train "
            f"({train.dropped} were longer than train.max_length={recipe.train.max_length})",
            f"burnish data {recipe.name} --show 3   shows what is trained; or raise train.max_length",
        )
    if held and not valid.trained:
        raise UserError(
            "the validation rows leave no token to score", "raise train.max_length or name another data.valid"
        )
    return Prepared(read.format, read.why, train, valid, bool(held) and not settings.valid)


def _read(file: str, recipe: Recipe, tokenizer: Tokenizer, first: int | None) -> Read:
    return read_conversations(read_rows(expand(file), first), recipe.data, tokenizer.has_chat_template)


def _hold_out(
    rows: Sequence[Conversation], share: float, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    n = min(len(rows) - 1, max(1, round(share * len(rows))))
    if n < 1:
        raise UserError(
            f"data.valid_share={share} of {len(rows)} row leaves nothing to train", "set data.valid_share=0"
        )
    chosen = {int(i) for i in np.random.default_rng([seed, 0x5A11D]).permutation(len(rows))[:n]}
    return (
        [r for i, r in enumerate(rows) if i not in chosen],
        [r for i, r in enumerate(rows) if i in chosen],
    )


def _render(conversations: Sequence[Conversation], renderer: Renderer, recipe: Recipe) -> Part:
    limit, policy = recipe.train.max_length, recipe.data.too_long
    examples: list[Example] = []
    kept: list[Conversation] = []
    dropped = truncated = 0
    too_long: list[str] = []
    for conversation in conversations:
        example = renderer.example(conversation)
        n = len(example.tokens)
        if n > limit:
            if policy == "error":
                too_long.append(
                    f"{conversation.at}: {n} tokens, {_prompt_tokens(example)} of them before the answer"
                )
                continue
            example = Example(example.tokens[:limit], example.weights[:limit])
            if policy == "drop" or not example.trained:
                dropped += 1
                continue
            truncated += 1
        if example.trained:
            examples.append(example)
            kept.append(conversation)
        else:
            dropped += 1
    if too_long:
        raise all_problems(
            f"{len(too_long)} of {len(conversations)} rows are longer than train.max_length={limit} tokens:",
            too_long,
            "raise train.max_length, or choose data.too_long=drop or data.too_long=truncate",
        )
    return Part(tuple(examples), tuple(kept), dropped, truncated)


def _prompt_tokens(example: Example) -> int:
    trained = np.flatnonzero(example.weights)
    return int(trained[0]) if len(trained) else len(example.tokens)
