"""A whole run as one generator of events: recipe in, adapter folder out.

    for event in run_job(recipe, out, resume=False, skip_before=False, stop=stop):
        show(event)

Reads top to bottom as the pipeline does. Every event is recorded in the run folder before anyone hears of it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from burnish import __version__, backends
from burnish.backends.base import Learner
from burnish.data.formats import question, takes_chat
from burnish.data.prepare import Prepared, prepare
from burnish.data.render import Renderer
from burnish.data.training_template import NO_TEMPLATE, OWN
from burnish.errors import OutOfMemory, UserError, all_problems
from burnish.evaluation.score import run_task
from burnish.inference.generate import answer, check_window, sampling
from burnish.machine.probe import Machine, probe
from burnish.models.spec import ModelSpec, spec_of
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from burnish.planning.memory import Part
from burnish.planning.plan import Choice, Plan, make_plan
from burnish.recipe import Recipe, dump
from burnish.runs.events import (
    Answered,
    Event,
    Finished,
    Interrupted,
    Noted,
    Planned,
    Rehearsed,
    Scored,
    Stepped,
    Validated,
)
from burnish.runs.folder import ADAPTER, BEST, RunFolder, State
from burnish.training.rehearsal import predicted_bytes, rehearse
from burnish.training.too_large import ran_out, too_large
from burnish.training.trackers import check_trackers, open_trackers
from burnish.training.train import train

PINNED = ("micro_batch", "keep_layers", "ahead", "loss_slice", "pack", "row_length", "lengths")
SAME = ("backend", "device", "weights", "compute", "quantize")


@dataclass(frozen=True)
class Material:
    """What a run is made of, read and checked before anything is written or loaded."""

    plan: Plan
    prepared: Prepared
    tokenizer: Tokenizer
    questions: tuple[tuple[str, list[int]], ...]  # of `ask:`, as text and as the prompt's tokens


def gather(recipe: Recipe, near: Path) -> Material:
    """Read model, data and machine, and plan. Raises UserError for whatever is wrong with any of them."""
    spec = spec_of(recipe)
    plan = make_plan(recipe, spec, probe(near))  # refuses an impossible recipe before the data is read
    prepared = prepare(recipe, load_tokenizer(spec.folder, recipe.trust_remote_code))
    tokenizer = prepared.tokenizer  # with the template that the data is proven under
    _check_vocabulary(prepared, spec)
    wishes = {"train.early_stop": recipe.train.early_stop, "evaluate.task": recipe.evaluate.task}
    for key, wish in wishes.items():
        if wish not in (None, "none") and not prepared.valid.examples:
            raise UserError(
                f"{key}: {wish}, but there are no validation rows",
                "set data.valid=FILE.jsonl or data.valid_share=0.1",
            )
    questions = _questions(recipe, prepared, tokenizer, spec.max_positions)
    return Material(plan.tightened(prepared.stats), prepared, tokenizer, questions)


def _questions(
    recipe: Recipe, prepared: Prepared, tokenizer: Tokenizer, positions: int
) -> tuple[tuple[str, list[int]], ...]:
    renderer, found = Renderer(tokenizer, recipe.data.loss_on), []
    chat = takes_chat(recipe.data, tokenizer.has_chat_template)
    data = recipe.data.model_copy(update={"system": prepared.system})
    for asked in recipe.ask:
        prompt = renderer.prompt(question(asked, data, prepared.format, chat))
        check_window(prompt, positions, "ask: a question")
        found.append((asked if isinstance(asked, str) else json.dumps(asked, ensure_ascii=False), prompt))
    return tuple(found)


def run_job(
    recipe: Recipe, out: Path, *, resume: bool, skip_before: bool, stop: Callable[[], bool]
) -> Iterator[Event]:
    """Raises UserError (bad input; exit 3 where it will not fit), OutOfMemory, NonFinite, Unsupported."""
    began = time.monotonic()
    material = gather(recipe, out)
    check_trackers(recipe)
    backends.check(material.plan)
    if not material.plan.fits:
        raise too_large(material.plan)
    with (
        (RunFolder.resume if resume else RunFolder.begin)(out, recipe) as run,
        open_trackers(recipe, out) as trackers,
    ):
        plan = _pinned(material.plan, run) if resume else material.plan
        if not plan.fits:  # it began with more room than there is now
            raise too_large(plan)
        known = run.read_json("plan.json") if resume else None
        run.write_json("plan.json", plan.summary() | _measured(known or {}))
        run.write_json("environment.json", _environment(plan.machine))
        for event in _events(material, plan, run, resume, skip_before, stop, began):
            run.record(event)
            trackers.hear(event)
            yield event


def _events(
    material: Material,
    plan: Plan,
    run: RunFolder,
    resume: bool,
    skip_before: bool,
    stop: Callable[[], bool],
    began: float,
) -> Iterator[Event]:
    recipe, prepared = plan.recipe, material.prepared
    folder, state, notes = _where(run, resume, _fingerprint(prepared))
    yield Planned(
        str(run.path),
        plan.summary(),
        len(prepared.train.examples),
        len(prepared.valid.examples),
        prepared.train.tokens,
        prepared.train.trained,
        prepared.train.dropped,
        prepared.train.truncated,
        state.step,
    )
    yield from map(Noted, [*_data_notes(prepared), *notes])
    learner = backends.open(plan)
    try:
        if folder is not None:
            learner.load(folder)
        else:
            yield from _begin(learner, material, plan, run, skip_before, stop)
        step, best_step = state.step, state.best_step
        for event in train(plan, learner, prepared, run, state, stop):
            yield event
            if isinstance(event, Stepped):
                step = event.step
            elif isinstance(event, Validated) and event.best:
                best_step = event.step
            elif isinstance(event, Interrupted):
                return
        peak = learner.memory().peak_bytes
        from_step = step
        if recipe.train.best and best_step is not None and best_step != step:
            learner.load_adapter(run.path / BEST)
            from_step = best_step
        adapter = run.publish(ADAPTER, lambda folder: _write_adapter(folder, learner, material))
        yield from _judge("after", learner, material, stop)
        yield Finished(step, str(adapter), from_step, time.monotonic() - began, plan.total_bytes, peak)
    finally:
        learner.close()


def _begin(
    learner: Learner,
    material: Material,
    plan: Plan,
    run: RunFolder,
    skip_before: bool,
    stop: Callable[[], bool],
) -> Iterator[Event]:
    """What comes before the first step of all: memory first, for it may end the run."""
    if not stop():
        rehearsed = _rehearsed(learner, material.prepared, plan)
        run.write_json("plan.json", measured_summary(plan, rehearsed))
        yield rehearsed
    if not skip_before:
        yield from _judge("before", learner, material, stop)


def _rehearsed(learner: Learner, prepared: Prepared, plan: Plan) -> Rehearsed:
    try:
        return rehearse(plan, learner, prepared)
    except OutOfMemory as e:
        raise ran_out(plan, learner.memory().peak_bytes, predicted_bytes(plan), e) from e


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
        return measured_summary(plan, _rehearsed(learner, material.prepared, plan))
    finally:
        learner.close()


def measured_summary(plan: Plan, rehearsed: Rehearsed) -> dict[str, Any]:
    names = ("peak_bytes", "predicted_bytes", "error_percent", "seconds")
    return plan.summary() | {"measured": {name: getattr(rehearsed, name) for name in names}}


def _measured(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a run that is resumed has measured already."""
    return {k: v for k, v in summary.items() if k == "measured"}


