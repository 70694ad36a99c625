"""`burnish train`"""

from __future__ import annotations

from pathlib import Path

import typer

from burnish.cli.show import JsonView, TrainView
from burnish.errors import EXIT_INTERRUPTED
from burnish.recipe import expand, load
from burnish.runs.events import Interrupted, Scored
from burnish.training.environment import prepare_environment
from burnish.training.interrupt import interruptible
from burnish.training.job import run_job


def train_command(
    name: str, overrides: list[str], out: Path | None, resume: bool, skip_before: bool, json: bool
) -> None:
    recipe = load(name, overrides)
    folder = expand(str(out)) if out is not None else expand(f"runs/{recipe.name}")
    prepare_environment()
    scores: dict[str, Scored] = {}
    interrupted = False
    with interruptible() as stop, JsonView() if json else TrainView(recipe.train.log_every) as view:
        for event in run_job(recipe, folder, resume=resume, skip_before=skip_before, stop=stop):
            view.hear(event)
            interrupted = interrupted or isinstance(event, Interrupted)
            if isinstance(event, Scored):
                scores[event.when] = event
    if interrupted or stop():
        raise typer.Exit(EXIT_INTERRUPTED)
    if len(scores) == 2 and not json:
        before, after = scores["before"], scores["after"]
        task = after.task.replace("-", " ")
        print(f"held-out {task}: before {before.percent:.1f} %, after {after.percent:.1f} %", flush=True)
