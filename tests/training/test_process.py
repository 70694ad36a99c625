"""`Silence`: when a process that says nothing counts as hung. The clock is the test's."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.training.process import DEAD_S, FIRST_S, LEAST_S, LOOK_S, TIMES, Silence

BEAT: dict[str, Any] = {"beat": 1}
PULSE: dict[str, Any] = {"pulse": 1}


def event(kind: str) -> dict[str, Any]:
    return {"event": kind}


class Listener:
    """Looks every LOOK_S seconds, as `Process.lines` does."""

    def __init__(self, limit_s: float | None = None) -> None:
        self.now = 1000.0
        self.silence = Silence(limit_s, lambda: self.now)

    def hears(self, *told: dict[str, Any]) -> None:
        for value in told:
            self.silence.heard(value)
            assert not self.silence.too_long()

    def waits(self, seconds: float, beats: bool = True) -> float:
        """What it says in the end; a beat comes every five seconds."""
        for n in range(1, round(seconds / LOOK_S) + 1):
            self.now += LOOK_S
            if beats and n % round(5 / LOOK_S) == 0:
                self.silence.heard(BEAT)
            if found := self.silence.too_long():
                return found
        return 0.0

    def began(self) -> None:
        self.hears(event("planned"), event("rehearsed"))


def test_asked_for_seconds_are_heeded_to_the_second() -> None:
    for limit in (10, 100):
        ear = Listener(limit)
        ear.hears(event("planned"))
        assert not ear.waits(limit)
        assert ear.waits(1) == pytest.approx(limit, abs=2 * LOOK_S)


def test_an_event_or_a_pulse_begins_anew() -> None:
    ear = Listener(10)
    for told in (event("planned"), PULSE, event("noted"), PULSE):
        ear.hears(told)
        assert not ear.waits(9)
    assert ear.waits(2)


def test_beats_only_say_that_it_lives() -> None:
    ear = Listener(10)
    assert ear.waits(60, beats=True), "it does nothing"
    still = Listener(10_000)
    assert not still.waits(DEAD_S + 60, beats=True)
    assert still.waits(DEAD_S + 1, beats=False) == pytest.approx(DEAD_S, abs=1), "no thread of it has a turn"


def test_before_the_first_step_it_has_longer() -> None:
    """Weights are read, kernels compiled, questions answered."""
    ear = Listener()
    ear.hears(event("planned"))
    assert not ear.waits(FIRST_S - 1)
    assert ear.waits(2)


@pytest.mark.parametrize("began", ["rehearsed", "stepped"])
def test_later_less(began: str) -> None:
    ear = Listener()
    ear.hears(event(began))
    assert not ear.waits(LEAST_S - 1)
    assert ear.waits(2)


def test_a_slow_machine_has_longer() -> None:
    ear = Listener()
    ear.began()
    assert not ear.waits(LEAST_S / 2)
    ear.hears(PULSE, event("stepped"))
    assert not ear.waits(TIMES * LEAST_S / 2 - 1)
    assert ear.waits(2)


@pytest.mark.parametrize("ends", [(event("rehearsed"),), (PULSE, event("rehearsed")), (event("stepped"),),
                                  (PULSE, event("stepped"))])  # fmt: skip
def test_the_first_step_says_already_how_slow_it_is(ends: tuple[dict[str, Any], ...]) -> None:
    """A rehearsal of a quarter of an hour is followed by steps of a quarter of an hour; a run gone on with
    has none. The learner's pulse comes before the event.
    """
    ear = Listener()
    ear.hears(event("planned"))
    assert not ear.waits(900)
    ear.hears(*ends)
    assert not ear.waits(900)


def test_a_machine_that_slept_was_not_silent() -> None:
    ear = Listener(60)
    ear.began()
    for _ in range(20):
        ear.now += 3600  # the lid was closed, or the run stopped with Ctrl-Z: no look in between
        assert not ear.silence.too_long()
    assert ear.waits(61)


def test_a_paused_run_may_be_silent_for_days() -> None:
    ear = Listener(60)
    ear.began()
    ear.hears(event("paused"))
    assert not ear.waits(24 * 3600)
    ear.hears(event("continued"))
    assert ear.waits(61), "it is not paused any more"


def test_a_paused_run_that_does_not_even_beat_is_dead() -> None:
    ear = Listener()
    ear.began()
    ear.hears(event("paused"))
    assert ear.waits(DEAD_S + 1, beats=False)


def test_a_pause_does_not_make_the_machine_slow() -> None:
    ear = Listener()
    ear.began()
    ear.hears(event("paused"))
    assert not ear.waits(7200)
    ear.hears(event("continued"), event("stepped"))
    assert ear.waits(LEAST_S + 1)


def test_another_reason_for_the_same_pause() -> None:
    ear = Listener(60)
    ear.began()
    ear.hears(event("paused"), event("paused"))
    assert not ear.waits(3600)


def test_beats_while_it_is_paused_change_nothing() -> None:
    ear = Listener(60)
    ear.began()
    ear.hears(event("paused"), BEAT, BEAT)
    assert not ear.waits(120)
