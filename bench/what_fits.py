"""What the shipped recipes would do on machines that most people have: `docs/WHAT-FITS.md`.

    PYTHONPATH=src python bench/what_fits.py

Plans only: no model, no data and none of the machines is needed (`machine/known.py`, `models/geometry.py`),
so the same source gives the same file everywhere. tests/planning/test_what_fits.py holds the committed file
against what this renders now; a change to the memory arithmetic shows there as the verdicts that it turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from burnish.errors import UserError
from burnish.machine.known import GIB, KNOWN, MACOS_LARGE_BYTES, MACOS_SMALL_BYTES, SMALL_MAC_BYTES
from burnish.models.geometry import spec_of_geometry
from burnish.models.spec import ModelSpec
from burnish.planning.levers import levers
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import load, shipped

PAGE = Path(__file__).parents[1] / "docs" / "WHAT-FITS.md"
COMMAND = "PYTHONPATH=src python bench/what_fits.py"
TIGHT = 0.9  # of the budget
# What lets a recipe written for another machine be planned at all.
ANY_DEVICE = ("backend=auto", "device=auto")
TIER_RECIPE = "medical-r1-14b"
GUIDE_MPS = ("backend=torch", "device=mps", "dtype=float32", "train.keep_layers=0")
# How the guide runs each recipe, and on which device. Its first two examples recompute every layer; the
# second says nothing of precision, and float32 is the guide's advice for every Mac. The third is
# mlx-examples', and the article that the guide was adapted from is the recipe as it stands.
GUIDE_WAYS = {
    "medical-r1-14b": ("metal", GUIDE_MPS),
    "deepseek-coder-7b": ("metal", GUIDE_MPS),
    "mistral-7b-wikisql": ("metal", ("backend=mlx",)),
    "medical-r1-32b-cuda": ("cuda", ()),
}


@dataclass(frozen=True)
class Tier:
    """A row of the guide's table of memory and settings, least and most where it gives a range."""

    name: str
    machines: tuple[str, ...]
    lengths: tuple[int, int]
    rows: tuple[int, int]  # of a forward pass
    passes: tuple[int, int]  # of a step
    rank: int
    targets: str

    def settings(self, end: int) -> tuple[str, ...]:
        """Overrides of medical-r1-14b; end: 0 for the least, 1 for the most."""
        return (
            f"train.max_length={self.lengths[end]}",
            f"train.micro_batch={self.rows[end]}",
            f"train.batch_size={self.rows[end] * self.passes[end]}",
            f"lora.rank={self.rank}",
            f"lora.targets={self.targets}",
        )


