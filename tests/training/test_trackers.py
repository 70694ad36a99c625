"""Trackers hear numbers and their steps, and nothing that stands in the data. Their libraries are doubles."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.recipe import Recipe
from burnish.runs.events import Answered, Event, Noted, Saved, Scored, Stepped, Validated
from burnish.training.trackers import check_trackers, open_trackers
from tests.world import World

NAMES = ("tensorboard", "wandb", "swanlab", "mlflow", "trackio")
SECRET = "the patient's name"


def stepped(step: int) -> Stepped:
    return Stepped(step, 7, 0.5, 1.5, 0.1, 2.0, 30, 20.0, 0.25, 100, 200)


EVENTS: list[Event] = [
    Answered("before", SECRET, SECRET, "stop", "", ""), Scored("before", "exact-match", 1, 4),
    *(stepped(i) for i in range(1, 5)), Validated(4, 1.25, 0.5, 20.0, True), Saved(4, SECRET), Noted(SECRET),
    *(stepped(i) for i in range(5, 8)), Answered("after", SECRET, SECRET, "stop", "", ""),
    Scored("after", "exact-match", 3, 4),
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every call of every double: (tracker, function, arguments…)."""
    heard: list[tuple[Any, ...]] = []

    def double(tracker: str, *functions: str) -> Any:
        def hearing(function: str) -> Any:
            return lambda *args, **kwargs: heard.append((tracker, function, *args, *kwargs.items()))

        return SimpleNamespace(**{f: hearing(f) for f in functions})

    for name in ("wandb", "swanlab", "trackio"):
        monkeypatch.setitem(sys.modules, name, double(name, "init", "log", "finish"))
    mlflow = double("mlflow", "set_experiment", "start_run", "log_dict", "log_metrics", "end_run")
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)

    def writer(folder: str) -> Any:
        heard.append(("tensorboard", "SummaryWriter", folder))
        return double("tensorboard", "add_scalar", "flush", "close")

    module = ModuleType("tensorboardX")
    module.SummaryWriter = writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    return heard


def hear(tracker: str, log_every: int = 1) -> None:
    recipe = Recipe.model_validate({"name": "r", "trackers": [tracker], "train": {"log_every": log_every}})
    with open_trackers(recipe, Path("out")) as trackers:
        for event in EVENTS:
            trackers.hear(event)


def numbers(calls: list[tuple[Any, ...]], tracker: str) -> list[tuple[int, dict[str, float]]]:
    """What a tracker was told, step by step, however its library wants to hear it."""
    told: list[tuple[int, dict[str, float]]] = []
    for call in calls:
        if call[:2] in ((tracker, "log"), (tracker, "log_metrics")):
            told.append((dict(call[3:])["step"], call[2]))
        elif call[:2] == (tracker, "add_scalar"):
            told.append((call[4], {call[2]: call[3]}))
    return told


@pytest.mark.parametrize("tracker", NAMES)
def test_numbers_reach_every_tracker(calls: list[tuple[Any, ...]], tracker: str):
    hear(tracker)
    told = numbers(calls, tracker)
    by_step: dict[int, dict[str, float]] = {}
    for step, values in told:
        by_step.setdefault(step, {}).update(values)
    assert sorted(by_step) == list(range(8))
    assert by_step[0] == {"exact-match/before": 25.0}
    assert by_step[4] == {
        "train/loss": 1.5, "train/lr": 0.1, "train/grad_norm": 2.0, "train/tokens_per_second": 120.0,
        "train/peak_bytes": 200.0, "valid/loss": 1.25, "valid/accuracy": 0.5,
    }  # fmt: skip
    assert by_step[7]["exact-match/after"] == 75.0
    assert all(isinstance(v, float) for _, values in told for v in values.values())


@pytest.mark.parametrize("tracker", NAMES)
def test_no_text_of_the_data_leaves(calls: list[tuple[Any, ...]], tracker: str):
    hear(tracker)
    assert calls and SECRET not in repr(calls)


@pytest.mark.parametrize("tracker", NAMES)
def test_trackers_are_closed(calls: list[tuple[Any, ...]], tracker: str):
    hear(tracker)
    assert calls[-1][1] in ("finish", "end_run", "close")


def test_the_recipe_and_the_run_are_named(calls: list[tuple[Any, ...]]):
    for name in NAMES:
        hear(name)
    starts = {c[0]: c for c in calls if c[1] in ("init", "start_run", "SummaryWriter")}
    for name in ("wandb", "swanlab", "trackio"):
        start = dict(starts[name][2:])
        assert (start["project"], start["name"]) == ("burnish", "r")
        assert start["config"]["trackers"] == [name]
    assert starts["mlflow"][2:] == (("run_name", "r"),)
    assert starts["tensorboard"][2] == str(Path("out/tensorboard"))


@pytest.mark.parametrize(("log_every", "steps"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (100, [7])])
def test_log_every(calls: list[tuple[Any, ...]], log_every: int, steps: list[int]):
    """And always the last; validations and scores are never left out."""
    hear("wandb", log_every)
    told = numbers(calls, "wandb")
    assert [step for step, values in told if "train/loss" in values] == steps
    assert [step for step, values in told if "valid/loss" in values] == [4]
    assert [step for step, values in told if "exact-match/after" in values] == [7]


def test_one_that_is_not_installed_is_said_before_another_is_opened(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    recipe = Recipe(trackers=("wandb", "swanlab"))
    with pytest.raises(UserError, match="swanlab needs the package swanlab, which is not installed"):
        check_trackers(recipe)
    assert calls == []


def test_a_run_that_is_refused_opens_no_tracker(calls: list[tuple[Any, ...]], world: World):
    world.recipe(trackers=["wandb", "tensorboard"])
    said = world.train()
    assert said.code == 0, said.err
    assert numbers(calls, "wandb") and numbers(calls, "tensorboard")
    calls.clear()
    assert world.train().code == 2  # the folder is taken
    assert calls == []
