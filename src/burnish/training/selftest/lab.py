"""One backend on one device, with the selftest's model: what the checks measure with.

lab = Lab(place, "torch", "mps")
taken = lab.taken([collate(rows)], train={"keep_layers": 0})     # loss and gradients of one step
apart(taken, other)                                              # the largest relative difference
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish import backends
from burnish.backends.adapter_folder import OPTIMIZER, read_floats
from burnish.backends.base import Learner
from burnish.data.batches import Batch, Example
from burnish.errors import UserError
from burnish.machine.probe import probe
from burnish.models.spec import read_spec
from burnish.planning.plan import DataStats, Plan, make_plan
from burnish.recipe import Recipe
from burnish.training.selftest.report import TRUTH, Line, Status
from burnish.training.selftest.world import MODEL, START, Size, read_size

BETA1 = 0.9  # AdamW's: after one step from rest the first moment is (1 - β1) g


@dataclass(frozen=True)
class Taken:
    """What a step was: its loss, and its gradient by every adapter weight."""

    loss: float
    gradients: Mapping[str, np.ndarray]

    def write(self, path: Path) -> None:
        np.savez(path, loss=self.loss, **self.gradients)  # type: ignore[arg-type]

    @staticmethod
    def read(path: Path) -> Taken:
        """Raises UserError where nothing was written."""
        if not path.is_file():
            raise UserError(f"there is nothing to compare with: {TRUTH} are missing")
        with np.load(path) as file:
            return Taken(float(file["loss"]), {k: file[k] for k in file.files if k != "loss"})


@dataclass(frozen=True)
class Lab:
    place: Path  # of this selftest: world.write_world has filled it
    backend: str
    device: str

    @property
    def where(self) -> str:
        return f"{self.backend} on {self.device}"

    @property
    def size(self) -> Size:
        return read_size(self.place)

    def plan(self, stats: DataStats | None = None, **overrides: Any) -> Plan:
        """Sections are merged over the selftest's own recipe."""
        recipe = recipe_of(self.place, self.backend, self.device, **overrides)
        return make_plan(recipe, read_spec(Path(recipe.model)), probe(self.place), stats)

    def dtypes(self) -> list[str]:
        """float32, and what a recipe would get that names none, where that is another."""
        plan = self.plan(dtype="auto")
        narrow = {plan.weights.value, plan.compute.value} != {"float32"}
        return ["float32", "auto"] if narrow else ["float32"]

    @contextmanager
    def learner(self, plan: Plan, fresh: bool = False) -> Iterator[Learner]:
        """With the selftest's adapter, unless it is to be a `fresh` one."""
        learner = backends.open(plan)
        try:
            if not fresh:
                learner.load_adapter(self.place / START)
            yield learner
        finally:
            learner.close()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """An empty one, gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self.place) as made:
            yield Path(made)

    def taken(self, micros: Sequence[Batch], **overrides: Any) -> Taken:
        """One step from the selftest's adapter, with a learner of its own."""
        plan = self.plan(stats_of(micros), **overrides)
        with self.learner(plan) as learner, self.folder() as folder:
            loss = learner.step(micros, 0.0).loss
            learner.save(folder)
            moments = read_floats(folder / OPTIMIZER)
        first = "exp_avg."
        return Taken(
            loss, {k.removeprefix(first): v / (1 - BETA1) for k, v in moments.items() if k.startswith(first)}
        )

    def line(self, check: str, what: str, status: Status, note: str = "", **more: Any) -> Line:
        return Line(check, self.where, what, status, note=note, **more)

    def judged(self, check: str, what: str, number: float, limit: float, unit: str = "", **more: Any) -> Line:
        """Passed where number ≤ limit: what is not a number is not."""
        passed = number <= limit
        return self.line(
            check, what, "passed" if passed else "failed", number=number, limit=limit, unit=unit, **more
        )


def recipe_of(place: Path, backend: str, device: str, **overrides: Any) -> Recipe:
    asked: dict[str, Any] = {
        "name": "selftest",
        "model": str(place / MODEL),
        "backend": backend,
        "device": device,
        "dtype": "float32",
        "lora": {"rank": 8, "alpha": 16},
        "train": {
            "batch_size": 4,
            "micro_batch": 4,
            "max_length": read_size(place).long,
            "keep_layers": 0,
            "pack": False,
            "clip": None,
            "lr": 1e-3,
            "seed": 5,
        },
    }
    for key, value in overrides.items():
        asked[key] = {**asked[key], **value} if isinstance(value, Mapping) and key in asked else value
    return Recipe.model_validate(asked)


def stats_of(rows: Sequence[Batch]) -> DataStats:
    """As data preparation would tell the plan."""
    lengths = tuple(int(n) + 1 for b in rows for n in (b.segments_BT > 0).sum(1))
    trained = sum(int(np.count_nonzero(b.weights_BT)) for b in rows)
    return DataStats(len(lengths), max(lengths), sum(lengths), trained, lengths)


def sliced(batch: Batch, start: int, stop: int) -> Batch:
    """Some rows of a batch, padding as it was."""
    keep = slice(start, stop)
    return Batch(
        batch.tokens_BT[keep],
        batch.targets_BT[keep],
        batch.weights_BT[keep],
        batch.segments_BT[keep],
        batch.positions_BT[keep],
    )


def answered(prompt: Sequence[int], answer: Sequence[int]) -> Example:
    """A prompt and its answer, of which the answer counts."""
    weights = np.array([0.0] * len(prompt) + [1.0] * len(answer), np.float32)
    return Example(np.array([*prompt, *answer], np.int32), weights)


def loss_apart(a: Taken, b: Taken) -> float:
    """Relative to `b`."""
    return abs(a.loss - b.loss) / abs(b.loss)


def gradients_apart(a: Taken, b: Taken) -> tuple[float, str]:
    """Of the adapter weight whose gradients differ most: the difference's norm by the norm of `b`'s, and its
    name. A mean over all would hide one wrong weight of many.
    """
    if a.gradients.keys() != b.gradients.keys():
        return float("inf"), f"other weights: {sorted(a.gradients.keys() ^ b.gradients.keys())[:2]}"
    norm, found = np.linalg.norm, {}
    for k, g in b.gradients.items():
        size = float(norm(g))
        if size == 0:
            return float("inf"), f"no gradient reaches {k}"
        found[k] = float(norm(a.gradients[k] - g)) / size
    if bad := [k for k, v in found.items() if not np.isfinite(v)]:
        return float("inf"), f"not finite: {bad[0]}"
    worst = max(found, key=lambda k: found[k])
    return found[worst], worst.removeprefix("base_model.model.model.")


def apart(a: Taken, b: Taken) -> float:
    """The larger of both."""
    loss = loss_apart(a, b)
    return max(loss, gradients_apart(a, b)[0]) if np.isfinite(loss) else float("inf")
