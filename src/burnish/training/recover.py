"""What to do about a typed error: policy, in one place, that never changes what is trained.

    way = after_out_of_memory(plan, tries)      # None: nothing is left that leaves the training as it is
    learner.reshape(way.plan)

Out of memory: the same once more, for memory may have been short for a moment and the freed cache may do;
then rung by rung down `cheaper`: fewer rows a pass, fewer layers kept, a smaller loss slice. Shorter rows or
a packed base would train something else; they are proposed (too_large.py) and never taken.

A number that is not finite: the step once more, for a device may have slipped; then it is left out where the
recipe says so (care.non_finite), though not two in a row; else the run ends with the rows named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from burnish.backends.base import Learner
from burnish.errors import NonFinite, OutOfMemory
from burnish.planning.levers import cheaper
from burnish.planning.plan import Plan
from burnish.runs.folder import RunFolder

OUT_OF_MEMORY = "out of memory"
AGAIN = "memory was freed, and the same was done again"
ROWS_NAMED = 8


@dataclass(frozen=True)
class Way:
    plan: Plan
    did: str  # in words


def after_out_of_memory(plan: Plan, tries: int, renewable: bool) -> Way | None:
    """None where nothing is left, or where a new process is to try. tries: how often memory ran out at this
    very place before. renewable: a new process may take this one's place.
    """
    if tries == 0:
        return Way(plan, AGAIN)
    # What a C library has freed is not always there for others: under RLIMIT_DATA a process that ran out once
    # ran out on every rung, where a new one went on with half the rows. A GPU's cache does go back.
    if renewable and plan.device.value == "cpu":
        return None
    return lighter(plan)


def lighter(plan: Plan) -> Way | None:
    """The next rung down, with the same training in it."""
    smaller = cheaper(plan)
    return None if smaller is None else Way(smaller, difference(plan, smaller))


def take(way: Way, plan: Plan, learner: Learner, run: RunFolder, error: OutOfMemory) -> None:
    """Go on with `way`. The plan that does is kept with the run, so that a resumed one begins with it."""
    let_go(error)
    if way.plan is not plan:
        run.update_json("plan.json", way.plan.summary())
    learner.reshape(way.plan)


def let_go(error: BaseException | None) -> None:
    """The frames of an error, and of what it came from, hold the tensors of the step that failed."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def difference(a: Plan, b: Plan) -> str:
    """How two plans cut a step, where they differ: 'micro-batch 4 → 2'."""
    named = (
        ("micro-batch", a.micro_batch, b.micro_batch),
        ("layers kept", a.keep_layers, b.keep_layers),
        ("layers ahead of the device", a.ahead, b.ahead),
        ("loss slice", a.loss_slice, b.loss_slice),
    )
    said = [f"{name} {x.value} → {y.value}" for name, x, y in named if x.value != y.value]
    if a.recipe.lora.dropout and a.micro_batch.value != b.micro_batch.value:
        said.append("so dropout draws other masks")
    return ", ".join(said)


def named_rows(error: NonFinite, step: int, rows: Sequence[str]) -> NonFinite:
    """The same error with the rows of its step."""
    shown = ", ".join(rows[:ROWS_NAMED]) + (f" and {len(rows) - ROWS_NAMED} more" * (len(rows) > ROWS_NAMED))
    what = str(error).partition(" at step ")[0]  # a backend counts the steps that it took
    return NonFinite(f"{what} at step {step}, twice, of the rows {shown}")
