"""A module of burnish run in a process of its own, so that this one imports no framework.

    told = ask("burnish.data.lengths", ["recipe.yaml"])        # what it printed as JSON, or its UserError

    if __name__ == "__main__":                                  # and at that module's end
        sys.exit(tell(lambda: lengths_of(sys.argv[1:])))
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from burnish.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, UserError, in_words

KILLED = (-9, 137)  # by SIGKILL, as a process sees it and as a shell does
_PACKAGE = Path(__file__).parents[2]


def run_module(
    module: str, arguments: Sequence[str], limit_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Its output as text. Raises OSError where it cannot be started, TimeoutExpired where it does not end."""
    return subprocess.run(
        [*command_of(module), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=limit_s,
        check=False,
        env=environment(),
    )


def command_of(module: str) -> list[str]:
    """Runs it, and never what lies in the folder that it is run in: a file of the user's must not stand in
    for a module. With `environment`.
    """
    return [sys.executable, "-P", "-m", module]


def environment() -> dict[str, str]:
    """Ours, with this very package in it, however this process came to it."""
    # Where it is installed it is found anyway, and what lies beside it must not come before Python's own.
    installed = {"site-packages", "dist-packages"} & set(_PACKAGE.parts)
    paths = [*([] if installed else [str(_PACKAGE)]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def last_object(text: str) -> dict[str, Any] | None:
    """The JSON object of the last line: frameworks may have said something before. None where it is none."""
    try:
        told = json.loads(text.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return None
    return told if isinstance(told, dict) else None


def ask(module: str, arguments: Sequence[str]) -> dict[str, Any]:
    """What a module that ends in `tell` has found. Raises its error as UserError, and one of its own where it
    ended without a word.
    """
    done = run_module(module, arguments)
    told = last_object(done.stdout)
    if done.returncode in KILLED:
        raise UserError(
            f"the system ended {module}, most likely because memory ran out",
            "close other programs, or set a smaller train.max_length",
            EXIT_OUT_OF_MEMORY,
        )
    if told is None:
        why = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(
            f"{module} ended with code {done.returncode}: {why}",
            f"{shlex.join([sys.executable, '-m', module, *arguments])}   shows all it says",
            EXIT_FAILED,
        )
    if "error" in told:
        raise UserError(**told["error"])
    return told


def tell(find: Callable[[], dict[str, Any]]) -> int:
    """Print what `find` gives, or the error that it raises on purpose, as one line of JSON; the exit code.
    Whatever else is printed goes to stderr. Defects of ours leave their traceback, and no line.
    """
    code = 0
    with redirect_stdout(sys.stderr):
        try:
            told = find()
        except Exception as e:
            said = in_words(e)
            if said is None:
                raise
            code = said.exit_code
            told = {"error": {"message": said.message, "hint": said.hint, "exit_code": code}}
    print(json.dumps(told), flush=True)
    return code
