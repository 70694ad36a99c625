"""A whole run as one generator of events: recipe in, adapter folder out.

    for event in run_job(recipe, out, resume=False, skip_before=False, stop=stop):
        show(event)

Reads top to bottom as the pipeline does. Every event is recorded in the run folder before anyone hears of it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from burnish import __version__, backends
from burnish.backends.base import Learner
from burnish.data.prepare import Prepared
from burnish.data.render import Renderer
from burnish.errors import OutOfMemory, UserError, all_problems
from burnish.evaluation.score import run_task
from burnish.inference.generate import answer, sampling
from burnish.machine.awake import keep_awake
from burnish.machine.probe import Machine
from burnish.planning.memory import Part
from burnish.planning.plan import Choice, Plan
from burnish.recipe import Recipe, dump
from burnish.runs.events import (
    Answered,
    Event,
    Finished,
    Interrupted,
    Noted,
    Planned,
    Recovered,
    Rehearsed,
    Scored,
    Stepped,
    Validated,
)
from burnish.runs.folder import ADAPTER, BEST, RunFolder, State
from burnish.runs.wish import ask
from burnish.training.keeper import Keeper
from burnish.training.material import Material, data_notes, fingerprint, gather
from burnish.training.orders import Aftermath
from burnish.training.pulse import Pulsing
from burnish.training.recover import (
    OUT_OF_MEMORY,
    after_out_of_memory,
    difference,
    first_line,
    lighter,
    take,
)
from burnish.training.rehearsal import predicted_bytes, rehearse
from burnish.training.too_large import ran_out, ran_out_again, too_large
from burnish.training.trackers import check_trackers, open_trackers
from burnish.training.train import train

PINNED = ("micro_batch", "keep_layers", "ahead", "loss_slice", "pack", "row_length", "lengths")
SAME = ("backend", "device", "weights", "compute", "quantize")


def run_job(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool,
    skip_before: bool,
    stop: Callable[[], bool],
    aftermath: Aftermath | None = None,
    pulse: Callable[[], None] = lambda: None,
    renewable: bool = False,
    lock: IO[str] | None = None,
) -> Iterator[Event]:
    """`pulse` is called after each thing that was done: a step, a score, a token of an answer. renewable: a
    new process may take this one's place, with an `aftermath` of why. lock: the run's, where a parent has
    taken it already.

    Raises UserError (bad input; exit 3 where it will not fit), OutOfMemory, NonFinite, Unsupported.
    """
    began = time.monotonic()
    material = gather(recipe, out)
    check_trackers(recipe)
    backends.check(material.plan)
    if not resume and not material.plan.fits:
        raise too_large(material.plan)
    if stop():  # while all that was read: nothing has begun
        return
    with (
        _folder(recipe, out, resume, aftermath, lock) as run,
        open_trackers(recipe, out) as trackers,
        Keeper(run.path, recipe.care, stop, pulse=pulse, awake=_awake(recipe)) as keeper,
    ):
        plan, did = _going_on(material.plan, run, aftermath) if resume else (material.plan, "")
        known = run.read_json("plan.json") if resume else None
        run.write_json("plan.json", plan.summary() | _measured(known or {}))
        run.write_json("environment.json", _environment(plan.machine))
        run.forget_failure()
        session = _Session(material, plan, run, keeper, resume, skip_before, began, pulse, renewable)
        for event in _events(session, keeper.notes(), did, aftermath):
            run.record(event)
            trackers.hear(event)
            yield event


def _awake(recipe: Recipe) -> Callable[[], AbstractContextManager[str]]:
    return lambda: keep_awake(os.getpid()) if recipe.care.keep_awake else nullcontext("")


def _folder(
    recipe: Recipe, out: Path, resume: bool, aftermath: Aftermath | None, lock: IO[str] | None
) -> RunFolder:
    if resume:
        return RunFolder.resume(out, recipe, by_itself=aftermath is not None, lock=lock)
    return RunFolder.begin(out, recipe)


@dataclass(frozen=True)
class _Session:
    """What is known of a run once it has its folder."""

    material: Material
    plan: Plan
    run: RunFolder
    keeper: Keeper
    resume: bool
    skip_before: bool
    began: float
    pulse: Callable[[], None]
    renewable: bool


def _going_on(plan: Plan, run: RunFolder, aftermath: Aftermath | None) -> tuple[Plan, str]:
    """The plan the run began with, cut smaller where that ran out of memory, or where there is less room now;
    and what was done about it.
    """
    begun = plan = _pinned(plan, run)
    wanted = aftermath is not None and aftermath.lighter
    while wanted or not plan.fits:
        way = lighter(plan)
        if way is None:
            raise ran_out_again(plan) if wanted else too_large(plan)
        plan, wanted = way.plan, False
    return plan, difference(begun, plan)


def _events(
    s: _Session, notes: Sequence[str], did: str, aftermath: Aftermath | None
) -> Iterator[Event]:
    prepared, run = s.material.prepared, s.run
    folder, state, damaged = _where(run, s.resume, fingerprint(prepared))
    yield Planned(
        str(run.path),
        s.plan.summary(),
        len(prepared.train.examples),
        len(prepared.valid.examples),
        prepared.train.tokens,
        prepared.train.trained,
        prepared.train.dropped,
        prepared.train.truncated,
        state.step,
    )
    yield from (Noted(n) for n in (*data_notes(prepared), *damaged, *notes))
    if did and aftermath is None:
        yield Noted(f"there is less memory now than when the run began: {did}")
    learner = Pulsing(backends.open(s.plan), s.pulse)
    try:
        if folder is not None:
            learner.load(folder)
        if aftermath is not None:
            yield _recovered(aftermath, state.step, did)
        if folder is None:
            yield from _begin(s, learner)
        yield from _trained(s, learner, state)
    finally:
        learner.close()


def _recovered(aftermath: Aftermath, step: int, did: str) -> Recovered:
    repeated = max(0, aftermath.step - step)
    lost = time.monotonic() - aftermath.since
    how = f"a new process went on{f', with {did}' if did else ''}"
    return Recovered(step, aftermath.cause, how, repeated, lost, aftermath.error)


def _trained(s: _Session, learner: Learner, state: State) -> Iterator[Event]:
    """The steps, the adapter, the answers after."""
    step, best_step = state.step, state.best_step
    for event in train(learner, s.material.prepared, s.run, state, s.keeper, s.renewable):
        yield event
        if isinstance(event, Stepped):
            step = event.step
        elif isinstance(event, Validated) and event.best:
            best_step = event.step
        elif isinstance(event, Interrupted):
            return
    peak = learner.memory().peak_bytes
    from_step = step
    if s.plan.recipe.train.best and best_step is not None and best_step != step:
        learner.load_adapter(s.run.path / BEST)
        from_step = best_step
    adapter = s.run.publish(ADAPTER, lambda folder: _write_adapter(folder, learner, s.material))
    yield from _judge("after", learner, s.material, s.keeper.stop)
    seconds = time.monotonic() - s.began
    ask(s.run.path, "")  # too late to be heeded
    yield Finished(step, str(adapter), from_step, seconds, learner.plan.total_bytes, peak)


def _begin(s: _Session, learner: Learner) -> Iterator[Event]:
    """What comes before the first step of all: memory first, for it may end the run."""
    if not s.keeper.stop():
        rehearsed = yield from _rehearsed(learner, s.material.prepared, s.run, s.renewable)
        s.run.write_json("plan.json", measured_summary(learner.plan, rehearsed))
        yield rehearsed
    if not s.skip_before:
        yield from _judge("before", learner, s.material, s.keeper.stop)


def _rehearsed(
    learner: Learner, prepared: Prepared, run: RunFolder | None, renewable: bool = False
) -> Generator[Event, None, Rehearsed]:
    """Run the longest step; where memory runs out, rung by rung in a smaller cut, if there is a `run` to go
    on with it.
    """
    tries = 0
    while True:
        plan, began = learner.plan, time.perf_counter()
        try:
            return rehearse(plan, learner, prepared)
        except OutOfMemory as e:
            failed, peak = e, learner.memory().peak_bytes
        way = after_out_of_memory(plan, tries, renewable) if run is not None else None
        if way is None and renewable and lighter(plan) is not None:
            raise failed  # a new process tries that
        if way is None or run is None:
            raise ran_out(plan, peak, predicted_bytes(plan), failed) from failed
        take(way, plan, learner, run, failed)
        seconds, text = time.perf_counter() - began, first_line(failed)
        yield Recovered(0, f"{OUT_OF_MEMORY} in the rehearsal", way.did, 0, seconds, text)
        tries += 1


def measure(recipe: Recipe, near: Path) -> dict[str, Any]:
    """The plan's summary with `measured`, as plan.json has it once a run has rehearsed: model and data are
    read, the longest step is run once, and nothing is written. Raises as `run_job` does.
    """
    material = gather(recipe, near)
    plan = material.plan
    backends.check(plan)
    if not plan.fits:
        raise too_large(plan)
    learner = backends.open(plan)
    try:
        return measured_summary(plan, _last(_rehearsed(learner, material.prepared, None)))
    finally:
        learner.close()


def _last(events: Generator[Event, None, Rehearsed]) -> Rehearsed:
    """What a generator returns that has nothing to yield."""
    try:
        next(events)
    except StopIteration as e:
        return e.value
    raise AssertionError("nothing is recovered where there is no run")


def measured_summary(plan: Plan, rehearsed: Rehearsed) -> dict[str, Any]:
    names = ("peak_bytes", "predicted_bytes", "error_percent", "seconds")
    return plan.summary() | {"measured": {name: getattr(rehearsed, name) for name in names}}


def _measured(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that is resumed has measured already."""
    return {k: v for k, v in summary.items() if k == "measured"}


