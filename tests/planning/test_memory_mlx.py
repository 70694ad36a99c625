"""Memory with MLX: the arithmetic against counting, and the guide's 14B model on the machines people have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from burnish.models.quantized import Quantization
from burnish.models.spec import ModelSpec, TensorInfo
from burnish.planning.fitted import FITTED
from burnish.planning.memory import Part, Shape, adapter_parameters, total
from burnish.planning.memory_mlx import (
    MOST_REUSED_BYTES,
    estimate_mlx,
    layer_activation_bytes,
    loss_bytes,
    scores_bytes,
    weight_bytes,
)
from burnish.planning.plan import DataStats
from tests.machine import recorded
from tests.machine.recorded import Recorded, with_mlx
from tests.planning.test_plan import GIB, LINEARS, SMALL, SPEC_14B, planned

SHAPE = Shape(
    "metal", "bfloat16", "bfloat16", "none", 16, LINEARS, tuple(range(48)), 1, 2048, 0, 512, 1.0
)  # fmt: skip
STATS = DataStats(200, 1500, 200 * 700, 200 * 400)
MACS = (recorded.M1_16, recorded.M2_MAX_32, recorded.M4_MAX_128)


def parts_of(spec: ModelSpec, shape: Shape) -> dict[str, Part]:
    return {p.name: p for p in estimate_mlx(spec, shape)}


def packed(spec: ModelSpec, bits: int) -> ModelSpec:
    """The same model as MLX lays it on disk."""
    tensors, unpacked = {}, {}
    for name, info in spec.tensors.items():
        if len(info.shape) == 1:
            tensors[name] = info
            continue
        out, into = info.shape
        unpacked[name] = info.shape
        tensors[name] = TensorInfo("U32", (out, into * bits // 32), "x")
        for leaf in ("scales", "biases"):
            tensors[name.removesuffix("weight") + leaf] = TensorInfo("BF16", (out, into // 64), "x")
    return replace(spec, tensors=tensors, unpacked=unpacked, quantization=Quantization(bits, 64))


@pytest.mark.parametrize(("quantize", "bits"), [("4bit", 4), ("8bit", 8)])
@pytest.mark.parametrize("compute", ["bfloat16", "float32"])
def test_what_is_quantised_on_the_way_in_weighs_what_a_packed_folder_does(
    quantize: str, bits: int, compute: str
) -> None:
    shape = replace(SHAPE, quantize=quantize, compute=compute)
    folder = packed(SPEC_14B, bits)
    assert weight_bytes(SPEC_14B, shape) == weight_bytes(folder, shape)
    if compute == "bfloat16":
        assert weight_bytes(folder, shape) == folder.weight_bytes
    per_weight = bits / 8 + (4 if compute == "bfloat16" else 8) / 64
    assert weight_bytes(SPEC_14B, shape) == pytest.approx(per_weight * SPEC_14B.parameters, rel=1e-3)


def test_weights_as_they_are() -> None:
    assert weight_bytes(SPEC_14B, SHAPE) == 2 * SPEC_14B.parameters
    assert weight_bytes(SPEC_14B, replace(SHAPE, weights="float32")) == 4 * SPEC_14B.parameters


def test_a_kept_layer_keeps_its_input_and_every_output_but_the_last() -> None:
    hidden, kv, inner = 5120, 8 * 128, 13824
    one_by_one = hidden + (hidden + kv + kv) + hidden + 2 * inner  # input; q, k, v; o; gate, up
    assert layer_activation_bytes(SPEC_14B, SHAPE) == 2 * 2048 * one_by_one


def test_inputs_and_gradients_trade_places_unless_a_step_has_several_passes() -> None:
    gradients = 4 * adapter_parameters(SPEC_14B, SHAPE)
    inputs = 48 * 2048 * 5120 * 2
    assert inputs > gradients

    def both(shape: Shape) -> tuple[int, int]:
        parts = parts_of(SPEC_14B, shape)
        return parts["saved inputs"].n_bytes, parts["gradients"].n_bytes

    assert both(SHAPE) == (inputs, 0)  # the last layer goes back first: nothing has come yet
    assert both(replace(SHAPE, length=64, rank=64)) == (0, 4 * gradients)  # and the update comes last
    assert both(replace(SHAPE, passes=2)) == (inputs, gradients)


def test_layers_below_the_adapted_ones_keep_nothing() -> None:
    last = replace(SHAPE, layers=(46, 47), rank=1)
    assert parts_of(SPEC_14B, last)["saved inputs"].n_bytes == 2 * 2048 * 5120 * 2
    assert parts_of(SPEC_14B, replace(last, keep_layers=48))["kept activations"].n_bytes == 2 * (
        layer_activation_bytes(SPEC_14B, last)
    )


def test_the_update_is_the_largest_moment_of_short_rows_and_large_adapters() -> None:
    short = replace(SHAPE, length=64, rank=256)
    adapter = adapter_parameters(SPEC_14B, short)
    parts = parts_of(SPEC_14B, short)
    assert parts["largest moment"].why.startswith("the update")
    assert (parts["largest moment"].n_bytes, parts["gradients"].n_bytes) == (12 * adapter, 4 * adapter)
    assert parts["saved inputs"].n_bytes == 0, "what was saved is gone by then"
    assert parts_of(SPEC_14B, SHAPE)["largest moment"].why.startswith("one layer's")


def test_a_layer_that_waits_takes_its_own_buffers_and_its_unpacked_weights() -> None:
    cuda = replace(SHAPE, device="cuda")
    ahead = total(estimate_mlx(SPEC_14B, replace(cuda, ahead=1))) - total(estimate_mlx(SPEC_14B, cuda))
    packed_too = replace(cuda, quantize="4bit")
    unpacked = total(estimate_mlx(SPEC_14B, replace(packed_too, ahead=1)))
    unpacked -= total(estimate_mlx(SPEC_14B, packed_too))
    a_layer = 2 * (SPEC_14B.parameters - 2 * 152064 * 5120) // 48
    assert 0 < ahead < ahead + a_layer < unpacked < ahead + 3 * a_layer


def test_answers_take_a_cache_that_may_be_the_largest_moment() -> None:
    asked = replace(SHAPE, length=64, prompt_tokens=16 * 2048, answer_tokens=16 * 256)
    moment = parts_of(SPEC_14B, asked)["largest moment"]
    cache = (16 * 2048 + 16 * 256) * 48 * 2 * 8 * 128 * 2
    assert moment.why.startswith("answering") and moment.n_bytes > cache
    narrow = parts_of(SPEC_14B, replace(asked, cache_bits=4))["largest moment"]
    assert cache * 0.7 < moment.n_bytes - narrow.n_bytes < cache * 0.75  # 16 bits, and 4 with their scales


def test_a_slice_of_the_loss_is_no_longer_than_what_is_trained() -> None:
    few = replace(SHAPE, loss_share=0.1)  # 205 of 2,048 tokens, in a slice of 256
    hidden_states = 2 * 205 * 5120 * 2
    fit = FITTED["mlx", "metal"]
    assert loss_bytes(SPEC_14B, few, fit) == 256 * 152064 * 8 + 16384 * 5120 * 2 + hidden_states
    assert loss_bytes(SPEC_14B, few, fit) < loss_bytes(SPEC_14B, SHAPE, fit)


def test_attention_scores_are_bounded_and_free_only_on_cuda_in_bfloat16() -> None:
    assert scores_bytes(SPEC_14B, SHAPE) == 4 * (64 << 20)
    assert scores_bytes(SPEC_14B, replace(SHAPE, length=64)) == 8 * 4 * 40 * 64 * 64
    assert scores_bytes(SPEC_14B, replace(SHAPE, device="cuda")) == 0
    assert scores_bytes(SPEC_14B, replace(SHAPE, device="cuda", compute="float32")) > 0


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, quantize="4bit"), replace(SHAPE, compute="float32")])
def test_more_rows_longer_rows_and_kept_layers_never_cost_less(shape: Shape) -> None:
    base = total(estimate_mlx(SPEC_14B, shape))
    for more in ({"micro_batch": 2}, {"length": 4096}, {"keep_layers": 4}, {"rank": 64}, {"passes": 2}):
        assert total(estimate_mlx(SPEC_14B, replace(shape, **more))) > base, more


def test_the_budget_on_metal_is_that_of_mps() -> None:
    for mac in MACS:
        plans = [planned(SMALL, with_mlx(mac), f"backend={b}") for b in ("mlx", "torch")]
        assert plans[0].device.value == "metal" and plans[0].budget == plans[1].budget


@pytest.mark.parametrize(
    ("words", "compute", "rows"),
    [(152064, "bfloat16", 256), (152064, "float32", 128), (4096, "bfloat16", 2048), (10**6, "float32", 64)],
)
def test_the_slice_of_the_loss_is_80_mib_in_what_is_computed_in(words: int, compute: str, rows: int) -> None:
    spec = replace(SMALL, vocab_size=words)
    assert planned(spec, with_mlx(recorded.M4_MAX_128), f"dtype={compute}").loss_slice.value == rows


@pytest.mark.parametrize(
    ("which", "overrides", "device", "compute", "micro", "keep", "fits", "gib"),
    [
        # The guide's model in two bytes a weight, in one and in a half, on a Mac of each size.
        (recorded.M1_16, ("quantize=4bit",), "metal", "float32", 1, 0, False, 12.96),
        (recorded.M2_MAX_32, (), "metal", "float32", 1, 0, False, 31.9),
        (recorded.M2_MAX_32, ("quantize=8bit",), "metal", "float32", 1, 0, False, 19.8),
        (recorded.M2_MAX_32, ("quantize=4bit",), "metal", "float32", 1, 29, True, 19.4),
        (recorded.M4_MAX_128, (), "metal", "bfloat16", 1, 48, True, 35.81),
        (recorded.M4_MAX_128, ("quantize=4bit",), "metal", "bfloat16", 1, 48, True, 17.07),
        (recorded.H100, (), "cuda", "bfloat16", 5, 48, True, 62.79),
        (recorded.H100, ("quantize=4bit",), "cuda", "bfloat16", 5, 48, True, 44.04),
        (recorded.CONTAINER, ("quantize=4bit",), "cpu", "float32", 1, 0, False, 18.57),
    ],
)
def test_the_guides_model_on_the_machines_people_have(
    which: Recorded, overrides: tuple[str, ...], device: str, compute: str, micro: int, keep: int,
    fits: bool, gib: float,
) -> None:  # fmt: skip
    here = with_mlx(which, *(["mlx-cuda-13"] if device == "cuda" else []))
    plan = planned(SPEC_14B, here, "backend=mlx", *overrides, stats=STATS)
    assert (plan.device.value, plan.compute.value) == (device, compute)
    assert (plan.micro_batch.value, plan.keep_layers.value, plan.fits) == (micro, keep, fits)
    assert plan.total_bytes / GIB == pytest.approx(gib, abs=0.06)


def test_on_a_cpu_what_was_freed_stays_so_that_moments_add_up() -> None:
    """The loss is the largest moment here, and a longer row's layers are resident beside it all the same."""
    on_cpu = replace(SHAPE, device="cpu", weights="float32", compute="float32", loss_slice=2048)
    parts, longer = (parts_of(SPEC_14B, replace(on_cpu, length=n)) for n in (512, 1024))
    assert "the loss slice" in parts["largest moment"].why
    assert parts["allocator"].n_bytes > 12 * adapter_parameters(SPEC_14B, on_cpu)
    assert longer["allocator"].n_bytes > parts["allocator"].n_bytes
    assert "allocator" not in parts_of(SPEC_14B, replace(on_cpu, device="metal"))


