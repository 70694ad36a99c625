"""The process that looks: one backend on one device, check after check.

    python -m burnish.training.selftest.child PLACE BACKEND DEVICE FILE CHECK...

Into FILE goes a line of JSON as each check begins (`{"began": NAME}`), for each `Line`, and as it ends
(`{"ended": NAME}`). So whoever started this process knows, if it dies, what it was at, and what it had found.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from burnish.errors import in_words
from burnish.machine.child import tell
from burnish.training.environment import prepare_environment


def main(arguments: Sequence[str]) -> dict[str, Any]:
    from burnish.training.selftest.checks import CHECKS
    from burnish.training.selftest.lab import Lab

    place, backend, device, file, *names = arguments
    lab = Lab(Path(place), backend, device)
    with Path(file).open("a", encoding="utf-8", buffering=1) as out:
        for name in names:
            print(json.dumps({"began": name}), file=out)
            try:
                for line in CHECKS[name](lab):
                    print(json.dumps({"line": asdict(line)}), file=out)
            # Whatever it is: it is this check's finding, and the others are still to be made.
            except Exception as e:
                print(json.dumps({"line": asdict(lab.line(name, name, "failed", _words(e)))}), file=out)
            print(json.dumps({"ended": name}), file=out)
    return {"ended": True}


def _words(error: Exception) -> str:
    """The error's own; of what was not raised on purpose with the place in burnish that it came through."""
    said = in_words(error)
    if said is not None:
        return said.message
    places = [f for f in traceback.extract_tb(error.__traceback__) if "burnish" in Path(f.filename).parts]
    at = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places else ""
    return f"{type(error).__name__}: {error}{at}"


if __name__ == "__main__":
    prepare_environment()
    os.environ.setdefault("MLX_ENABLE_TF32", "0")  # limits.py says why
    sys.exit(tell(lambda: main(sys.argv[1:])))
