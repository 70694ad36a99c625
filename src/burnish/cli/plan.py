"""`burnish plan`. No framework is imported in this process: what needs one is asked of a child."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from burnish.cli.show import print_json
from burnish.cli.show_plan import show_plan
from burnish.data.lengths import lengths
from burnish.errors import EXIT_WILL_NOT_FIT, UserError
from burnish.machine.child import ask
from burnish.machine.known import known_machine
from burnish.machine.probe import Machine, probe
from burnish.machine.rate import Rate, measured_rate, published_rate
from burnish.models.geometry import published_as, spec_of_geometry
from burnish.models.source import find_spec
from burnish.planning.duration import duration
from burnish.planning.levers import Lever, levers, room
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import Recipe, expand, is_hub_id, load
from burnish.training.environment import prepare_environment


@dataclass(frozen=True)
class Asked:
    """What else than the recipe was asked of `burnish plan`."""

    machine: str | None = None  # a machine of the table, instead of this one
    geometry: str | None = None  # a model of the table, instead of the recipe's
    measure: bool = False  # run the longest step once
    json: bool = False


def plan_command(name: str, overrides: list[str], asked: Asked) -> None:
    recipe = load(name, overrides)
    if asked.measure and (asked.machine or asked.geometry):
        raise UserError(
            "--measure runs a step of the recipe's own model on this machine",
            "leave out --machine and --model-geometry",
        )
    if asked.measure and (is_hub_id(recipe.model) or not expand(recipe.model).is_dir()):
        raise UserError(
            f"--measure needs the model itself, and {recipe.model or 'model:'} is no folder here",
            "leave out --measure to plan without it, or set model=FOLDER",
        )
    machine = known_machine(asked.machine) if asked.machine is not None else probe(Path.cwd())
    spec, source = (
        (spec_of_geometry(asked.geometry), f"the published config of {_named(asked.geometry)}")
        if asked.geometry is not None
        else find_spec(recipe)
    )
    plan = make_plan(recipe, spec, machine)  # refuses an impossible recipe before the data is read
    prepare_environment(recipe.care)  # for the children
    unread = _unread(recipe)
    if not unread:  # known lengths make a closer plan
        plan = plan.tightened(lengths(name, overrides))
    summary = plan.summary() | {"model": source or str(spec.folder), "data": unread or "read"}
    if asked.measure:  # what does not fit is not run
        measured = ask("burnish.training.measure", [name, *overrides])["measured"] if plan.fits else None
        summary |= {"measured": measured}
    summary |= _outlook(plan, asked)
    if asked.json:
        print_json(summary)
    else:
        show_plan(plan, summary)
    if not plan.fits:
        raise typer.Exit(EXIT_WILL_NOT_FIT)


def _named(geometry: str) -> str:
    model = published_as(geometry)
    return model.hub_id if model else geometry


def _unread(recipe: Recipe) -> str:
    """Why the data's lengths are not known; '': they can be. It takes the recipe's own tokenizer, whichever
    model is planned: those of one family cut alike.
    """
    model, data = recipe.model, recipe.data.train
    if not model or is_hub_id(model) or not expand(model).exists():
        return "the model's tokenizer is not here, so the data's lengths are not known"
    hub = next((d for d in (data, recipe.data.valid) if is_hub_id(d)), "")
    if hub:
        return f"{hub} is on a hub, so its lengths are not known"
    if not data or not expand(data).exists():
        return f"{data or 'data.train'} is not here, so its lengths are not known"
    return ""


def _outlook(plan: Plan, asked: Asked) -> dict[str, Any]:
    """What would fit or what room is left, and how long it takes."""
    rate = _rate(plan, asked)
    return {
        "levers": [_typed(lever) for lever in sorted(levers(plan), key=_helps)],
        "room": [_typed(lever) for lever in room(plan)],
        "time": None if rate is None else asdict(duration(plan, rate)),
        "rate": None if rate is None else asdict(rate),
        "predicted": plan.device.value in ("mps", "metal") or asked.machine is not None,
    }


def _helps(lever: Lever) -> tuple[bool, int]:
    """Those that are enough come first, in their own order; of the others, those that help most."""
    return not lever.fits, 0 if lever.fits else lever.total_bytes


def _typed(lever: Lever) -> dict[str, Any]:
    """As typed behind `burnish plan RECIPE`: a model of the table is an option, so that the data is still
    read with the recipe's own tokenizer.
    """
    words = [
        f"--model-geometry={word[len('model=') :]}" if word.startswith("model=") else word
        for word in lever.overrides
    ]
    return {**asdict(lever), "overrides": words}


def _rate(plan: Plan, asked: Asked) -> Rate | None:
    device, compute = plan.device.value, plan.compute.value
    here: Machine | None = None if asked.machine else plan.machine
    found = here and measured_rate(plan.backend.value, device, compute, here)
    return found or published_rate(plan.machine, device, compute)
