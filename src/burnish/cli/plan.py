"""`burnish plan`"""

from __future__ import annotations

from pathlib import Path

import typer

from burnish.cli.show import choices_table, console, memory_table, print_json, verdict
from burnish.data.prepare import prepare
from burnish.errors import EXIT_WILL_NOT_FIT
from burnish.machine.probe import probe
from burnish.models.spec import spec_of
from burnish.models.tokenizer import load_tokenizer
from burnish.planning.plan import make_plan
from burnish.recipe import expand, load
from burnish.training.environment import prepare_environment


def plan_command(name: str, overrides: list[str], json: bool) -> None:
    recipe = load(name, overrides)
    spec = spec_of(recipe)
    plan = make_plan(recipe, spec, probe(Path.cwd()))
    if recipe.data.train and expand(recipe.data.train).is_file():  # known lengths make a closer plan
        prepare_environment()
        tokenizer = load_tokenizer(spec.folder, recipe.trust_remote_code)
        plan = plan.tightened(prepare(recipe, tokenizer).stats)
    summary = plan.summary()
    if json:
        print_json(summary)
    else:
        out = console()
        out.print(choices_table(summary["choices"]))
        out.print()
        out.print(memory_table(summary))
        out.print(f"\n{verdict(summary)}")
    if not plan.fits:
        raise typer.Exit(EXIT_WILL_NOT_FIT)
