"""Events to experiment trackers: TensorBoard, Weights & Biases, SwanLab, MLflow, Trackio. Each is an extra.

A tracker hears numbers (losses, rates, scores) with their step and nothing else: no text of the data leaves
the run.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.errors import UserError
from burnish.recipe import Recipe
from burnish.runs.events import Event, Scored, Stepped, Validated

_MODULES = {"tensorboard": "tensorboardX"}  # where the module is not named like the tracker

Log = Callable[[Mapping[str, float], int], None]


@dataclass(frozen=True)
class Tracker:
    log: Log
    close: Callable[[], None]


class Trackers:
    """Owns the open trackers of a run."""

    def __init__(self, trackers: list[Tracker], log_every: int) -> None:
        self._trackers, self._log_every, self._step = trackers, log_every, 0

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in self._trackers:
            tracker.close()

    def hear(self, event: Event) -> None:
        numbers = self._numbers(event)
        for tracker in self._trackers if numbers else ():
            tracker.log(numbers, self._step)

    def _numbers(self, event: Event) -> dict[str, float]:
        if isinstance(event, Stepped):
            self._step = event.step
            if event.step % self._log_every and event.step != event.steps:
                return {}
            return {
                "train/loss": event.loss,
                "train/lr": event.lr,
                "train/grad_norm": event.grad_norm,
                "train/tokens_per_second": event.tokens / event.seconds,
                "train/peak_bytes": float(event.peak_bytes),
            }
        if isinstance(event, Validated):
            return {"valid/loss": event.loss, "valid/accuracy": event.accuracy}
        if isinstance(event, Scored):
            return {f"{event.task}/{event.when}": event.percent}
        return {}


def check_trackers(recipe: Recipe) -> None:
    """Raises UserError naming the extra where a tracker of the recipe is not installed."""
    for name in recipe.trackers:
        _module(name, _MODULES.get(name, name))


def open_trackers(recipe: Recipe, out: Path) -> Trackers:
    """Trackers keep records of their own from here on. Raises UserError as `check_trackers` does."""
    config = recipe.model_dump(mode="json")
    return Trackers(
        [_OPEN[name](recipe.name, config, out) for name in recipe.trackers], recipe.train.log_every
    )


def _module(tracker: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise UserError(
            f"trackers: {tracker} needs the package {e.name}, which is not installed",
            f"pip install 'burnish[{tracker}]', or take {tracker} out of `trackers`",
        ) from e


def _like_wandb(tracker: str) -> Callable[[str, Mapping[str, Any], Path], Tracker]:
    """wandb, swanlab and trackio share one interface: init, log, finish."""

    def start(name: str, config: Mapping[str, Any], out: Path) -> Tracker:
        module = _module(tracker, tracker)
        module.init(project="burnish", name=name, config=dict(config))
        return Tracker(lambda numbers, step: module.log(dict(numbers), step=step), module.finish)

    return start


def _mlflow(name: str, config: Mapping[str, Any], out: Path) -> Tracker:
    module = _module("mlflow", "mlflow")
    module.set_experiment("burnish")
    module.start_run(run_name=name)
    module.log_dict(dict(config), "recipe.json")
    return Tracker(lambda numbers, step: module.log_metrics(dict(numbers), step=step), module.end_run)


def _tensorboard(name: str, config: Mapping[str, Any], out: Path) -> Tracker:
    writer = _module("tensorboard", _MODULES["tensorboard"]).SummaryWriter(str(out / "tensorboard"))

    def log(numbers: Mapping[str, float], step: int) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Tracker(log, writer.close)


_OPEN: dict[str, Callable[[str, Mapping[str, Any], Path], Tracker]] = {
    "wandb": _like_wandb("wandb"),
    "swanlab": _like_wandb("swanlab"),
    "trackio": _like_wandb("trackio"),
    "mlflow": _mlflow,
    "tensorboard": _tensorboard,
}
