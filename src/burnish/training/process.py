"""The training process as its parent has it: started, listened to, asked to stop, and seen to have ended.

    with Process(orders) as child:
        for told in child.lines(stop): ...
    child.end()
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any

from burnish.machine.child import environment
from burnish.runs.failure import LOG
from burnish.training.orders import Orders, Told

LOOK_S = 0.25
TAIL_LINES = 200
HELD_S = 5.0  # a reader gets its turn in that, however busy the machine
# No line at all, not even a beat: the process is stopped, or nothing of it gets a turn.
DEAD_S = 180.0
# Without an event or a pulse: at first, while weights are read and kernels compiled; and later at the least,
# or so many times the longest silence there was.
FIRST_S, LEAST_S, TIMES = 3600.0, 600.0, 10.0


@dataclass(frozen=True)
class End:
    """How the process ended. signal: its name, '' where none ended it. log: the last lines of stderr."""

    code: int
    signal: str
    hung_s: float  # so long without a word, and so it was ended; 0: it was not
    told: Told | None
    log: tuple[str, ...]


class Silence:
    """Counts how long nothing was heard. Only time that this process was awake for counts: a Mac that slept
    with its lid closed, or a run that was stopped with Ctrl-Z, was not silent.
    """

    def __init__(self, limit_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._asked, self._clock = limit_s, clock
        self._last = clock()
        self._line = self._event = self._longest = 0.0
        self._begun = self._paused = False

    def heard(self, told: Mapping[str, Any]) -> None:
        self._line = 0.0
        if "beat" in told:
            return
        kind = told.get("event")
        self._begun = self._begun or kind in ("rehearsed", "stepped")
        if not self._paused:
            self._longest = max(self._longest, self._event)
        self._event = 0.0
        if kind is not None:
            self._paused = kind == "paused"

    def too_long(self) -> float:
        """Seconds of silence where they are too many; else 0."""
        now = self._clock()
        passed, self._last = min(now - self._last, 2 * LOOK_S), now
        self._line, self._event = self._line + passed, self._event + passed
        if self._line > DEAD_S:
            return self._line
        return self._event if not self._paused and self._event > self._limit() else 0.0

    def _limit(self) -> float:
        if self._asked is not None:
            return self._asked
        return max(LEAST_S, TIMES * self._longest) if self._begun else FIRST_S


class Process:
    """Owns the process and the threads that read what it says."""

    def __init__(
        self, orders: Orders, command: Sequence[str], insisted: Callable[[], bool] = lambda: False
    ) -> None:
        self._insisted = insisted  # a second Ctrl-C
        asked = orders.recipe.care.silence_s
        self._silence = Silence(None if asked == "auto" else float(asked))
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            list(command), stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace",
            env=environment(), pass_fds=() if orders.lock is None else (orders.lock,),
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._log: deque[str] = deque(maxlen=TAIL_LINES)
        self._folder, self._unwritten, self._planned = orders.out, list[str](), False
        self._told: Told | None = None
        self._hung_s, self._asked_to_stop, self._ended = 0.0, False, 0.0
        self._readers = [
            threading.Thread(target=read, daemon=True, name="reader")
            for read in (self._read_lines, self._read_log)
        ]
        for reader in self._readers:
            reader.start()
        self._say(orders.line())

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leaves no process behind. Whoever leaves early, because the terminal is gone, lets it save first;
        whoever insists does not.
        """
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()  # which asks it to stop
        try:
            while self._process.poll() is None and not self._silence.too_long():
                if kind is KeyboardInterrupt or self._insisted():
                    break
                with suppress(queue.Empty):
                    self._heard(self._lines.get(timeout=LOOK_S))
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()
            self._close()

    def _close(self) -> None:
        """A pipe that is still read is held open by a process of the child's; to close it would be to wait
        for that.
        """
        for reader, pipe in zip(self._readers, (self._process.stdout, self._process.stderr)):
            reader.join(timeout=1)
            if not reader.is_alive() and pipe is not None:
                pipe.close()

    def lines(self, stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Its events, until it has ended. `stop()` is handed on."""
        while True:
            if stop() and not self._asked_to_stop:
                self._asked_to_stop = True
                self._say("stop\n")
            ended = self._process.poll() is not None
            try:
                line = self._lines.get(timeout=LOOK_S)
            except queue.Empty:
                line = None
            if line is not None:
                if told := self._heard(line):
                    yield told
            elif ended and not (self._readers[0].is_alive() and time.monotonic() < self._wait_until()):
                break
            self._hung_s = self._silence.too_long()
            if self._hung_s:
                self._process.kill()
                self._process.wait()
                break
        for reader in self._readers:
            reader.join(timeout=1)  # a grandchild that lives on holds the pipe open

    def _wait_until(self) -> float:
        """Where a process that lives on holds the pipe, its end never comes; what is in it comes at once."""
        self._ended = self._ended or time.monotonic()
        return self._ended + HELD_S

    def end(self) -> End:
        code = self._process.returncode
        name = signal_name(-code) if code < 0 and not self._hung_s else ""
        return End(code, name, self._hung_s, self._told, tuple(self._log))

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        _read(self._process.stdout, self._lines.put)

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        _read(self._process.stderr, self._noted)

    def _noted(self, line: str) -> None:
        """Into log.txt of the run, once it has its folder: the address of a tracker's page, a warning."""
        self._log.append(line)
        self._unwritten.append(line)
        if self._planned:
            text = "".join(f"{line}\n" for line in self._unwritten)
            with suppress(OSError), (self._folder / LOG).open("a", encoding="utf-8") as log:
                log.write(text)
            self._unwritten.clear()

    def _heard(self, line: str) -> dict[str, Any] | None:
        try:
            told = json.loads(line)
        except ValueError:  # half a line of a process that was killed
            return None
        if not isinstance(told, dict):
            return None
        self._silence.heard(told)
        if "failed" in told:
            self._told = Told(**told["failed"])
        self._planned = self._planned or told.get("event") == "planned"
        return told if "event" in told else None

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # it has ended; its end tells more
            self._process.stdin.write(line)
            self._process.stdin.flush()


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _read(pipe: IO[str], put: Callable[[str], None]) -> None:
    with suppress(ValueError, OSError):  # closed while it was read
        for line in pipe:
            put(line.rstrip("\n"))
