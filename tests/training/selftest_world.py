"""What the selftest's tests share: a world smaller still, and backends that are broken in one way each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish import backends
from burnish.backends.base import Learner, Sampling, StepStats, Token
from burnish.backends.reference import ReferenceLearner
from burnish.backends.reference_decoder import Dropout
from burnish.data.batches import Batch
from burnish.machine.probe import Gpu, Machine, probe
from burnish.models.spec import read_spec
from burnish.planning.plan import Plan, make_plan
from burnish.training.selftest.checks import CHECKS
from burnish.training.selftest.lab import Lab, recipe_of
from burnish.training.selftest.report import MEMORY, TRUTH, Line
from burnish.training.selftest.world import MODEL, Size, write_start, write_world
from tests.contract.doubles import Wrapped
from tests.tiny import MACHINE

TINY = Size(64, 64, 2, 1, 300, (33, 25, 17, 9), 130, 2, 6)
# On a CPU the peak is that of the whole process, which here has run other tests.
ALONE = [name for name in CHECKS if name not in (TRUTH, MEMORY)]
NO_TORCH = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
NO_BNB = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def made(place: Path, size: Size) -> Path:
    """A selftest's folder, with the numbers to compare with."""
    place.mkdir()
    write_world(place, size)
    recipe = recipe_of(place, "reference", "cpu")
    write_start(place, make_plan(recipe, read_spec(place / MODEL), probe(place)))
    assert list(CHECKS[TRUTH](Lab(place, "reference", "cpu"))) == []
    return place


def looked(lab: Lab, names: Sequence[str], tmp: Path) -> list[Line]:
    """As the child does it, in this process."""
    from burnish.training.selftest.child import main

    file = tmp / "lines.jsonl"
    main([str(lab.place), lab.backend, lab.device, str(file), *names])
    told = [json.loads(text) for text in file.read_text().splitlines()]
    file.unlink()
    assert [t["ended"] for t in told if "ended" in t] == [*names]
    return [Line(**t["line"]) for t in told if "line" in t]


def failed(lines: Sequence[Line]) -> set[str]:
    return {line.check for line in lines if line.status == "failed"}


class OneInAHundred(Wrapped):
    """A gradient that is off by a factor, as where a mean is taken over other tokens."""

    def __init__(self, inner: ReferenceLearner) -> None:
        super().__init__(inner)
        right = inner.gradients

        def wrong(micros: Sequence[Batch], weight: float) -> Any:
            loss, grads = right(micros, weight)
            return loss, {k: 1.01 * g for k, g in grads.items()}

        inner.gradients = wrong  # type: ignore[method-assign]


class OneWeightOfMany(Wrapped):
    """The gradient of one weight is off. Over all of them that would hardly show."""

    def __init__(self, inner: ReferenceLearner) -> None:
        super().__init__(inner)
        right = inner.gradients

        def wrong(micros: Sequence[Batch], weight: float) -> Any:
            loss, grads = right(micros, weight)
            k = next(k for k in grads if "1.self_attn.k_proj.lora_A" in k)
            return loss, {**grads, k: 0.999 * grads[k]}

        inner.gradients = wrong  # type: ignore[method-assign]


class LossOfOtherTokens(Wrapped):
    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        stats = self.inner.step(micros, lr)
        return replace(stats, loss=stats.loss * 1.0001)


class LongRowsGoWrong(Wrapped):
    """As a kernel that counts in too few bits: nothing is said, and only long rows show it."""

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        return self.inner.step([self._cut(m) for m in micros], lr)

    @staticmethod
    def _cut(batch: Batch) -> Batch:
        tokens = batch.tokens_BT.copy()
        tokens[:, 120:] = 0
        return replace(batch, tokens_BT=tokens)


class RedrawnInRecomputation(Wrapped):
    """Seen in peers: a stream of masks, seeded anew each step. A layer that is recomputed draws others."""

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        rng, named = np.random.default_rng(self.inner.state.step), Dropout.mask

        def mask(dropout: Dropout, projection: int, shape: tuple[int, ...]) -> np.ndarray:
            return (rng.random(shape) >= dropout.p) / (1 - dropout.p)

        Dropout.mask = mask  # type: ignore[method-assign, assignment]
        try:
            return self.inner.step(micros, lr)
        finally:
            Dropout.mask = named  # type: ignore[method-assign]


class LoadsNoMoments(Wrapped):
    def load(self, folder: Path) -> None:
        self.inner.load(folder)
        zeros = {k: np.zeros_like(v) for k, v in self.inner.state.first.items()}
        self.inner.state = replace(self.inner.state, first=zeros)


class ForgetsTheLastToken(Wrapped):
    """Off by one: together and alone it answers alike, and wrongly."""

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        return self.inner.generate([p[:-1] or p for p in prompts], how)


class OneTokenOff(Wrapped):
    """As a cache that goes wrong late."""

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        for t in self.inner.generate(prompts, how):
            yield replace(t, logprob=t.logprob - 1e-3) if t.finish == "length" else t


class SecondBest(Wrapped):
    """The likeliest token as `score` sees it is another, though every probability is right."""

    def score(self, batch: Batch) -> Any:
        scores = self.inner.score(batch)
        return replace(scores, hit_BT=np.zeros_like(scores.hit_BT))


class LearnsNothing(Wrapped):
    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        return self.inner.step(micros, 0.0)


class FinalAdapterIgnored(Wrapped):
    """Loaded without a word, and not used."""

    def load_adapter(self, folder: Path) -> None:
        if folder.name != "adapter":
            self.inner.load_adapter(folder)


class LoadsAnotherAdapter(Wrapped):
    def load_adapter(self, folder: Path) -> None:
        self.inner.load_adapter(folder)
        if folder.name == "adapter":
            larger = {k: 3 * v for k, v in self.inner.state.weights.items()}
            self.inner.state = replace(self.inner.state, weights=larger)


class NoDropoutHere(Wrapped):
    """An operation that the device does not have."""

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        if self.inner.plan.recipe.lora.dropout:
            raise RuntimeError("aten::bernoulli is not there")
        return self.inner.step(micros, lr)


def opening(double: type[Wrapped]) -> Callable[[Plan], Learner]:
    right = backends.open

    def open_broken(plan: Plan) -> Learner:
        inner = right(plan)
        assert isinstance(inner, ReferenceLearner)
        return double(inner)

    return open_broken


TORCH = {"torch": "2.13.0"}
MLX = {"mlx": "0.32.4", "mlx-lm": "0.32.2"}


def machine(gpu: str = "", **versions: str) -> Machine:
    gpus = (Gpu("any", gpu, 8 << 30, 8 << 30),) if gpu else ()  # type: ignore[arg-type]
    return replace(MACHINE, gpus=gpus, versions=versions)
