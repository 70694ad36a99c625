"""A base in 4 or 8 bits: what is trained on it is what would be trained on the same numbers written out.

The folders are mlx-lm's own; `written_out` makes an ordinary float32 folder of one, which transformers reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
pytest.importorskip("torch", reason="tiny models are made with torch and transformers")

from mlx_lm.utils import load_model, quantize_model, save_config, save_model  # noqa: E402

from burnish import backends  # noqa: E402
from burnish.data.packing import packed_split  # noqa: E402
from burnish.errors import Unsupported, UserError  # noqa: E402
from burnish.planning.plan import Plan  # noqa: E402
from tests.backends.peft_truth import assert_same, scores, truth  # noqa: E402
from tests.backends.test_packing_equal import Measured, apart  # noqa: E402
from tests.tiny import random_batch, random_example, tiny_model, tiny_plan  # noqa: E402

# Whole groups of 64.
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
RNG = np.random.default_rng(3)
PACKED = packed_split([random_example(RNG, n, 280) for n in (30, 9, 17, 25, 4, 12)], 2, 48)
SCORED = random_batch(RNG, 3, 30, 280)

Predicate = Callable[[str, Any], bool | dict[str, Any]]


def quantized(model: Path, folder: Path, bits: int, predicate: Predicate | None = None, **how: Any) -> Path:
    """What mlx-lm's own conversion writes."""
    how = {"group_size": 64, **how}
    base, config = load_model(model)
    base, config = quantize_model(base, config, bits=bits, quant_predicate=predicate, **how)
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_model(folder, base)
    save_config(config, folder / "config.json")
    return folder


def written_out(folder: Path, out: Path) -> Path:
    """The same model in float32, by MLX's definition of its format."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    how, stored = config.pop("quantization"), mx.load(str(folder / "model.safetensors"))
    plain = {}
    for key, value in stored.items():
        path, _, kind = key.rpartition(".")
        if f"{path}.scales" not in stored:
            plain[key] = value.astype(mx.float32)
        elif kind == "weight":
            own = how.get(path, how)
            biases, mode = stored.get(f"{path}.biases"), own.get("mode", "affine")
            scales, size, bits = stored[f"{path}.scales"], own["group_size"], own["bits"]
            plain[key] = mx.dequantize(value, scales, biases, size, bits, mode=mode).astype(mx.float32)
        elif kind == "bias":
            plain[key] = value
    mx.save_safetensors(str(out / "model.safetensors"), plain, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def plan_of(model: Path, **overrides: Any) -> Plan:
    train = {"clip": None, "weight_decay": 0, **overrides.pop("train", {})}
    return tiny_plan(model, **{"backend": "mlx", **overrides}, train=train)


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2's head is the quantised embedding; Llama has a head of its own."""
    return tiny_model(tmp_path_factory.mktemp(request.param) / "model", request.param, **WIDE)


@pytest.mark.parametrize(("bits", "size", "keep"), [(4, 64, 0), (4, 64, 2), (8, 64, 0), (4, 32, 1)])
def test_a_quantised_folder(wide: Path, bits: int, size: int, keep: int, tmp_path: Path) -> None:
    folder = quantized(wide, tmp_path / "quantised", bits, group_size=size)
    plain = written_out(folder, tmp_path / "plain")
    plan = plan_of(folder, train={"keep_layers": keep})
    assert plan.quantize.value == f"{bits}bit"
    measured = Measured(plan, tmp_path)
    mine = measured.step(PACKED)
    assert_same(mine, truth(measured.start, PACKED, plain), loss=1e-5)
    np.testing.assert_allclose(
        measured.learner.score(SCORED).nll_BT, scores(measured.folder, SCORED, plain), atol=2e-4
    )
    original = truth(measured.start, PACKED, wide)
    assert abs(mine[0] - original[0]) > (1e-2 if bits == 4 else 1e-5), "nothing was rounded"


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_by_the_recipe_is_quantised_by_mlx_lm(wide: Path, bits: int, tmp_path: Path) -> None:
    plans = {
        "folder": plan_of(quantized(wide, tmp_path / "quantised", bits)),
        "recipe": plan_of(wide, quantize=f"{bits}bit"),
    }
    found = {}
    for who, plan in plans.items():
        (tmp_path / who).mkdir()
        measured = Measured(plan, tmp_path / who)
        found[who] = measured.step(PACKED)
    assert max(apart(found["folder"], found["recipe"])) < 1e-6


def test_layers_of_different_bits(wide: Path, tmp_path: Path) -> None:
    """As mlx-lm's mixed recipes store them: the config says which layer differs."""

    def predicate(path: str, module: Any) -> bool | dict[str, Any]:
        if "layers.0.mlp" in path:
            return {"group_size": 32, "bits": 8}
        return "layers.1.self_attn.q_proj" not in path

    folder = quantized(wide, tmp_path / "quantised", 4, predicate)
    assert len(json.loads((folder / "config.json").read_text())["quantization"]) > 3
    right_or_refused(folder, tmp_path)


@pytest.mark.parametrize(
    ("bits", "how"), [(6, {}), (3, {}), (4, {"mode": "mxfp4", "group_size": 32})], ids=str
)
def test_other_formats_of_mlx(wide: Path, bits: int, how: dict[str, Any], tmp_path: Path) -> None:
    right_or_refused(quantized(wide, tmp_path / "quantised", bits, **how), tmp_path)


def right_or_refused(folder: Path, tmp: Path) -> None:
    try:
        measured = Measured(plan_of(folder), tmp)
    except (Unsupported, UserError) as e:
        assert "quanti" in str(e) and len(str(e)) > 30, f"this does not say why: {e}"
        return
    assert_same(measured.step(PACKED), truth(measured.start, PACKED, written_out(folder, tmp / "plain")))


def test_a_quantised_base_is_small(tmp_path: Path) -> None:
    """Held packed: opening it takes a fraction of what the float32 model takes."""
    model = tiny_model(tmp_path / "model", "llama", **{**WIDE, "hidden_size": 256, "intermediate_size": 512})
    taken = []
    for quantize in ("none", "8bit", "4bit"):
        before = mx.get_active_memory()
        learner = backends.open(plan_of(model, quantize=quantize))
        learner.step(PACKED, 1e-3)
        taken.append(mx.get_active_memory() - before)
        del learner
    assert taken[1] < 0.5 * taken[0] and taken[2] < 0.4 * taken[0] and taken[2] < taken[1], taken


def test_a_group_that_does_not_fit_is_told(tmp_path: Path) -> None:
    """A hidden size of 40 has no whole groups of 64: what cannot be quantised is said, or left as it is."""
    narrow: dict[str, Any] = {"hidden_size": 40, "intermediate_size": 128, "num_hidden_layers": 2}
    model = tiny_model(tmp_path / "model", "llama", **narrow)
    try:
        measured = Measured(plan_of(model, quantize="4bit"), tmp_path)
    except (Unsupported, UserError) as e:
        assert "64" in str(e), f"this does not say why: {e}"
        return
    plain = written_out(quantized(model, tmp_path / "quantised", 4), tmp_path / "plain")
    assert_same(measured.step(PACKED), truth(measured.start, PACKED, plain))
