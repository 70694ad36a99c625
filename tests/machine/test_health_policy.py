"""`verdict`: when a run goes on, goes slower, pauses, and when a pause is over."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from burnish.machine.health import RECHARGED, Health, Pressure, Verdict, verdict

USUAL = {"on_battery": "go-on", "min_battery": 20, "when_hot": "slow", "under_pressure": "pause"}
GO = Verdict("go-on")


def judged(health: Health, paused: str = "", **care: str | int) -> tuple[str, str]:
    found = verdict(health, **{**USUAL, **care}, paused=paused)  # type: ignore[arg-type]
    assert bool(found.words) == bool(found.why) == (found.action != "go-on")
    return found.action, found.why


def test_a_machine_that_tells_nothing_goes_on():
    for battery, hot, pressure in itertools.product(("go-on", "slow", "pause"), ("go-on", "slow", "pause"),
                                                    ("go-on", "pause")):
        assert verdict(Health(), battery, 100, hot, pressure) == GO


@pytest.mark.parametrize(("policy", "percent", "wanted"), [
    ("go-on", 57, ("go-on", "")), ("slow", 57, ("slow", "battery")), ("pause", 57, ("pause", "battery")),
    ("go-on", 20, ("go-on", "")), ("go-on", 19, ("pause", "battery")), ("slow", 19, ("pause", "battery")),
    ("pause", 19, ("pause", "battery")),
    ("go-on", None, ("go-on", "")), ("slow", None, ("slow", "battery")),
    ("pause", None, ("pause", "battery")),
])
def test_on_battery(policy: str, percent: int | None, wanted: tuple[str, str]):
    assert judged(Health(True, percent), on_battery=policy) == wanted
    for mains in (Health(False, percent), Health(None, percent)):
        assert judged(mains, on_battery=policy) == ("go-on", "")


def test_min_battery_of_nothing_never_pauses():
    assert judged(Health(True, 0), min_battery=0) == ("go-on", "")


@pytest.mark.parametrize(("policy", "wanted"), [
    ("go-on", ("go-on", "")), ("slow", ("slow", "heat")), ("pause", ("pause", "heat")),
])
def test_hot(policy: str, wanted: tuple[str, str]):
    assert judged(Health(hot=True), when_hot=policy) == wanted
    for cool in (Health(hot=False), Health(hot=None)):
        assert judged(cool, when_hot=policy) == ("go-on", "")


@pytest.mark.parametrize("pressure", ["normal", "warning", "critical", None])
@pytest.mark.parametrize("policy", ["go-on", "pause"])
def test_memory_pressure(pressure: Pressure | None, policy: str):
    bad = pressure == "critical" and policy == "pause"
    wanted = ("pause", "memory pressure") if bad else ("go-on", "")
    assert judged(Health(pressure=pressure), under_pressure=policy) == wanted


def test_a_pause_wins_over_going_slower():
    assert judged(Health(True, 57, True), on_battery="slow", when_hot="pause") == ("pause", "heat")
    assert judged(Health(True, 57, True), on_battery="slow") == ("slow", "battery")
    assert judged(Health(True, 57, True, "critical"), on_battery="slow") == ("pause", "memory pressure")
    assert judged(Health(True, 9, True, "critical"), when_hot="pause") == ("pause", "battery")
    assert judged(Health(False, 9, True, "critical"), when_hot="pause") == ("pause", "memory pressure")


@pytest.mark.parametrize(("health", "wanted"), [
    (Health(True, 17), "on battery, 17 % left, less than 20 %"),
    (Health(pressure="critical"), "memory pressure is critical"),
    (Health(hot=True), "the machine is held back by heat"),
])
def test_words(health: Health, wanted: str):
    assert verdict(health, **USUAL).words == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(("health", "wanted"), [
    (Health(True, 19), "pause"), (Health(True, 20), "pause"), (Health(True, 20 + RECHARGED - 1), "pause"),
    (Health(True, 20 + RECHARGED), "go-on"), (Health(True, None), "pause"), (Health(None, None), "pause"),
    (Health(None, 90), "pause"), (Health(False, 3), "go-on"), (Health(False, None), "go-on"),
])
def test_a_pause_for_a_low_battery_ends_later_than_it_began(health: Health, wanted: str):
    assert judged(health, paused="battery")[0] == wanted
    # Only that pause: one for something else knows the battery's own limit alone.
    if health.on_battery and health.battery_percent == 20:
        assert judged(replace(health, hot=False), paused="heat") == ("go-on", "")


def test_a_pause_for_any_battery_ends_on_mains():
    assert judged(Health(True, 99), "battery", on_battery="pause") == ("pause", "battery")
    assert judged(Health(False, 21), "battery", on_battery="pause") == ("go-on", "")
    words = verdict(Health(True, 22), "pause", 20, "slow", "pause", paused="battery").words
    assert words == "on battery, 22 % left; goes on on mains power", "no charge would be enough"
    assert judged(Health(True, 30), "battery", on_battery="slow") == ("slow", "battery")


def test_a_full_battery_is_enough():
    assert judged(Health(True, 99), "battery", min_battery=98) == ("pause", "battery")
    assert judged(Health(True, 100), "battery", min_battery=98) == ("go-on", "")


def test_a_pause_for_heat_ends_when_it_is_said_to_be_over():
    assert judged(Health(hot=True), "heat", when_hot="pause") == ("pause", "heat")
    assert judged(Health(hot=None), "heat", when_hot="pause") == ("pause", "heat")
    assert judged(Health(hot=False), "heat", when_hot="pause") == ("go-on", "")
    assert judged(Health(hot=None), "battery", when_hot="pause", on_battery="slow") == ("pause", "battery")
    assert judged(Health(False, hot=None), "battery", when_hot="pause") == ("go-on", "")


@pytest.mark.parametrize(("pressure", "wanted"), [
    ("critical", "pause"), (None, "pause"), ("warning", "go-on"), ("normal", "go-on"),
])
def test_a_pause_for_memory_ends_when_it_is_no_longer_critical(pressure: Pressure | None, wanted: str):
    assert judged(Health(pressure=pressure), "memory pressure")[0] == wanted


def test_the_end_of_one_pause_may_be_the_start_of_another():
    assert judged(Health(True, 10, False), "heat", when_hot="pause") == ("pause", "battery")
    assert judged(Health(False, 10, True), "battery") == ("slow", "heat")
