"""Errors as sentences on stderr, and their exit codes."""

from __future__ import annotations

import sys

from burnish.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, NonFinite, OutOfMemory, Unsupported, UserError


def exit_code_of(error: Exception) -> int | None:
    """Say the error and give its exit code; None where it is a defect of ours and deserves its traceback."""
    if isinstance(error, UserError):
        _say(error.message, error.hint)
        return error.exit_code
    if isinstance(error, OutOfMemory):
        _say(
            f"memory ran out: {str(error).splitlines()[0]}",
            "begin again with train.micro_batch=1, train.keep_layers=0 or a smaller train.max_length, and "
            "--out DIR",
        )
        return EXIT_OUT_OF_MEMORY
    if isinstance(error, NonFinite):
        _say(
            f"the numbers left the finite range: {error}; nothing was updated by that step",
            "set a smaller train.lr or dtype=float32, then begin again with --out DIR",
        )
        return EXIT_FAILED
    if isinstance(error, Unsupported):
        usual = "set backend=torch" if error.kind == "model" else "try dtype=float32 or device=cpu"
        _say(f"this backend cannot do it: {error}", error.hint or usual)
        return EXIT_FAILED
    return None


def _say(message: str, hint: str) -> None:
    print(f"burnish: {message}", file=sys.stderr)
    if hint:
        print(f"  → {hint}", file=sys.stderr)
