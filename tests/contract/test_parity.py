"""The reference and torch from the same weights on the same data: equal scores, equal losses, equal words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import burnish.backends
from burnish.backends.base import Learner, Sampling
from tests.contract.clauses import BATCH, HALVES, LR, OTHER, PROMPTS, assert_same_tokens
from tests.tiny import FAMILIES, tiny_model, tiny_plan

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


def pair(model: Path, folder: Path, **overrides: Any) -> tuple[Learner, Learner]:
    """Reference and torch with one adapter, drawn by torch and trained for a step, and new optimizers."""
    start, torch, reference = (
        burnish.backends.open(tiny_plan(model, backend=backend, **overrides))
        for backend in ("torch", "torch", "reference")
    )
    start.step([OTHER], LR)
    folder.mkdir()
    start.save(folder)
    reference.load_adapter(folder)
    torch.load_adapter(folder)
    return reference, torch


@pytest.mark.parametrize("options", MODELS, ids=name)
def test_scores_and_losses(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", **options)
    reference, torch = pair(model, tmp_path / "adapter")
    a, b = reference.score(BATCH), torch.score(BATCH)
    np.testing.assert_allclose(a.nll_BT, b.nll_BT, atol=1e-5)
    np.testing.assert_array_equal(a.hit_BT, b.hit_BT)
    for _ in range(2):
        r, t = reference.step(HALVES, LR), torch.step(HALVES, LR)
        np.testing.assert_allclose([r.loss, r.grad_norm], [t.loss, t.grad_norm], rtol=1e-4)
        assert (r.weight, r.tokens) == (t.weight, t.tokens)


@pytest.mark.parametrize("overrides", RECIPES, ids=name)
def test_ten_steps(overrides: dict[str, Any], model: Path, tmp_path: Path) -> None:
    reference, torch = pair(model, tmp_path / "adapter", **overrides)
    losses = [(reference.step(m, LR).loss, torch.step(m, LR).loss) for m in [HALVES, [OTHER]] * 5]
    assert losses[-2][0] < 0.95 * losses[0][0], "nothing was learned, so nothing was compared"
    np.testing.assert_allclose([r for r, _ in losses], [t for _, t in losses], atol=1e-4)
    np.testing.assert_allclose(reference.score(BATCH).nll_BT, torch.score(BATCH).nll_BT, atol=1e-3)


@pytest.mark.parametrize("keep_layers", [0, 3])
def test_generation(keep_layers: int, model: Path, tmp_path: Path) -> None:
    reference, torch = pair(model, tmp_path / "adapter", train={"keep_layers": keep_layers})
    sampled = Sampling(8, temperature=1.3, top_p=0.9, top_k=60, repetition_penalty=1.3, seed=1)
    for how in (Sampling(8), sampled):
        assert_same_tokens(list(reference.generate(PROMPTS, how)), list(torch.generate(PROMPTS, how)))
