"""docs/WHAT-FITS.md is what bench/what_fits.py renders now, and says nothing that is known to be wrong.

The golden changes with the memory arithmetic; what stands under it must hold whatever the constants are.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from burnish.machine.known import GIB, KNOWN
from burnish.models.geometry import spec_of_geometry
from burnish.planning.levers import levers
from burnish.planning.memory import ELEMENT_BYTES
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import dump, load, parse, shipped

ROOT = Path(__file__).parents[2]
MACS = [name for name, machine in KNOWN.items() if machine.system == "Darwin"]
EVERY = [(recipe, machine) for recipe in shipped() for machine in KNOWN]


@cache
def script() -> ModuleType:
    """bench/ is a folder of scripts, not a package."""
    spec = importlib.util.spec_from_file_location("what_fits", ROOT / "bench" / "what_fits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@cache
def page() -> str:
    return script().render()


def outlook(recipe: str, machine: str) -> Any:
    return script().outlook(recipe, machine)


def planned(recipe: str, machine: str, *overrides: str) -> Plan:
    return script().plan_of(recipe, machine, overrides)


def weights(plan: Plan) -> int:
    return next(p.n_bytes for p in plan.estimate if p.name == "weights")


# ---- the page


def test_the_committed_page_is_what_the_planner_says_now() -> None:
    there = script().PAGE.read_text(encoding="utf-8") if script().PAGE.is_file() else ""
    if there != page():
        old, new = there.splitlines(), page().splitlines()
        lines = [f"- {line}" for line in old if line not in new] + [
            f"+ {line}" for line in new if line not in old
        ]
        pytest.fail("\n".join(["docs/WHAT-FITS.md is not what the planner says now:", *lines[:30],
                               f"to refresh it: {script().COMMAND}"]), pytrace=False)  # fmt: skip


def test_its_first_line_says_what_makes_it_and_it_names_neither_day_nor_folder() -> None:
    assert script().COMMAND in page().splitlines()[0]
    assert not re.search(r"\b20\d\d-\d\d|/(home|root|Users|work|tmp)/|~/", page())


def test_whatever_it_says_of_a_mac_is_called_predicted() -> None:
    rows = [line for line in page().splitlines() if any(f"| {m} |" in line for m in MACS)]
    assert len(rows) >= len(shipped()) * len(MACS)
    for row in rows:
        cells = [cell for cell in row.split("|") if re.search(r"\d of \d+\.", cell)]
        assert cells or "| nothing |" in row, row
        assert all("predicted" in cell for cell in cells), row


def test_every_recipe_has_a_row_for_every_machine() -> None:
    sections = re.split(r"^## ", page(), flags=re.MULTILINE)[1:]
    assert [s.split("\n")[0] for s in sections] == [*shipped(), "The guide's tiers"]
    for section in sections[:-1]:
        assert re.findall(r"^\| ([\w-]+) \| (?:no|\*\*)", section, re.MULTILINE) == list(KNOWN)


def test_the_tiers_are_those_of_the_guide() -> None:
    """Its table: 32 GB, 1024-1536 tokens, batch 1, 8-16 passes, rank 8, attention only; and so on."""
    said = {t.name: (t.lengths, t.rows, t.passes, t.rank, t.targets) for t in script().TIERS}
    assert said == {
        "32 GB": ((1024, 1536), (1, 1), (8, 16), 8, "attention"),
        "64 GB": ((2048, 2048), (1, 1), (4, 8), 16, "attention+mlp"),
        "96 GB+": ((2048, 3072), (1, 2), (4, 4), 32, "attention+mlp"),
    }
    for tier in script().TIERS:
        for machine in tier.machines:
            gb = KNOWN[machine].ram_bytes // GIB
            assert gb == int(tier.name.split()[0]) or (tier.name.endswith("+") and gb > 96)
        for end in (0, 1):
            train = load("medical-r1-14b", tier.settings(end)).train
            assert isinstance(train.micro_batch, int)
            assert train.batch_size == train.micro_batch * tier.passes[end]


# ---- what must hold whatever the constants are


def test_the_guides_14b_in_float32_is_59_gb_and_no_32_gb_mac_holds_it() -> None:
    for machine in ("m1-max-32gb", "m2-pro-32gb"):
        for tier in script().TIERS:
            plan = planned("medical-r1-14b", machine, *tier.settings(0), *script().GUIDE_MPS)
            assert weights(plan) == 4 * plan.spec.parameters
            assert weights(plan) / 1e9 == pytest.approx(59, abs=0.5)
            assert not plan.fits and script().verdict(plan) == "no"


def test_nor_does_a_64_gb_mac_which_the_guide_recommends() -> None:
    """55 GiB of weights, and Metal gives three quarters of 64."""
    plan = planned("medical-r1-14b", "m3-max-64gb", *script().GUIDE_MPS)
    assert weights(plan) > plan.budget.value


def test_14b_in_4_bits_on_mlx_fits_an_m2_pro_with_32_gb() -> None:
    plan = planned("medical-r1-14b", "m2-pro-32gb", "quantize=4bit")
    assert (plan.backend.value, plan.device.value, plan.compute.value) == ("mlx", "metal", "float32")
    assert plan.fits and weights(plan) < planned("medical-r1-14b", "m2-pro-32gb").budget.value / 2


def test_nothing_of_14b_in_bfloat16_fits_an_m1_with_8_gb() -> None:
    small = ("train.max_length=64", "train.batch_size=1", "lora.rank=1", "lora.last_layers=1")
    for way in ("backend=mlx", "backend=torch", "device=cpu"):
        plan = planned("medical-r1-14b", "m1-8gb", way, "dtype=bfloat16", *small)
        assert weights(plan) == 2 * plan.spec.parameters
        assert not plan.fits


def test_mistral_fits_the_32_gb_m1_on_which_the_guides_article_ran_it() -> None:
    assert planned("mistral-7b-wikisql", "m1-max-32gb").fits


def test_the_demo_fits_every_machine() -> None:
    assert [m for m in KNOWN if not planned("demo", m).fits] == []


def test_more_memory_never_fits_less() -> None:
    """Macs of one kind of arithmetic, from small to large."""
    for recipe in shipped():
        for native in (False, True):
            macs = sorted((m for m in MACS if KNOWN[m].gpu_bfloat16 is native),
                          key=lambda m: KNOWN[m].ram_bytes)  # fmt: skip
            fits = [(plan := outlook(recipe, m).plan) is not None and plan.fits for m in macs]
            assert fits == sorted(fits), (recipe, macs)


@pytest.mark.parametrize(("recipe", "machine"), EVERY)
def test_every_no_has_a_change_that_fits_or_says_that_nothing_does(recipe: str, machine: str) -> None:
    found = outlook(recipe, machine)
    plan, change = found.plan, found.change
    row = next(line for line in section(recipe) if line.startswith(f"| {machine} |"))
    if plan is not None and plan.fits:
        assert change is None and "| no |" not in row
        return
    assert row.startswith(f"| {machine} | no |") and (plan is not None or found.refused.split(";")[0] in row)
    if change is None:
        assert "| nothing |" in row
        return
    if plan is not None:
        assert change.overrides == next(lever.overrides for lever in levers(plan) if lever.fits)
    # Applied by hand to the recipe, as a person would.
    asked = load(recipe, change.overrides)
    there = make_plan(asked, spec_of_geometry(Path(asked.model).name), KNOWN[machine])
    assert there.fits and there.total_bytes == change.plan.total_bytes
    assert f"`{' '.join(change.overrides)}`" in row


@pytest.mark.parametrize(("recipe", "machine"), EVERY)
def test_what_the_recipe_fixes_is_never_changed_to_make_it_fit(recipe: str, machine: str) -> None:
    plan = outlook(recipe, machine).plan
    if plan is None:
        return
    asked = load(recipe)
    assert plan.recipe == asked and parse(dump(plan.recipe)) == asked
    assert plan.length.value == asked.train.max_length
    assert set(plan.targets.value) == set(asked.lora.targets) or isinstance(asked.lora.targets, str)
    assert len(plan.layers.value) == (asked.lora.last_layers or plan.spec.n_layers)
    assert plan.quantize.value == asked.quantize
    if asked.dtype != "auto":
        assert plan.weights.value == asked.dtype
    if asked.train.micro_batch != "auto":
        assert plan.micro_batch.value == asked.train.micro_batch
    if asked.train.keep_layers != "auto":
        assert plan.keep_layers.value == asked.train.keep_layers
    held = ELEMENT_BYTES[plan.weights.value] * plan.spec.parameters
    assert weights(plan) == held if asked.quantize == "none" else weights(plan) < held


@pytest.mark.parametrize(("recipe", "machine"), EVERY)
def test_the_least_is_no_more_than_planned(recipe: str, machine: str) -> None:
    plan = outlook(recipe, machine).plan
    if plan is None:
        return
    least = script().least(plan)
    assert least <= plan.total_bytes
    assert plan.fits == (least <= plan.budget.value)  # whatever fits at the least is found


def section(recipe: str) -> list[str]:
    start = page().index(f"## {recipe}\n")
    return page()[start : page().index("\n## ", start)].splitlines()
