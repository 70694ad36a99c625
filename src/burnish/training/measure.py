"""A plan measured, in a process of its own: who asks imports no framework.

    python -m burnish.training.measure RECIPE [KEY=VALUE]...

prints one line of JSON: the plan's summary with `measured`, or `{"error": {"message", "hint", "exit_code"}}`,
and exits with that code. Whatever else is printed goes to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from burnish.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, NonFinite, OutOfMemory, Unsupported, UserError
from burnish.recipe import load
from burnish.training.environment import prepare_environment


def main(args: Sequence[str]) -> int:
    """The exit code. Defects of ours leave their traceback, and no line."""
    with redirect_stdout(sys.stderr):
        told, code = _told(args)
    print(json.dumps(told), flush=True)
    return code


def _told(args: Sequence[str]) -> tuple[dict[str, Any], int]:
    prepare_environment()
    from burnish.training.job import measure

    try:
        return measure(load(args[0], args[1:]), Path.cwd()), 0
    except (UserError, OutOfMemory, NonFinite, Unsupported) as e:
        error = _sentence(e)
    told = {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    return {"error": told}, error.exit_code


def _sentence(error: Exception) -> UserError:
    match error:
        case UserError():
            return error
        case OutOfMemory():
            first = str(error).splitlines()[0]
            hint = "set quantize=4bit, or take a smaller model"
            return UserError(f"memory ran out while the model was loaded: {first}", hint, EXIT_OUT_OF_MEMORY)
        case NonFinite():
            hint = "set dtype=float32; if it stays so, the model's weights are damaged"
            return UserError(f"the numbers left the finite range: {error}", hint, EXIT_FAILED)
        case Unsupported():
            hint = error.hint or "try dtype=float32 or device=cpu"
            return UserError(f"this backend cannot do it: {error}", hint, EXIT_FAILED)
        case _:
            raise error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
