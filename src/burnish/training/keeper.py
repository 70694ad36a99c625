"""The keeper of a run: looks at the machine and at what other terminals ask for, and says when to wait.

    with Keeper(run.path, recipe.care, stop) as keeper:
        if keeper.stop(): ...
        asked = keeper.verdict()       # go-on, slow or pause, and why

Power, heat and memory pressure are read in a thread every LOOK_S seconds, so a step never waits for a
thermometer; the loop asks between steps, which costs it the look at one small file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

from burnish.machine.health import Health, Quick, Verdict, read_health, verdict
from burnish.recipe import Care
from burnish.runs.wish import wished

LOOK_S = 20.0
SWAPPED_BYTES = 2 << 30
ASKED = Verdict("pause", "asked", "asked for; `burnish resume` goes on")

Read = Callable[[], Health]


def _read() -> Health:
    return read_health(Quick())


class Keeper:
    """Owns the thread, and what keeps the machine awake. stop: the wish of this process's own terminal.
    pulse: called while it waits. awake: `keep_awake`, where that is wanted. read, look_s: for tests.
    """

    def __init__(
        self,
        folder: Path,
        care: Care,
        stop: Callable[[], bool],
        read: Read = _read,
        look_s: float = LOOK_S,
        pulse: Callable[[], None] = lambda: None,
        awake: Callable[[], AbstractContextManager[str]] = lambda: nullcontext(""),
    ) -> None:
        self._awake, self._held = awake, ExitStack()
        self._folder, self._care, self._stop, self._pulse = folder, care, stop, pulse
        self._read, self._look_s = read, look_s
        self._health, self._over = Health(), threading.Event()
        self._notes: list[str] = []
        self._swap_bytes: int | None = None  # at the first look
        self._swapped = self._told_awake = self._is_awake = False
        self._thread = threading.Thread(target=self._look, daemon=True, name="keeper")

    def __enter__(self) -> Keeper:
        self.stay_awake()
        if self._heeds_anything():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.let_sleep()
        self._over.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2)  # a tool that hangs in a driver is not waited for

    def stay_awake(self) -> None:
        if self._is_awake:
            return
        self._is_awake = True
        words = self._held.enter_context(self._awake())
        if words and not self._told_awake:
            self._told_awake = True
            self._notes.append(words)

    def let_sleep(self) -> None:
        """While a run waits for its battery to be charged, staying awake would only empty it."""
        self._held.close()
        self._is_awake = False

    def stop(self) -> bool:
        return self._stop() or wished(self._folder) == "stop"

    def verdict(self, paused: str = "") -> Verdict:
        """paused: the `why` of the pause that the run is in; it wants better than what paused it."""
        if wished(self._folder) == "pause":
            return ASKED
        care = self._care
        return verdict(
            self._health, care.on_battery, care.min_battery, care.when_hot, care.under_pressure, paused
        )

    def notes(self) -> list[str]:
        """What a person should know of the machine, each once."""
        notes, self._notes = self._notes, []
        return notes

    def wait(self, seconds: float) -> None:
        """So long, or until the run is to stop."""
        left = seconds
        while left > 0 and not self.stop():
            self._over.wait(min(left, 0.2))
            self._pulse()
            left -= 0.2

    def _heeds_anything(self) -> bool:
        care = self._care
        quiet = (care.on_battery, care.when_hot, care.under_pressure) == ("go-on",) * 3
        return not quiet or care.min_battery > 0

    def _look(self) -> None:
        while True:
            try:
                self._health = self._read()
            except Exception:  # whatever breaks, it ends neither the looking nor a pause for ever
                self._health = Health()
            self._watch_swap()
            if self._over.wait(self._look_s):
                return

    def _watch_swap(self) -> None:
        """Swapping is no reason to pause, and the usual one why a Mac gets slow."""
        now = self._health.swap_bytes
        if now is None:
            return
        if self._swap_bytes is None:
            self._swap_bytes = now
        elif now - self._swap_bytes > SWAPPED_BYTES and not self._swapped:
            self._swapped = True
            gib = (now - self._swap_bytes) / 2**30
            self._notes.append(
                f"the system has swapped out {gib:.1f} GiB since the run began, which makes it slow: close "
                "other programs"
            )
