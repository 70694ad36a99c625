"""The model as it was trained, base and adapter apart, asked what its export will be asked.

    answers = ask_live(source, questions, folder)       # in a process of its own

It stands on the base's original weights, as the export does, in float32 where memory allows: so what is
found between the two is the export's doing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from burnish import __version__
from burnish.backends.base import Learner, Sampling
from burnish.data.batches import Example, collate
from burnish.errors import EXIT_WILL_NOT_FIT, UserError
from burnish.export import answers as answers_
from burnish.export.answers import Answers, joined
from burnish.export.questions import LONGEST, Questions
from burnish.export.source import Source
from burnish.machine.child import ask, tell
from burnish.machine.probe import probe
from burnish.models.spec import ModelSpec
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import Recipe, dump, load


def ask_live(source: Source, questions: Questions, folder: Path) -> Answers:
    """folder: where the two processes leave files for each other.

    Raises UserError where the model does not fit, exit code 3, and what its backend raises.
    """
    recipe, asked, told = folder / "recipe.yaml", folder / "questions.json", folder / "live.npz"
    model = {"model": str(source.base.folder.resolve())}
    recipe.write_text(dump(source.recipe.model_copy(update=model)), encoding="utf-8")
    questions.save(asked)
    ask("burnish.export.live", [str(recipe), str(source.adapter), str(asked), str(told)])
    return answers_.load(told)


def live_plan(recipe: Recipe, base: ModelSpec) -> Plan:
    """On the original weights: float32 if that fits, else the dtype that fits. UserError where none does."""
    machine = probe(Path.cwd())
    plans = []
    # One row forward, whatever training did at a time.
    longest = min(recipe.train.max_length, LONGEST + 1)
    least = {"micro_batch": 1, "batch_size": 1, "keep_layers": 0, "max_length": longest}
    one = {"quantize": "none", "ask": (), "train": recipe.train.model_copy(update=least)}
    one |= {"evaluate": recipe.evaluate.model_copy(update={"task": "none"})}
    for dtype in ("float32", "auto"):
        plans.append(make_plan(recipe.model_copy(update={**one, "dtype": dtype}), base, machine))
        if plans[-1].fits:
            return plans[-1]
    need, have = plans[-1].total_bytes / 2**30, plans[-1].budget.value / 2**30
    raise UserError(
        f"the proof loads the model twice, one after the other, and it takes {need:.1f} GiB of {have:.1f}",
        "prove it on a larger machine, or leave the proof out with --no-proof: the card will say so",
        EXIT_WILL_NOT_FIT,
    )


def _answer(arguments: Sequence[str]) -> dict[str, Any]:
    recipe_file, adapter, asked, out = arguments
    from burnish import backends
    from burnish.machine.usage import peak_resident_bytes
    from burnish.models.spec import spec_of
    from burnish.training.environment import prepare_environment

    prepare_environment()
    recipe, questions = load(recipe_file), Questions.load(Path(asked))
    plan = live_plan(recipe, spec_of(recipe))
    learner = backends.open(plan)
    try:
        base = losses(learner, questions.rows, questions.targets)
        learner.load_adapter(Path(adapter))
        found = _live(learner, plan, questions)
    finally:
        learner.close()
    answers_.save(replace(found, base=base, peak_bytes=peak_resident_bytes()), Path(out))
    return {"saved": out}


def _live(learner: Learner, plan: Plan, questions: Questions) -> Answers:
    prompts = [a.tokens for a in questions.asked]
    likeliest = Sampling(questions.max_new_tokens, stop_ids=questions.stop_ids)
    greedy = tuple(_without_stop(_new(learner, p, likeliest), questions.stop_ids) for p in prompts)
    drawing = Sampling(questions.drawn_tokens, temperature=1.0, stop_ids=questions.stop_ids)
    draws = tuple(_new(learner, p, replace(drawing, seed=i)) for i, p in enumerate(prompts))
    rows = [(*p, *d) for p, d in zip(prompts, draws, strict=True)]
    places = [range(len(p), len(row)) for p, row in zip(prompts, rows, strict=True)]
    return Answers(
        nll=losses(learner, questions.rows, questions.targets),
        drawn=losses(learner, rows, places),
        greedy=greedy,
        draws=draws,
        prompts=tuple(prompts),
        base=joined([]),
        dtype=plan.weights.value,
        device=plan.device.value,
        program=f"burnish {__version__} ({plan.backend.value})",
        peak_bytes=0,
    )


def losses(learner: Learner, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> np.ndarray:
    """Of the tokens at the places `targets` of each row, end to end."""
    found = []
    for tokens, places in zip(rows, targets, strict=True):
        weights = np.zeros(len(tokens), np.float32)
        weights[list(places)] = 1
        scores = learner.score(collate([Example(np.asarray(tokens, np.int32), weights)]))
        found.append(scores.nll_BT[0, np.asarray(places, np.int64) - 1])
    return joined(found)


def _new(learner: Learner, prompt: Sequence[int], how: Sampling) -> tuple[int, ...]:
    return tuple(token.id for token in learner.generate([prompt], how))


def _without_stop(tokens: tuple[int, ...], stop_ids: Sequence[int]) -> tuple[int, ...]:
    return tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens


if __name__ == "__main__":
    sys.exit(tell(lambda: _answer(sys.argv[1:])))
