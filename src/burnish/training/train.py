"""The one loop: a generator of events. It prints nothing, and everything it needs to go on is in `State`.

    for event in train(plan, learner, prepared, run, state, stop):
        ...

Saving, validating, keeping the best and stopping early happen here, in an order that a resumed run repeats
exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from burnish.backends.base import Learner
from burnish.data.batches import Batch, Cursor, Example, split, steps_per_epoch
from burnish.data.batches import steps as data_steps
from burnish.data.packing import packed_split, packed_steps
from burnish.data.prepare import Prepared
from burnish.evaluation.score import validate
from burnish.planning.plan import Plan
from burnish.runs.events import Event, Interrupted, Noted, Saved, Stepped, Validated
from burnish.runs.folder import BEST, RunFolder, State
from burnish.training.schedule import learning_rate


def train(
    plan: Plan, learner: Learner, prepared: Prepared, run: RunFolder, state: State, stop: Callable[[], bool]
) -> Iterator[Event]:
    """Steps from `state` to the end, to an early stop, or until `stop()`; then Interrupted comes last."""
    recipe = plan.recipe.train
    assert plan.steps is not None, "a plan tightened with the data knows its steps"
    total = plan.steps.value
    examples = prepared.train.examples
    per_epoch = steps_per_epoch(len(examples), recipe.batch_size)
    held_out = _held_out(plan, prepared.valid.examples)
    batches = laid_out(plan, examples, state.cursor)
    saved = state.step
    while state.step < total and not _stale(plan, state):
        if stop():
            if saved != state.step:
                yield _save(run, state, learner, recipe.keep_last)
            yield Interrupted(state.step, str(run.path))
            return
        micros, cursor = next(batches)
        lr = learning_rate(recipe, state.step, total)
        began = time.perf_counter()
        stats = learner.step(micros, lr)
        seconds = time.perf_counter() - began
        state = replace(state, step=state.step + 1, cursor=cursor)
        memory = learner.memory()
        yield Stepped(
            state.step,
            total,
            state.step / per_epoch,
            stats.loss,
            lr,
            stats.grad_norm,
            stats.tokens,
            stats.weight,
            seconds,
            memory.now_bytes,
            memory.peak_bytes,
        )
        last = state.step == total
        if held_out and (last or state.step % recipe.eval_every == 0):
            result = validate(learner, held_out)
            best = state.best_loss is None or result.loss < state.best_loss
            state = _judged(state, result.loss, best)
            if best and recipe.best:
                run.publish(BEST, lambda folder: _adapter_only(learner, folder))
            yield Validated(state.step, result.loss, result.accuracy, result.weight, best)
        if last or state.step % recipe.save_every == 0 or _stale(plan, state):
            yield _save(run, state, learner, recipe.keep_last)
            saved = state.step
    if _stale(plan, state) and state.step < total:
        yield Noted(
            f"stopped early: no better validation loss in {state.stale} validations; the best was at step "
            f"{state.best_step}"
        )


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


def _stale(plan: Plan, state: State) -> bool:
    limit = plan.recipe.train.early_stop
    return limit is not None and state.stale >= limit


def _judged(state: State, loss: float, best: bool) -> State:
    if best:
        return replace(state, best_loss=loss, best_step=state.step, stale=0)
    return replace(state, stale=state.stale + 1)


def _save(run: RunFolder, state: State, learner: Learner, keep: int) -> Saved:
    return Saved(state.step, str(run.save_checkpoint(state, learner.save, keep)))


def _adapter_only(learner: Learner, folder: Path) -> None:
    learner.save(folder)
    (folder / "optimizer.safetensors").unlink()
