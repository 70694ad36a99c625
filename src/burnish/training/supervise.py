"""A run in a process of its own, and what is done when that process ends without having ended the run.

    for event in supervise(Orders(recipe, out, resume=False, skip_before=False), stop):
        show(event)

Frameworks abort, crash and are killed where no exception could be caught: MLX ends a CPU process whose memory
runs out with a segmentation fault, macOS kills work that keeps the display waiting, Linux kills who takes too
much memory. A new process then goes on from the last checkpoint, so every number is what it would have been.
The first time it does the same again; where it ends once more without a new checkpoint and memory may be why,
it takes a rung down (recover.py), which leaves the training as it is. After `care.restarts` ends in a row
without a new checkpoint the run is given up, with a diagnosis; its checkpoints stay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from burnish.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, EXIT_WILL_NOT_FIT, UserError
from burnish.machine.child import command_of
from burnish.machine.diagnosis import diagnose
from burnish.runs.events import (
    Event,
    Finished,
    Interrupted,
    Noted,
    Planned,
    Saved,
    Stepped,
    from_json,
)
from burnish.runs.failure import append_event
from burnish.runs.lock import free, locked, release
from burnish.runs.wish import ask, wished
from burnish.training.orders import Aftermath, Orders
from burnish.training.process import End, Process

WORKER = "burnish.training.worker"
BACK_OFF_S = (1.0, 5.0, 20.0, 60.0)
# What the catalogue knows to pass by in a new process: with less memory taken, or with shorter work handed to
# a GPU at a time, which a rung down gives as well.
SHORT_OF_MEMORY = {
    "mps-out-of-memory", "metal-out-of-memory", "metal-resource-limit", "cuda-out-of-memory",
    "cublas-alloc-failed", "cpu-out-of-memory", "bad-alloc", "killed-for-memory",
}  # fmt: skip
TOO_LONG_FOR_A_GPU = {"gpu-watchdog-display", "gpu-timeout", "gpu-victim", "gpu-fault"}


@dataclass(frozen=True)
class Death:
    """The end of a process that did not end its run."""

    cause: str  # 'SIGKILL', 'out of memory', 'no answer', or an entry of the catalogue
    words: str  # 'was killed by SIGKILL, …'
    error: str  # the last it said
    memory: bool  # may be for want of it


@dataclass
class _Heard:
    """What is known of the run from all of its processes."""

    begun: bool = False  # it has its folder
    step: int = 0
    saved: int = 0
    deaths: int = 0  # in a row, without a new checkpoint
    over: bool = False  # finished or interrupted
    backend: str = ""
    at: float = 0.0  # time.monotonic() of the last event

    def hear(self, event: Event) -> None:
        self.at = time.monotonic()
        if isinstance(event, Planned):
            self.begun, self.step = True, event.resumed_at
            self.saved = max(self.saved, event.resumed_at)
            self.backend = event.summary["choices"]["backend"]["value"]
        elif isinstance(event, Stepped):
            self.step = event.step
        elif isinstance(event, Saved) and event.step > self.saved:
            self.saved, self.deaths = event.step, 0
        elif isinstance(event, Finished | Interrupted):
            self.over = True


def supervise(
    orders: Orders,
    stop: Callable[[], bool],
    command: Sequence[str] = (),
    back_off: Sequence[float] = BACK_OFF_S,
    insisted: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """The events of the run, whatever process they come from. Raises UserError where it ends badly: its log
    is what the process said last.

    command: what to start instead of the worker, for tests. insisted: by a second Ctrl-C; then nothing is
    waited for.
    """
    if orders.resume and wished(orders.out) and free(orders.out):
        ask(orders.out, "")  # of before: whoever resumes wants it to go on
    with ExitStack() as locks:
        yield from _lives(orders, stop, command or command_of(WORKER), back_off, insisted, locks)


def _lives(
    orders: Orders,
    stop: Callable[[], bool],
    command: Sequence[str],
    back_off: Sequence[float],
    insisted: Callable[[], bool],
    locks: ExitStack,
) -> Iterator[Event]:
    """One process after another. locks: what is to be let go of at the end."""
    heard = _Heard(at=time.monotonic())
    while True:
        orders = replace(orders, renewable=heard.deaths < orders.recipe.care.restarts)
        with Process(orders, command, insisted) as child:
            for told in child.lines(stop):
                try:
                    event = from_json(told)
                except (KeyError, TypeError):  # not of our making
                    continue
                heard.hear(event)
                yield event
            end = child.end()
        if heard.over:  # how the process ended after that is of no consequence
            return
        death = _death(end, heard, orders)
        if death is None:
            raise _as_error(end)
        if heard.begun and orders.lock is None:  # from now on nobody else begins here, nor goes on
            lock = locked(orders.out)
            locks.callback(release, lock)
            orders = replace(orders, lock=lock.fileno())
        if heard.deaths >= orders.recipe.care.restarts:
            raise _as_error(end) if end.told and end.told.meant else _given_up(death, heard, end)
        if not stop():
            yield Noted(f"after step {heard.step} the training process {death.words}; {_next(heard)}")
        if _stopped_while(back_off[min(heard.deaths, len(back_off) - 1)], stop, orders.out):
            if heard.begun:  # else there is nothing to go on with
                interrupted = Interrupted(heard.saved, str(orders.out))
                append_event(orders.out, interrupted)
                yield interrupted
            return
        lighter = death.memory and heard.deaths > 0
        aftermath = Aftermath(death.cause, death.error, lighter, heard.step, heard.at)
        heard.deaths += 1
        orders = replace(orders, resume=orders.resume or heard.begun, aftermath=aftermath)


def _death(end: End, heard: _Heard, orders: Orders) -> Death | None:
    """None where the process ended with an error that a new one would only meet again."""
    told, last = end.told, _last_words(end)
    if end.hung_s:
        return Death("no answer", f"gave no answer for {end.hung_s:.0f} s and was ended", last, False)
    found = diagnose("\n".join([*end.log, told.message if told else ""]))
    known = "" if found is None else found.id
    if told is not None:
        if told.exit_code == EXIT_OUT_OF_MEMORY:
            return Death("out of memory", "ran out of memory", last, True)
        cut = orders.aftermath is not None and orders.aftermath.lighter
        if told.exit_code == EXIT_WILL_NOT_FIT and heard.deaths and not cut:
            return Death("no room", "found too little memory free", last, True)  # it may be free in a moment
        if told.meant or known not in SHORT_OF_MEMORY | TOO_LONG_FOR_A_GPU:
            return None
        return Death(known, f"ended: {last}", last, True)
    memory = known in SHORT_OF_MEMORY | TOO_LONG_FOR_A_GPU
    if end.signal == "SIGKILL":
        words = "was killed by SIGKILL, as the system does when memory runs out"
        return Death(end.signal, words, last, True)
    if end.signal:
        # MLX's allocator on a CPU crashes where it gets nothing.
        crash = heard.backend == "mlx" and end.signal in ("SIGSEGV", "SIGBUS", "SIGABRT")
        return Death(end.signal, f"was ended by {end.signal}", last, memory or crash)
    if end.code == EXIT_OUT_OF_MEMORY:
        return Death("out of memory", "ran out of memory", last, True)
    return Death(f"exit code {end.code}", f"ended with code {end.code} and no word", last, memory)


def _last_words(end: End) -> str:
    lines = (end.told.message if end.told else "\n".join(end.log)).strip().splitlines()
    # A fault handler's last lines list modules; what it says first names the fault.
    fatal = [line for line in lines if line.startswith("Fatal Python error")]
    return (fatal or lines or [""])[-1][:300]


def _next(heard: _Heard) -> str:
    from_ = f"from step {heard.saved}" if heard.saved else "from the beginning"
    return f"a new one goes on {from_}"


def _stopped_while(seconds: float, stop: Callable[[], bool], out: Path) -> bool:
    """Was it asked to stop, here or from another terminal?"""
    end = time.monotonic() + seconds
    while True:
        if stop():
            return True
        if wished(out) == "stop":
            ask(out, "")  # heeded
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(0.1)


def _as_error(end: End) -> UserError:
    """What the process told, as if it had been raised here."""
    assert end.told is not None
    told = end.told
    if told.meant:
        return UserError(told.message, told.hint, told.exit_code)
    return UserError(told.message, "", EXIT_FAILED, end.log)  # what is known of it is said with every error


def _given_up(death: Death, heard: _Heard, end: End) -> UserError:
    times = f", {heard.deaths + 1} times without a new checkpoint" if heard.deaths else ""
    keeps = f"; the checkpoint of step {heard.saved} is whole" if heard.saved else ""
    said = f"\n{death.error}" if death.error else ""
    code = EXIT_OUT_OF_MEMORY if death.memory else EXIT_FAILED
    return UserError(
        f"the training process {death.words}{times}{keeps}{said}",
        "burnish doctor   looks for what can be found"
        + ("; the same command with --resume goes on" if heard.begun else ""),
        code,
        end.log,
    )
