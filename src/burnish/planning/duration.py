"""How long a run takes: operations and bytes counted on the plan, divided by the machine's rate.

    rate = measured_rate("torch", "cuda", "bfloat16") or published_rate(machine, "cuda", "bfloat16")
    if rate is not None:
        duration(plan, rate).tokens_per_s

What is counted is the engine's own work (docs/DESIGN.md): frozen weights forward, backward from the first
adapted layer on and once more where a layer is recomputed; the head for supervised tokens only; attention
over the rows' true lengths; unpacking; what moves between products. How near a backend comes to the rate is a
handful of numbers in `SPEEDS`, fitted on timed steps by bench/fit_speed.py. They carry over to other cards
only roughly, so a range is given with every number: how far the fit itself is off, and a little more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from random import Random

from burnish.machine.rate import Rate
from burnish.planning.layout import Place, first_fit
from burnish.planning.memory import (
    ELEMENT_BYTES,
    QUANTIZED_BYTES_PER_WEIGHT,
    adapter_parameters,
    trained_layers,
)
from burnish.planning.plan import Plan

SAMPLE_STEPS = 32  # optimizer steps that stand for a run, their examples drawn from the data's lengths
# Of attention's forward pass, two products: scores again, and four gradients.
ATTENTION_BACKWARD = 2.5
UPDATE_BYTES = 32  # an adapter weight's in a step: itself, gradient and two moments, read and written
# A large product and a large copy reach so much of what a maker publishes (H100: 605 of 989 TFLOP/s); that
# differs between them, so the range is wider by this factor, too: two doubts of their own.
PUBLISHED_PRODUCT, PUBLISHED_COPY, PUBLISHED_SPREAD = 0.65, 0.85, 1.5


@dataclass(frozen=True)
class Speed:
    """How a backend fares on a device, against the rate that is measured there."""

    product: float  # share of the rate that the products of a step reach
    attention: float  # and attention's
    traffic: float  # times that what goes in and out of a layer's projections is moved, forward
    unpack: float  # times that a matrix in 4 or 8 bits, or one to be widened, is moved for a product
    layer_s: float  # seconds of a run of a layer, however few rows: Python, and handing operations over
    packed_s: float  # the same, where its matrices are unpacked
    spread: float  # measured tokens/s lay within predicted ÷ spread … × spread
    rows: int  # of bench/speed.jsonl that it was fitted on; 0: taken from its like


# Of one kind of card, too, some are a fifth slower than others (bench/RESULTS.md): no spread is below that.
SPEEDS: Mapping[tuple[str, str], Speed] = {
    ("torch", "cuda"): Speed(1.0, 0.82, 1.24, 0.89, 2.2e-3, 4.7e-3, 1.3, 12),
    ("mlx", "cuda"): Speed(1.0, 0.87, 4.95, 4.0, 2.1e-3, 1.6e-3, 1.35, 18),
    ("torch", "cpu"): Speed(0.65, 0.45, 1.0, 1.05, 1.6e-3, 1.2e-3, 1.35, 5),
    ("mlx", "cpu"): Speed(0.91, 0.18, 0.49, 0.5, 9.3e-4, 1.0e-3, 1.4, 3),
    # Apple's: as on CUDA, but no attention fused on the way back.
    ("mlx", "metal"): Speed(0.9, 0.3, 4.0, 4.0, 2.1e-3, 1.6e-3, 2.5, 0),
    ("torch", "mps"): Speed(0.7, 0.2, 5.0, 4.0, 2.2e-3, 4.7e-3, 3.0, 0),
}


@dataclass(frozen=True)
class Duration:
    tokens_per_s: float  # real tokens of optimizer steps, padding not counted
    low: float  # tokens/s
    high: float
    step_seconds: float  # of an average step
    seconds: float | None  # of the whole training; None before the data is known
    why: str


@dataclass(frozen=True)
class Pass:
    """One micro-batch as it is computed."""

    tokens: int  # real ones
    positions: int  # with padding, where that is computed
    pairs: float  # of a query and a key that attention computes


Sample = tuple[list[Pass], int]  # the passes of some steps, and how many steps these are


@dataclass(frozen=True)
class Work:
    """What is run of the layers in one pass. All are counts of layers."""

    forward: int
    backward: int
    products_again: int  # multiplied again on the way back
    rest_again: int  # attention, norms and activations computed again


def duration(plan: Plan, rate: Rate, speed: Speed | None = None) -> Duration:
    """Speed and time of the training that `plan` describes. rate: of the plan's device, in `plan.compute`'s
    dtype. Loading, scoring before and after, and generation are not in it; validations are, where the
    validation rows are a share of the training rows. speed: another than SPEEDS', to try.
    """
    speed = speed or SPEEDS[plan.backend.value, plan.device.value]
    passes, steps = passes_of(plan)
    step_s = _step_seconds(plan, rate, speed, (passes, steps))
    per_s = sum(p.tokens for p in passes) / (steps * step_s)
    doubts = (speed.spread, 1.0 if rate.measured else PUBLISHED_SPREAD)
    spread = math.exp(math.hypot(*map(math.log, doubts)))
    seconds = None
    if plan.steps is not None and plan.stats is not None:
        seconds = plan.steps.value * step_s + _validations(plan) * _validation_seconds(
            plan, rate, speed, (passes, steps)
        )
    return Duration(per_s, per_s / spread, per_s * spread, step_s, seconds, _why(plan, rate, speed, spread))


def _step_seconds(plan: Plan, rate: Rate, speed: Speed, sample: Sample) -> float:
    """Of an average optimizer step, in seconds. sample: `passes_of(plan)`."""
    passes, steps = sample
    work = _training_work(plan)
    computed = sum(_pass_seconds(plan, rate, speed, p, work) for p in passes)
    adapter = adapter_parameters(plan.spec, plan.shape)
    return computed / steps + adapter * UPDATE_BYTES / _reached(rate).bytes_per_s


def passes_of(plan: Plan) -> Sample:
    """The micro-batches of some steps that stand for the run, and how many steps these are."""
    batch_size, micro = plan.recipe.train.batch_size, plan.micro_batch.value
    most = max(1, plan.length.value - 1)  # an example of n tokens takes n - 1 positions
    if plan.stats is None:
        drawn = [most] * batch_size
    else:
        sizes = [max(1, min(n - 1, most)) for n in plan.stats.sizes]
        width = min(len(sizes), SAMPLE_STEPS * batch_size)
        drawn = Random(plan.recipe.train.seed).sample(sizes, width)
    steps = -(-len(drawn) // batch_size)
    if plan.pack.value:
        rows = [[drawn[i] for i in row] for row in first_fit(drawn, max(most, plan.row_length.value))]
        dealt = [rows[i::steps] for i in range(steps)]
    else:  # rows of like length are computed together
        parts = [drawn[i * batch_size : (i + 1) * batch_size] for i in range(steps)]
        dealt = [[[n] for n in sorted(part, reverse=True)] for part in parts]
    found = [_pass(plan, step[i : i + micro]) for step in dealt for i in range(0, len(step), micro)]
    return found, steps


def _pass(plan: Plan, rows: list[list[int]]) -> Pass:
    place, tokens = Place(plan.backend.value, plan.device.value), sum(map(sum, rows))
    if not place.padded:
        return Pass(tokens, tokens, sum(_pairs(n, plan.spec.window) for row in rows for n in row))
    longest = max(map(sum, rows))
    wide = plan.row_length.value if plan.pack.value else longest
    wide = max(longest, next((n for n in plan.lengths.value if n >= wide), wide))
    # Fused kernels skip what no query sees, where the mask is the plain causal one; other ways compute all.
    plain = plan.device.value == "cuda" and not plan.pack.value
    pairs = _pairs(wide, plan.spec.window) if plain else float(wide * wide)
    return Pass(tokens, wide * len(rows), pairs * len(rows))


def _pairs(length: int, window: int | None) -> float:
    """Queries and keys that see each other in one example."""
    seen = min(length, window or length)
    return length * seen - seen * seen / 2


def _training_work(plan: Plan) -> Work:
    layers, depth = plan.spec.n_layers, trained_layers(plan.spec, plan.shape)
    again = depth - min(plan.keep_layers.value, depth)
    # With MLX a kept layer is run again with its products' outputs.
    return Work(layers, depth, again, depth if plan.backend.value == "mlx" else again)


def _pass_seconds(plan: Plan, rate: Rate, speed: Speed, p: Pass, work: Work) -> float:
    spec, got = plan.spec, _reached(rate)
    element = ELEMENT_BYTES[plan.compute.value]
    weights, held = spec.layer_weights, _held_bytes(plan)
    targets, head = math.ceil(p.tokens * plan.shape.loss_share), spec.vocab_size * spec.hidden_size
    multiplied = work.forward + work.backward + work.products_again  # times that a layer's weights are used
    slices = max(1, -(-targets // plan.loss_slice.value))
    head_uses = slices * (2 if work.backward else 1)
    # torch leaves the head as it is where the layers are packed.
    head_held = held if plan.backend.value == "mlx" else ELEMENT_BYTES[plan.weights.value]
    adapted = adapter_parameters(spec, plan.shape) / max(spec.n_layers, 1)
    # A gradient of the adapter's own comes on top of the one that is passed on.
    operations = 2 * p.positions * (
        weights * multiplied + adapted * (multiplied + work.backward)
    ) + 2 * targets * head * (2 if work.backward else 1)
    read = held * weights * multiplied + head_held * head * head_uses
    products = max(operations / (speed.product * got.flops), read / got.bytes_per_s)
    heads = spec.n_heads * spec.head_dim
    runs = work.forward + work.rest_again
    attention = 4 * heads * p.pairs * (runs + ATTENTION_BACKWARD * work.backward)
    around = sum(sum(shape) for shape in spec.linears.values()) * element * p.positions
    traffic = speed.traffic * around * (runs + 2 * work.backward)
    unpacked = 0.0
    if held != element:
        unpacked = speed.unpack * (held + element) * weights * multiplied
    if head_held != element:
        unpacked += speed.unpack * (head_held + element) * head * head_uses
    busy = products + attention / (speed.attention * got.flops) + (traffic + unpacked) / got.bytes_per_s
    handed = (speed.packed_s if unpacked else speed.layer_s) * (runs + work.backward)
    if plan.device.value == "cpu":  # the same cores do both
        return busy + handed
    return math.hypot(busy, handed)  # a GPU computes while more is handed over, but now and then one waits


def _reached(rate: Rate) -> Rate:
    """What a measurement on this device would likely give."""
    if rate.measured:
        return rate
    return replace(rate, flops=rate.flops * PUBLISHED_PRODUCT, bytes_per_s=rate.bytes_per_s * PUBLISHED_COPY)


def _held_bytes(plan: Plan) -> float:
    """Of a frozen weight, as it is held."""
    return QUANTIZED_BYTES_PER_WEIGHT.get(plan.quantize.value) or ELEMENT_BYTES[plan.weights.value]


def _validations(plan: Plan) -> int:
    """How often the held-out rows are scored: every so many steps, and at the end."""
    train = plan.recipe.train
    if plan.steps is None or plan.recipe.data.valid or not plan.recipe.data.valid_share:
        return 0
    return -(-plan.steps.value // train.eval_every)


def _validation_seconds(plan: Plan, rate: Rate, speed: Speed, sample: Sample) -> float:
    """Of one validation: the held-out share of the rows, forward only."""
    assert plan.stats is not None
    passes, steps = sample
    work = Work(plan.spec.n_layers, 0, 0, 0)
    step = sum(_pass_seconds(plan, rate, speed, p, work) for p in passes) / steps
    epoch = plan.stats.examples / plan.recipe.train.batch_size * step
    return epoch * plan.recipe.data.valid_share / (1 - plan.recipe.data.valid_share)


def _why(plan: Plan, rate: Rate, speed: Speed, spread: float) -> str:
    where = f"{plan.backend.value} on {plan.device.value}"
    said = [rate.source]
    if speed.rows:
        said.append(f"within a factor of {spread:.2g}, as {speed.rows} timed steps of {where} were")
    else:
        said.append(f"within a factor of {spread:.2g}: no step of {where} was timed yet")
    if not rate.measured:
        said.append("the range is wider because the rate is only published")
    if plan.stats is None:
        said.append(f"every row counted as {plan.length.value} tokens until the data is read")
    elif plan.recipe.data.valid:
        said.append("validation is not counted")
    return "; ".join(said)
