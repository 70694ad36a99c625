"""The process that trains: it hears its orders on stdin, and tells its events on what was its stdout.

    python -P -m burnish.training.worker        # started by supervise.py

What frameworks print goes to stderr, whose end the parent keeps for the diagnosis. A parent that is gone is a
wish to stop: the step in hand is finished and a checkpoint saved, so that a run whose terminal was killed can
be gone on with at once, and no process trains on unseen.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any

from burnish.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, in_words
from burnish.runs.events import as_json
from burnish.runs.lock import adopted
from burnish.training.environment import prepare_environment
from burnish.training.orders import Orders, Told

BEAT_S = 5.0
PULSE_S = 1.0  # at most one in so long
ORPHAN_S = 900.0  # for a process without a parent to finish its step, and to save


def main() -> int:
    say = _line_to_parent()
    faulthandler.enable()  # a crash in a library leaves its stack in stderr
    for number in (signal.SIGINT, signal.SIGHUP):  # the terminal's are the parent's to hear
        signal.signal(number, signal.SIG_IGN)
    parent = _lines_of_parent()
    orders = Orders.of(parent.readline())
    sys.argv = list(orders.command)  # environment.json tells what a person typed
    prepare_environment(orders.recipe.care)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=_listen, args=(parent, stop), daemon=True, name="parent").start()
    try:
        with _beating(say):
            _train(orders, say, stop.is_set)
    except BaseException as e:  # a library may call sys.exit
        told = told_of(e)
        say({"failed": asdict(told)})
        return told.exit_code
    return 0


def _train(orders: Orders, say: Callable[[Any], None], stop: Callable[[], bool]) -> None:
    from burnish.training.job import run_job

    told = 0.0

    def pulse() -> None:
        nonlocal told
        if time.monotonic() - told > PULSE_S:
            told = time.monotonic()
            say({"pulse": round(told)})

    events = run_job(
        orders.recipe, orders.out, resume=orders.resume, skip_before=orders.skip_before, stop=stop,
        aftermath=orders.aftermath, pulse=pulse, renewable=orders.renewable,
        lock=None if orders.lock is None else adopted(orders.lock),
    )  # fmt: skip
    for event in events:
        say(as_json(event))


def told_of(error: BaseException) -> Told:
    """What the parent is told. A defect of ours, or an error of a library that nobody translated, keeps its
    traceback; a MemoryError of Python's own means what OutOfMemory means.
    """
    said = in_words(error) if isinstance(error, Exception) else None
    if said is not None:
        return Told(said.message, said.hint, said.exit_code, True)
    text = "".join(traceback.format_exception(error)).rstrip()
    code = EXIT_OUT_OF_MEMORY if isinstance(error, MemoryError) else EXIT_FAILED
    return Told(text, "", code, False)


def _line_to_parent() -> Callable[[Any], None]:
    """Says one value as a line of JSON, from any thread. What a framework prints goes to stderr instead."""
    ours = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    one_at_a_time = threading.Lock()

    def say(value: Any) -> None:
        try:
            with one_at_a_time:
                ours.write(json.dumps(value) + "\n")
                ours.flush()
        except OSError:  # nobody listens any more; the end of stdin says so too
            pass

    return say


def _lines_of_parent() -> IO[str]:
    """What was our stdin. A library that reads its own gets the end of a file, not our parent's words."""
    ours = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return ours


def _listen(parent: IO[str], stop: threading.Event) -> None:
    for line in parent:
        if line.strip() == "stop":
            stop.set()
    # The parent is gone, and what is printed would only fail.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    stop.set()
    time.sleep(ORPHAN_S)
    os._exit(EXIT_FAILED)  # it hangs, and would keep its memory and the run's lock for ever


@contextmanager
def _beating(say: Callable[[Any], None]) -> Iterator[None]:
    over = threading.Event()

    def beat() -> None:
        n = 0
        while not over.wait(BEAT_S):
            n += 1
            say({"beat": n})

    thread = threading.Thread(target=beat, daemon=True, name="beat")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    # Not sys.exit: threads of a framework that has failed may wait for ever at the interpreter's end.
    os._exit(code)