TIERS = (
    Tier("32 GB", ("m1-max-32gb", "m2-pro-32gb"), (1024, 1536), (1, 1), (8, 16), 8, "attention"),
    Tier("64 GB", ("m3-max-64gb",), (2048, 2048), (1, 1), (4, 8), 16, "attention+mlp"),
    Tier("96 GB+", ("m3-max-96gb", "m4-max-128gb", "m2-ultra-192gb"), (2048, 3072), (1, 2), (4, 4), 32,
         "attention+mlp"),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What would make it fit: overrides, a smaller model among them where no others are enough."""

    overrides: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Outlook:
    """A recipe on a machine. Without a plan, `refused` says why. change: None: it fits, or nothing does."""

    plan: Plan | None
    refused: str
    change: Change | None


@cache  # the test asks for each again
def outlook(recipe: str, machine: str, asked: tuple[str, ...] = ()) -> Outlook:
    """asked: overrides that are taken as part of the recipe."""
    first, refused = (), ""
    try:
        plan = plan_of(recipe, machine, asked)
    except UserError as e:
        first, refused = ANY_DEVICE, e.message
        plan = plan_of(recipe, machine, (*asked, *ANY_DEVICE))
    change = first if plan.fits else _first_lever(plan, first)
    found = Change(change, plan_of(recipe, machine, (*asked, *change))) if change else None
    return Outlook(None if refused else plan, refused, found)


def _first_lever(plan: Plan, first: tuple[str, ...]) -> tuple[str, ...]:
    enough = [lever.overrides for lever in levers(plan) if lever.fits]
    return (*first, *enough[0]) if enough else ()


def plan_of(recipe: str, machine: str, overrides: Sequence[str] = ()) -> Plan:
    """Raises UserError where the recipe asks for what the machine has not."""
    asked = load(recipe, overrides)
    return make_plan(asked, spec_for(asked.model), KNOWN[machine])


def spec_for(model: str) -> ModelSpec:
    return spec_of_geometry(Path(model).name)


def least(plan: Plan) -> int:
    """Bytes that would do, were the machine's free memory none: all that the plan is free to choose by memory
    (layers kept, rows a pass, answers at once) is then as small as can be.
    """
    gpus = tuple(replace(g, free_bytes=0) for g in plan.machine.gpus)
    return make_plan(plan.recipe, plan.spec, replace(plan.machine, free_ram_bytes=0, gpus=gpus)).total_bytes


def verdict(plan: Plan) -> str:
    if not plan.fits:
        return "no"
    return "tight" if least(plan) > TIGHT * plan.budget.value else "fits"


def render() -> str:
    parts = [HEAD]
    parts += [recipe_section(name) for name in shipped()]
    parts.append(tiers_section())
    return "\n".join(parts)


HEAD = f"""\
<!-- Made by `{COMMAND}`; change that or the planner, not this file. -->

# What fits

What `burnish plan` says of the shipped recipes on machines of a few sizes, before any data is read: every
example is taken to be as long as `train.max_length`, and all of it to be trained, so real data needs the same
or less. A Mac is taken as it is after start-up, when macOS itself has {MACOS_SMALL_BYTES / GIB:g} GiB up to \
{SMALL_MAC_BYTES // GIB} GB and {MACOS_LARGE_BYTES // GIB} GiB above.
No Mac was at hand: whatever stands here about one is predicted.

- **planned, GiB**: what is needed at the largest moment, of what the plan may use: Metal's share of a Mac's
  memory, or what is free on the GPU or of RAM, less a margin. Room that is left is spent to save time: layers
  kept, rows a pass, answers at once. *least* is what would do without; the columns after it give that.
  **tight**: even the least is more than nine tenths of the room.
- **what would fit**: the first change that is enough of those that `burnish plan` names, the cheapest for the
  result; a smaller model where no other is.
- **the guide's way**: its settings, in burnish's engine. What the guide's own trainer needs beside the
  weights was not predicted.
"""


def recipe_section(name: str) -> str:
    recipe = load(name)
    spec, train, lora = spec_for(recipe.model), recipe.train, recipe.lora
    targets = lora.targets if isinstance(lora.targets, str) else f"{len(lora.targets)} projections"
    layers = f"the last {lora.last_layers} layers" if lora.last_layers else "every layer"
    lines = [
        f"## {name}",
        "",
        f"{Path(recipe.model).name}, {spec.parameters / 1e9:.2f} billion parameters. Rank {lora.rank} on "
        f"{targets} of {layers}; {train.batch_size} example{'s' * (train.batch_size > 1)} a step, "
        f"{train.max_length:,} tokens.",
        _guide_said(name),
        "",
        "| machine | verdict | runs on | weights | rows a pass | layers kept | planned, GiB "
        "| what would fit | the guide's way, GiB |",
        "|---|---|---|---|--:|--:|---|---|---|",
    ]
    lines += [f"| {m} | {_cells(outlook(name, m))} | {_guide_cell(name, m)} |" for m in KNOWN]
    return "\n".join([*lines, ""])


def _guide_said(recipe: str) -> str:
    if recipe not in GUIDE_WAYS:
        return "Not of the guide."
    way = GUIDE_WAYS[recipe][1]
    return f"The guide's way: `{' '.join(way)}`." if way else "The guide's way is the recipe itself."


def _cells(found: Outlook) -> str:
    plan = found.plan
    if plan is None:
        return f"no | {found.refused.partition(';')[0]} | | | | | {_change_cell(found)}"
    return (
        f"{_bold(plan)} | {plan.backend.value}, {plan.device.value} | {_weights(plan)} | "
        f"{plan.micro_batch.value} | {plan.keep_layers.value} of {plan.spec.n_layers} | "
        f"{_planned(plan)} | {_change_cell(found)}"
    )


def _change_cell(found: Outlook) -> str:
    change = found.change
    if change is None:
        return "" if found.plan is not None and found.plan.fits else "nothing"
    return f"`{' '.join(change.overrides)}`: {_least(change.plan)}"


def _guide_cell(recipe: str, machine: str) -> str:
    kind, way = GUIDE_WAYS.get(recipe, ("", ()))
    if kind not in {g.kind for g in KNOWN[machine].gpus}:
        return "–"  # no such device, so not the guide's
    return _short(plan_of(recipe, machine, way)) if way else "the same"


def _short(plan: Plan) -> str:
    return f"{_bold(plan)}: {_least(plan)}"


def _bold(plan: Plan) -> str:
    said = verdict(plan)
    return said if said == "no" else f"**{said}**"


def _weights(plan: Plan) -> str:
    held = plan.weights.value if plan.quantize.value == "none" else plan.quantize.value
    compute = plan.compute.value
    return held if held == compute else f"{held}, computed in {compute}"


def _planned(plan: Plan) -> str:
    said, n_bytes = _of(plan.total_bytes, plan), least(plan)
    if n_bytes < plan.total_bytes:
        said += f", least {_gib(n_bytes)}"
    return f"{said}{_predicted(plan)}"


def _least(plan: Plan) -> str:
    return f"{_of(least(plan), plan)}{_predicted(plan)}"


def _of(n_bytes: int, plan: Plan) -> str:
    return f"{_gib(n_bytes)} of {_gib(plan.budget.value)}"


def _predicted(plan: Plan) -> str:
    return ", predicted" if plan.machine.system == "Darwin" else ""


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f}"


def tiers_section() -> str:
    lines = [
        "## The guide's tiers",
        "",
        f"The guide's table of settings for its own run, {TIER_RECIPE}, each row at its least and its most:",
        f"its way, which is `{' '.join(GUIDE_MPS)}`,",
        "and with these four left to the plan. GiB are the least; all of it is predicted.",
        "",
        "| tier | machine | the guide's setting | its way, GiB | left to the plan, GiB | what would fit |",
        "|---|---|---|---|---|---|",
    ]
    for tier in TIERS:
        for machine in tier.machines:
            ends = dict.fromkeys((tier.settings(0), tier.settings(1)))
            lines += [_tier_row(tier, machine, settings) for settings in ends]
    return "\n".join([*lines, ""])


def _tier_row(tier: Tier, machine: str, settings: tuple[str, ...]) -> str:
    train = load(TIER_RECIPE, settings).train
    passes = train.batch_size // int(train.micro_batch)
    said = f"{train.max_length:,} tokens, {train.micro_batch} × {passes}, rank {tier.rank}, {tier.targets}"
    way = _short(plan_of(TIER_RECIPE, machine, (*settings, *GUIDE_MPS)))
    ours = outlook(TIER_RECIPE, machine, settings)
    assert ours.plan is not None  # the recipe leaves the device to the plan
    return (
        f"| {tier.name} | {machine} | {said} | {way} | {_short(ours.plan)}; {_weights(ours.plan)} | "
        f"{_change_cell(ours)} |"
    )


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
