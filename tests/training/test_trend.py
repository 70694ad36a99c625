"""Whether the loss falls: said where it does not, and only then."""

from __future__ import annotations

import math

import numpy as np
import pytest

from burnish.training.trend import FALLEN, LEAST_STEPS, Trend


def said(losses: list[float], steps: int | None = None, first: int = 1) -> list[tuple[int, str]]:
    """At which step, and what."""
    trend = Trend(len(losses) if steps is None else steps)
    return [(n, words) for n, loss in enumerate(losses, first) for words in trend.hear(n, loss)]


def noisy(start: float, end: float, n: int) -> list[float]:
    rng = np.random.default_rng(0)
    return [float(x) for x in np.linspace(start, end, n) + rng.normal(0, 0.02, n)]


def test_a_loss_that_stands_is_said_at_a_quarter_and_at_the_end() -> None:
    found = said(noisy(3, 3, 400))
    assert [step for step, _ in found] == [100, 400]
    assert "has not fallen" in found[0][1] and "the first 25 steps" in found[0][1]
    assert "the last 100" in found[1][1] and "train.lr" in found[1][1]


@pytest.mark.parametrize("end", [3.5, 30.0])
def test_so_is_one_that_rises(end: float) -> None:
    assert [step for step, _ in said(noisy(3, end, 400))] == [100, 400]


def test_one_that_falls_is_not_spoken_of() -> None:
    assert said(noisy(3, 1, 400)) == []


def test_one_that_falls_late_is_spoken_of_once() -> None:
    assert [step for step, _ in said(noisy(3, 3, 200) + noisy(3, 1, 200))] == [100]


def test_a_little_lower_is_not_lower() -> None:
    def at_its_end(share: float) -> bool:
        return 200 in [step for step, _ in said([1.0] * 100 + [share] * 100)]

    assert at_its_end(1 - FALLEN / 2) and not at_its_end(1 - 2 * FALLEN)


@pytest.mark.parametrize("n", [1, 10, LEAST_STEPS - 1])
def test_few_steps_say_nothing(n: int) -> None:
    assert said([3.0] * n) == []


def test_a_short_run_is_looked_at_once() -> None:
    assert [step for step, _ in said([3.0] * LEAST_STEPS)] == [LEAST_STEPS]
    assert [step for step, _ in said([3.0] * 60)] == [LEAST_STEPS, 60]


def test_of_a_run_gone_on_with_nothing_is_said() -> None:
    """What fell before is not known, and a loss may well be flat by then."""
    assert said([3.0] * 50, steps=400, first=351) == []
    assert said([3.0] * 350, steps=400, first=51) == []


def test_steps_left_out_are_none() -> None:
    trend = Trend(100)
    heard = [n for n in range(1, 101) if n != 40 for _ in trend.hear(n, 3.0)]
    assert heard == [100]


def test_infinite_losses_break_nothing() -> None:
    found = said([math.inf] * 50 + [3.0] * 50)
    assert [step for step, _ in found] == [LEAST_STEPS] or found == []
