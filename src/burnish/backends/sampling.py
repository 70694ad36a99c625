"""The next token from a row of logits: the one function that every backend's `generate` calls.

    rng = stream(how.seed, row)
    token, logprob = choose(logits_V, seen, how, rng)

Choosing is done in float64 on the host, so that backends whose logits agree choose alike; a row of 152,064
logits costs well under a millisecond greedily and some ten milliseconds where top-p has to sort all of them.
The order of the filters is that of transformers: repetition penalty, temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from burnish.backends.base import Sampling
from burnish.errors import NonFinite


def stream(seed: int, row: int) -> np.random.Generator:
    """The random stream of one row. Philox counts, so a stream owes nothing to what other rows have drawn."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, row])))


def choose(
    logits_V: np.ndarray, seen: Collection[int], how: Sampling, rng: np.random.Generator
) -> tuple[int, float]:
    """A token id and its log-probability under the model's own distribution (before penalty, temperature,
    filters).

    logits_V: [V], any float dtype, not changed. seen: the ids of prompt and answer so far, in any order,
    repeats allowed. Greedy takes the lowest id of equals; sampling draws exactly one number from `rng`.
    Raises NonFinite where a logit is NaN or +inf.
    """
    logits_V = np.asarray(logits_V, np.float64)
    top = logits_V.max()
    if not np.isfinite(top):
        raise NonFinite(f"the largest logit is {top}")
    logprobs_V = logits_V - top - np.log(np.exp(logits_V - top).sum())
    scores_V = _penalised(logits_V, seen, how.repetition_penalty)
    if how.temperature == 0:
        token = int(scores_V.argmax())
        return token, float(logprobs_V[token])
    ids, probs = _candidates(scores_V / how.temperature, how.top_k, how.top_p)
    cumulative = probs.cumsum()
    at = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    token = int(ids[min(at, len(ids) - 1)])
    return token, float(logprobs_V[token])


def _penalised(scores_V: np.ndarray, seen: Collection[int], penalty: float) -> np.ndarray:
    """Each seen token once, however often it was seen (Keskar et al. 2019, as transformers does)."""
    if penalty == 1 or not seen:
        return scores_V
    ids = np.fromiter(seen, np.int64, len(seen))  # repeats write the same value again
    scores_V = scores_V.copy()
    scores_V[ids] = np.where(scores_V[ids] < 0, scores_V[ids] * penalty, scores_V[ids] / penalty)
    return scores_V


def _candidates(scores_V: np.ndarray, top_k: int, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """The ids that may be drawn, and their (unnormalised) probabilities.

    Top-p keeps the smallest set of most likely tokens whose probability reaches top_p, at least one.
    """
    probs_V = np.exp(scores_V - scores_V.max())
    ids = np.arange(len(probs_V))
    if 0 < top_k < len(ids):
        ids = np.sort(np.argpartition(-probs_V, top_k - 1)[:top_k])
    if top_p < 1:
        ids = ids[np.argsort(-probs_V[ids], kind="stable")]
        cumulative = probs_V[ids].cumsum()
        ids = ids[: int(np.searchsorted(cumulative, top_p * cumulative[-1])) + 1]
    return ids, probs_V[ids]
