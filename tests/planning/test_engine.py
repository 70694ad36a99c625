"""Backend, device and numbers: what mlx is given unasked, what it is refused, and what is said of it."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import replace
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.machine.probe import MLX_CUDA
from burnish.models.quantized import Quantization
from burnish.planning.engine import APPLE, MARGIN, MLX_FAMILIES
from burnish.planning.fitted import FITTED
from burnish.planning.layout import ENOUGH_TOKENS
from burnish.planning.plan import DataStats
from tests.machine import recorded
from tests.machine.recorded import Recorded, with_mlx
from tests.planning.test_plan import SMALL, planned

M4 = with_mlx(recorded.M4_MAX_128)
CPU = with_mlx(recorded.CONTAINER)
H100 = with_mlx(recorded.H100)
PACKED = replace(SMALL, quantization=Quantization(4, 64))


def test_auto_takes_mlx_on_an_apple_gpu_for_a_family_it_is_known_to_train() -> None:
    plan = planned(SMALL, M4)
    assert (plan.backend.value, plan.device.value) == ("mlx", "metal")
    assert "known to train qwen2" in plan.backend.reason


@pytest.mark.parametrize(
    ("which", "overrides", "family", "why"),
    [
        (recorded.M4_MAX_128, [], "qwen2", "mlx and mlx-lm not installed: pip install 'burnish[mlx]'"),
        (replace(M4, versions={"mlx": "0.32.4"}), [], "qwen2", "mlx-lm not installed"),
        (M4, [], "mixtral", "mixtral is not among the families"),
        (M4, ["device=cpu"], "qwen2", "trains on every device"),
        (H100, [], "qwen2", "trains on every device"),
        (CPU, [], "qwen2", "trains on every device"),
    ],
)
def test_auto_takes_torch_elsewhere_and_says_why(
    which: Recorded, overrides: list[str], family: str, why: str
) -> None:
    plan = planned(replace(SMALL, model_type=family), which, *overrides)
    assert plan.backend.value == "torch" and why in plan.backend.reason
    assert plan.device.value != "metal"


def test_mlx_lm_has_every_family() -> None:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    from mlx_lm.utils import MODEL_REMAPPING

    for family in MLX_FAMILIES:
        module = MODEL_REMAPPING.get(family, family)
        assert importlib.util.find_spec(f"mlx_lm.models.{module}"), family


@pytest.mark.parametrize("word", APPLE)
@pytest.mark.parametrize(("backend", "device"), [("mlx", "metal"), ("torch", "mps")])
def test_both_words_mean_the_apple_gpu(word: str, backend: str, device: str) -> None:
    choice = planned(SMALL, M4, f"device={word}", f"backend={backend}").device
    assert choice.value == device and (device in choice.reason) == (word != device)


def test_mlx_uses_an_nvidia_gpu_only_where_its_cuda_part_is_installed() -> None:
    without = planned(SMALL, H100, "backend=mlx")
    assert (without.device.value, without.compute.value) == ("cpu", "float32")
    assert without.device.reason == "this build of mlx has no CUDA"
    for package in MLX_CUDA:
        plan = planned(SMALL, with_mlx(recorded.H100, package), "backend=mlx")
        assert (plan.device.value, plan.compute.value) == ("cuda", "bfloat16")
        assert plan.budget.value < 81008 << 20


@pytest.mark.parametrize(
    ("overrides", "weights", "compute"),
    [
        ((), "float32", "float32"),
        (("dtype=bfloat16",), "bfloat16", "float32"),
        (("dtype=float32",), "float32", "float32"),
    ],
)
def test_mlx_on_a_cpu_computes_in_float32_whatever_the_cpu_has(
    overrides: tuple[str, ...], weights: str, compute: str
) -> None:
    plan = planned(SMALL, H100, "backend=mlx", *overrides)  # its CPU has bfloat16
    assert (plan.weights.value, plan.compute.value) == (weights, compute)
    assert planned(SMALL, H100, "backend=torch", "device=cpu").compute.value == "bfloat16"


@pytest.mark.parametrize(
    ("which", "compute"), [(recorded.M1_16, "float32"), (recorded.M4_MAX_128, "bfloat16")]
)
def test_on_metal_dtypes_are_those_of_the_chip(which: Recorded, compute: str) -> None:
    plan = planned(SMALL, with_mlx(which))
    assert (plan.weights.value, plan.compute.value) == ("bfloat16", compute)


def test_a_packed_folder_is_trained_as_it_lies_and_by_mlx_alone() -> None:
    for which, overrides in ((M4, ()), (CPU, ()), (CPU, ("backend=mlx", "quantize=4bit"))):
        plan = planned(PACKED, which, *overrides)
        assert (plan.backend.value, plan.quantize.value) == ("mlx", "4bit")
        assert plan.quantize.reason == "the folder is quantised"


@pytest.mark.parametrize(
    ("which", "spec", "overrides", "message", "hint"),
    [
        (recorded.CONTAINER, SMALL, ["backend=mlx"], "needs mlx and mlx-lm, which are not installed",
         "pip install 'burnish[mlx]'"),
        (replace(CPU, versions={"mlx": "0.32.4"}), SMALL, ["backend=mlx"], "needs mlx-lm, which is not",
         "pip install 'burnish[mlx]'"),
        (recorded.CONTAINER, PACKED, [], "m is an MLX folder; it needs mlx and mlx-lm", "burnish[mlx]"),
        (CPU, PACKED, ["backend=torch"], "m is an MLX folder, quantised in 4 bits; backend torch cannot",
         "set backend=mlx, or use the original model"),
        (CPU, PACKED, ["backend=reference"], "is an MLX folder", "set backend=mlx"),
        (CPU, PACKED, ["quantize=8bit"], "8bit, but m is quantised already, to 4bit", "the original"),
        (CPU, SMALL, ["quantize=8bit"], "8bit is for backend mlx only; this run is planned for torch",
         "quantize=4bit"),
        (CPU, SMALL, ["generation.cache_bits=4"], "generation.cache_bits: 4 is for backend mlx only", "out"),
        (CPU, SMALL, ["generation.cache_bits=8", "backend=reference"], "8 is for backend mlx", "mlx"),
        (H100, SMALL, ["backend=mlx", "device=cuda"], "this build of mlx has no CUDA", "burnish[mlx-cuda]"),
        (CPU, SMALL, ["backend=mlx", "device=cuda"], "cuda is not on this machine; there is: cpu", "doctor"),
        (CPU, SMALL, ["backend=mlx", "device=mps"], "mps is not on this machine; there is: cpu", "doctor"),
        (CPU, SMALL, ["device=metal"], "device: metal is not on this machine; there is: cpu", "doctor"),
        (M4, SMALL, ["device=cuda"], "there is: mps, cpu", "doctor"),
        (M4, SMALL, ["device=cuda", "backend=mlx"], "there is: metal, cpu", "doctor"),
        (CPU, SMALL, ["backend=reference", "device=metal"], "runs on the CPU, not on metal", "device=cpu"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_a_way_out(
    which: Recorded, spec: Any, overrides: list[str], message: str, hint: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        planned(spec, which, *overrides)
    assert hint in (caught.value.hint or "")


def test_eight_bits_and_a_packed_cache_are_planned_for_mlx() -> None:
    plan = planned(SMALL, CPU, "backend=mlx", "quantize=8bit", "generation.cache_bits=4")
    assert plan.quantize.value == "8bit" and plan.recipe.generation.cache_bits == 4


@pytest.mark.parametrize("which", [M4, CPU, with_mlx(recorded.H100, "mlx-cuda-12")])
def test_every_table_knows_every_device_of_mlx(which: Recorded) -> None:
    plan = planned(SMALL, which, "backend=mlx", stats=DataStats(10, 100, 550, 550))
    for table in (MARGIN, ENOUGH_TOKENS, {device for backend, device in FITTED if backend == "mlx"}):
        assert plan.device.value in table
    assert plan.lengths.value == ((64, 112) if plan.device.value == "cpu" else (64, 128))
    assert plan.lengths.reason.startswith("every new shape compiles with mlx")
    assert all(choice.reason for choice in plan.choices().values())
