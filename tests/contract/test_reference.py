"""The reference itself: its derivatives against finite differences, what it refuses, how it reads 16-bit
weights.

That its arithmetic is the models' is shown in test_parity.py, against torch and transformers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from burnish.backends import adapter_folder, reference_decoder
from burnish.backends.reference import adamw, fresh_state, open_reference
from burnish.backends.reference_decoder import Adapter, Dropout
from burnish.backends.reference_model import read_decoder
from burnish.errors import Unsupported
from burnish.models.spec import read_spec
from burnish.planning.plan import Choice
from tests.contract.clauses import BATCH, HALVES, LR
from tests.tiny import FAMILIES, tiny_model, tiny_plan


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_finite_differences(family: str, tmp_path: Path) -> None:
    """Along a random direction of each adapter weight; with dropout, whose masks are the same each time."""
    plan = tiny_plan(tiny_model(tmp_path, family, num_hidden_layers=2), backend="reference")
    decoder, rng = read_decoder(plan.spec), np.random.default_rng(0)
    weights = {k: rng.normal(0, 0.3, shape) for k, shape in adapter_folder.shapes(plan).items()}
    modules = {m: i for i, m in enumerate(adapter_folder.modules(plan))}
    adapter = Adapter(modules, weights, 0.7, Dropout(0.2, 1, 2, 3))

    def loss(at: dict[str, np.ndarray]) -> float:
        return reference_decoder.gradients(decoder, replace(adapter, weights=at), HALVES[0], 17.0, 64)[0]

    _, grads = reference_decoder.gradients(decoder, adapter, HALVES[0], 17.0, 64)
    assert grads.keys() == weights.keys()
    for key, w in weights.items():
        direction, h = rng.normal(size=w.shape), 1e-5
        up, down = (loss({**weights, key: w + sign * h * direction}) for sign in (1, -1))
        numeric = (up - down) / (2 * h)
        np.testing.assert_allclose((grads[key] * direction).sum(), numeric, rtol=1e-6, atol=1e-8, err_msg=key)


def test_loss_slice_and_lowest_layer_change_nothing(model: Path) -> None:
    """Neither the slicing of the head nor stopping at the first adapted layer touches the numbers."""
    plan = tiny_plan(model, backend="reference", lora={"last_layers": 1})
    whole = open_reference(plan).step(HALVES, LR)
    sliced = open_reference(replace(plan, loss_slice=Choice(3, "test"))).step(HALVES, LR)
    np.testing.assert_allclose([sliced.loss, sliced.grad_norm], [whole.loss, whole.grad_norm], rtol=1e-12)
    everywhere = open_reference(tiny_plan(model, backend="reference"))
    _, all_grads = everywhere.gradients([BATCH], BATCH.weight)
    last = open_reference(plan)
    last.state = replace(last.state, weights={k: everywhere.state.weights[k] for k in last.state.weights})
    _, grads = last.gradients([BATCH], BATCH.weight)
    assert {k.split(".")[2] for k in grads} == {"2"}
    for k, g in grads.items():
        np.testing.assert_allclose(g, all_grads[k], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_is_torchs(weight_decay: float, model: Path) -> None:
    state = fresh_state(tiny_plan(model, backend="reference"))
    key, rng = next(iter(state.weights)), np.random.default_rng(0)
    p = torch.nn.Parameter(torch.tensor(state.weights[key]))
    optimizer = torch.optim.AdamW([p], lr=LR, weight_decay=weight_decay)
    for _ in range(5):
        grads = {k: rng.normal(size=v.shape) for k, v in state.weights.items()}
        state = adamw(state, grads, 0.5, LR, weight_decay)
        p.grad = torch.tensor(grads[key] * 0.5, dtype=torch.float32)
        optimizer.step()
    np.testing.assert_allclose(state.weights[key], p.detach().numpy(), rtol=1e-5, atol=1e-7)


def test_fresh_adapter_does_nothing_and_depends_on_the_seed(model: Path) -> None:
    plan, other = (tiny_plan(model, backend="reference", train={"seed": s}) for s in (5, 6))
    a, b = fresh_state(plan), fresh_state(other)
    for k, v in a.weights.items():
        if ".lora_B." in k:
            assert not v.any()
        else:
            bound = v.shape[1] ** -0.5
            assert 0.8 * bound < np.abs(v).max() <= bound
            assert (v != b.weights[k]).all()


def test_a_mask_is_named_by_its_four_numbers() -> None:
    """Each of them makes another mask, the same ones the same; an element is 0 or 1/(1-p), 1 on average."""
    place = {"seed": 1, "step": 2, "micro": 3}
    mask = Dropout(0.25, **place).mask(4, (40, 500))
    np.testing.assert_array_equal(mask, Dropout(0.25, **place).mask(4, (40, 500)))
    assert set(np.unique(mask)) == {0.0, 1 / 0.75}
    assert abs(mask.mean() - 1) < 0.02
    others = [Dropout(0.25, **{**place, k: 9}).mask(4, (40, 500)) for k in place]
    for other in (*others, Dropout(0.25, **place).mask(5, (40, 500))):
        assert abs(np.corrcoef(mask.ravel(), other.ravel())[0, 1]) < 0.05


def test_bfloat16_and_float16_weights_are_read_exactly(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, -2.5, 3.140625], [1e-30, 65280.0, float("inf")]])
    save_file({"b": values.bfloat16(), "h": values.half(), "f": values}, tmp_path / "t.safetensors")
    read = adapter_folder.read_floats(tmp_path / "t.safetensors")
    for name, dtype in (("b", torch.bfloat16), ("h", torch.float16), ("f", torch.float32)):
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], values.to(dtype).float().numpy())


@pytest.mark.parametrize(("key", "value", "reason"), [
    ("model_type", "gemma3_text", "gemma3_text"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "yarn"),
    ("hidden_act", "gelu", "gelu"),
])
def test_what_is_not_known_is_refused(key: str, value: object, reason: str, tmp_path: Path) -> None:
    tiny_model(tmp_path, "qwen2")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(Unsupported, match=reason):
        read_decoder(read_spec(tmp_path))


def test_a_plan_for_other_hardware_is_refused(model: Path) -> None:
    plan = tiny_plan(model, backend="reference")
    with pytest.raises(Unsupported, match="bfloat16"):
        open_reference(replace(plan, compute=Choice("bfloat16", "test")))
    learner = open_reference(plan)
    for device, dtype in (("cuda", ""), ("", "bfloat16")):
        with pytest.raises(Unsupported), learner.moved(device, dtype):
            pass
