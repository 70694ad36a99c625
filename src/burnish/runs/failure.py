"""The post-mortem of a run that did not end well: failure.json, and the last line of its records.

    record_failure(folder, failure_of(error, step), log=[…])
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from burnish.errors import UserError
from burnish.machine.diagnosis import diagnose
from burnish.runs.atomic import write_text
from burnish.runs.events import Event, Failed, as_json

FAILURE = "failure.json"
LOG = "log.txt"  # what libraries print; written by the parent of a supervised run
LOG_LINES = 60  # of what the process said last


def failure_of(error: UserError, step: int, log: Sequence[str] = ()) -> Failed:
    """What a person is told of `error`, with the catalogue's advice after its own hint. log: what else was
    said; the catalogue is asked with it where the error's own words are not in it.
    """
    found = diagnose(error.message) or diagnose("\n".join(log))
    advice = [error.hint] if error.hint else []
    if found is not None:
        advice += [remedy.words for remedy in found.remedies]
    lines = error.message.strip().splitlines() or [""]
    own = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    what = found.cause if found is not None and len(lines) > 1 else own
    return Failed(step, what, error.message, tuple(advice), "" if found is None else found.id)


def record_failure(folder: Path, failure: Failed, log: Sequence[str] = ()) -> None:
    """Into the folder of a run that nobody owns any more. What a full or lost disk refuses is let be: the
    error itself is told anyway.
    """
    told = {k.strip("_"): v for k, v in asdict(failure).items()}
    told |= {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "log": list(log[-LOG_LINES:])}
    # A path of bytes that are no UTF-8 comes with lone surrogates.
    text = json.dumps(told, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
    append_event(folder, failure)
    with suppress(UserError):
        write_text(folder / FAILURE, text.decode() + "\n")


def append_event(folder: Path, event: Event) -> None:
    """The last line of the records of a run whose process has ended."""
    line = json.dumps(as_json(event), ensure_ascii=False).encode("utf-8", "backslashreplace")
    with suppress(OSError), (folder / "events.jsonl").open("ab") as events:
        if events.tell() and not _ends_whole(folder / "events.jsonl"):
            events.write(b"\n")  # a process that was killed in the middle of a line
        events.write(line + b"\n")


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as f:
        f.seek(-1, 2)
        return f.read(1) == b"\n"
