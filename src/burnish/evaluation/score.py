"""Scores of a model on held-out rows: the loss per target token, and the share of right answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from burnish.backends.base import Model, Sampling
from burnish.data.batches import Batch
from burnish.data.conversation import Conversation
from burnish.data.render import Renderer
from burnish.errors import NonFinite
from burnish.evaluation.tasks.text import exact_match
from burnish.inference.generate import answer
from burnish.models.tokenizer import Tokenizer
from burnish.planning.memory import ANSWERS_AT_ONCE

TASKS: dict[str, Callable[[str, str], bool]] = {"exact-match": exact_match}


@dataclass(frozen=True)
class Validation:
    loss: float  # Σ w·nll / Σ w, in nats
    accuracy: float  # weighted share of targets that were the most likely token
    weight: float


@dataclass(frozen=True)
class Result:
    question: str
    expected: str
    answer: str
    right: bool


def validate(model: Model, batches: Sequence[Batch]) -> Validation:
    """Over all batches, weighted by tokens. Raises NonFinite where a score is NaN."""
    loss = hits = weight = 0.0
    for batch in batches:
        scores = model.score(batch)
        w = batch.weights_BT.astype(np.float64)
        loss += float((w * scores.nll_BT).sum())
        hits += float((w * scores.hit_BT).sum())
        weight += float(w.sum())
    if not np.isfinite(loss):
        raise NonFinite(f"validation loss {loss}")
    return Validation(loss / weight, hits / weight, weight)


def run_task(
    task: str,
    model: Model,
    tokenizer: Tokenizer,
    renderer: Renderer,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    at_once: int = ANSWERS_AT_ONCE,
) -> list[Result]:
    """Greedy answers to every conversation's last question, each held against its expected answer. at_once:
    prompts answered side by side.
    """
    prompts = [renderer.prompt(c.prompt) for c in conversations]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like with like: less padding
    how = Sampling(max_new_tokens, stop_ids=tokenizer.stop_ids)
    given = answer(model, tokenizer, [prompts[i] for i in by_length], how, stop, at_once=at_once)
    texts = dict(zip(by_length, (a.text for a in given), strict=True))
    return [
        Result(
            c.turns[-2].content if len(c.turns) > 1 else "",
            c.answer,
            texts[i],
            TASKS[task](texts[i], c.answer),
        )
        for i, c in enumerate(conversations)
    ]
