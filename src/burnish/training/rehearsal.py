"""The rehearsal: the step of the data that needs most memory, run once before the first and not kept.

    rehearsed = rehearse(plan, learner, prepared)
    rehearsed.peak_bytes, rehearsed.predicted_bytes

A prediction of memory rests on constants; this is the measurement. A run that will not fit ends here, seconds
after its model was loaded, and not in the step that happens to hold the longest examples, hours later. It
costs one step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice

from burnish.backends.base import Learner
from burnish.data.batches import Batch, Cursor, numbered_steps, steps_per_epoch
from burnish.data.packing import Rows, numbered_rows
from burnish.data.prepare import Prepared
from burnish.planning.layout import PACK_WINDOW, Place
from burnish.planning.plan import Plan
from burnish.runs.events import Rehearsed
from burnish.training.train import laid_out

# Steps are looked through by their lengths alone. An epoch of examples one a row is always seen whole (a
# second for a million), small data for more epochs. Packing is slower to lay out, and packed rows are alike.
LOOK_EXAMPLES = 100_000
LOOK_WINDOWS = 8

Need = tuple[int, int, int]  # positions computed, the longest row, trained tokens: more of each, more memory


def rehearse(plan: Plan, learner: Learner, prepared: Prepared) -> Rehearsed:
    """Run the longest step. Raises what a step raises; `learner.memory()` is worth reading even then."""
    micros = longest(plan, prepared)
    began = time.perf_counter()
    learner.rehearse(micros)
    seconds = time.perf_counter() - began
    measured, predicted = learner.memory().peak_bytes, predicted_bytes(plan)
    error = 100 * (predicted - measured) / measured
    return Rehearsed(seconds, measured, predicted, error, sum(m.n_tokens for m in micros))


def predicted_bytes(plan: Plan) -> int:
    """What can be measured of the estimate of steps: a GPU's counters do not see the framework's own part."""
    seen = [p for p in plan.training if plan.device.value == "cpu" or p.name != "framework"]
    return sum(p.n_bytes for p in seen)


def longest(plan: Plan, prepared: Prepared) -> list[Batch]:
    """The micro-batches of the run's step that needs most memory, as `train` will make them.

    That with the largest micro-batch; where steps have several, one of several, since their gradients add up
    beside the later ones.
    """
    examples = prepared.train.examples
    lengths = [len(e.tokens) for e in examples]
    trained = [e.trained for e in examples]

    def key(step: tuple[Cursor, list[Rows]]) -> tuple[bool, Need, Need]:
        needs = [_need(plan, rows, lengths, trained) for rows in step[1]]
        return len(needs) > 1, max(needs), max(needs[1:], default=(0, 0, 0))

    cursor, _ = max(_steps(plan, lengths), key=key)
    micros, _ = next(laid_out(plan, examples, cursor))
    return micros


def _need(plan: Plan, rows: Rows, lengths: Sequence[int], trained: Sequence[int]) -> Need:
    held = [sum(lengths[i] - 1 for i in row) for row in rows]
    longest = max(held)
    if plan.backend.value == "torch" and not Place("torch", plan.device.value).padded:
        positions = sum(held)
    elif plan.pack.value:
        positions = len(rows) * plan.row_length.value
    else:
        positions = len(rows) * next((n for n in plan.lengths.value if n >= longest), longest)
    return positions, longest, sum(trained[i] for row in rows for i in row)


def _steps(plan: Plan, lengths: Sequence[int]) -> Iterator[tuple[Cursor, list[Rows]]]:
    """Where each step of the run begins, and the examples that its micro-batches hold, by number."""
    assert plan.steps is not None, "a plan tightened with the data knows its steps"
    train, micro = plan.recipe.train, plan.micro_batch.value
    size, seed, steps = train.batch_size, train.seed, plan.steps.value
    if plan.pack.value:
        dealt = numbered_rows(lengths, size, seed, Cursor(), plan.row_length.value)
        steps = min(steps, LOOK_WINDOWS * PACK_WINDOW)
    else:  # one example a row, longest first, as `batches.split` has them
        dealt = (
            (at, [[i] for i in sorted(some, key=lambda i: -lengths[i])], after)
            for at, some, after in numbered_steps(len(lengths), size, seed, Cursor())
        )
        steps = min(steps, max(steps_per_epoch(len(lengths), size), LOOK_EXAMPLES // size))
    for at, rows, _ in islice(dealt, steps):
        yield at, [rows[i : i + micro] for i in range(0, len(rows), micro)]
