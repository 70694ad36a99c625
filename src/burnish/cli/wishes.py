"""`burnish pause`, `resume` and `stop`: from another terminal than the run's."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from shlex import quote

from burnish.cli.show import console
from burnish.cli.train import train_orders
from burnish.errors import UserError
from burnish.recipe import expand, load
from burnish.report.page import json_of
from burnish.report.run_facts import check_run, run_facts
from burnish.runs.lock import LOCK, in_use
from burnish.runs.wish import ask, wished
from burnish.training.orders import Orders

WAIT_S, LOOK_S = 10.0, 0.2


def pause_command(run: str) -> None:
    folder = expand(run)
    _check_running(run)
    ask(folder, "pause")
    console().print(
        f"{run} pauses after the step in hand (not while it answers, nor after its last step), with a "
        "checkpoint; its memory stays taken\n"
        f"  burnish resume {quote(run)}   goes on, burnish stop {quote(run)}   ends it"
    )


def stop_command(run: str) -> None:
    folder = expand(run)
    _check_running(run)
    ask(folder, "stop")
    end = time.monotonic() + WAIT_S
    while in_use(folder / LOCK) and time.monotonic() < end:
        time.sleep(LOOK_S)
    if in_use(folder / LOCK):
        console().print(f"{run} will end after the step in hand, with a checkpoint")
        return
    told = run_facts(folder)
    console().print(f"{run}: {told['verdict']}")
    for step in told["next"]:
        console().print(f"  {step['command']}   {step['what']}")


def resume_command(run: str, json: bool) -> None:
    """A run that waits goes on in its own terminal; one that has ended goes on in this one."""
    folder = expand(run)
    check_run(folder)
    if in_use(folder / LOCK):
        if wished(folder) != "pause":
            waits = run_facts(folder)["state"]["paused_for"]
            words = f"waits by itself ({waits}) and goes on after that" if waits else "goes on already"
            raise UserError(f"{run} {words}", f"burnish report {quote(run)}   tells how far it is")
        ask(folder, "")
        console().print(f"{run} goes on in its own terminal")
        return
    if run_facts(folder)["state"]["kind"] == "finished":
        raise UserError(f"{run} has finished", f"burnish generate {quote(run)}   asks it something")
    recipe, begun_in = load(str(folder / "recipe.yaml")), _begun_in(folder)
    if begun_in:
        os.chdir(begun_in)  # the recipe's own paths may be relative
    orders = Orders(recipe, folder, resume=True, skip_before=False, command=tuple(sys.argv))
    train_orders(orders, in_process=False, json=json)


def _begun_in(folder: Path) -> str:
    told = json_of(folder / "environment.json").get("folder")
    return told if isinstance(told, str) and os.path.isdir(told) else ""


def _check_running(run: str) -> None:
    folder = expand(run)
    check_run(folder)
    if not in_use(folder / LOCK):
        hint = f"burnish report {quote(run)}   tells what became of it"
        raise UserError(f"nothing trains in {run} now", hint)
