"""All that can be said of prepared data before training: one plain dict for JSON, the terminal and the page.

    told = facts(prepared, recipe, show=3)
    told["verdict"], told["train"]["tokens"], told["warnings"], told["examples"]

Lengths and counts are in tokens of the recipe's model. A warning names file and line, never a secret's text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from burnish.data.batches import Example
from burnish.data.checks import (
    SHOWN,
    Finding,
    Overlap,
    Repeats,
    duplicates,
    emails,
    fingerprints,
    overlap,
    secrets,
)
from burnish.data.conversation import Conversation
from burnish.data.packing import padding_shares
from burnish.data.prepare import Part, Prepared
from burnish.models.tokenizer import Tokenizer
from burnish.planning.layout import lay_out
from burnish.recipe import Recipe

_BINS = 12  # at most
_FEW_TRAINED = 0.02  # below this share of trained tokens, most of the work goes into reading prompts


def facts(prepared: Prepared, recipe: Recipe, show: int = 0) -> dict[str, Any]:
    """Everything `burnish data` says. show: how many training examples come with their text.

    `examples[i]` is a list of pieces {text, trained, special: [[start, end], …] (characters of the text that
    are special tokens)}, and `example_places[i]` its file:line.
    """
    train, valid = prepared.train, prepared.valid
    rows = [*train.conversations, *valid.conversations]
    prints = fingerprints(train.conversations)
    told: dict[str, Any] = {
        "recipe": recipe.name,
        "max_length": recipe.train.max_length,
        "format": prepared.format,
        "why": prepared.why,
        "container": prepared.container,
        "template": prepared.template,
        "template_why": prepared.template_why,
        "trimmed": prepared.trimmed,
        "normalized": prepared.normalized,
        "thoughts_dropped": prepared.thoughts_dropped,
        "held_out": prepared.held_out,
        "train": _part(train, recipe.train.max_length),
        "valid": _part(valid, recipe.train.max_length),
        "bad_rows": {"count": len(prepared.bad), "rows": [{"at": b.at, "why": b.why} for b in prepared.bad]},
        "duplicates": _repeats(duplicates(prints)),
        "overlap": _overlap(overlap(prints, fingerprints(valid.conversations))),
        "secrets": [_finding(f) for f in secrets(rows)],
        "emails": _finding(emails(rows)),
        "padding": _padding(prepared, recipe),
        "examples": [_pieces(e, prepared.tokenizer) for e in train.examples[:show]],
        "example_places": [c.at for c in train.conversations[:show]],
    }
    told["warnings"] = list(_warnings(told, recipe))
    told["verdict"] = _verdict(told)
    return told


def _part(part: Part, max_length: int) -> dict[str, Any]:
    lengths = np.sort([len(e.tokens) for e in part.examples])
    tokens, trained = part.tokens, part.trained
    return {
        "rows": len(part.examples),
        "tokens": tokens,
        "trained": trained,
        "trained_percent": 100 * trained / max(1, tokens),
        "shortest": int(lengths[0]) if len(lengths) else 0,
        "median": _at(lengths, 0.5),
        "p90": _at(lengths, 0.9),
        "p95": _at(lengths, 0.95),
        "p99": _at(lengths, 0.99),
        "longest": part.longest,
        "histogram": _histogram(lengths, max_length),
        "dropped": part.dropped,
        "untrained": part.untrained,
        "too_long": part.dropped - part.untrained,
        "truncated": part.truncated,
        **_turns(part.conversations),
    }


def _turns(conversations: Sequence[Conversation]) -> dict[str, int]:
    answers = [t for c in conversations for t in c.turns if t.role == "assistant"]
    return {
        "conversations": sum(not c.plain for c in conversations),
        "many_turns": sum(sum(t.role == "assistant" for t in c.turns) > 1 for c in conversations),
        "answers": len(answers),
        "reasoning": sum(bool(t.reasoning.strip()) or "<think>" in t.content for t in answers),
        "tool_calls": sum(len(t.calls) for t in answers),
        "with_tools": sum(bool(c.tools) or any(t.calls for t in c.turns) for c in conversations),
    }


def _at(lengths: np.ndarray, share: float) -> int:
    return int(lengths[min(len(lengths) - 1, int(share * len(lengths)))]) if len(lengths) else 0


def _histogram(lengths: np.ndarray, max_length: int) -> list[dict[str, int]]:
    """Bins of one round width from 1 to the longest row, at most `max_length`; both ends belong to a bin."""
    if not len(lengths):
        return []
    width = _width(int(lengths[-1]))
    counts = np.bincount((lengths - 1) // width)
    return [
        {"from": i * width + 1, "to": min((i + 1) * width, max_length), "rows": int(n)}
        for i, n in enumerate(counts)
    ]


def _width(top: int) -> int:
    """The smallest round number of which `_BINS` reach `top`."""
    scale = 1
    while True:
        for tenths in (10, 15, 20, 25, 30, 40, 50, 60, 80):
            if scale * tenths % 10 == 0 and scale * tenths // 10 * _BINS >= top:
                return scale * tenths // 10
        scale *= 10


def _padding(prepared: Prepared, recipe: Recipe) -> dict[str, Any]:
    """Shares of padding in batches unpacked and packed, on a machine whose memory is no limit.

    A plan for this machine may choose other rows (`burnish plan`); that needs the machine, and this does not.
    """
    alone = recipe.train.model_copy(update={"pack": False})
    stats = prepared.stats
    layout = lay_out(alone, "cpu", "torch", stats.longest, stats, lambda rows, length: True)
    rows, length = layout.micro_batch.value, layout.row_length.value
    found = padding_shares(stats.sizes, alone.batch_size, rows, alone.seed, length)
    return {
        "unpacked": found.unpacked,
        "packed": found.packed,
        "asked": recipe.train.pack,
        "micro_batch": rows,
        "row_length": length,
    }


def _pieces(example: Example, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Stretches of tokens that are trained, and that are not, as text."""
    special = {i: text for text, i in tokenizer.special.items()}
    tokens = zip(example.tokens.tolist(), (example.weights > 0).tolist(), strict=True)
    pieces = []
    for trained, run in groupby(tokens, lambda x: x[1]):
        ids = [t for t, _ in run]
        text = tokenizer.decode(ids, keep_special=True)
        spans = []
        for n, token in enumerate(ids):
            if token in special:
                start = len(tokenizer.decode(ids[:n], keep_special=True))
                if text.startswith(special[token], start):
                    spans.append([start, start + len(special[token])])
        pieces.append({"text": text, "trained": trained, "special": spans})
    return pieces


