"""The one loop: a generator of events. It prints nothing, and everything it needs to go on is in `State`.

    for event in train(learner, prepared, run, state, keeper):
        ...

Saving, validating, keeping the best and stopping early happen here, in an order that a resumed run repeats
exactly. So does what the loop does about memory that runs out, numbers that are not finite (recover.py says
what), and a machine that wants a rest (keeper.py says when).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from burnish.backends.base import Learner, StepStats
from burnish.data.batches import Batch, Cursor, Example, numbered_steps, split, steps_per_epoch
from burnish.data.batches import steps as data_steps
from burnish.data.packing import numbered_rows, packed_split, packed_steps
from burnish.data.prepare import Prepared
from burnish.errors import NonFinite, OutOfMemory
from burnish.evaluation.score import Validation, validate
from burnish.planning.plan import Plan
from burnish.runs.events import (
    Continued,
    Event,
    Interrupted,
    Noted,
    Paused,
    Recovered,
    Saved,
    Skipped,
    Stepped,
    Validated,
)
from burnish.runs.folder import BEST, RunFolder, State
from burnish.runs.wish import ask
from burnish.training.keeper import Keeper
from burnish.training.recover import OUT_OF_MEMORY, after_out_of_memory, first_line, named_rows, take
from burnish.training.schedule import learning_rate
from burnish.training.trend import Trend

PAUSE_LOOK_S = 1.0


class Course:
    """Where a run is: what the loop changes as it goes. The plan changes only in how a step is cut."""

    def __init__(
        self, learner: Learner, prepared: Prepared, run: RunFolder, state: State, renewable: bool
    ) -> None:
        self.learner, self.prepared, self.run, self.state = learner, prepared, run, state
        self.renewable = renewable
        self.saved = state.step
        self.cut(learner.plan)

    def cut(self, plan: Plan) -> None:
        """Lay out what is to come as `plan` cuts it."""
        self.plan = plan
        self.batches = laid_out(plan, self.prepared.train.examples, self.state.cursor)
        self.held_out = _held_out(plan, self.prepared.valid.examples)

    def save(self) -> Saved:
        folder = self.run.save_checkpoint(self.state, self.learner.save, self.plan.recipe.train.keep_last)
        self.saved = self.state.step
        return Saved(self.state.step, str(folder))

    @property
    def stale(self) -> bool:
        limit = self.plan.recipe.train.early_stop
        return limit is not None and self.state.stale >= limit


def train(
    learner: Learner,
    prepared: Prepared,
    run: RunFolder,
    state: State,
    keeper: Keeper,
    renewable: bool = False,
) -> Iterator[Event]:
    """Steps from `state` to the end, to an early stop, or until `keeper.stop()`; then Interrupted comes last.

    renewable: where memory runs out, a new process may take this one's place. Raises OutOfMemory where no
    rung is left, NonFinite where a step cannot be taken.
    """
    plan = learner.plan
    recipe = plan.recipe.train
    assert plan.steps is not None, "a plan tightened with the data knows its steps"
    total, per_epoch = plan.steps.value, steps_per_epoch(len(prepared.train.examples), recipe.batch_size)
    course, trend = Course(learner, prepared, run, state, renewable), Trend(total)
    slow = ""
    while course.state.step < total and not course.stale:
        if keeper.verdict().action == "pause" and not keeper.stop():
            yield from _paused(course, keeper)
        if keeper.stop():
            if course.saved != course.state.step:
                yield course.save()
            ask(run.path, "")  # heeded
            yield Interrupted(course.state.step, str(run.path))
            return
        lr = learning_rate(recipe, course.state.step, total)
        stepped = yield from _stepped(course, lr)
        if stepped is not None:
            stats, seconds = stepped
            memory = learner.memory()
            step = course.state.step
            yield Stepped(
                step, total, step / per_epoch, stats.loss, lr, stats.grad_norm, stats.tokens, stats.weight,
                seconds, memory.now_bytes, memory.peak_bytes,
            )  # fmt: skip
            yield from map(Noted, (*trend.hear(step, stats.loss), *keeper.notes()))
            slow = yield from _slowed(keeper, slow, seconds)
        last = course.state.step == total
        if course.held_out and (last or course.state.step % recipe.eval_every == 0):
            yield from _validated(course)
        if last or course.state.step % recipe.save_every == 0 or course.stale:
            yield course.save()
    if course.stale and course.state.step < total:
        yield Noted(
            f"stopped early: no better validation loss in {course.state.stale} validations; the best was at "
            f"step {course.state.best_step}"
        )


# --- a step, and what may go wrong with it


def _stepped(course: Course, lr: float) -> Generator[Event, None, tuple[StepStats, float] | None]:
    """Take the step; its stats and seconds, or None where it was left out (the generator's value)."""
    spent = wrong = 0  # how often memory ran out, and numbers were not finite, at this step
    while True:
        micros, cursor = next(course.batches)
        began = time.perf_counter()
        try:
            stats = course.learner.step(micros, lr)
        except OutOfMemory as e:
            failed: Exception = e
        except NonFinite as e:
            failed = e
        else:
            _advance(course, cursor, skipped=False)
            return stats, time.perf_counter() - began
        del micros
        if isinstance(failed, OutOfMemory):
            yield _relieved(course, failed, spent, began)
            spent += 1
            continue
        wrong += 1
        if wrong == 1:
            yield Noted(f"{failed}; the step is computed again, once")
            course.cut(course.plan)
            continue
        rows = _rows_of_next(course)
        if course.plan.recipe.care.non_finite != "skip" or course.state.skipped:
            raise named_rows(failed, course.state.step + 1, rows)
        _advance(course, cursor, skipped=True)
        yield Skipped(course.state.step, str(failed), rows)
        return None


def _advance(course: Course, cursor: Cursor, skipped: bool) -> None:
    course.state = replace(course.state, step=course.state.step + 1, cursor=cursor, skipped=skipped)


def _relieved(course: Course, error: OutOfMemory, tries: int, began: float) -> Recovered:
    """Cut what is to come so that it takes less; the plan that does is kept with the run."""
    way = after_out_of_memory(course.plan, tries, course.renewable)
    if way is None:
        raise error
    take(way, course.plan, course.learner, course.run, error)
    course.cut(way.plan)
    return Recovered(
        course.state.step, OUT_OF_MEMORY, way.did, 0, time.perf_counter() - began, first_line(error)
    )


def _rows_of_next(course: Course) -> tuple[str, ...]:
    """file:line of the examples of the step that comes next."""
    plan, part = course.plan, course.prepared.train
    size, seed = plan.recipe.train.batch_size, plan.recipe.train.seed
    if plan.pack.value:
        lengths = [len(e.tokens) for e in part.examples]
        _, rows, _ = next(numbered_rows(lengths, size, seed, course.state.cursor, plan.row_length.value))
        chosen = list(chain.from_iterable(rows))
    else:
        _, chosen, _ = next(numbered_steps(len(part.examples), size, seed, course.state.cursor))
    return tuple(part.conversations[i].at for i in chosen if i < len(part.conversations))


# --- between steps


def _validated(course: Course) -> Iterator[Event]:
    tries = 0
    while True:
        began = time.perf_counter()
        try:
            result: Validation = validate(course.learner, course.held_out)
            break
        except OutOfMemory as e:
            failed = e
        yield _relieved(course, failed, tries, began)
        tries += 1
    state = course.state
    best = state.best_loss is None or result.loss < state.best_loss
    course.state = _judged(state, result.loss, best)
    if best and course.plan.recipe.train.best:
        course.run.publish(BEST, lambda folder: _adapter_only(course.learner, folder))
    yield Validated(state.step, result.loss, result.accuracy, result.weight, best)


def _paused(course: Course, keeper: Keeper) -> Iterator[Event]:
    """A checkpoint first: a pause may end with the battery."""
    if course.saved != course.state.step:
        yield course.save()
    asked, began, why = keeper.verdict(), time.monotonic(), ""
    while asked.action == "pause" and not keeper.stop():
        why = asked.why
        yield Paused(course.state.step, asked.why, asked.words)
        if why == "battery":
            keeper.let_sleep()
        elif why == "memory pressure":  # what is cached goes back; the weights stay
            course.learner.reshape(course.plan)
        while asked.action == "pause" and asked.why == why and not keeper.stop():
            keeper.wait(PAUSE_LOOK_S)
            asked = keeper.verdict(why)
    keeper.stay_awake()
    if why and not keeper.stop():
        yield Continued(course.state.step, time.monotonic() - began)


def _slowed(keeper: Keeper, slow: str, seconds: float) -> Generator[Event, None, str]:
    """At half speed while the machine asks for it: as long a rest as the step was. slow: what was said last;
    the generator's value is what is said now.
    """
    asked = keeper.verdict()
    words = asked.words if asked.action == "slow" else ""
    if words and not slow:
        yield Noted(f"at half speed: {words}")
    elif slow and not words:
        yield Noted("at full speed again")
    if words:
        keeper.wait(seconds)
    return words


# --- how the data lies


def laid_out(plan: Plan, examples: Sequence[Example], cursor: Cursor) -> Iterator[tuple[list[Batch], Cursor]]:
    """Endless steps from `cursor` on: each one's micro-batches, and the cursor that follows it."""
    size, micro, seed = plan.recipe.train.batch_size, plan.micro_batch.value, plan.recipe.train.seed
    if plan.pack.value:
        return packed_steps(examples, size, micro, seed, cursor, plan.row_length.value)
    return data_steps(examples, size, micro, seed, cursor, plan.lengths.value)


def _held_out(plan: Plan, examples: Sequence[Example]) -> list[Batch]:
    if plan.pack.value:
        return packed_split(examples, plan.micro_batch.value, plan.row_length.value)
    return split(examples, plan.micro_batch.value, plan.lengths.value)


def _judged(state: State, loss: float, best: bool) -> State:
    if best:
        return replace(state, best_loss=loss, best_step=state.step, stale=0)
    return replace(state, stale=state.stale + 1)


def _adapter_only(learner: Learner, folder: Path) -> None:
    learner.save(folder)
    (folder / "optimizer.safetensors").unlink()
