"""The true lengths of a recipe's data, found in a process of its own: reading them takes a tokenizer, and
with it a framework that whoever only plans need not import.

    stats = lengths("recipe.yaml", ["train.max_length=512"])

In that process: `python -m burnish.data.lengths RECIPE [KEY=VALUE]...` prints one line of JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from burnish.machine.child import ask, tell
from burnish.planning.choice import DataStats


def lengths(recipe: str, overrides: Sequence[str]) -> DataStats:
    """Raises UserError for whatever is wrong with the data or the tokenizer, as reading them here would."""
    told = ask("burnish.data.lengths", [recipe, *overrides])
    return DataStats(**{**told, "lengths": tuple(told["lengths"])})


def _read(arguments: Sequence[str]) -> dict[str, Any]:
    from burnish.data.prepare import prepare
    from burnish.models.spec import spec_of
    from burnish.models.tokenizer import load_tokenizer
    from burnish.recipe import load

    recipe = load(arguments[0], arguments[1:])
    tokenizer = load_tokenizer(spec_of(recipe).folder, recipe.trust_remote_code)
    return asdict(prepare(recipe, tokenizer).stats)


if __name__ == "__main__":
    sys.exit(tell(lambda: _read(sys.argv[1:])))
