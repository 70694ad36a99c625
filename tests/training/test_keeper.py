"""The keeper and the loop: when a run waits, goes slower, and what it says of it. Readings and clocks are the
test's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from burnish.backends.base import Memory, StepStats
from burnish.data.batches import Batch
from burnish.data.prepare import Prepared
from burnish.machine.health import Health
from burnish.models.tokenizer import Tokenizer
from burnish.planning.plan import Plan
from burnish.recipe import Care
from burnish.runs.events import (
    Continued,
    Event,
    Interrupted,
    Noted,
    Paused,
    Saved,
    Stepped,
)
from burnish.runs.folder import RunFolder, State
from burnish.runs.wish import WISH, ask
from burnish.training import train as loop
from burnish.training.keeper import Keeper
from burnish.training.train import train
from tests.tiny import tiny_plan
from tests.training.test_train import part

FINE = Health(False, 90, False, "normal", 0, False)
LOW, UNPLUGGED = Health(True, 5, False, "normal"), Health(True, 80, False, "normal")
HOT, SHORT = Health(False, 90, True, "normal"), Health(False, 90, False, "critical")


class Learner:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        return StepStats(1.0, 1.0, 1.0, 1)

    def reshape(self, plan: Plan) -> None:
        self.plan = plan

    def save(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_text("")
        (folder / "optimizer.safetensors").write_text("")

    def memory(self) -> Memory:
        return Memory(1, 2, 3)


def prepared() -> Prepared:
    return Prepared("text", "", part(24), part(0), False, "", (), "none", "", 0, cast(Tokenizer, None))


@dataclass
class Watched:
    """A run whose machine is as `at` says after each of its steps, and that waits without waiting.

    then: what happens, one thing at each look of a pause (or rest); each may change the machine, or ask.
    """

    folder: Path
    plan: Plan
    care: Care
    at: dict[int, Health] = field(default_factory=dict)
    then: list[Callable[[Watched], object]] = field(default_factory=list)
    stopped: bool = False
    waits: list[float] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def run(self, on: Callable[[Watched, Event], object] = lambda *_: None) -> list[str]:
        """What it says, in short."""
        with RunFolder.begin(self.folder, self.plan.recipe) as run:
            self.keeper = Keeper(run.path, self.care, lambda: self.stopped)  # not entered: no thread looks
            self.keeper._health = self.at.get(0, FINE)
            self.keeper.wait = self._wait  # type: ignore[method-assign]
            learner: Any = Learner(self.plan)
            for event in train(learner, prepared(), run, State(), self.keeper):
                self.events.append(event)
                if isinstance(event, Stepped) and event.step in self.at:
                    self.keeper._health = self.at[event.step]
                on(self, event)
        return [short(e) for e in self.events]

    def _wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        assert len(self.waits) < 100, "it waits for ever"
        if self.then:
            self.then.pop(0)(self)

    def now(self, health: Health) -> None:
        self.keeper._health = health


def short(e: Event) -> str:
    match e:
        case Stepped():
            return f"s{e.step}"
        case Saved():
            return f"k{e.step}"
        case Paused():
            return f"paused{e.step} {e.why}"
        case Continued():
            return f"continued{e.step}"
        case Interrupted():
            return f"i{e.step}"
        case Noted():
            return e.message.split(":")[0]
    raise AssertionError(e)


def becomes(health: Health) -> Callable[[Watched], object]:
    return lambda w: w.now(health)


def asks(wish: Any) -> Callable[[Watched], object]:
    return lambda w: ask(w.folder, wish)


def same(_: Watched) -> None:
    pass


Watch = Callable[..., Watched]


@pytest.fixture
def watch(tmp_path: Path, tiny_folder: Path) -> Watch:
    settings = {"batch_size": 4, "micro_batch": 2, "max_steps": 4, "save_every": 4}
    plan = tiny_plan(tiny_folder, prepared().stats, train=settings)

    def watched(at: dict[int, Health] | None = None, then: Sequence[Any] = (), **care: Any) -> Watched:
        return Watched(tmp_path / "run", plan, Care.model_validate(care), at or {}, list(then))

    return watched


# --- pauses


def test_a_machine_that_is_well_is_let_be(watch: Watch) -> None:
    w = watch({0: FINE})
    assert w.run() == ["s1", "s2", "s3", "s4", "k4"] and not w.waits


@pytest.mark.parametrize(
    ("bad", "care", "why"),
    [
        (LOW, {}, "battery"), (UNPLUGGED, {"on_battery": "pause"}, "battery"),
        (HOT, {"when_hot": "pause"}, "heat"), (SHORT, {}, "memory pressure"),
    ],
)  # fmt: skip
def test_it_waits_with_a_checkpoint_until_it_is_better(
    bad: Health, care: dict[str, Any], why: str, watch: Watch
) -> None:
    w = watch({2: bad}, [same, same, becomes(FINE)], **care)
    assert w.run() == ["s1", "s2", "k2", f"paused2 {why}", "continued2", "s3", "s4", "k4"]
    assert len(w.waits) == 3 and all(0 < s <= 5 for s in w.waits)
    (paused,) = [e for e in w.events if isinstance(e, Paused)]
    assert paused.words


@pytest.mark.parametrize(
    ("bad", "care"),
    [
        (LOW, {"min_battery": 0}), (UNPLUGGED, {}), (HOT, {"when_hot": "go-on"}),
        (SHORT, {"under_pressure": "go-on"}),
    ],
)  # fmt: skip
def test_where_the_recipe_says_so_it_goes_on(bad: Health, care: dict[str, Any], watch: Watch) -> None:
    w = watch({0: bad}, **care)
    assert w.run() == ["s1", "s2", "s3", "s4", "k4"] and not w.waits


def test_before_the_first_step_there_is_nothing_to_save(watch: Watch) -> None:
    w = watch({0: LOW}, [becomes(FINE)])
    assert w.run() == ["paused0 battery", "continued0", "s1", "s2", "s3", "s4", "k4"]


def test_what_was_just_saved_is_not_saved_twice(watch: Watch) -> None:
    w = watch({2: SHORT}, [becomes(FINE)])
    train_ = w.plan.recipe.train.model_copy(update={"save_every": 2})
    w.plan = replace(w.plan, recipe=w.plan.recipe.model_copy(update={"train": train_}))
    assert w.run() == ["s1", "s2", "k2", "paused2 memory pressure", "continued2", "s3", "s4", "k4"]


def test_it_wants_better_than_what_paused_it(watch: Watch) -> None:
    """A charge that wavers around the mark does not pause and go on by turns."""
    w = watch({1: Health(True, 19)}, [becomes(Health(True, p)) for p in (20, 19, 21, 24, 25)])
    assert w.run() == ["s1", "k1", "paused1 battery", "continued1", "s2", "s3", "s4", "k4"]
    assert len(w.waits) == 5


def test_a_reading_that_fails_ends_no_pause(watch: Watch) -> None:
    for bad, care in ((LOW, {}), (SHORT, {}), (HOT, {"when_hot": "pause"})):
        w = watch({1: bad}, [becomes(Health()), becomes(Health()), becomes(FINE)], **care)
        w.folder = w.folder.with_name(f"run-{bad.hot}-{bad.pressure}")
        assert w.run()[2].startswith("paused1") and len(w.waits) == 3


def test_another_reason_is_told_in_the_same_pause(watch: Watch) -> None:
    w = watch({1: SHORT}, [becomes(LOW), same, becomes(FINE)])
    assert w.run() == [
        "s1",
        "k1",
        "paused1 memory pressure",
        "paused1 battery",
        "continued1",
        "s2",
        "s3",
        "s4",
        "k4",
    ]


def test_a_machine_that_is_well_again_by_the_time_it_is_saved(watch: Watch) -> None:
    """A pause that was none is not said to be over."""
    w = watch({2: LOW})
    said = w.run(lambda w, e: w.now(FINE) if isinstance(e, Saved) else None)
    assert said == ["s1", "s2", "k2", "s3", "s4", "k4"]


def test_it_may_pause_again_and_again(watch: Watch) -> None:
    w = watch({1: SHORT, 3: LOW}, [becomes(FINE), becomes(FINE)])
    assert w.run() == ["s1", "k1", "paused1 memory pressure", "continued1", "s2", "s3", "k3",
                       "paused3 battery", "continued3", "s4", "k4"]  # fmt: skip


def test_at_the_end_nothing_waits(watch: Watch) -> None:
    w = watch({4: LOW})
    assert w.run() == ["s1", "s2", "s3", "s4", "k4"] and not w.waits


def test_a_pause_tells_how_long_it_was(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 160.0])
    w = watch({1: LOW}, [becomes(FINE)])
    real = time.monotonic
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock, real()))
    w.run()
    (continued,) = [e for e in w.events if isinstance(e, Continued)]
    assert continued.seconds == 60


# --- to stop in a pause


def stops(w: Watched) -> None:
    w.stopped = True


@pytest.mark.parametrize("how", [stops, asks("stop")])
def test_a_paused_run_can_be_stopped(how: Callable[[Watched], object], watch: Watch) -> None:
    w = watch({2: LOW}, [same, how])
    said = w.run()
    assert said[:4] == ["s1", "s2", "k2", "paused2 battery"] and said[-1] == "i2"
    assert said.count("k2") == 1 and "s3" not in said


def test_to_stop_and_to_pause_at_once_is_to_stop(watch: Watch) -> None:
    w = watch()

    def on(w: Watched, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 2:
            ask(w.folder, "pause")
            w.stopped = True

    assert w.run(on) == ["s1", "s2", "k2", "i2"]


# --- what others wish for


def at_step(step: int, wish: Any) -> Callable[[Watched, Event], object]:
    def on(w: Watched, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == step:
            (w.folder / WISH).write_text(wish)

    return on


def test_pause_and_resume_from_another_terminal(watch: Watch) -> None:
    w = watch(then=[same, same, asks("")])
    assert w.run(at_step(1, "pause\n")) == ["s1", "k1", "paused1 asked", "continued1", "s2", "s3", "s4", "k4"]
    assert len(w.waits) == 3


def test_stop_from_another_terminal(watch: Watch) -> None:
    assert watch().run(at_step(3, "stop\n")) == ["s1", "s2", "s3", "k3", "i3"]


@pytest.mark.parametrize("wish", ["", "\n", "paused", "PAUSE", "stop it", "\x00", "pause stop"])
def test_another_word_is_no_wish(wish: str, watch: Watch) -> None:
    w = watch()
    assert w.run(at_step(1, wish)) == ["s1", "s2", "s3", "s4", "k4"] and not w.waits


def test_asked_to_pause_while_it_is_paused(watch: Watch) -> None:
    """And asked to go on: the battery still holds it."""
    w = watch({1: LOW}, [asks("pause"), asks(""), same, becomes(FINE)])
    assert w.run() == ["s1", "k1", "paused1 battery", "paused1 asked", "paused1 battery", "continued1",
                       "s2", "s3", "s4", "k4"]  # fmt: skip


# --- slowly


@pytest.mark.parametrize(("bad", "care"), [(HOT, {}), (UNPLUGGED, {"on_battery": "slow"})])
def test_at_half_speed_it_rests_as_long_as_it_worked(bad: Health, care: dict[str, Any], watch: Watch) -> None:
    w = watch({1: bad, 3: FINE}, **care)
    assert w.run() == ["s1", "at half speed", "s2", "s3", "at full speed again", "s4", "k4"]
    seconds = {e.step: e.seconds for e in w.events if isinstance(e, Stepped)}
    assert w.waits == [seconds[1], seconds[2]]
    assert next(e for e in w.events if isinstance(e, Noted)).message.split(": ")[1], "and why"


def test_a_battery_that_runs_down_is_told_once_while_slow(watch: Watch) -> None:
    """Its words change with each percent."""
    at = {n: Health(True, 80 - n) for n in range(5)}
    w = watch(at, on_battery="slow")
    w.run()
    assert len([e for e in w.events if isinstance(e, Noted)]) == 1 and len(w.waits) == 4


def test_it_rests_no_longer_than_until_it_is_to_stop(tmp_path: Path) -> None:
    stopped = iter([False, True])
    keeper = Keeper(tmp_path, Care(), lambda: next(stopped, True))
    keeper.wait(3600)  # else this test does not end


# --- the thread


class Reading:
    """Healths one after the other, the last for ever; an error is raised."""

    def __init__(self, *found: Health | Exception) -> None:
        self.found, self.n = list(found), 0
        self.seen = threading.Semaphore(0)

    def __call__(self) -> Health:
        now = self.found[min(self.n, len(self.found) - 1)]
        self.n += 1
        self.seen.release()
        if isinstance(now, Exception):
            raise now
        return now


def settled(keeper: Keeper, action: str) -> bool:
    for _ in range(2000):
        if keeper.verdict().action == action:
            return True
        time.sleep(0.005)
    return False


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "keeper"]


def test_its_thread_looks_again_and_again_and_ends(tmp_path: Path) -> None:
    read = Reading(FINE, SHORT, FINE)
    with Keeper(tmp_path, Care(), lambda: False, read, look_s=0.01) as keeper:
        assert len(threads()) == 1
        for _ in range(10):
            assert read.seen.acquire(timeout=30)
        assert settled(keeper, "go-on")
    assert threads() == []


def test_what_it_reads_is_what_it_says(tmp_path: Path) -> None:
    with Keeper(tmp_path, Care(), lambda: False, Reading(SHORT), look_s=0.01) as keeper:
        assert settled(keeper, "pause") and keeper.verdict().why == "memory pressure"


def test_the_machine_is_looked_at_before_the_first_step(tmp_path: Path) -> None:
    """Twenty seconds are many steps of a small model, on a battery of 3 %."""
    read = Reading(LOW)
    with Keeper(tmp_path, Care(), lambda: False, read) as keeper:
        assert settled(keeper, "pause")


def test_nobody_looks_where_nothing_is_heeded(tmp_path: Path) -> None:
    care = Care(on_battery="go-on", min_battery=0, when_hot="go-on", under_pressure="go-on")
    with Keeper(tmp_path, care, lambda: False, Reading(LOW), look_s=0.001) as keeper:
        assert threads() == [] and keeper.verdict().action == "go-on"
        ask(tmp_path, "pause")
        assert keeper.verdict().action == "pause", "a wish is heeded all the same"


def test_a_reading_that_breaks_does_not_end_the_looking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    read = Reading(SHORT, ValueError("a format that nobody knew"), FINE)
    with Keeper(tmp_path, Care(), lambda: False, read, look_s=0.01) as keeper:
        assert all(read.seen.acquire(timeout=5) for _ in range(3)), "the run would stay paused for ever"
        assert settled(keeper, "go-on")


def test_a_tool_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    let_go, began = threading.Event(), threading.Event()

    def hang() -> Health:
        began.set()
        let_go.wait(60)
        return FINE

    with Keeper(tmp_path, Care(), lambda: False, hang, look_s=0.01) as keeper:
        assert began.wait(30)
        assert keeper.verdict().action == "go-on", "and no step waits for it"
    assert threads() == ["keeper"], "it was left behind"
    let_go.set()
