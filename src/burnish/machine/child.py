"""A module of burnish run in a process of its own, so that this one imports no framework.

done = run_module("burnish.backends.rate", ["torch", "cpu", "float32"], limit_s=60)
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parents[2]


def run_module(
    module: str, arguments: Sequence[str], limit_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Its output as text. Raises OSError where it cannot be started, TimeoutExpired where it does not end.

    This very package is found first, however this process came to it, and never the folder that it is run in:
    a file of the user's must not stand in for a module.
    """
    # Where it is installed it is found anyway, and what lies beside it must not come before Python's own.
    installed = {"site-packages", "dist-packages"} & set(_PACKAGE.parts)
    paths = [*([] if installed else [str(_PACKAGE)]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=limit_s,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
