"""A learner that tells of each thing it has done, so that a run that answers or validates for an hour is not
taken for one that hangs.

    learner = Pulsing(backends.open(plan), pulse)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from burnish.backends.base import Learner, Memory, Sampling, Scores, StepStats, Token
from burnish.data.batches import Batch
from burnish.planning.plan import Plan


class Pulsing:
    """Passes everything on; `pulse()` after every step, score and token."""

    def __init__(self, inner: Learner, pulse: Callable[[], None]) -> None:
        self._inner, self._pulse = inner, pulse

    @property
    def plan(self) -> Plan:
        return self._inner.plan

    def score(self, batch: Batch) -> Scores:
        scores = self._inner.score(batch)
        self._pulse()
        return scores

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        tokens = self._inner.generate(prompts, how)
        return self._told(tokens)

    def _told(self, tokens: Iterator[Token]) -> Iterator[Token]:
        try:
            for token in tokens:
                self._pulse()
                yield token
        finally:
            close = getattr(tokens, "close", None)  # a generator's own; plain iterators have none
            if close is not None:
                close()

    def memory(self) -> Memory:
        return self._inner.memory()

    def moved(self, device: str, dtype: str) -> AbstractContextManager[None]:
        return self._inner.moved(device, dtype)

    def close(self) -> None:
        self._inner.close()

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        stats = self._inner.step(micros, lr)
        self._pulse()
        return stats

    def rehearse(self, micros: Sequence[Batch]) -> None:
        self._inner.rehearse(micros)
        self._pulse()

    def reshape(self, plan: Plan) -> None:
        self._inner.reshape(plan)

    def save(self, folder: Path) -> None:
        self._inner.save(folder)
        self._pulse()

    def load(self, folder: Path) -> None:
        self._inner.load(folder)
        self._pulse()

    def load_adapter(self, folder: Path) -> None:
        self._inner.load_adapter(folder)
