"""The last check: a whole run through `run_job`, as `burnish train` makes it, and its adapter loaded anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from burnish.data.formats import question, takes_chat
from burnish.data.render import Renderer
from burnish.inference.generate import answer, sampling
from burnish.machine.probe import probe
from burnish.models.spec import spec_of
from burnish.planning.plan import make_plan
from burnish.runs.events import Answered, Event, Finished, Rehearsed, Saved, Stepped
from burnish.runs.folder import ADAPTER
from burnish.runs.opened import open_folder, tokenizer_of
from burnish.training.job import run_job
from burnish.training.selftest.lab import Lab, recipe_of
from burnish.training.selftest.report import Line
from burnish.training.selftest.world import DATA, PAIRS

CHECK = "whole run"
STEPS, LR, LEARNED = 4, 5e-3, 0.7  # measured: 0.2 to 0.5, whatever the seed
ASK = tuple(prompt for prompt, _ in PAIRS[:2])


def whole_run(lab: Lab) -> Iterator[Line]:
    with lab.folder() as folder:
        recipe = recipe_of(
            lab.place, lab.backend, lab.device, dtype="auto", data={"train": str(lab.place / DATA)},
            train={"max_steps": STEPS, "epochs": STEPS, "save_every": 2, "lr": LR, "schedule": "constant",
                   "clip": 1.0, "keep_layers": "auto", "micro_batch": 2, "max_length": 64},
            ask=list(ASK), generation={"greedy": True, "max_new_tokens": 8},
        )  # fmt: skip
        out = folder / "run"
        events = list(run_job(recipe, out, resume=False, skip_before=True, stop=lambda: False))
        losses = [e.loss for e in events if isinstance(e, Stepped)]
        missing = _missing(events, out)
        told = {e.question: e.answer for e in events if isinstance(e, Answered)}
        yield lab.line(
            CHECK, "a run of four steps: rehearsal, checkpoints, adapter folder",
            "failed" if missing else "passed", f"missing: {', '.join(missing)}" if missing else "",
        )  # fmt: skip
        if losses:
            what = f"loss of the last of {len(losses)} steps, as a share of the first"
            note = f"{losses[0]:.2f} to {losses[-1]:.2f} nats"
            yield lab.judged(CHECK, what, losses[-1] / losses[0], LEARNED, note=note)
        yield _loaded_anew(lab, out, told)


def _missing(events: list[Event], out: Path) -> list[str]:
    saved = [e.step for e in events if isinstance(e, Saved)]
    there = {
        "the rehearsal": any(isinstance(e, Rehearsed) for e in events),
        f"{STEPS} steps": sum(isinstance(e, Stepped) for e in events) == STEPS,
        "a checkpoint in the middle": 2 in saved,
        "the last checkpoint": STEPS in saved,
        "the end": any(isinstance(e, Finished) for e in events),
        "answers": {e.question for e in events if isinstance(e, Answered)} == set(ASK),
        "the adapter folder": (out / ADAPTER / "adapter_model.safetensors").is_file(),
    }
    return [name for name, found in there.items() if not found]


def _loaded_anew(lab: Lab, out: Path, told: dict[str, str]) -> Line:
    """The learner that trained it answered at its end; another one, with the folder's adapter as `burnish
    generate` opens it, must say the same.
    """
    what = f"of {len(told)} answers at the run's end, those that the adapter loaded anew gives otherwise"
    opened = open_folder(out, [])
    spec = spec_of(opened.recipe)
    tokenizer, plan = tokenizer_of(opened, spec.folder), make_plan(opened.recipe, spec, probe(lab.place))
    data, how = opened.recipe.data, sampling(opened.recipe.generation, tokenizer)
    chat = takes_chat(data, tokenizer.has_chat_template)
    renderer = Renderer(tokenizer, data.loss_on)
    prompts = {q: renderer.prompt(question(q, data, opened.format, chat)) for q in told}
    with lab.learner(plan, fresh=True) as learner:
        before, after = {}, {}
        for answers in (before, after):
            for q, prompt in prompts.items():
                answers[q] = answer(learner, tokenizer, [prompt], how)[0].text
            learner.load_adapter(out / ADAPTER)
    if before == after:
        return lab.line(CHECK, what, "failed", "the adapter changes no answer, so nothing was shown")
    return lab.judged(CHECK, what, sum(after[q] != a for q, a in told.items()), 0)
