"""Broken backends, each wrong in one way that has happened to somebody: every check of the contract has to
see its own.

A double wraps a reference learner and passes on all that it does not break. `broken(make, Double)` opens
such.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from burnish.backends.adapter_folder import read_floats
from burnish.backends.base import Learner, Memory, Sampling, Scores, StepStats, Token
from burnish.backends.reference import ReferenceLearner, fresh_state
from burnish.backends.reference_decoder import Dropout
from burnish.data.batches import Batch
from burnish.errors import NonFinite, UserError
from burnish.planning.plan import Plan
from tests.contract.clauses import Make

COUNTED = Dropout.mask


class Wrapped:
    """Passes everything on. (Inheritance is for test doubles; nothing in src does it.)"""

    def __init__(self, inner: ReferenceLearner) -> None:
        self.inner = inner

    def score(self, batch: Batch) -> Scores:
        return self.inner.score(batch)

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        return self.inner.generate(prompts, how)

    def memory(self) -> Memory:
        return self.inner.memory()

    def moved(self, device: str, dtype: str) -> AbstractContextManager[None]:
        return self.inner.moved(device, dtype)

    def close(self) -> None:
        self.inner.close()

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        return self.inner.step(micros, lr)

    def rehearse(self, micros: Sequence[Batch]) -> None:
        self.inner.rehearse(micros)

    @property
    def plan(self) -> Plan:
        return self.inner.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.inner.plan = plan

    def reshape(self, plan: Plan) -> None:
        self.inner.reshape(plan)

    def save(self, folder: Path) -> None:
        self.inner.save(folder)

    def load(self, folder: Path) -> None:
        self.inner.load(folder)

    def load_adapter(self, folder: Path) -> None:
        self.inner.load_adapter(folder)


def broken(make: Make, double: type[Wrapped]) -> Make:
    def make_broken(**overrides: Any) -> Learner:
        inner = make(**overrides)
        assert isinstance(inner, ReferenceLearner)
        return double(inner)

    return make_broken


class WiderScores(Wrapped):
    def score(self, batch: Batch) -> Scores:
        scores = self.inner.score(batch)
        return replace(scores, nll_BT=scores.nll_BT.astype(np.float64))


class ArrayScalars(Wrapped):
    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        stats = self.inner.step(micros, lr)
        return replace(stats, loss=np.float64(stats.loss))


class UpdatesBeforeChecking(Wrapped):
    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        try:
            return self.inner.step(micros, lr)
        except NonFinite:
            self.inner.step(micros[:1], lr)
            raise


class LosesItsPlaceInTheMasks(Wrapped):
    """The counter moves on although the step failed: only what follows a failure can show it."""

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        try:
            return self.inner.step(micros, lr)
        except Exception:
            self.inner.plan = replace(self.inner.plan, recipe=self._other_seed())
            raise

    def _other_seed(self) -> Any:
        recipe = self.inner.plan.recipe
        return recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 99})})


class RehearsalIsAStep(Wrapped):
    """Nothing moves at a learning rate of 0 but the moments and the counter."""

    def rehearse(self, micros: Sequence[Batch]) -> None:
        self.inner.step(micros, 0.0)


class RehearsalTakesAMask(LosesItsPlaceInTheMasks):
    """What is saved is the same; the masks that follow are others."""

    def rehearse(self, micros: Sequence[Batch]) -> None:
        self.inner.rehearse(micros)
        self.inner.plan = replace(self.inner.plan, recipe=self._other_seed())


class RehearsesForwardOnly(Wrapped):
    def rehearse(self, micros: Sequence[Batch]) -> None:
        for micro in micros:
            self.inner.score(micro)


class ReshapingForgets(Wrapped):
    """A model opened anew would be in that shape, but without what it has learned."""

    def reshape(self, plan: Plan) -> None:
        self.inner.state = fresh_state(plan)
        self.inner.plan = plan


class ReshapingDoesNothing(Wrapped):
    def reshape(self, plan: Plan) -> None:
        pass


class MeanOfMeans(Wrapped):
    """Seen in peers: each micro-batch weighs the same, however few its trained tokens."""

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        evened = [replace(m, weights_BT=m.weights_BT / m.weight) for m in micros]
        return replace(self.inner.step(evened, lr), weight=sum(m.weight for m in micros))


class SumNotMean(Wrapped):
    """The loss is divided by the micro-batch's own weight, not by the step's, and summed."""

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        stats = self.inner.step(micros, lr)
        return replace(stats, loss=stats.loss * len(micros))


class NaNsPassThrough(Wrapped):
    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        try:
            return self.inner.step(micros, lr)
        except NonFinite:
            return StepStats(float("nan"), float("nan"), 1.0, 1)


class NoTokensNoError(Wrapped):
    """Seen in peers: a step without targets passes for a step."""

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        try:
            return self.inner.step(micros, lr)
        except UserError:
            return StepStats(0.0, 0.0, 0.0, 0)


class LoadsHalf(Wrapped):
    """The adapter is in place before the optimizer is found wanting."""

    def load(self, folder: Path) -> None:
        try:
            self.inner.load(folder)
        except UserError:
            weights = read_floats(folder / "adapter_model.safetensors") if folder.exists() else {}
            plain = {k.removeprefix("base_model.model."): v for k, v in weights.items()}
            self.inner.state = replace(self.inner.state, weights={**self.inner.state.weights, **plain})
            raise


class OptimizerComesLater(Wrapped):
    def save(self, folder: Path) -> None:
        self.inner.save(folder)
        if self.inner.state.step == 0:
            save_file({}, folder / "optimizer.safetensors", metadata={"step": "0"})


class ForgetsMoments(Wrapped):
    def save(self, folder: Path) -> None:
        self.inner.save(folder)
        zeros = {k: np.zeros_like(v) for k, v in read_floats(folder / "optimizer.safetensors").items()}
        save_file(zeros, folder / "optimizer.safetensors", metadata={"step": str(self.inner.state.step)})


class ResumesAtStepZero(Wrapped):
    """Seen in peers: bias correction and dropout start again."""

    def load(self, folder: Path) -> None:
        self.inner.load(folder)
        self.inner.state = replace(self.inner.state, step=0)


class RunningMasks(Wrapped):
    """Seen in peers: masks come from a stream, so a recomputed layer, or a resumed run, draws others."""

    def __init__(self, inner: ReferenceLearner) -> None:
        super().__init__(inner)
        self.rng = np.random.default_rng(0)

    def mask(self, dropout: Dropout, projection: int, shape: tuple[int, ...]) -> np.ndarray:
        return (self.rng.random(shape) >= dropout.p) / (1 - dropout.p)

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        counted = Dropout.mask
        Dropout.mask = lambda d, projection, shape: self.mask(d, projection, shape)  # type: ignore[assignment]
        try:
            return self.inner.step(micros, lr)
        finally:
            Dropout.mask = counted


class OneMaskForAllSteps(RunningMasks):
    def mask(self, dropout: Dropout, projection: int, shape: tuple[int, ...]) -> np.ndarray:
        return COUNTED(replace(dropout, step=0), projection, shape)


class OneMaskForAllMicros(RunningMasks):
    def mask(self, dropout: Dropout, projection: int, shape: tuple[int, ...]) -> np.ndarray:
        return COUNTED(replace(dropout, micro=0), projection, shape)


class DropoutDoesNothing(Wrapped):
    def __init__(self, inner: ReferenceLearner) -> None:
        lora = inner.plan.recipe.lora.model_copy(update={"dropout": 0.0})
        inner.plan = replace(inner.plan, recipe=inner.plan.recipe.model_copy(update={"lora": lora}))
        super().__init__(inner)


class PadsPrompts(Wrapped):
    """Shorter prompts are filled on the left with token 0, and nothing masks it."""

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        width = max(map(len, prompts))
        return self.inner.generate([[0] * (width - len(p)) + list(p) for p in prompts], how)


class RowAfterRow(Wrapped):
    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        return iter(sorted(self.inner.generate(prompts, how), key=lambda t: t.row))


class LogprobsAfterTemperature(Wrapped):
    """Not the model's own distribution (to first order)."""

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        for t in self.inner.generate(prompts, how):
            yield replace(t, logprob=t.logprob * 0.9)


