"""Whether an export is the model that was trained: its answers beside the live model's, and a verdict.

    proof = judge(live, export, LIMITS["gguf", "q8_0"])
    proof.passed, proof.failures, proof.paragraph

`survival` is how much of what the adapter does to the losses is there in the export: with base b, tuned t and
export e over the same target tokens, ⟨e − b, t − b⟩ / ⟨t − b, t − b⟩. An adapter that was lost gives 0, one
at half its scale about a half. Rounding weights moves losses every way and so hardly along t − b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.export.answers import Answers
from burnish.export.limits import Limits

_NOTHING = 1e-5  # nats: less than this on average is no effect but the arithmetic's own noise
_FAINT = 0.1  # nats: the effect of an adapter below which rounding alone moves its share
_LEAST_SHARE = 0.65  # whatever the noise: a halved adapter may show a little more than a half


@dataclass(frozen=True)
class Proof:
    program: str  # that read the export
    live: str
    dtype: str  # the export was computed in; 'auto': as stored
    live_dtype: str  # the live model was held in
    targets: int
    origin: str  # of the rows
    noise: float  # standard error of `survival`, from what differs beside the adapter's effect
    mean: float  # |difference| of a target's loss, in nats
    worst: float
    divergence: float | None  # KL(live ‖ export) in nats a token, on tokens that the live model drew
    greedy: float | None  # share of prompts with the same likeliest answer
    greedy_prompts: int
    read_alike: float | None  # share of prompts that the program reads as the same tokens
    effect: float  # mean |difference| that the adapter makes
    survival: float | None  # None: the adapter has no effect to survive
    loss: tuple[float, float, float]  # of the base, of the live model, of the export
    limits: Limits
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def paragraph(self) -> str:
        """For the model card and the terminal."""
        said = [
            f"The export was loaded by {self.program} and compared with the base and its adapter as "
            f"{self.live} computes them in {self.live_dtype}, on {self.targets} answer tokens of the "
            f"{self.origin}.",
            f"The loss is {self.loss[2]:.4f} (base {self.loss[0]:.4f}, trained {self.loss[1]:.4f}); a token "
            f"differs by {self.mean:.1e} nats on average and {self.worst:.1e} at the most "
            f"(allowed: {self.limits.mean:g} and {self.limits.worst:g}).",
        ]
        if self.survival is not None:
            said.append(f"{self.survival:.1%} of the adapter's effect is there.")
        if self.divergence is not None:
            said.append(
                f"The divergence from the trained model is {max(0.0, self.divergence):.1e} nats a token."
            )
        if self.greedy is not None:
            same = round(self.greedy * self.greedy_prompts)
            said.append(f"{same} of {self.greedy_prompts} greedy answers are the same, token for token.")
        if self.read_alike is not None:
            said.append(f"{self.read_alike:.0%} of the prompts are read as the tokens of training.")
        said.append("It passed." if self.passed else "It failed: " + "; ".join(self.failures) + ".")
        return " ".join(said)

    def as_json(self) -> dict[str, Any]:
        return {
            **{k: v for k, v in vars(self).items() if k != "limits"},
            "limits": vars(self.limits),
            "passed": self.passed,
        }


def judge(live: Answers, export: Answers, limits: Limits, origin: str) -> Proof:
    """live: with its `base`. Both have answered the same questions."""
    if not (live.nll.shape == export.nll.shape == live.base.shape and live.drawn.shape == export.drawn.shape):
        raise ValueError("the answers are not to the same questions")
    off = np.abs(export.nll.astype(np.float64) - live.nll)
    change = live.nll.astype(np.float64) - live.base
    effect = float(np.abs(change).mean())
    survival, noise = _survival(export.nll - live.nll.astype(np.float64), change)
    drawn = export.drawn.astype(np.float64) - live.drawn
    same = [a == b for a, b in zip(live.greedy, export.greedy, strict=True)]
    read = [a == b for a, b in zip(live.prompts, export.prompts, strict=True)]
    proof = Proof(
        program=export.program,
        live=live.program,
        dtype=export.dtype,
        live_dtype=live.dtype,
        targets=len(off),
        origin=origin,
        noise=noise,
        mean=float(off.mean()),
        worst=float(off.max()),
        divergence=float(drawn.mean()) if len(drawn) else None,
        greedy=sum(same) / len(same) if same else None,
        greedy_prompts=len(same),
        read_alike=sum(read) / len(read) if read else None,
        effect=effect,
        survival=survival,
        loss=(float(live.base.mean()), float(live.nll.mean()), float(export.nll.mean())),
        limits=limits,
        failures=(),
    )
    return Proof(**{**vars(proof), "failures": tuple(_failures(proof, export))})


def _survival(off: np.ndarray, change: np.ndarray) -> tuple[float | None, float]:
    """The share of `change` that is there, its standard error. off: export − live; change: live − base."""
    size = float(change @ change)
    if np.abs(change).mean() <= _NOTHING:
        return None, 0.0
    share = 1 + float(off @ change) / size
    with np.errstate(invalid="ignore"):  # infinite losses are told by their own names
        rest = off - (share - 1) * change
        return share, float(np.sqrt((rest @ rest) / size / len(off)))


def _failures(proof: Proof, export: Answers) -> list[str]:
    limits, found = proof.limits, []
    if not np.isfinite(export.nll).all():
        found.append("it scores NaN or infinity")
    if not proof.mean <= limits.mean:
        found.append(f"tokens differ by {proof.mean:.2e} nats on average, more than {limits.mean:g}")
    if not proof.worst <= limits.worst:
        found.append(f"one token differs by {proof.worst:.2e} nats, more than {limits.worst:g}")
    # What three standard errors explain is no loss.
    beside = max(0.0, min(3 * proof.noise, limits.least - _LEAST_SHARE)) if proof.effect < _FAINT else 0.0
    if proof.survival is not None and not limits.least - beside <= proof.survival <= limits.most + beside:
        found.append(
            f"{proof.survival:.1%} of the adapter's effect is left; expected {limits.least:.0%} to "
            f"{limits.most:.0%}"
        )
    if proof.divergence is not None and not proof.divergence <= limits.divergence:
        found.append(
            f"its answers diverge by {proof.divergence:.2e} nats a token, more than {limits.divergence:g}"
        )
    if export.goes_on:
        found.append(f"{proof.program} does not end an answer at token {', '.join(map(str, export.goes_on))}")
    if proof.greedy is not None and proof.greedy < limits.greedy:
        found.append(
            f"{proof.greedy:.0%} of the greedy answers are the same; expected {limits.greedy:.0%} or more"
        )
    if proof.read_alike is None:
        found.append("no prompt could be asked, so how it reads one is not known")
    elif proof.read_alike < 1:
        found.append(f"{proof.program} reads {1 - proof.read_alike:.0%} of the prompts as other tokens")
    return found
