"""`burnish train`, and `burnish resume` where nothing trains."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import typer

from burnish.cli.show import JsonView, TrainView
from burnish.errors import EXIT_INTERRUPTED, UserError
from burnish.recipe import expand, load
from burnish.report.run_facts import run_facts
from burnish.report.run_page import check_target, write_run_page
from burnish.runs.events import Event, Interrupted, Planned, Scored
from burnish.training.interrupt import interruptible
from burnish.training.orders import Orders
from burnish.training.post_mortem import with_post_mortem
from burnish.training.supervise import supervise


def train_command(
    name: str,
    overrides: list[str],
    out: Path | None,
    resume: bool,
    skip_before: bool,
    in_process: bool,
    json: bool,
) -> None:
    recipe = load(name, overrides)
    folder = expand(str(out)) if out is not None else expand(f"runs/{recipe.name}")
    train_orders(Orders(recipe, folder, resume, skip_before, command=tuple(sys.argv)), in_process, json)


def train_orders(orders: Orders, in_process: bool, json: bool) -> None:
    scores: dict[str, Scored] = {}
    interrupted, begun, unheard = False, False, False
    log_every = orders.recipe.train.log_every
    try:
        with interruptible() as wished, JsonView() if json else TrainView(log_every) as view:

            def stop() -> bool:
                return wished() or unheard

            events = _here(orders, stop) if in_process else supervise(orders, stop, insisted=wished.insisted)
            for event in with_post_mortem(events, orders.out):
                try:
                    view.hear(event)
                except OSError as e:  # whoever read our output is gone, or there is no room for it
                    unheard = True
                    _to_nowhere(1)
                    with suppress(OSError):
                        print(f"burnish: nothing can be printed ({e}); saving and ending", file=sys.stderr)
                if wished.terminal_gone and not unheard:
                    unheard = True
                    _to_nowhere(1, 2)
                begun = begun or isinstance(event, Planned)
                interrupted = interrupted or isinstance(event, Interrupted)
                if isinstance(event, Scored):
                    scores[event.when] = event
    finally:
        page = _page(orders.out) if begun else None
    if page is not None and not json:
        print(f"report: {page}", flush=True)
    if interrupted or stop():
        raise typer.Exit(EXIT_INTERRUPTED)
    if len(scores) == 2 and not json:
        before, after = scores["before"], scores["after"]
        task = after.task.replace("-", " ")
        print(f"held-out {task}: before {before.percent:.1f} %, after {after.percent:.1f} %", flush=True)


def _page(out: Path) -> Path | None:
    """report.html of a run that has ended, however it did. None where it cannot be written: whatever keeps it
    from that, such as a full disk, has been said.
    """
    page = out / "report.html"
    try:
        check_target(page)
        write_run_page(page, run_facts(out))
    except UserError:
        return None
    return page


def _to_nowhere(*descriptors: int) -> None:
    """What is printed there from now on fails no more, not even at the interpreter's end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)


def _here(orders: Orders, stop: Callable[[], bool]) -> Iterator[Event]:
    """In this very process: for debuggers, and for whoever supervises by other means."""
    from burnish.training.environment import prepare_environment
    from burnish.training.job import run_job

    prepare_environment(orders.recipe.care)
    return run_job(
        orders.recipe, orders.out, resume=orders.resume, skip_before=orders.skip_before, stop=stop
    )
