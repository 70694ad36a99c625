"""`burnish data`"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from burnish.cli.show import console, print_json, trained_text
from burnish.data.batches import Example
from burnish.data.prepare import Part, Prepared, prepare
from burnish.models.spec import spec_of
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from burnish.recipe import load
from burnish.training.environment import prepare_environment


def data_command(name: str, overrides: list[str], show: int, json: bool) -> None:
    recipe = load(name, overrides)
    folder = spec_of(recipe).folder  # lengths are counted in its model's tokens
    prepare_environment()
    tokenizer = load_tokenizer(folder, recipe.trust_remote_code)
    prepared = prepare(recipe, tokenizer)
    shown = [_pieces(e, tokenizer) for e in prepared.train.examples[:show]]
    if json:
        print_json(
            {**_facts(prepared), "examples": [[{"text": t, "trained": on} for t, on in e] for e in shown]}
        )
        return
    out = console()
    out.print(f"format: {prepared.format} ({prepared.why})")
    for title, part in (("training", prepared.train), ("validation", prepared.valid)):
        if part.examples:
            facts = _part(part)
            out.print(
                f"{title}: {facts['rows']} rows, {facts['tokens']} tokens, {facts['trained']} trained "
                f"({facts['trained_percent']:.1f} %)"
            )
            out.print(
                f"  tokens a row: median {facts['median']}, 95 % below {facts['p95']}, "
                f"longest {facts['longest']} (train.max_length {recipe.train.max_length})"
            )
        if part.dropped or part.truncated:
            out.print(f"  {part.dropped} rows left out, {part.truncated} cut: too long, or nothing to train")
    if prepared.held_out:
        out.print("  (taken from the training rows: data.valid_share)")
    for number, pieces in enumerate(shown, 1):
        out.print(f"\n--- example {number}, {prepared.train.conversations[number - 1].at} ---")
        out.print(trained_text(pieces))


def _pieces(example: Example, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Stretches of tokens that are trained, and that are not, as text."""
    tokens = zip(example.tokens.tolist(), (example.weights > 0).tolist(), strict=True)
    return [
        (tokenizer.decode([t for t, _ in run], keep_special=True), on)
        for on, run in groupby(tokens, lambda x: x[1])
    ]


def _facts(prepared: Prepared) -> dict[str, Any]:
    return {
        "format": prepared.format,
        "why": prepared.why,
        "held_out": prepared.held_out,
        "train": _part(prepared.train),
        "valid": _part(prepared.valid),
    }


def _part(part: Part) -> dict[str, Any]:
    lengths = sorted(len(e.tokens) for e in part.examples)
    at = lambda share: lengths[min(len(lengths) - 1, int(share * len(lengths)))] if lengths else 0  # noqa: E731
    return {
        "rows": len(lengths),
        "tokens": part.tokens,
        "trained": part.trained,
        "trained_percent": 100 * part.trained / max(1, part.tokens),
        "median": at(0.5),
        "p95": at(0.95),
        "longest": part.longest,
        "dropped": part.dropped,
        "truncated": part.truncated,
    }
