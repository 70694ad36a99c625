"""A plan measured, in a process of its own: who asks imports no framework.

    python -m burnish.training.measure RECIPE [KEY=VALUE]...

prints one line of JSON: the plan's summary with `measured`, or `{"error": {"message", "hint", "exit_code"}}`,
and exits with that code.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from burnish.machine.child import tell
from burnish.recipe import load
from burnish.training.environment import prepare_environment


def _measured(arguments: Sequence[str]) -> dict[str, Any]:
    recipe = load(arguments[0], arguments[1:])
    prepare_environment(recipe.care)
    from burnish.training.job import measure

    return measure(recipe, Path.cwd())


if __name__ == "__main__":
    sys.exit(tell(lambda: _measured(sys.argv[1:])))