def _repeats(found: Repeats) -> dict[str, Any]:
    return {"count": found.count, "first": [{"at": at, "same_as": other} for at, other in found.pairs]}


def _overlap(found: Overlap) -> dict[str, Any]:
    return {"whole": _repeats(found.whole), "question_only": _repeats(found.question_only)}


def _finding(found: Finding) -> dict[str, Any]:
    return {"kind": found.kind, "count": found.count, "rows": found.rows, "first": list(found.places)}


def _verdict(told: dict[str, Any]) -> str:
    train, n = told["train"], len(told["warnings"])
    rows = f"{_count(train['rows'], 'row')} to train on"
    return f"{rows}, {train['trained']:,} of {train['tokens']:,} tokens trained; " + (
        f"{_count(n, 'warning')} to look at first" if n else "nothing to warn of"
    )


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def _warning(kind: str, message: str, hint: str, places: Sequence[str] = ()) -> dict[str, Any]:
    return {"kind": kind, "message": message, "hint": hint, "places": list(places)}


def _pairs(repeats: dict[str, Any]) -> list[str]:
    return [f"{p['at']} (as {p['same_as']})" for p in repeats["first"]]


def _warnings(told: dict[str, Any], recipe: Recipe) -> Iterator[dict[str, Any]]:
    """What should be looked at before training, the gravest first."""
    for found in told["secrets"]:
        yield _warning(
            "secret",
            f"{_count(found['rows'], 'row')} with what looks like a secret: {found['kind']}",
            "revoke it and take it out: a trained model can repeat it",
            found["first"],
        )
    yield from _overlap_warnings(told["overlap"])
    yield from _left_out(told, recipe.train.max_length)
    repeated = told["duplicates"]
    if repeated["count"]:
        yield _warning(
            "duplicates",
            f"{_count(repeated['count'], 'training row')} the same as an earlier one",
            "remove them, unless they are meant to count more than once",
            _pairs(repeated),
        )
    found = told["emails"]
    if found["count"]:
        addresses = _count(found["count"], "e-mail address", "e-mail addresses")
        yield _warning(
            "emails",
            f"{addresses} in {_count(found['rows'], 'row')}",
            "replace them, unless they are public: a trained model can repeat them",
            found["first"],
        )
    yield from _odd_answers(told["train"])


def _overlap_warnings(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    hint = "remove them from one of the two: with them, the validation loss looks better than it is"
    for key, what in (
        ("whole", "the same as a training row"),
        ("question_only", "with the question of a training row, and another answer"),
    ):
        if found[key]["count"]:
            rows = _count(found[key]["count"], "validation row")
            yield _warning("overlap", f"{rows} {what}", hint, _pairs(found[key]))


def _left_out(told: dict[str, Any], max_length: int) -> Iterator[dict[str, Any]]:
    bad = told["bad_rows"]
    if bad["count"]:
        yield _warning(
            "bad rows",
            f"{_count(bad['count'], 'row')} skipped that cannot be used (data.on_bad_row: skip)",
            "correct or remove them",
            [
                *(f"{b['at']}: {b['why']}" for b in bad["rows"][:SHOWN]),
                *([f"… and {bad['count'] - SHOWN} more (--json lists all)"] if bad["count"] > SHOWN else []),
            ],
        )
    limit = f"train.max_length={max_length}"
    for part, rows in ((told["train"], "training row"), (told["valid"], "validation row")):
        if part["too_long"]:
            yield _warning(
                "too long",
                f"{_count(part['too_long'], rows)} left out: longer than {limit} (data.too_long: drop)",
                "raise train.max_length, or choose data.too_long=truncate",
            )
        if part["untrained"]:
            yield _warning(
                "untrained",
                f"{_count(part['untrained'], rows)} left out: nothing in them would be trained",
                "look at what data.loss_on, data.too_long and the rows' own weights leave of them",
            )
        if part["truncated"]:
            yield _warning(
                "cut",
                f"{_count(part['truncated'], rows)} cut at {limit} (data.too_long: truncate)",
                "raise train.max_length: an answer that is cut teaches no end",
            )


def _odd_answers(train: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if 0 < train["reasoning"] < train["answers"]:
        yield _warning(
            "reasoning",
            f"{train['reasoning']:,} of {train['answers']:,} answers with reasoning, the others without",
            "data.thinking=require finds those without, data.thinking=drop cuts all of it out",
        )
    if train["trained"] < _FEW_TRAINED * train["tokens"]:
        yield _warning(
            "few trained",
            f"only {train['trained_percent']:.1f} % of the tokens are trained",
            "shorter prompts train faster; data.loss_on=all would train every token",
        )
