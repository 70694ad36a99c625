"""Single changes of a recipe that take less memory, each with its price, and the plan that follows one.

    steps = shorter(plan)               # every length below the longest row there is
    new = tried(plan, steps[-1:])       # as make_plan has it, with the data as it would be; None: refused

`levers` chooses among them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from burnish.errors import UserError
from burnish.machine.probe import Machine
from burnish.models.geometry import smaller, spec_of_geometry
from burnish.planning.choice import DataStats
from burnish.planning.layout import BUCKET, up
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import Recipe

# Rows shorter than this hardly hold a question and its answer.
LEAST_LENGTH = 128
LEAST_RANK = 2
# Where at most this share of the examples is too long, they are left out, since answers without an end teach
# a model not to end; where more are, they are cut.
LEAVE_OUT = 0.05

Change = Mapping[str, str | int]  # key of the recipe → what is set


@dataclass(frozen=True)
class Step:
    """One change with its price, before it is known what it gives."""

    change: Change
    cost: str


def set_by_hand(plan: Plan) -> list[Step]:
    """What the recipe fixed against the plan's own choice."""
    recipe, train, steps = plan.recipe, plan.recipe.train, list[Step]()
    if train.keep_layers != "auto":
        cost = "layers that are not kept are computed twice, which takes longer"
        steps.append(Step({"train.keep_layers": "auto"}, cost))
    if train.micro_batch != "auto":
        steps.append(Step({"train.micro_batch": "auto"}, "fewer rows a pass, in the same optimizer step"))
    if train.pack != "auto":
        cost = "examples lie in rows as memory allows; where packed, a step holds about as many"
        steps.append(Step({"train.pack": "auto"}, cost))
    if recipe.dtype == "float32":
        steps.append(Step({"dtype": "auto"}, "numbers are held in bfloat16, of about three digits"))
    if recipe.backend == "torch":
        steps.append(Step({"backend": "auto"}, "trained by another framework, which rounds otherwise"))
    return steps


def shorter(plan: Plan, least: int = LEAST_LENGTH) -> list[Step]:
    """Rows of every multiple of 64 below the longest there is, ascending."""
    stats, asked = plan.stats, plan.recipe.data.too_long
    ordered = sorted(stats.lengths) if stats is not None else []

    def step(length: int) -> Step:
        change: dict[str, str | int] = {"train.max_length": length}
        if stats is None:
            return Step(change, _cut_unseen(length, asked))
        longer = len(ordered) - bisect_right(ordered, length)
        policy = asked
        if asked == "error":
            policy = "drop" if ordered and longer <= LEAVE_OUT * len(ordered) else "truncate"
            change["data.too_long"] = policy
        what = "are left out" if policy == "drop" else "lose their end"
        if not ordered:
            return Step(change, f"examples longer than {length:,} tokens {what}")
        return Step(change, f"{longer:,} of {len(ordered):,} examples are longer and {what}")

    top = (plan.length.value - 1) // BUCKET * BUCKET
    return [step(n) for n in range(up(max(LEAST_LENGTH, least)), top + 1, BUCKET)]


def _cut_unseen(length: int, policy: str) -> str:
    what = {
        "drop": "are left out",
        "truncate": "lose their end",
        "error": "end the run, unless data.too_long says drop or truncate",
    }[policy]
    return f"examples longer than {length:,} tokens {what}"


def fewer_bits(plan: Plan) -> list[Step]:
    lower = {"none": (8, 4), "8bit": (4,)}.get(plan.quantize.value, ())
    cost = "the frozen base is rounded to {} bits, which it pays for a little"
    return [Step({"quantize": f"{bits}bit"}, cost.format(bits)) for bits in lower]


def fewer_targets(plan: Plan) -> list[Step]:
    if not set(plan.targets.value) > set(plan.spec.attention_linears):
        return []
    return [Step({"lora.targets": "attention"}, "the MLP gets no adapter, so less can be learnt")]


def fewer_layers(plan: Plan) -> list[Step]:
    def step(last: int) -> Step:
        return Step({"lora.last_layers": last}, f"the first {plan.spec.n_layers - last} layers learn nothing")

    return [step(n) for n in range(1, len(plan.layers.value))]


def smaller_ranks(plan: Plan) -> list[Step]:
    ranks, rank = [], plan.recipe.lora.rank // 2
    while rank >= LEAST_RANK:
        ranks, rank = [rank, *ranks], rank // 2
    return [Step({"lora.rank": r}, f"adapters of rank {r} hold less of what is new") for r in ranks]


def smaller_models(plan: Plan) -> list[Step]:
    """Largest first."""
    return [Step({"model": n}, "a smaller model of the family can do less") for n in smaller(plan.spec)]


def tried(
    plan: Plan, steps: Sequence[Step], rough: bool = False, machine: Machine | None = None
) -> Plan | None:
    """The plan with `steps` taken; None where it is refused, or no example is left. rough: of one batch of
    examples as long as any may be.
    """
    change = {key: value for step in steps for key, value in step.change.items()}
    recipe, spec, stats = _changed(plan.recipe, change), plan.spec, plan.stats
    try:
        if "model" in change:
            spec = spec_of_geometry(recipe.model)
        if stats is not None:
            stats = _sketch(stats, recipe) if rough else shortened(stats, recipe)
            if not stats.examples:
                return None
        return make_plan(recipe, spec, machine or plan.machine, stats)
    except UserError:
        return None


def _changed(recipe: Recipe, change: Change) -> Recipe:
    asked = recipe.model_dump()
    for key, value in change.items():
        section, _, leaf = key.rpartition(".")
        (asked[section] if section else asked)[leaf] = value
    return Recipe.model_validate(asked)


def shortened(stats: DataStats, recipe: Recipe) -> DataStats:
    """The data as `recipe` would leave it: its own lengths, cut or left out where they are longer than
    train.max_length. The share of trained tokens is taken to stay as it is.

    The longest may be a validation example, whose lengths are not known: it counts as not left out.
    """
    most = recipe.train.max_length
    if stats.longest <= most:
        return stats
    if recipe.data.too_long == "drop":
        lengths = tuple(n for n in stats.lengths if n <= most)
    else:
        lengths = tuple(min(n, most) for n in stats.lengths)
    examples = len(lengths) if stats.lengths else stats.examples
    tokens = sum(lengths) if stats.lengths else min(stats.tokens, stats.examples * most)
    trained = round(stats.trained * tokens / max(stats.tokens, 1))
    return DataStats(examples, most, tokens, trained, lengths)


def _sketch(stats: DataStats, recipe: Recipe) -> DataStats:
    examples, longest = recipe.train.batch_size, min(stats.longest, recipe.train.max_length)
    tokens = examples * longest
    return DataStats(examples, longest, tokens, round(stats.trained * tokens / max(stats.tokens, 1)))


def fits(plan: Plan | None) -> bool:
    return plan is not None and plan.fits
