"""The selftest: good backends pass it, and each broken one fails what it breaks, and nothing else.

In this process, on a model smaller still, against the NumPy reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from burnish import backends
from burnish.backends.base import Memory, StepStats, Token
from burnish.data.batches import Batch
from burnish.machine.probe import probe
from burnish.models.spec import read_spec
from burnish.planning.plan import make_plan
from burnish.training.rehearsal import predicted_bytes
from burnish.training.selftest import checks, packed
from burnish.training.selftest.lab import Lab, Taken, gradients_apart, recipe_of
from burnish.training.selftest.limits import EXACT, limits_of, memory_limit
from burnish.training.selftest.report import MEMORY
from burnish.training.selftest.world import MODEL, write_start, write_world
from tests.contract import doubles
from tests.contract.conftest import NO_MLX
from tests.contract.doubles import Wrapped
from tests.training.selftest_world import (
    ALONE,
    NO_BNB,
    NO_TORCH,
    TINY,
    FinalAdapterIgnored,
    ForgetsTheLastToken,
    LearnsNothing,
    LoadsAnotherAdapter,
    LoadsNoMoments,
    LongRowsGoWrong,
    LossOfOtherTokens,
    NoDropoutHere,
    OneInAHundred,
    OneTokenOff,
    OneWeightOfMany,
    RedrawnInRecomputation,
    SecondBest,
    failed,
    looked,
    made,
    opening,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("selftest") / "place", TINY)


@pytest.mark.parametrize(
    "backend", ["reference", pytest.param("torch", marks=NO_TORCH), pytest.param("mlx", marks=NO_MLX)]
)
def test_a_good_backend_passes(backend: str, place: Path, tmp_path: Path) -> None:
    names = [n for n in ALONE if n != "4-bit base"]
    lines = looked(Lab(place, backend, "cpu"), names, tmp_path)
    assert [line for line in lines if line.status != "passed"] == []
    assert {line.check for line in lines} == set(names)


BROKEN: dict[type[Wrapped], set[str]] = {
    OneInAHundred: {"loss and gradients", "long row"},  # both are held against the truth
    OneWeightOfMany: {"loss and gradients", "long row"},
    LossOfOtherTokens: {"loss and gradients", "long row"},
    LongRowsGoWrong: {"long row"},
    RedrawnInRecomputation: {"dropout"},
    doubles.DropoutDoesNothing: {"dropout"},
    doubles.Leaks: {"packing"},
    doubles.SumNotMean: {"micro-batches"},
    doubles.MeanOfMeans: {"micro-batches"},
    doubles.ResumesAtStepZero: {"resume"},
    LoadsNoMoments: {"resume"},
    doubles.PadsPrompts: {"generation"},
    ForgetsTheLastToken: {"generation"},
    OneTokenOff: {"generation"},
    SecondBest: {"generation"},
    doubles.LogprobsAfterTemperature: {"generation"},
    LearnsNothing: {"whole run"},
    FinalAdapterIgnored: {"whole run"},
    LoadsAnotherAdapter: {"whole run"},
    NoDropoutHere: {"dropout", "resume"},
    Wrapped: set(),  # wrapping alone breaks nothing
}


@pytest.mark.parametrize("double", BROKEN, ids=lambda d: d.__name__)
def test_a_broken_backend_fails_what_it_breaks(
    double: type[Wrapped], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "open", opening(double))
    names = [n for n in ALONE if n != "4-bit base"]
    lines = looked(Lab(place, "reference", "cpu"), names, tmp_path)
    assert failed(lines) == BROKEN[double]
    assert {line.check for line in lines} == set(names), "the others went on"


def test_words_of_an_error_are_in_the_line(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "open", opening(NoDropoutHere))
    (line,) = looked(Lab(place, "reference", "cpu"), ["dropout"], tmp_path)
    assert line.note.startswith("RuntimeError: aten::bernoulli is not there (")


@pytest.mark.parametrize(
    ("double", "notes"),
    [
        (LearnsNothing, ["", "6.94 to 6.94 nats", "the adapter changes no answer, so nothing was shown"]),
        (LoadsAnotherAdapter, ["", None, ""]),
    ],
)
def test_an_adapter_that_shows_nothing_is_no_proof(
    double: type[Wrapped],
    notes: list[str | None],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backends, "open", opening(double))
    lines = looked(Lab(place, "reference", "cpu"), ["whole run"], tmp_path)
    assert [line.note for line, n in zip(lines, notes, strict=True) if n is not None] == [
        n for n in notes if n is not None
    ]
    assert lines[-1].status == "failed"
    assert (lines[-1].number is None) == (double is LearnsNothing)


def test_a_device_that_does_not_repeat_itself_is_told_from_a_bad_checkpoint(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng()

    class Noisy(Wrapped):
        def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
            return self.inner.step(micros, lr * (1 + 1e-3 * float(rng.random())))

    for double, said in ((Noisy, "does not repeat itself"), (doubles.ResumesAtStepZero, "")):
        monkeypatch.undo()
        monkeypatch.setattr(backends, "open", opening(double))
        (line,) = looked(Lab(place, "reference", "cpu"), ["resume"], tmp_path)
        assert line.status == "failed" and line.number and line.number > 0
        assert (said in line.note) if said else line.note == ""


@pytest.mark.parametrize(("times", "right"), [(0.2, True), (1.0, True), (1.2, True), (3.0, False)])
def test_memory(times: float, right: bool, place: Path, tmp_path: Path,
                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    class Sized(Wrapped):
        def memory(self) -> Memory:
            return Memory(1, int(times * predicted_bytes(self.inner.plan)), 1 << 40)

    monkeypatch.setattr(backends, "open", opening(Sized))
    memory, speed = looked(Lab(place, "reference", "cpu"), [MEMORY], tmp_path)
    assert memory.status == ("passed" if right else "failed") and "MiB predicted" in memory.text
    assert speed.status == "told" and speed.number and speed.number > 0 and speed.limit is None


def test_without_the_truth_the_rest_is_looked_at(place: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    write_world(bare, TINY)
    recipe = recipe_of(bare, "reference", "cpu")
    write_start(bare, make_plan(recipe, read_spec(bare / MODEL), probe(bare)))
    lines = looked(Lab(bare, "reference", "cpu"), ["loss and gradients", "packing"], tmp_path)
    assert [(line.check, line.status) for line in lines] == [
        ("loss and gradients", "failed"), ("packing", "passed"),
    ]  # fmt: skip
    assert "nothing to compare with" in lines[0].note


# --- four bits ---


@NO_MLX
def test_mlx_packs_what_it_is_unpacked_to(place: Path, tmp_path: Path) -> None:
    (line,) = looked(Lab(place, "mlx", "cpu"), ["4-bit base"], tmp_path)
    assert line.status == "passed" and line.limit == EXACT.same


def has_avx512_bf16() -> bool:
    path = Path("/proc/cpuinfo")
    return path.is_file() and "avx512_bf16" in path.read_text()


@NO_TORCH
@NO_BNB
@pytest.mark.xfail(
    has_avx512_bf16(),
    strict=True,
    reason="bitsandbytes packs a weight for inference when a layer is run without a gradient, as a "
    "recomputed one first is, and what it packs has no gradient afterwards",
)
def test_bitsandbytes_holds_what_it_is_written_out_to(place: Path, tmp_path: Path) -> None:
    (line,) = looked(Lab(place, "torch", "cpu"), ["4-bit base"], tmp_path)
    assert line.status == "passed" and line.limit == EXACT.same, line.text


@NO_TORCH
@NO_BNB
def test_nf4_is_as_bitsandbytes_rounds() -> None:
    import torch
    from bitsandbytes import functional

    weight = np.random.default_rng(0).normal(0, 0.3, (128, 192)).astype(np.float32)
    packed_, state = functional.quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed_, state).numpy()
    np.testing.assert_allclose(packed.nf4(weight), theirs, atol=1e-6)


@NO_MLX
def test_affine_is_as_mlx_unpacks() -> None:
    import mlx.core as mx

    weight = mx.array(np.random.default_rng(0).normal(0, 0.3, (96, 192)).astype(np.float32))
    words, scales, biases = mx.quantize(weight, 64, 4)
    theirs = np.array(mx.dequantize(words, scales, biases, 64, 4))
    ours = packed.affine(np.array(words), np.array(scales), np.array(biases))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@NO_MLX
def test_a_base_that_is_not_what_it_should_be_fails(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = packed.affine
    monkeypatch.setattr(packed, "affine", lambda w, s, b: right(w, s, b) * np.float32(1.01))
    (line,) = looked(Lab(place, "mlx", "cpu"), ["4-bit base"], tmp_path)
    assert line.status == "failed" and line.number and line.number > EXACT.same
    monkeypatch.undo()
    asked = lambda *_: (place / MODEL, "none", place / MODEL)  # noqa: E731
    monkeypatch.setattr(checks, "four_bits", asked)
    (line,) = looked(Lab(place, "mlx", "cpu"), ["4-bit base"], tmp_path)
    assert line.status == "failed" and "nothing was rounded" in line.note


def test_what_a_backend_has_not_is_left_out(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    for backend in ("torch", "reference"):
        (line,) = looked(Lab(place, backend, "cpu"), ["4-bit base"], tmp_path)
        assert line.status == "left out" and line.note


# --- comparing ---


def test_gradients_are_compared_weight_by_weight() -> None:
    a = Taken(1.0, {"big": np.full(100, 10.0), "small": np.array([1e-3, 0.0])})
    b = Taken(1.0, {"big": np.full(100, 10.0), "small": np.array([0.0, 1e-3])})
    assert gradients_apart(a, a) == (0.0, "big")
    number, worst = gradients_apart(b, a)
    assert worst == "small" and number == pytest.approx(2**0.5)
    for wrong in (np.array([np.nan, 0.0]), np.array([np.inf, 0.0])):
        assert gradients_apart(Taken(1.0, {**a.gradients, "small": wrong}), a)[0] == float("inf")
    assert gradients_apart(Taken(1.0, {"big": np.ones(100)}), a)[0] == float("inf")
    dead = Taken(1.0, {**a.gradients, "small": np.zeros(2)})
    assert gradients_apart(dead, dead)[0] == float("inf"), "nothing would have been compared"


def test_what_is_not_a_number_fails(place: Path) -> None:
    lab = Lab(place, "reference", "cpu")
    assert lab.judged("packing", "", float("nan"), 1.0).status == "failed"
    assert lab.judged("packing", "", 1.0, 1.0).status == "passed"


def test_answers_may_part_where_two_tokens_are_equally_likely() -> None:
    def row(*tokens: tuple[int, float]) -> list[Token]:
        return [Token(0, id, logprob) for id, logprob in tokens]

    parted, whole = checks._parted, row((1, -0.5), (2, -0.7))
    assert not parted(whole, row((1, -0.50001), (2, -0.7)), 1e-3)
    assert not parted(whole, row((9, -0.5001), (8, -3.0)), 1e-3), "a tie, and all after it is another text"
    assert parted(whole, row((9, -0.6), (2, -0.7)), 1e-3)
    assert parted(whole, row((1, -0.5), (2, -0.8)), 1e-3)
    assert parted(whole, row((1, -0.5)), 1e-3)


def test_limits_hold_for_the_apple_gpu_too() -> None:
    """Wider, since they are predictions; and a wrong gradient of a tenth is still seen in float32."""
    for device in ("mps", "metal"):
        for dtype in ("float32", "bfloat16"):
            wide, narrow = limits_of(device, dtype), limits_of("cuda", dtype)
            assert wide.gradient > narrow.gradient and wide.loss > narrow.loss
        assert limits_of(device, "float32").gradient < 0.01
        assert memory_limit(device, 1 << 30) > memory_limit("cuda", 1 << 30) > 1 << 30
