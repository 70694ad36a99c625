"""What is said where a run does not fit: before it begins, or in its rehearsal."""

from __future__ import annotations

from dataclasses import replace

from burnish.errors import EXIT_WILL_NOT_FIT, OutOfMemory, UserError
from burnish.planning.levers import cheaper, levers
from burnish.planning.plan import Plan, make_plan

# What a plan that ran out of memory is taken to need beyond its estimate, and how many changes are named.
MISSED, NAMED = 0.1, 3
SMALLER = "take a smaller model, or a smaller train.max_length"


def too_large(plan: Plan) -> UserError:
    """By the estimate."""
    ways = _ways(plan, [])
    return UserError(
        f"this needs {plan.total_bytes / 2**30:.1f} GiB and {plan.budget.value / 2**30:.1f} GiB "
        f"are there ({plan.budget.reason})",
        f"burnish plan RECIPE   shows the parts; {f'set {ways[0]}' if ways else SMALLER}",
        EXIT_WILL_NOT_FIT,
    )


def ran_out(plan: Plan, peak_bytes: int, predicted_bytes: int, error: OutOfMemory) -> UserError:
    """In the rehearsal, of a plan that fits by its estimate. peak_bytes: the most until then."""
    said = (str(error).splitlines() or ["no more could be had"])[0]
    return UserError(
        f"memory ran out in the rehearsal of the longest step: {peak_bytes / 2**30:.2f} GiB measured until "
        f"then, {predicted_bytes / 2**30:.2f} GiB predicted ({said})",
        _less(plan),
        EXIT_WILL_NOT_FIT,
    )


def ran_out_again(plan: Plan) -> UserError:
    """Of a run whose processes ended for want of memory until nothing was left to take less."""
    return UserError(
        "memory ran out again, and the steps cannot be cut any smaller: "
        f"{plan.micro_batch.value} row a pass, {plan.keep_layers.value} layers kept",
        _less(plan),
        EXIT_WILL_NOT_FIT,
    )


def _less(plan: Plan) -> str:
    """What to type for a plan that takes clearly less: the same training where that can be, else another.

    Numbers that are `auto` are written down: on a machine that seems to have room they would fill it again.
    """
    least, written, begun = plan, _written(plan, plan), _numbers(plan, plan)
    # A layer that waits and answers side by side are no keys of a recipe: what is typed must change a number.
    while not (written.fits and _numbers(plan, least) != begun) and (smaller := cheaper(least)) is not None:
        least, written = smaller, _written(plan, smaller)
    numbers, asked = _numbers(plan, least), plan.recipe.train
    typed = [f"train.{k}={str(v).lower()}" for k, v in numbers.items() if getattr(asked, k) != v]
    same = f"{' '.join(typed)} (the same training; {written.total_bytes / 2**30:.2f} GiB)"
    changes = numbers != begun
    if written.fits and changes:
        return f"set {same}"
    ways = ([same] if changes else []) + _ways(written, typed)
    return f"set {'; or '.join(ways)}" if ways else SMALLER


def _ways(plan: Plan, typed: list[str]) -> list[str]:
    """The changes that would make `plan` fit, each with what is `typed` already. Not a smaller model: it
    would have to be here.
    """
    found = [v for v in levers(plan) if v.fits and not any(o.startswith("model=") for o in v.overrides)]
    return [
        f"{' '.join([*typed, *lever.overrides])} ({lever.cost}; {lever.total_bytes / 2**30:.2f} GiB)"
        for lever in found[:NAMED]
    ]


def _written(plan: Plan, numbers: Plan) -> Plan:
    """`plan` with the numbers of another written down, where there is less memory than it was to take."""
    grows = sum(p.n_bytes for p in plan.estimate if p.name != "framework")
    machine, share = plan.machine, (plan.total_bytes - MISSED * grows) / plan.budget.value
    less = replace(
        machine,
        ram_bytes=int(machine.ram_bytes * share),
        free_ram_bytes=int(machine.free_ram_bytes * share),
        gpus=tuple(replace(g, free_bytes=int(g.free_bytes * share)) for g in machine.gpus),
    )
    train = plan.recipe.train.model_copy(update=_numbers(plan, numbers))
    return make_plan(plan.recipe.model_copy(update={"train": train}), plan.spec, less, plan.stats)


def _numbers(plan: Plan, numbers: Plan) -> dict[str, int | bool]:
    """Keys of `train` that say how a step is cut. Whether rows are packed may hang on the first."""
    found: dict[str, int | bool] = {
        "micro_batch": numbers.micro_batch.value, "keep_layers": numbers.keep_layers.value
    }  # fmt: skip
    return found | ({"pack": plan.pack.value} if plan.recipe.train.pack == "auto" else {})
