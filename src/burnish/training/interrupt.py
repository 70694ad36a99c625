"""Ctrl-C, SIGTERM and a closed terminal as a wish: the step in hand is finished, a checkpoint saved, then the
run ends.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Wish:
    """`stop()` is true once a signal came, `stop.insisted()` once a second one did. A terminal that is closed
    is told of by the shell and by the system, which is one wish.
    """

    def __init__(self) -> None:
        self._times, self.terminal_gone = 0, False

    def __call__(self) -> bool:
        return self._times > 0 or self.terminal_gone

    def insisted(self) -> bool:
        return self._times > 1

    def hear(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            self.terminal_gone = True
            return
        self._times += 1
        if self._times > 1:
            raise KeyboardInterrupt


@contextmanager
def interruptible() -> Iterator[Wish]:
    """A second signal ends the process at once. What is ignored already stays so: `nohup` runs on when its
    terminal closes.
    """
    stop = Wish()
    heard = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.hear) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
