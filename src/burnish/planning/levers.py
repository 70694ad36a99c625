"""What would make a plan fit, and what else it could be: changes of the recipe, each planned anew.

    for lever in levers(plan):         # of a plan that does not fit, cheapest for the result first
        print(" ".join(lever.overrides), lever.total_bytes, lever.fits, lever.cost)
    for lever in room(plan):           # of one that fits: what matters most for speed and room
        ...
    plan = cheaper(plan)               # after running out of memory: the same numbers in less; None: no more

A lever is only offered once `make_plan` has said what it gives, so what is printed is what typing it would
plan. Where a number is looked for (rows, layers, a rank, a model) it is found by halving, on a handful of
examples as long as any may be, and then settled on the true data, whose layout is dearer to plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from burnish.planning.changes import (
    LEAST_LENGTH,
    Step,
    fewer_bits,
    fewer_layers,
    fewer_targets,
    fits,
    set_by_hand,
    shorter,
    smaller_models,
    smaller_ranks,
    tried,
)
from burnish.planning.choice import Choice
from burnish.planning.engine import MLX_FAMILIES, MLX_PACKAGES
from burnish.planning.layout import BUCKET, largest
from burnish.planning.memory import trained_layers
from burnish.planning.memory_mlx import LEAST_SLICE
from burnish.planning.plan import Plan, parts_of

# The longest row that `room` looks for where the model has more positions.
MOST_LENGTH = 131072
MOST_ROOM = 3
# A change that is not enough alone is named where it takes away so large a share of what is too much.
NOTABLE = 0.1


@dataclass(frozen=True)
class Lever:
    overrides: tuple[str, ...]  # as typed: 'train.max_length=1024'
    total_bytes: int  # of the plan that follows
    least_bytes: int  # of it, with nothing spent on speed
    fits: bool
    cost: str  # in a plain sentence
    changes_result: bool  # of training; False: the same numbers, but for rounding


def levers(plan: Plan) -> tuple[Lever, ...]:
    """The smallest changes that make `plan` fit, the ones that cost the result least first: what the recipe
    fixed, shorter rows, fewer bits, fewer targets, fewer layers, a smaller rank; where none of these is
    enough alone, a few of them together; then a smaller model.

    A change of one word (4bit, attention) that is not enough is named where it helps notably. () where the
    plan fits. Raises nothing: what machine, model or backend refuses is left out.
    """
    if plan.fits:
        return ()
    fixed = _helpful(plan, ([s] for s in set_by_hand(plan)))
    words = ([s] for s in (*fewer_bits(plan), *fewer_targets(plan)))
    numbers = (_found(plan, [], choices) for choices in (fewer_layers(plan), smaller_ranks(plan)))
    alone = [
        *fixed,
        *_helpful(plan, [_found(plan, [], shorter(plan))]),
        *_helpful(plan, words),
        *_helpful(plan, numbers),
    ]
    found = [lever for _, lever in alone]
    settings = [step for steps, _ in fixed for step in steps]
    models, together = smaller_models(plan), []
    if not any(lever.fits for lever in found):
        together = _first_fitting(plan, _together(plan, settings))
    # Before a few changes at once, which may leave little of the training: a smaller model in fewer bits.
    packed = _first_fitting(plan, _packed_smaller(plan, models))
    smaller = _first_fitting(plan, ([model] for model in models))
    found += [v for v in packed if v not in smaller] + smaller + together
    if not any(lever.fits for lever in found):
        found += _first_fitting(plan, _together_smaller(plan, settings, models))
    return tuple(found)


def room(plan: Plan) -> tuple[Lever, ...]:
    """At most three changes that matter most for the speed or the room of a plan that fits; () where it does
    not. What makes it faster may not fit: `total_bytes` then says how much memory it would take.

    `backend=mlx` is planned as if mlx were installed, on an Apple GPU where it is not.
    """
    if not plan.fits:
        return ()
    found = [*_set_free(plan), *_with_mlx(plan), *_all_kept(plan), *_bits_for_room(plan)]
    return tuple(found[:MOST_ROOM])


def cheaper(plan: Plan) -> Plan | None:
    """The next plan to try when memory ran out, with the same training in it: no layer ahead of the device,
    then half the rows a pass, then half of the layers kept (none, where that was not more than half of them
    all), then half the loss slice.

    Which examples meet in a step, how they are packed and padded, and what is computed in stay as they are.
    With dropout, rows a pass come last: masks are drawn for each pass. None where nothing is left. The
    estimate is made anew and is never larger: a step that would take more is passed over.
    """
    ways = (_none_ahead, _fewer_rows, _fewer_kept, _smaller_slice)
    if plan.recipe.lora.dropout:
        ways = (_none_ahead, _fewer_kept, _smaller_slice, _fewer_rows)
    tries = (smaller for way in ways for smaller in way(plan))
    return next((smaller for smaller in tries if smaller.total_bytes <= plan.total_bytes), None)


# --- changes together


def _together(plan: Plan, fixed: Sequence[Step]) -> Iterator[list[Step]]:
    """Several changes at once, cheapest for the result first: rows of at least half, of a quarter, then with
    fewer layers, then the shortest.
    """
    bases = [[*fixed], *([*fixed, b] for b in fewer_bits(plan))]
    yield from (base for base in bases if len(base) > 1)
    bases.append([*bases[-1], *fewer_targets(plan)])
    half, quarter = plan.length.value // 2, plan.length.value // 4
    for least, layers_too in ((half, False), (quarter, True), (LEAST_LENGTH, True)):
        rows = shorter(plan, least)
        yield from (_found(plan, base, rows) for base in bases if base)
        if layers_too:
            yield _found(plan, [*bases[-1], *rows[:1]], fewer_layers(plan))


def _packed_smaller(plan: Plan, models: Sequence[Step]) -> Iterator[list[Step]]:
    """Smaller models, the largest first, each in as many bits as will do; none where the bits alone do."""
    bits = fewer_bits(plan)
    if not any(_enough(plan, [b]) for b in bits):
        yield from ([b, model] for model in models for b in bits)


def _together_smaller(plan: Plan, fixed: Sequence[Step], models: Sequence[Step]) -> Iterator[list[Step]]:
    """A smaller model with what the recipe fixed, or with shorter rows, where nothing else is enough."""
    ways = [[*fixed], *([*fixed, b] for b in fewer_bits(plan))]
    if fixed:
        yield from ([*way, model] for way in ways for model in models)
    yield from (_found(plan, [*way, model], shorter(plan)) for way in ways for model in models[-1:])


def _found(plan: Plan, base: Sequence[Step], choices: Sequence[Step]) -> list[Step]:
    """`base` and the last of `choices`, each of which takes more memory than the one before, with which the
    plan fits; [] where none does.
    """

    def roughly(i: int) -> bool:
        return fits(tried(plan, [*base, choices[i]], rough=True))

    @cache
    def truly(i: int) -> bool:
        return fits(tried(plan, [*base, choices[i]]))

    if not choices or not roughly(0):
        return []
    i = largest(len(choices) - 1, roughly, 0)
    if not truly(i):
        i = largest(max(i - 1, 0), truly, 0)
    while truly(i) and i + 1 < len(choices) and truly(i + 1):
        i += 1
    return [*base, choices[i]] if truly(i) else []


def _first_fitting(plan: Plan, ways: Iterator[list[Step]]) -> list[Lever]:
    """The first way that fits, without those of its steps that it does not need; [] where none does."""
    for steps in ways:
        if steps and _enough(plan, steps):
            for step in reversed(steps):  # the dearest first
                fewer = [s for s in steps if s is not step]
                steps = fewer if fewer and _enough(plan, fewer) else steps
            return [lever] if (lever := _lever(plan, steps)) else []
    return []


def _enough(plan: Plan, steps: Sequence[Step]) -> bool:
    return fits(tried(plan, steps, rough=True)) and fits(tried(plan, steps))


# --- what a change gives


def _helpful(plan: Plan, ways: Iterable[list[Step]]) -> list[tuple[list[Step], Lever]]:
    """Those that make it fit, or notably help."""
    least = NOTABLE * (plan.total_bytes - plan.budget.value)
    found = ((steps, _lever(plan, steps)) for steps in ways if steps)
    return [(s, v) for s, v in found if v and (v.fits or plan.total_bytes - v.total_bytes >= least)]


def _lever(plan: Plan, steps: Sequence[Step]) -> Lever | None:
    """None where the change is refused."""
    new = tried(plan, steps)
    return None if new is None else _as_lever(plan, new, steps, "; ".join(s.cost for s in steps))


def _as_lever(plan: Plan, new: Plan, steps: Sequence[Step], cost: str) -> Lever:
    typed = tuple(f"{key}={value}" for step in steps for key, value in step.change.items())
    cost = "; ".join([*_to_install(plan, new), cost])
    return Lever(typed, new.total_bytes, new.least_bytes, new.fits, cost, _another_result(plan, new))


def _to_install(plan: Plan, new: Plan) -> list[str]:
    there = plan.machine.versions
    if new.backend.value == "mlx" and not all(there.get(p) for p in MLX_PACKAGES):
        return ["first pip install 'burnish[mlx]'"]
    if new.backend.value == "torch" and new.quantize.value != "none" and not there.get("bitsandbytes"):
        return ["first pip install 'burnish[bnb]'"]
    return []


def _another_result(a: Plan, b: Plan) -> bool:
    """Would the two train other numbers, rounding aside?"""

    def decides(p: Plan) -> tuple[Any, ...]:
        train = p.recipe.train
        return (
            p.spec, p.recipe.lora, p.backend.value, p.device.value, p.weights.value, p.compute.value,
            p.quantize.value, p.targets.value, p.layers.value, p.length.value, p.stats,
            p.pack.value and (train.batch_size, p.row_length.value),
            p.recipe.lora.dropout and p.micro_batch.value,  # masks are drawn for each pass
        )  # fmt: skip

    return decides(a) != decides(b)


# --- of a plan that fits


def _gains(plan: Plan, new: Plan) -> list[str]:
    said = []
    if new.compute.value != plan.compute.value:
        said.append(f"computed in {new.compute.value}, not {plan.compute.value}")
    if _pass(new) > _pass(plan):
        said.append(f"{_pass(new):,} tokens in a pass, not {_pass(plan):,}")
    if _kept(new) > _kept(plan):
        said.append(f"{_kept(new)} of {_depth(new)} layers are not computed twice, {_kept(plan)} are not now")
    return said


def _set_free(plan: Plan) -> Iterator[Lever]:
    """What the recipe fixed to less than memory allows."""
    for step in set_by_hand(plan):
        new = tried(plan, [step]) if "backend" not in step.change else None
        if new is not None and new.fits and (gains := _gains(plan, new)):
            yield _as_lever(plan, new, [step], "; ".join(gains))


def _with_mlx(plan: Plan) -> Iterator[Lever]:
    versions = plan.machine.versions
    there = replace(
        plan.machine, versions={**versions, **{p: versions.get(p) or "any" for p in MLX_PACKAGES}}
    )
    if (
        plan.backend.value != "torch"
        or plan.device.value != "mps"
        or plan.spec.model_type not in MLX_FAMILIES
    ):
        return
    step = Step({"backend": "mlx"}, "")
    new = tried(plan, [step], machine=there)
    if new is not None:
        yield _as_lever(plan, new, [step], "; ".join(["Apple's own framework", *_gains(plan, new)]))


def _all_kept(plan: Plan) -> Iterator[Lever]:
    step = Step({"train.keep_layers": plan.spec.n_layers}, "")
    new = tried(plan, [step]) if _kept(plan) < _depth(plan) else None
    if new is not None and not new.fits:
        yield _as_lever(plan, new, [step], "with so much memory no layer would be computed twice")


def _bits_for_room(plan: Plan) -> Iterator[Lever]:
    for step in fewer_bits(plan)[-1:]:
        new = tried(plan, [step])
        if new is None or not new.fits:
            continue
        gains = _gains(plan, new)
        now, then = _longest_row(plan, []), _longest_row(plan, [step])
        if then > now:
            gains.append(f"rows of up to {then:,} tokens would fit, not {now:,}")
        if gains:
            yield _as_lever(plan, new, [step], "; ".join([*gains, step.cost]))


def _longest_row(plan: Plan, steps: Sequence[Step]) -> int:
    """Tokens of the longest row that would fit, whatever the data has."""
    unread, most = replace(plan, stats=None), min(plan.spec.max_positions or MOST_LENGTH, MOST_LENGTH)

    def holds(buckets: int) -> bool:
        return fits(tried(unread, [*steps, Step({"train.max_length": buckets * BUCKET}, "")]))

    return largest(most // BUCKET, holds, 0) * BUCKET


def _pass(plan: Plan) -> int:
    return plan.micro_batch.value * plan.shape.length


def _depth(plan: Plan) -> int:
    return trained_layers(plan.spec, plan.shape)


def _kept(plan: Plan) -> int:
    return min(plan.keep_layers.value, _depth(plan))


# --- less memory for the same training


def _none_ahead(plan: Plan) -> Iterator[Plan]:
    if plan.ahead.value:
        none = Choice(0, "memory ran out with a layer ahead of the device")
        yield _estimated(replace(plan, ahead=none, shape=replace(plan.shape, ahead=0)))


def _fewer_rows(plan: Plan) -> Iterator[Plan]:
    now, half = plan.micro_batch.value, plan.micro_batch.value // 2
    most = plan.shape.passes * now if plan.pack.value else plan.recipe.train.batch_size  # rows of a step
    while half:
        fewer = Choice(half, f"memory ran out with {now} rows")
        shape = replace(plan.shape, micro_batch=half, passes=-(-most // half))
        yield _estimated(replace(plan, micro_batch=fewer, shape=shape))
        half //= 2


def _fewer_kept(plan: Plan) -> Iterator[Plan]:
    now = _kept(plan)
    for kept in dict.fromkeys((now // 2 if 2 * now > _depth(plan) else 0, 0)):
        if kept < now:
            fewer = Choice(kept, f"memory ran out with {now} layers kept")
            yield _estimated(replace(plan, keep_layers=fewer, shape=replace(plan.shape, keep_layers=kept)))


def _smaller_slice(plan: Plan) -> Iterator[Plan]:
    now = plan.loss_slice.value
    if now > LEAST_SLICE:
        half = max(LEAST_SLICE, now // 2 // LEAST_SLICE * LEAST_SLICE)
        smaller = Choice(half, f"memory ran out with {now} tokens a slice")
        yield _estimated(replace(plan, loss_slice=smaller, shape=replace(plan.shape, loss_slice=half)))


def _estimated(plan: Plan) -> Plan:
    return replace(plan, estimate=parts_of(plan.backend.value, plan.spec)(plan.shape))