def _where(run: RunFolder, resume: bool, fingerprint: str) -> tuple[Path | None, State, list[str]]:
    """The checkpoint to go on from, its state, and what to say about it; a fresh state if none."""
    found = run.newest_checkpoint() if resume else None
    if found is None:
        if resume:
            run.take_back(0)
        return None, State(data=fingerprint), []
    folder, state, notes = found
    if state.data != fingerprint:
        raise UserError(
            f"the data has changed since {run.path} began",
            "put the old data back, or begin a new run with --out DIR",
        )
    run.take_back(state.step)
    return folder, state, notes


def _judge(when: str, learner: Learner, material: Material, stop: Callable[[], bool]) -> Iterator[Event]:
    """The recipe's questions, then its task over the validation rows."""
    recipe, tokenizer = material.plan.recipe, material.tokenizer
    how = sampling(recipe.generation, tokenizer)
    for text, prompt in material.questions:
        if stop():
            return
        given = answer(learner, tokenizer, [prompt], how, recipe.generation.stop)[0]
        yield Answered(when, text, given.text, given.finish, given.rung, given.reason)
    task, rows = recipe.evaluate, material.prepared.valid.conversations
    if task.task != "none" and rows and not stop():
        results = run_task(
            task.task,
            learner,
            tokenizer,
            Renderer(tokenizer, recipe.data.loss_on),
            rows[: task.rows],
            task.max_new_tokens,
            recipe.generation.stop,
            material.plan.answers_at_once.value,
        )
        yield Scored(when, task.task, sum(r.right for r in results), len(results))


