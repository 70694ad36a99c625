"""Errors as sentences on stderr, and their exit codes."""

from __future__ import annotations

import sys

from burnish.errors import in_words


def exit_code_of(error: Exception) -> int | None:
    """Say the error and give its exit code; None where it is a defect of ours and deserves its traceback."""
    said = in_words(error)
    if said is None:
        return None
    print(f"burnish: {said.message}", file=sys.stderr)
    if said.hint:
        print(f"  → {said.hint}", file=sys.stderr)
    return said.exit_code
