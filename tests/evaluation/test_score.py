"""Scores: the loss weighted by tokens, and the share of right answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from burnish.backends.base import Model, Scores
from burnish.data.batches import Batch
from burnish.data.conversation import Conversation, Turn
from burnish.errors import NonFinite
from burnish.evaluation import score
from burnish.evaluation.score import run_task, validate
from burnish.evaluation.tasks.text import exact_match
from burnish.inference.generate import Answer


def batch(weights: Sequence[Sequence[float]]) -> Batch:
    w = np.asarray(weights, np.float32)
    zeros = np.zeros(w.shape, np.int32)
    return Batch(zeros, zeros, w, zeros + 1, zeros)


class Given:
    """Scores as they are given, one a batch."""

    def __init__(self, *nll: object, hit: object = False) -> None:
        self.nll, self.hit = [np.asarray(n, np.float32) for n in nll], hit

    def score(self, batch: Batch) -> Scores:
        nll = self.nll.pop(0)
        return Scores(nll, np.broadcast_to(np.asarray(self.hit), nll.shape))


def test_a_batch_counts_by_its_tokens_not_by_its_rows():
    """The mean of the batches' means would be 2.5, and of the rows' 2.0."""
    batches = [batch([[1, 1, 1, 1]]), batch([[1, 0, 0, 0]])]
    model = Given([[1, 1, 1, 1]], [[4, 9, 9, 9]], hit=[[True, False, False, True]])
    result = validate(cast(Model, model), batches)
    assert result.loss == pytest.approx((4 * 1 + 4) / 5)
    assert result.accuracy == pytest.approx(3 / 5)
    assert result.weight == 5


def test_weights_weigh():
    result = validate(cast(Model, Given([[1, 3]], hit=[[True, False]])), [batch([[0.5, 1.5]])])
    assert (result.loss, result.accuracy, result.weight) == (2.5, 0.25, 2.0)


def test_many_small_losses_do_not_vanish():
    """Summed in float64: in float32 the tail would be lost."""
    n = 100_000
    result = validate(cast(Model, Given([[1e6] + [0.01] * n])), [batch([[1.0] * (n + 1)])])
    assert result.loss * (n + 1) == pytest.approx(1e6 + 0.01 * n, abs=0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error(bad: float):
    with pytest.raises(NonFinite, match="validation loss"):
        validate(cast(Model, Given([[1, bad]])), [batch([[1, 1]])])


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [("a", "a", True), (" a\n", "a", True), ("a", " a", True), ("A", "a", False), ("a b", "a  b", False),
     ("a.", "a", False), ("", "", True)],
)  # fmt: skip
def test_exact_match(answer: str, expected: str, right: bool):
    assert exact_match(answer, expected) is right


class Echo:
    """As a renderer, a tokenizer and a model: an answer says how long its prompt was."""

    stop_ids = (2,)

    def prompt(self, conversation: Conversation) -> list[int]:
        return [ord(c) for t in conversation.turns for c in t.content]


def test_each_answer_is_held_against_its_own_row(monkeypatch: pytest.MonkeyPatch):
    """Prompts are answered by length, short ones first; the results come in the order of the rows."""
    seen: list[Any] = []

    def answered(model: Any, tokenizer: Any, prompts: Any, how: Any, stop: Any, at_once: int) -> list[Answer]:
        seen.append(([len(p) for p in prompts], how, stop, at_once))
        return [Answer(str(len(p)), 1, "stop", "", "") for p in prompts]

    monkeypatch.setattr(score, "answer", answered)
    rows = [
        Conversation((Turn("system", "s"), Turn("user", "q" * n), Turn("assistant", right)), False, "f:1")
        for n, right in ((5, "6"), (2, "3"), (9, "wrong"), (1, " 2 "))
    ]
    echo: Any = Echo()
    results = run_task("exact-match", echo, echo, echo, rows, 7, ("\n",), at_once=3)
    (lengths, how, stop, at_once) = seen[0]
    assert lengths == [2, 3, 6, 10] and at_once == 3
    assert (how.max_new_tokens, how.temperature, how.stop_ids, stop) == (7, 0.0, (2,), ("\n",))
    assert [r.question for r in results] == ["q" * 5, "q" * 2, "q" * 9, "q"]
    assert [r.answer for r in results] == ["6", "3", "10", "2"]
    assert [r.right for r in results] == [True, True, False, True]
