"""The whole way from files to examples: read, find the format, choose the template, render, prove, count.

    prepared = prepare(recipe, tokenizer)
    prepared.stats          # DataStats, for the plan
    prepared.train, prepared.valid
    prepared.tokenizer      # with the template that was chosen: whatever asks the model later uses this one

Everything that is left out or cut is counted, and zero trained tokens is an error here, long before a NaN
could be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from burnish.data.batches import Example
from burnish.data.conversation import Conversation, Turn
from burnish.data.formats import Read, fields, read_conversations
from burnish.data.render import Renderer
from burnish.data.rows import Bad, read_rows
from burnish.data.template import Layout, Unproven
from burnish.data.training_template import Chosen, choose
from burnish.errors import UserError, all_problems
from burnish.models.tokenizer import Tokenizer
from burnish.planning.plan import DataStats
from burnish.recipe import Recipe, expand, is_hub_id


@dataclass(frozen=True)
class Part:
    """Training or validation rows: conversations[i] is what examples[i] was rendered from."""

    examples: tuple[Example, ...]
    conversations: tuple[Conversation, ...]
    dropped: int  # left out: longer than max_length, or without a token to train
    truncated: int  # longer than max_length: they lost their end
    untrained: int = 0  # of the dropped, those without a token to train

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
    container: str  # what the training file is: "JSON Lines", "CSV with a header", …
    bad: tuple[Bad, ...]  # rows left out because they cannot be used (data.on_bad_row: skip)
    template: str  # which chat template renders them
    template_why: str
    trimmed: int  # texts whose outer white space the template removes
    tokenizer: Tokenizer
    asked_system: str | None = None  # data.system
    normalized: int = 0  # conversations whose text the tokenizer brings into a normal form of Unicode
    thoughts_dropped: int = 0  # answers whose reasoning was cut out (data.thinking: drop)

    @property
    def system(self) -> str | None:
        """The system prompt that questions asked later are to have: the one that every training row begins
        with, or else the recipe's own.
        """
        firsts = (c.turns[0] for c in self.train.conversations)
        found = {t.content if t.role == "system" else None for t in firsts}
        return found.pop() if len(found) == 1 else self.asked_system

    @property
    def stats(self) -> DataStats:
        longest = max(self.train.longest, self.valid.longest)
        lengths = tuple(len(e.tokens) for e in self.train.examples)
        return DataStats(len(lengths), longest, self.train.tokens, self.train.trained, lengths)


def prepare(recipe: Recipe, tokenizer: Tokenizer) -> Prepared:
    """Raises UserError for anything wrong with the data, with files and lines."""
    settings = recipe.data
    if not settings.train:
        raise UserError("the recipe names no training data", "set data.train=FILE.jsonl")
    container, read, bad = _read(settings.train, recipe, tokenizer, settings.rows)
    every, cut = list(read.conversations), read.thoughts_dropped
    if settings.valid:
        _, valid_read, more = _read(settings.valid, recipe, tokenizer, None)
        cut += valid_read.thoughts_dropped
        every, bad = [*every, *valid_read.conversations], [*bad, *more]
    every, changed = _normal(every, tokenizer)
    chosen = choose(tokenizer, every)
    bad += [Bad(every[i].at, why) for i, why in chosen.failed.items()]
    _check_bad(bad, len(every) + len(bad) - len(chosen.failed), read, chosen, recipe)
    laid_out = [(c, chosen.layouts.get(i)) for i, c in enumerate(every)]
    usable = [pair for i, pair in enumerate(laid_out) if i not in chosen.failed]
    n = sum(i not in chosen.failed for i in range(len(read.conversations)))
    rows, held_rows = usable[:n], usable[n:]
    if not rows:
        raise UserError(f"{settings.train}: no row can be used: {bad[0].at}: {bad[0].why}", _LOOK)
    if not settings.valid and settings.valid_share:
        rows, held_rows = _hold_out(rows, settings.valid_share, recipe.train.seed)
    renderer = Renderer(chosen.tokenizer, settings.loss_on)
    (train, lost), (valid, more_lost) = (_render(r, renderer, recipe) for r in (rows, held_rows))
    if lost or more_lost:
        bad += [*lost, *more_lost]
        _check_bad(bad, len(every), read, chosen, recipe)
    if settings.valid and not held_rows:
        raise UserError(f"{settings.valid}: none of its rows can be used", _LOOK)
    if not train.examples and lost:
        raise UserError(f"{settings.train}: no row can be used: {lost[0].at}: {lost[0].why}", _LOOK)
    if not train.trained:
        raise UserError(
            f"{settings.train}: none of its {len(read.conversations)} rows leaves a token to train "
            f"({train.dropped - train.untrained} longer than train.max_length={recipe.train.max_length})",
            f"burnish data {recipe.name} --show 3   shows what is trained; or raise train.max_length",
        )
    if held_rows and not valid.trained:
        raise UserError(
            "the validation rows leave no token to score", "raise train.max_length or name another data.valid"
        )
    return Prepared(
        read.format,
        read.why,
        train,
        valid,
        bool(held_rows) and not settings.valid,
        container,
        tuple(sorted(bad, key=_place)),
        chosen.name,
        chosen.why,
        renderer.trimmed,
        chosen.tokenizer,
        settings.system,
        changed,
        cut,
    )


_Row = tuple[Conversation, Layout | None]
_SAME = 3  # rows that share a reason are told one by one up to here
_LOOK = "burnish data RECIPE data.on_bad_row=skip   shows the rows that can be"


def _read(file: str, recipe: Recipe, tokenizer: Tokenizer, first: int | None) -> tuple[str, Read, list[Bad]]:
    settings = recipe.data
    names = {*settings.columns.values(), *fields(settings.prompt or ""), *fields(settings.completion or "")}
    found = read_rows(file if is_hub_id(file) else expand(file), first, names)
    if not found.rows:
        raise _unusable(list(found.bad), len(found.bad), found.container, "correct or remove those lines")
    read = read_conversations(found.rows, settings, tokenizer.has_chat_template)
    return found.container, read, [*found.bad, *read.bad]


def _normal(conversations: Sequence[Conversation], tokenizer: Tokenizer) -> tuple[list[Conversation], int]:
    """The conversations as the tokenizer takes them, and how many of them that changes."""
    found, changed = [], 0
    for c in conversations:
        turns = tuple(
            replace(t, content=tokenizer.normal(t.content), reasoning=tokenizer.normal(t.reasoning))
            for t in c.turns
        )
        changed += turns != c.turns
        found.append(c if turns == c.turns else replace(c, turns=turns))
    return found, changed


def _check_bad(bad: Sequence[Bad], rows: int, read: Read, chosen: Chosen, recipe: Recipe) -> None:
    """Bad rows end the run unless the recipe says to leave them out."""
    if not bad or recipe.data.on_bad_row == "skip":
        return
    bad = sorted(bad, key=_place)
    hint = "correct or remove those rows, or leave them out with data.on_bad_row=skip"
    if chosen.failed:
        hint += "; data.prompt and data.completion templates need no chat template"
    raise _unusable(bad, rows, read.why, hint)


def _unusable(bad: Sequence[Bad], rows: int, how: str, hint: str) -> UserError:
    file = bad[0].at.rpartition(":")[0]
    told = f"{len(bad)} of {rows} rows cannot be used" if rows > 1 else "its row cannot be used"
    return all_problems(f"{file}: {told} ({how}):", _grouped(bad), hint)


def _place(bad: Bad) -> tuple[str, int]:
    file, _, line = bad.at.rpartition(":")
    return file, int(line.split()[0])


def _grouped(bad: Sequence[Bad]) -> list[str]:
    """One line a reason where many rows share it, in the order of the first of each."""
    places: dict[str, list[str]] = {}
    for b in bad:
        places.setdefault(b.why, []).append(b.at)
    lines = []
    for why, at in places.items():
        if len(at) <= _SAME:
            lines += [f"{one}: {why}" for one in at]
        else:
            rest = ", ".join(one.rpartition(":")[2] for one in at[1:])
            lines.append(f"{at[0]}: {why}; so have {len(at) - 1} more rows: {rest:.300}")
    return lines


def _hold_out(rows: Sequence[_Row], share: float, seed: int) -> tuple[list[_Row], list[_Row]]:
    n = min(len(rows) - 1, max(1, round(share * len(rows))))
    if n < 1:
        raise UserError(
            f"data.valid_share={share} of {len(rows)} row leaves nothing to train", "set data.valid_share=0"
        )
    same: dict[tuple[Turn, ...], list[int]] = {}
    for i, (conversation, _) in enumerate(rows):
        same.setdefault(conversation.turns, []).append(i)
    chosen: set[int] = set()
    for i in np.random.default_rng([seed, 0x5A11D]).permutation(len(rows)).tolist():
        if len(chosen) >= n:
            break
        chosen.update(same[rows[i][0].turns])  # equal rows stay on one side
    if len(chosen) == len(rows):
        raise UserError(
            f"data.valid_share={share} leaves nothing to train: the {len(rows)} rows are all the same",
            "set data.valid_share=0",
        )
    return (
        [r for i, r in enumerate(rows) if i not in chosen],
        [r for i, r in enumerate(rows) if i in chosen],
    )


def _render(rows: Sequence[_Row], renderer: Renderer, recipe: Recipe) -> tuple[Part, list[Bad]]:
    """The rows as examples, and those whose text this tokenizer does not give back."""
    limit, policy = recipe.train.max_length, recipe.data.too_long
    examples: list[Example] = []
    kept: list[Conversation] = []
    dropped = truncated = untrained = 0
    too_long: list[str] = []
    lost: list[Bad] = []
    for conversation, layout in rows:
        try:
            example = renderer.example(conversation, layout)
        except Unproven as e:  # the template is proven by now: it is the tokenizer that loses something
            lost.append(Bad(conversation.at, str(e)))
            continue
        n = len(example.tokens)
        if not example.trained:
            dropped, untrained = dropped + 1, untrained + 1
            continue
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
        examples.append(example)
        kept.append(conversation)
    if too_long:
        raise all_problems(
            f"{len(too_long)} of {len(rows)} rows are longer than train.max_length={limit} tokens:",
            too_long,
            "raise train.max_length, or choose data.too_long=drop or data.too_long=truncate",
        )
    return Part(tuple(examples), tuple(kept), dropped, truncated, untrained), lost


def _prompt_tokens(example: Example) -> int:
    trained = np.flatnonzero(example.weights)
    return int(trained[0]) if len(trained) else len(example.tokens)
