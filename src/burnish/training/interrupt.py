"""Ctrl-C, SIGTERM and a closed terminal as a wish: the step in hand is finished, a checkpoint saved, then the
run ends.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Gives `stop()`, true once a signal came. A second signal ends the process at once. What is ignored
    already stays so: `nohup` runs on when its terminal closes.
    """
    wished = False

    def hear(number: int, _frame: object) -> None:
        nonlocal wished
        if wished:
            raise KeyboardInterrupt
        wished = True

    heard = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield lambda: wished
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
