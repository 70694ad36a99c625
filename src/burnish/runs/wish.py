"""What somebody in another terminal wants of a run: a word in a file of its folder.

    ask(folder, "pause")         # burnish pause RUN
    wished(folder)               # the run looks between two steps: 'pause', 'stop' or ''
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from burnish.runs.atomic import write_text

WISH = "wish"
Wish = Literal["pause", "stop", ""]


def ask(folder: Path, wish: Wish) -> None:
    """'' takes back what was wished for. Raises UserError where the folder may not be written."""
    if wish:
        write_text(folder / WISH, f"{wish}\n")
    else:
        (folder / WISH).unlink(missing_ok=True)


def wished(folder: Path) -> Wish:
    """A file that is unreadable, or says something else, is no wish."""
    try:
        said = (folder / WISH).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return "pause" if said == "pause" else "stop" if said == "stop" else ""
