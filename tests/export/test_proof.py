"""The verdict on made-up answers: what each number is, and that each one alone can end an export."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from burnish.export.answers import Answers
from burnish.export.limits import EIGHT, EXACT, FOUR, HALF, LIMITS, Limits, limits_of
from burnish.export.proof import Proof, judge

RNG = np.random.default_rng(3)
BASE = RNG.uniform(1, 9, 400).astype(np.float32)
CHANGE = RNG.normal(-1, 1, 400).astype(np.float32)
NOISE = RNG.normal(0, 1, 400).astype(np.float32)
DRAWN = RNG.uniform(0, 3, 100).astype(np.float32)
WIDE = Limits(9, 99, 9, -9, 9, 0, "anything")


def answers(**changes: Any) -> Answers:
    plain = Answers(
        nll=BASE + CHANGE, drawn=DRAWN, greedy=((5, 6), (7,), (), (9, 9)), draws=(),
        prompts=((1, 2), (3,), (4, 4), (8,)), base=BASE, dtype="float32", device="cpu",
        program="burnish 0 (none)", peak_bytes=0,
    )  # fmt: skip
    return replace(plain, **changes)


def judged(limits: Limits = EXACT, live: Answers | None = None, **changes: Any) -> Proof:
    export = answers(base=np.zeros(0, np.float32), program="reader 1", **changes)
    return judge(live or answers(), export, limits, "validation rows")


def with_share(share: float) -> np.ndarray:
    return (BASE + np.float32(share) * CHANGE).astype(np.float32)


def test_the_same_answers_pass():
    proof = judged()
    assert proof.passed and proof.failures == ()
    assert (proof.mean, proof.worst, proof.divergence) == (0, 0, 0)
    assert (proof.greedy, proof.read_alike, proof.greedy_prompts, proof.targets) == (1, 1, 4, 400)
    assert proof.survival == pytest.approx(1) and proof.effect == pytest.approx(np.abs(CHANGE).mean())
    assert proof.loss == pytest.approx((BASE.mean(), (BASE + CHANGE).mean(), (BASE + CHANGE).mean()))
    assert (proof.program, proof.live, proof.origin) == ("reader 1", "burnish 0 (none)", "validation rows")


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.5, 0.98, 1.0, 1.02, 2.0])
def test_survival_is_the_share_of_the_adapter(share: float):
    proof = judged(replace(WIDE, least=0.99, most=1.01), nll=with_share(share))
    assert proof.survival == pytest.approx(share, abs=1e-5)
    assert proof.passed == (share == 1)
    if not proof.passed:
        (said,) = proof.failures
        assert said == f"{share:.1%} of the adapter's effect is left; expected 99% to 101%"


def test_rounding_is_not_mistaken_for_a_lost_adapter():
    """Noise as large as a third of the effect, in every direction."""
    proof = judged(FOUR, nll=BASE + CHANGE + NOISE / 3)
    assert proof.survival == pytest.approx(1, abs=0.06) and proof.mean == pytest.approx(0.27, abs=0.03)
    assert proof.passed


def test_a_lost_adapter_is_not_mistaken_for_rounding():
    """An adapter so faint that every token is within the limits of 4 bits."""
    faint = np.float32(0.1) * CHANGE
    live = answers(nll=BASE + faint)
    proof = judged(FOUR, live, nll=BASE)
    assert proof.mean < FOUR.mean and proof.worst < FOUR.worst
    assert [f for f in proof.failures if "adapter's effect" not in f] == [] and not proof.passed


def test_an_adapter_without_effect_has_nothing_to_survive():
    live = answers(nll=BASE + np.float32(1e-7))
    proof = judged(EXACT, live, nll=BASE)
    assert proof.survival is None and proof.passed and proof.effect < 1e-5
    assert "of the adapter's effect" not in proof.paragraph


def test_the_mean():
    proof = judged(replace(WIDE, mean=0.01), nll=BASE + CHANGE + np.float32(0.02))
    assert proof.mean == pytest.approx(0.02, rel=1e-3)
    assert proof.failures == ("tokens differ by 2.00e-02 nats on average, more than 0.01",)
    assert judged(replace(WIDE, mean=0.021), nll=BASE + CHANGE + np.float32(0.02)).passed


def test_differences_do_not_cancel():
    """Half the tokens up and half down: the loss is the same, the model is not."""
    off = np.where(np.arange(400) % 2, 0.5, -0.5).astype(np.float32)
    proof = judged(replace(WIDE, mean=0.1), nll=BASE + CHANGE + off)
    assert proof.loss[1] == pytest.approx(proof.loss[2]) and proof.mean == pytest.approx(0.5, rel=1e-4)
    assert not proof.passed


@pytest.mark.parametrize("by", [2.0, -2.0])
def test_one_token_alone(by: float):
    nll = BASE + CHANGE
    nll[77] += np.float32(by)
    proof = judged(replace(WIDE, worst=1.0), nll=nll)
    assert proof.worst == pytest.approx(2) and proof.failures == (
        "one token differs by 2.00e+00 nats, more than 1",
    )


def test_the_divergence():
    """Of answers that the live model drew, the mean of log p(live) - log p(export)."""
    proof = judged(replace(WIDE, divergence=0.02), drawn=DRAWN + np.float32(0.03))
    assert proof.divergence == pytest.approx(0.03, rel=1e-3)
    assert proof.failures == ("its answers diverge by 3.00e-02 nats a token, more than 0.02",)
    below = judged(replace(WIDE, divergence=0.02), drawn=DRAWN - np.float32(0.03))  # of a finite sample
    assert below.passed and "divergence from the trained model is 0.0e+00" in below.paragraph


def test_nothing_drawn_and_nothing_asked():
    none: dict[str, Any] = {"drawn": np.zeros(0, np.float32), "greedy": (), "prompts": ()}
    proof = judged(EXACT, answers(**none), **none)
    assert (proof.divergence, proof.greedy, proof.read_alike, proof.greedy_prompts) == (None, None, None, 0)
    assert proof.failures == ("no prompt could be asked, so how it reads one is not known",)
    assert "greedy" not in proof.paragraph


def test_the_share_of_greedy_answers():
    """Scores are made without a cache, answers with one. Where 8 bits round, they say little: two words that
    are nearly as likely change places, and all after them is another answer.
    """
    other = ((5, 6), (7,), (1,), (9, 8))
    exact, eight = judged(greedy=other), judged(EIGHT, greedy=other)
    assert exact.greedy == 0.5 and eight.passed
    assert exact.failures == ("50% of the greedy answers are the same; expected 75% or more",)
    assert "2 of 4 greedy answers are the same" in exact.paragraph


def test_a_model_held_in_16_bits_is_compared_as_one():
    """Both sides round as they compute: no good export is nearer than one of bfloat16 then."""
    for what, type in LIMITS:
        own, wide = limits_of(what, type, "float32"), limits_of(what, type, "bfloat16")
        assert own == LIMITS[what, type]
        assert wide.mean >= max(own.mean, HALF.mean) and wide.least <= min(own.least, HALF.least)
        assert wide.greedy <= HALF.greedy and "held in bfloat16" in wide.why


def test_only_a_faint_adapter_is_allowed_its_noise():
    def share(size: float) -> Proof:
        live = answers(nll=BASE + np.float32(size) * CHANGE)
        off = live.nll + np.float32(0.02) * NOISE - np.float32(0.09 * size) * CHANGE
        return judged(replace(WIDE, least=0.95, most=1.05), live, nll=off)

    strong, faint = share(1.0), share(0.01)
    assert strong.effect > 0.1 > faint.effect
    assert faint.passed and faint.survival != pytest.approx(1, abs=0.05)
    assert strong.survival == pytest.approx(0.91, abs=0.01) and not strong.passed


@pytest.mark.parametrize("own", [(3, 3), None, ()])
def test_a_prompt_that_is_read_otherwise(own: tuple[int, ...] | None):
    proof = judged(WIDE, prompts=((1, 2), own, (4, 4), (8,)))
    assert proof.read_alike == 0.75
    assert proof.failures == ("reader 1 reads 25% of the prompts as other tokens",)
    assert "75% of the prompts are read as the tokens of training" in proof.paragraph


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_limit_is_wide_enough_for_what_is_no_number(value: float):
    nll = BASE + CHANGE
    nll[0] = value
    proof = judged(WIDE, nll=nll)
    assert "it scores NaN or infinity" in proof.failures and not proof.passed
    assert sum("on average" in f or "one token" in f for f in proof.failures) == 2


def test_what_is_no_number_among_the_drawn():
    drawn = DRAWN.copy()
    drawn[0] = np.nan
    assert any("diverge" in f for f in judged(WIDE, drawn=drawn).failures)


def test_every_failure_is_listed():
    nll = BASE.copy()
    nll[0] = 60
    proof = judged(EXACT, nll=nll, drawn=DRAWN + 1, prompts=((0,), (0,), (0,), (0,)))
    words = ("on average", "one token", "adapter's effect", "diverge", "reads 100%")
    assert len(proof.failures) == len(words)
    for said, word in zip(proof.failures, words):
        assert word in said and said in proof.paragraph
    assert "It failed: " in proof.paragraph and "It passed" not in proof.paragraph


def test_every_limit_decides():
    """Just within passes, just beyond does not, for each of the five."""
    export: dict[str, Any] = {"nll": BASE + CHANGE * np.float32(0.9), "drawn": DRAWN + np.float32(0.1)}
    at = judged(WIDE, **export)
    assert at.survival is not None and at.divergence is not None
    exact = Limits(at.mean, at.worst, at.divergence, at.survival, at.survival, 0, "what it is")
    assert judged(exact, **export).passed
    for name in ("mean", "worst", "divergence", "most"):
        tight = replace(exact, **{name: getattr(exact, name) * 0.999})
        assert len(judged(tight, **export).failures) == 1, name
    assert len(judged(replace(exact, least=exact.least * 1.001), **export).failures) == 1


def test_answers_to_other_questions():
    others: list[dict[str, Any]] = [{"nll": BASE[:-1]}, {"drawn": DRAWN[1:]}]
    for change in others:
        with pytest.raises(ValueError, match="not to the same questions"):
            judged(WIDE, **change)
    with pytest.raises(ValueError, match="not to the same questions"):
        judged(WIDE, answers(base=np.zeros(0, np.float32)))
    with pytest.raises(ValueError):
        judged(WIDE, greedy=((5, 6),))


@pytest.mark.parametrize("value", [None, np.nan])
def test_it_is_json_and_says_what_was_allowed(value: float | None):
    changes: dict[str, Any] = {} if value is None else {"drawn": DRAWN * np.float32(value)}
    told = json.loads(json.dumps(judged(**changes).as_json()))
    assert told["passed"] is (value is None) and told["limits"]["mean"] == EXACT.mean
    assert told["limits"]["why"] and told["failures"] == list(judged(**changes).failures)


def test_limits_widen_with_rounding_and_every_one_is_below_a_lost_adapter():
    order = [
        [("hf", t) for t in ("float32", "float16", "bfloat16")],
        [("gguf", t) for t in ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")],
        [("mlx", t) for t in ("16bit", "8bit", "4bit")],
    ]
    for keys in order:
        rows = [LIMITS[key] for key in keys]
        for tighter, wider in pairwise(rows):
            assert tighter.mean <= wider.mean and tighter.worst <= wider.worst
            assert tighter.divergence <= wider.divergence
            assert tighter.least >= wider.least and tighter.most <= wider.most
    for limits in LIMITS.values():
        assert 0.75 < limits.least < 1 < limits.most < 1.25 and limits.mean < limits.worst and limits.why
        faint = np.float32(limits.mean / np.abs(CHANGE).mean() / 2) * CHANGE  # half of what is allowed
        live = answers(nll=BASE + faint)
        assert judged(limits, live, nll=BASE).survival == pytest.approx(0, abs=1e-3)
        assert not judged(limits, live, nll=BASE).passed
        assert not judged(limits, live, nll=BASE + faint / 2).passed


def test_each_type_is_judged_by_its_own():
    """What 8 bits may do, 32 may not."""
    off = BASE + CHANGE + np.float32(0.03) * NOISE
    verdicts = {key: judged(limits, nll=off).passed for key, limits in LIMITS.items()}
    assert verdicts["gguf", "q8_0"] and verdicts["mlx", "8bit"] and verdicts["mlx", "4bit"]
    for key in (("hf", "float32"), ("hf", "float16"), ("hf", "bfloat16"), ("gguf", "f32"), ("mlx", "16bit")):
        assert not verdicts[key], key