class OneStream(Wrapped):
    """All rows draw from one stream: what a row says depends on its neighbours."""

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        return self.inner.generate(prompts, replace(how, seed=how.seed + sum(map(len, prompts))))


class KeepsCaches(Wrapped):
    def __init__(self, inner: ReferenceLearner) -> None:
        super().__init__(inner)
        self.kept: list[Iterator[Token]] = []

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        self.kept.append(self.inner.generate(prompts, how))
        tokens = self.kept[-1]  # neither named in a `for` nor closed: it stays where it is
        while (token := next(tokens, None)) is not None:
            yield token


class WrongAlpha(Wrapped):
    def save(self, folder: Path) -> None:
        self.inner.save(folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))


class RsloraUntold(Wrapped):
    def save(self, folder: Path) -> None:
        self.inner.save(folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": False}))


class OwnNames(Wrapped):
    """PEFT warns of missing keys, and goes on without an adapter."""

    def save(self, folder: Path) -> None:
        self.inner.save(folder)
        path = folder / "adapter_model.safetensors"
        plain = {k.removeprefix("base_model.model."): v for k, v in read_floats(path).items()}
        save_file(plain, path, metadata={"format": "pt"})


class Leaks(Wrapped):
    """Seen in peers: packed examples see each other."""

    def _leaking(self, batch: Batch) -> Batch:
        return replace(batch, segments_BT=(batch.segments_BT > 0).astype(np.int32))

    def score(self, batch: Batch) -> Scores:
        return self.inner.score(self._leaking(batch))

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        return self.inner.step([self._leaking(m) for m in micros], lr)