def _write_adapter(folder: Path, learner: Learner, material: Material) -> None:
    """A PEFT folder with the tokenizer and the prompt it was trained with, so that serving uses the same."""
    learner.save(folder)
    (folder / "optimizer.safetensors").unlink()
    material.tokenizer.save(folder)
    (folder / "recipe.yaml").write_text(dump(material.plan.recipe), encoding="utf-8")
    prepared = material.prepared
    prompt = {
        "format": prepared.format,
        "why": prepared.why,
        "system": prepared.system,
        "template": prepared.template,
        "template_why": prepared.template_why,
    }
    (folder / "burnish.json").write_text(
        json.dumps(prompt, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _pinned(plan: Plan, run: RunFolder) -> Plan:
    """The decisions the run began with: free memory may have changed since, but the numbers must not."""
    began = run.read_json("plan.json")
    if began is None:
        return plan
    choices = began["choices"]
    missing = [name for name in (*PINNED, *SAME) if name not in choices]
    if missing:
        raise UserError(
            f"{run.path} was begun by another version of burnish: its plan.json has no {', '.join(missing)}",
            "resume it with that version, or begin a new run with --out DIR",
        )
    moved = [
        f"{name}: {choices[name]['value']} → {getattr(plan, name).value}"
        for name in SAME
        if choices[name]["value"] != getattr(plan, name).value
    ]
    if moved:
        raise all_problems(
            f"{run.path} was begun elsewhere:", moved, "resume it on the same machine and versions"
        )
    values = {name: choices[name]["value"] for name in PINNED}
    values["lengths"] = tuple(values["lengths"])  # JSON knows no tuples
    kept = {name: Choice(value, "as the run began") for name, value in values.items()}
    parts = tuple(Part(p["part"], p["bytes"], p["why"]) for p in began["estimate"])
    shaped = {name: values[name] for name in ("micro_batch", "keep_layers", "ahead", "loss_slice")}
    return replace(plan, **kept, estimate=parts, shape=replace(plan.shape, **shaped))


def _environment(machine: Machine) -> dict[str, object]:
    return {
        "burnish": __version__,
        "python": platform.python_version(),
        "command": sys.argv,
        "folder": os.getcwd(),  # what the recipe's own paths are relative to
        **asdict(machine),
    }
