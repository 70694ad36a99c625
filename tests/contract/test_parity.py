"""Two backends from the same weights on the same data: equal scores, equal losses, equal words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import burnish.backends
from burnish.backends.base import Learner, Sampling
from tests.contract.clauses import (
    BATCH,
    HALVES,
    LR,
    OTHER,
    PROMPTS,
    assert_same_tokens,
    differing,
    largest_difference,
    saved,
)
from tests.contract.conftest import NO_MLX
from tests.tiny import FAMILIES, tiny_model, tiny_plan

OTHERS = ["torch", pytest.param("mlx", marks=NO_MLX)]
MODELS: list[dict[str, Any]] = [
    *({"family": f, "tied": tied} for f in FAMILIES for tied in (True, False)),
    {"family": "mistral", "sliding_window": 4},  # shorter than the examples
    {"family": "llama", "attention_bias": True, "mlp_bias": True},
]
RECIPES: list[dict[str, Any]] = [
    {},
    {"lora": {"rank": 2, "alpha": 8, "rslora": True, "targets": ["q_proj", "down_proj"], "last_layers": 2}},
    {"train": {"clip": None, "weight_decay": 0.3, "keep_layers": 3}},
    {"train": {"clip": 0.05}},
]


def name(value: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) or "plain"


def opened(model: Path, backend: str, adapter: Path | None = None, **overrides: Any) -> Learner:
    learner = burnish.backends.open(tiny_plan(model, backend=backend, **overrides))
    if adapter is not None:
        learner.load_adapter(adapter)
    return learner


def pair(model: Path, folder: Path, backend: str, **overrides: Any) -> tuple[Learner, Learner]:
    """Reference and another with one adapter, drawn by that and trained for a step, and new optimizers."""
    start = opened(model, backend, **overrides)
    start.step([OTHER], LR)
    folder.mkdir()
    start.save(folder)
    return opened(model, "reference", folder, **overrides), opened(model, backend, folder, **overrides)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("options", MODELS, ids=name)
def test_scores_and_losses(options: dict[str, Any], backend: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", **options)
    reference, other = pair(model, tmp_path / "adapter", backend)
    a, b = reference.score(BATCH), other.score(BATCH)
    np.testing.assert_allclose(a.nll_BT, b.nll_BT, atol=1e-5)
    np.testing.assert_array_equal(a.hit_BT, b.hit_BT)
    for _ in range(2):
        r, t = reference.step(HALVES, LR), other.step(HALVES, LR)
        np.testing.assert_allclose([r.loss, r.grad_norm], [t.loss, t.grad_norm], rtol=1e-4)
        assert (r.weight, r.tokens) == (t.weight, t.tokens)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("overrides", RECIPES, ids=name)
def test_ten_steps(overrides: dict[str, Any], backend: str, model: Path, tmp_path: Path) -> None:
    reference, other = pair(model, tmp_path / "adapter", backend, **overrides)
    losses = [(reference.step(m, LR).loss, other.step(m, LR).loss) for m in [HALVES, [OTHER]] * 5]
    assert losses[-2][0] < 0.95 * losses[0][0], "nothing was learned, so nothing was compared"
    np.testing.assert_allclose([r for r, _ in losses], [t for _, t in losses], atol=1e-4)
    np.testing.assert_allclose(reference.score(BATCH).nll_BT, other.score(BATCH).nll_BT, atol=1e-3)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("keep_layers", [0, 3])
def test_generation(keep_layers: int, backend: str, model: Path, tmp_path: Path) -> None:
    reference, other = pair(model, tmp_path / "adapter", backend, train={"keep_layers": keep_layers})
    sampled = Sampling(8, temperature=1.3, top_p=0.9, top_k=60, repetition_penalty=1.3, seed=1)
    for how in (Sampling(8), sampled):
        assert_same_tokens(list(reference.generate(PROMPTS, how)), list(other.generate(PROMPTS, how)))


@NO_MLX
@pytest.mark.parametrize(("one", "another"), [("mlx", "torch"), ("torch", "mlx")])
def test_a_run_begun_on_one_goes_on_on_the_other(one: str, another: str, model: Path, tmp_path: Path) -> None:
    """Adapter, moments and the count of steps are in the folder, whoever wrote it."""
    begun = opened(model, one)
    for micros in (HALVES, [OTHER], HALVES):
        begun.step(micros, LR)
    middle = saved(begun, tmp_path / "middle")
    taken = opened(model, another)
    taken.load(tmp_path / "middle")
    np.testing.assert_allclose(begun.score(BATCH).nll_BT, taken.score(BATCH).nll_BT, atol=1e-5)
    assert differing(middle, saved(taken, tmp_path / "taken")) == [], "the round trip changed bytes"
    restarted = opened(model, another, tmp_path / "middle")  # its moments begin at nothing
    for micros in ([OTHER], HALVES):
        a, b = begun.step(micros, LR), taken.step(micros, LR)
        np.testing.assert_allclose([a.loss, a.grad_norm], [b.loss, b.grad_norm], rtol=1e-4)
        restarted.step(micros, LR)
    here, there, without = (
        saved(x, tmp_path / n) for n, x in (("here", begun), ("there", taken), ("without", restarted))
    )
    file = "adapter_model.safetensors"
    assert largest_difference(here, there, file) < 1e-3
    assert largest_difference(here, without, file) > 5e-3, "moments make no difference, so nothing was shown"
