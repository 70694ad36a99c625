"""The true lengths of a recipe's data, found in a process of its own: reading them takes a tokenizer, and
with it a framework that whoever only plans need not import.

    stats = lengths("recipe.yaml", ["train.max_length=512"])

In that process: `python -m burnish.data.lengths RECIPE [KEY=VALUE]...` prints one line of JSON.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from burnish.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, UserError
from burnish.machine.child import run_module
from burnish.planning.choice import DataStats

KILLED = (-9, 137)  # by SIGKILL, as a process sees it and as a shell does


def lengths(recipe: str, overrides: Sequence[str]) -> DataStats:
    """Raises UserError for whatever is wrong with the data or the tokenizer, as reading them here would."""
    told = in_child("burnish.data.lengths", [recipe, *overrides])
    return DataStats(**{**told, "lengths": tuple(told["lengths"])})


def in_child(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What `python -m MODULE ARGUMENTS` printed as JSON; its `error` is raised as a UserError."""
    done = run_module(module, arguments)
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        told = None
    if done.returncode in KILLED:
        raise UserError(
            f"the system ended {module}, most likely because memory ran out",
            "close other programs, or set a smaller train.max_length",
            EXIT_OUT_OF_MEMORY,
        )
    if not isinstance(told, dict):
        why = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(
            f"{module} ended with code {done.returncode}: {why}",
            f"{shlex.join([sys.executable, '-m', module, *arguments])}   shows all it says",
            EXIT_FAILED,
        )
    if "error" in told:
        raise UserError(**told["error"])
    return told


def main(arguments: Sequence[str]) -> int:
    from burnish.data.prepare import prepare
    from burnish.models.spec import spec_of
    from burnish.models.tokenizer import load_tokenizer
    from burnish.recipe import load

    try:
        with redirect_stdout(sys.stderr):
            recipe = load(arguments[0], arguments[1:])
            tokenizer = load_tokenizer(spec_of(recipe).folder, recipe.trust_remote_code)
            told = asdict(prepare(recipe, tokenizer).stats)
    except UserError as e:
        told = {"error": {"message": e.message, "hint": e.hint, "exit_code": e.exit_code}}
    print(json.dumps(told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
