"""Does the loss fall? Said once, when a quarter of the run is over, and again at its end.

    for words in trend.hear(step, loss): ...
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean

# Fewer steps than this say nothing; a loss that is lower by less than this share has not fallen.
LEAST_STEPS = 40
FALLEN = 0.02


class Trend:
    def __init__(self, steps: int) -> None:
        self._losses: list[float] = []
        self._first = 0
        self._looks = {max(LEAST_STEPS, steps // 4), steps}

    def hear(self, step: int, loss: float) -> Iterator[str]:
        """Only of a run that this process has seen from its beginning: later a loss may well be flat."""
        self._losses.append(loss)
        self._first = self._first or step
        n = len(self._losses)
        if step not in self._looks or n < LEAST_STEPS or self._first > 1:
            return
        part = n // 4
        first, last = fmean(self._losses[:part]), fmean(self._losses[-part:])
        if last > (1 - FALLEN) * first:
            yield (
                f"the loss has not fallen: {first:.4f} over the first {part} steps, {last:.4f} over the last "
                f"{part}; `burnish data` shows what is trained, and train.lr may be too small or too large"
            )
