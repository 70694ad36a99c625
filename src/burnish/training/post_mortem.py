"""A run's events with its end: whatever ends it badly stands in the run folder before it is raised."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path

from burnish.errors import EXIT_FAILED, UserError, in_words
from burnish.runs.events import Event, Planned, Stepped
from burnish.runs.failure import failure_of, record_failure
from burnish.runs.lock import free


def with_post_mortem(events: Iterator[Event], out: Path) -> Iterator[Event]:
    """The same events, and Failed at a bad end, which is written to failure.json before it is raised. Input
    that is refused before the run has begun leaves nothing.
    """
    begun, step = False, 0
    try:
        for event in events:
            if isinstance(event, Planned):
                begun, step = True, event.resumed_at
            elif isinstance(event, Stepped):
                step = event.step
            yield event
    except Exception as e:
        if begun and free(out):  # else it is another process's run by now
            said = in_words(e) or UserError("".join(traceback.format_exception(e)), "", EXIT_FAILED)
            failure = failure_of(said, step, said.log)
            record_failure(out, failure, said.log)
            yield failure
        raise