def _data_notes(prepared: Prepared) -> Iterator[str]:
    """What a person should know of the data before it is trained."""
    if prepared.template not in (OWN, NO_TEMPLATE):
        yield f"chat template: {prepared.template}, stored with the adapter, for {prepared.template_why}"
    if prepared.bad:
        first = prepared.bad[0]
        yield f"{len(prepared.bad)} rows left out that cannot be used, such as {first.at}: {first.why}"
    if prepared.valid.dropped or prepared.valid.truncated:
        yield (
            f"{prepared.valid.dropped} validation rows left out and {prepared.valid.truncated} cut: "
            "too long, or nothing to score"
        )
    if prepared.normalized:
        yield f"the tokenizer brings Unicode into its normal form: {prepared.normalized} rows differ by that"
    if prepared.trimmed:
        yield f"the chat template removes the outer white space of {prepared.trimmed} texts"


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


def _fingerprint(prepared: Prepared) -> str:
    digest = hashlib.sha256()
    for e in (*prepared.train.examples, *prepared.valid.examples):
        digest.update(e.tokens.tobytes())
        digest.update(e.weights.tobytes())
    return digest.hexdigest()


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


def _check_vocabulary(prepared: Prepared, spec: ModelSpec) -> None:
    """A tokenizer with more words than the model has rows for would read beyond its embeddings."""
    examples = [*prepared.train.examples, *prepared.valid.examples]
    most = max(int(e.tokens.max()) for e in examples)
    if most >= spec.vocab_size:
        raise UserError(
            f"the tokenizer gives token {most}, but the model in {spec.folder} has {spec.vocab_size} words",
            "use the tokenizer that came with the model",
        )


def _environment(machine: Machine) -> dict[str, object]:
    return {
        "burnish": __version__,
        "python": platform.python_version(),
        "command": sys.argv,
        **asdict(machine),
    }
