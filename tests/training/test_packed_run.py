"""A packed run, stopped and resumed, leaves what the untouched run leaves, in the layout it began with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.recipe import Recipe, load
from burnish.runs.events import Stepped
from burnish.training import job
from burnish.training.job import run_job
from tests.world import World

ROWS = [{"prompt": f"question {i}", "completion": "answer " * (1 + i % 4)} for i in range(30)]


def recipe(world: World, *overrides: str) -> Recipe:
    world.rows(ROWS)
    fixed = [
        "backend=reference",
        "train.pack=true",
        "train.batch_size=4",
        "train.max_steps=null",
        "train.epochs=2",
    ]
    fixed += [f"data.train={world.root / 'data.jsonl'}", "data.valid_share=0.1", "train.eval_every=5"]
    return load(str(world.root / "recipe.yaml"), [*fixed, *overrides])


def run(asked: Recipe, out: Path, resume: bool = False, upto: int = 99) -> list[Stepped]:
    """Steps until `upto`, as a person who interrupts sees them."""
    steps: list[Stepped] = []
    stop: Callable[[], bool] = lambda: bool(steps) and steps[-1].step >= upto  # noqa: E731
    for event in run_job(asked, out, resume=resume, skip_before=True, stop=stop):
        if isinstance(event, Stepped):
            steps.append(event)
    return steps


def choices(out: Path) -> dict[str, Any]:
    found = json.loads((out / "plan.json").read_text("utf-8"))["choices"]
    return {k: c["value"] for k, c in found.items()}


def test_stopped_and_resumed_it_leaves_the_same_bytes(world: World) -> None:
    asked, (a, b) = recipe(world), (world.root / "whole", world.root / "twice")
    whole = run(asked, a)
    first = run(asked, b, upto=5)
    rest = run(asked, b, resume=True)
    assert [s.step for s in first] == [1, 2, 3, 4, 5] and rest[0].step == 6
    assert [(s.step, s.loss) for s in whole] == [(s.step, s.loss) for s in (*first, *rest)]
    adapters = [(out / "adapter" / "adapter_model.safetensors").read_bytes() for out in (a, b)]
    assert adapters[0] == adapters[1]
    assert choices(a)["pack"] is True and len(whole) == 14


def test_packed_steps_hold_other_examples_than_unpacked_ones_in_as_many_steps(world: World) -> None:
    packed = run(recipe(world), world.root / "a")
    single = run(recipe(world, "train.pack=false"), world.root / "b")
    assert len(packed) == len(single)
    assert sum(s.tokens for s in packed) == sum(s.tokens for s in single)
    assert [s.tokens for s in packed] != [s.tokens for s in single]


def test_a_resumed_run_keeps_the_layout_it_began_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, out = recipe(world), world.root / "out"
    run(asked, out, upto=3)
    began = choices(out)
    gather = job.gather

    def elsewhere(recipe: Recipe, near: Path) -> job.Material:
        """What would be planned were memory another."""
        found = gather(recipe, near)
        wider = replace(found.plan.row_length, value=found.plan.row_length.value + 64)
        return replace(found, plan=replace(found.plan, row_length=wider))

    monkeypatch.setattr(job, "gather", elsewhere)
    run(asked, out, resume=True, upto=5)
    layout = ("pack", "row_length", "lengths", "micro_batch")
    assert [choices(out)[name] for name in layout] == [began[name] for name in layout]


def test_a_plan_without_a_layout_is_another_versions(world: World) -> None:
    asked, out = recipe(world), world.root / "out"
    run(asked, out, upto=3)
    plan = json.loads((out / "plan.json").read_text("utf-8"))
    del plan["choices"]["row_length"]
    (out / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    with pytest.raises(UserError, match=r"begun by another version of burnish: .* has no row_length"):
        run(asked, out, resume=True)