def test_on_a_cpu_mlx_keeps_no_more_than_its_limit_for_reuse() -> None:
    long = replace(SHAPE, device="cpu", weights="float32", compute="float32", length=32768)
    lingering = 12 * adapter_parameters(SPEC_14B, long) + SPEC_14B.weight_bytes // 4
    assert parts_of(SPEC_14B, long)["allocator"].n_bytes == MOST_REUSED_BYTES + lingering


def test_14b_in_four_bits_at_2048_tokens_fits_in_eleven_gib() -> None:
    """What burnish promises (docs/DESIGN.md), with nothing kept: mlx-lm takes 27."""
    shape = replace(SHAPE, quantize="4bit")
    assert 10 * GIB < total(estimate_mlx(SPEC_14B, shape)) < 11 * GIB


def test_a_step_of_one_row_has_one_pass_and_is_planned_so() -> None:
    mac = with_mlx(recorded.M4_MAX_128)
    kept = "train.keep_layers=0"
    one = planned(SPEC_14B, mac, kept, "train.batch_size=1", stats=STATS)
    eight = planned(SPEC_14B, mac, kept, "train.micro_batch=1", "train.pack=false", stats=STATS)
    difference = eight.total_bytes - one.total_bytes
    assert difference == 4 * adapter_parameters(SPEC_14B, SHAPE)
