"""Choosing the next token: on numbers that can be checked by eye, and against transformers' own filters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from burnish.backends.base import Sampling
from burnish.backends.sampling import choose, stream
from burnish.errors import NonFinite

LOGITS = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))


def drawn(
    how: Sampling, logits: np.ndarray = LOGITS, seen: tuple[int, ...] = (), n: int = 4000
) -> np.ndarray:
    """How often each token comes, of n draws."""
    rng = stream(0, 0)
    return np.bincount([choose(logits, seen, how, rng)[0] for _ in range(n)], minlength=len(logits)) / n


def test_greedy_takes_the_first_of_equals_and_draws_nothing() -> None:
    rng = stream(0, 0)
    assert choose(np.array([1.0, 3.0, 3.0]), (), Sampling(1), rng)[0] == 1
    assert rng.random() == stream(0, 0).random()


def test_logprob_is_the_models_own_whatever_the_filters() -> None:
    filtered = (Sampling(1, 0.3, top_k=1), Sampling(1, 2.0, top_p=0.1))
    for how in (Sampling(1, repetition_penalty=1.5), *filtered):
        token, logprob = choose(LOGITS + 7, (3,), how, stream(0, 0))
        assert token == 0
        assert logprob == pytest.approx(np.log(0.5), abs=1e-6)


def test_draws_follow_the_distribution() -> None:
    np.testing.assert_allclose(drawn(Sampling(1, temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(drawn(Sampling(1, temperature=0.5)), squared / squared.sum(), atol=0.03)


def test_filters_cut_where_they_should() -> None:
    np.testing.assert_allclose(drawn(Sampling(1, 1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(drawn(Sampling(1, 1.0, top_p=0.79)), [0.625, 0.375, 0, 0], atol=0.03)
    assert (drawn(Sampling(1, 1.0, top_p=0.81)) > 0).tolist() == [True, True, True, False]
    assert (drawn(Sampling(1, 1.0, top_p=1e-9)) > 0).tolist() == [True, False, False, False]
    assert (drawn(Sampling(1, 1.0, top_k=99)) > 0).all()


def test_penalty_counts_a_token_once_and_leaves_the_logits_alone() -> None:
    logits = np.array([2.0, 1.5, -1.0])
    how = Sampling(1, repetition_penalty=1.3)
    assert choose(logits, [0], how, stream(0, 0))[0] == 0  # 2 / 1.3 = 1.54
    assert choose(logits, [0, 0, 0], how, stream(0, 0))[0] == 0
    assert choose(logits, [0], Sampling(1, repetition_penalty=1.4), stream(0, 0))[0] == 1  # 2 / 1.4 = 1.43
    assert choose(np.array([-1.0, -1.2]), {0}, how, stream(0, 0))[0] == 1  # negative ones are multiplied
    np.testing.assert_array_equal(logits, [2.0, 1.5, -1.0])


@pytest.mark.parametrize("seed", range(5))
def test_the_same_tokens_survive_as_in_transformers(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, seen = rng.normal(0, 2, 50).astype(np.float32), [3, 3, 9, 20]
    how = Sampling(1, temperature=0.8, top_p=0.7, top_k=20, repetition_penalty=1.2)
    scores = torch.tensor(logits)[None]
    ids = torch.tensor([seen])
    for step in (RepetitionPenaltyLogitsProcessor(1.2), TemperatureLogitsWarper(0.8), TopKLogitsWarper(20),
                 TopPLogitsWarper(0.7)):
        scores = step(ids, scores)  # type: ignore[arg-type]
    expected = torch.softmax(scores[0], -1).numpy()
    got = drawn(how, logits, tuple(seen))
    assert not got[expected == 0].any()
    np.testing.assert_allclose(got, expected, atol=0.04)


def test_streams_are_their_own() -> None:
    draws = {(seed, row): stream(seed, row).random() for seed in range(4) for row in range(4)}
    assert len(set(draws.values())) == 16
    assert stream(2, 3).random() == draws[2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(NonFinite):
        choose(np.array([0.0, bad, 1.0]), (), Sampling(1), stream(0, 0))
    assert choose(np.array([0.0, -np.inf, 1.0]), (), Sampling(1), stream(0, 0))[0] == 2
