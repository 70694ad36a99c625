"""How long training takes: relations that must hold whatever the constants, and the steps that were timed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from burnish.machine.known import KNOWN
from burnish.machine.rate import Rate, published_rate
from burnish.planning.duration import SPEEDS, Duration, duration, passes_of
from burnish.planning.plan import DataStats, Plan, make_plan
from burnish.recipe import parse
from tests.planning.test_plan import lengths_of, qwen2

BENCH = Path(__file__).parent.parent.parent / "bench"
SPEC_7B = qwen2(3584, 28, 28, 4, 18944, 152064)
SMALL = qwen2(576, 30, 9, 3, 1536, 49152)
H100 = Rate(6e14, 2.8e12, "measured on a test's H100", True)
CPU = Rate(2e11, 5e10, "measured on a test's CPU", True)
PLACES = [
    ("h100-80gb", "torch", "cuda"), ("h100-80gb", "mlx", "cuda"), ("cpu-2-cores", "torch", "cpu"),
    ("cpu-2-cores", "mlx", "cpu"), ("m4-max-128gb", "mlx", "metal"), ("m4-max-128gb", "torch", "mps"),
]  # fmt: skip


def even(n: int, length: int, share: float = 1.0) -> DataStats:
    """n examples of `length` positions; so much of them is supervised."""
    tokens = n * (length + 1)
    return DataStats(n, length + 1, tokens, max(1, round(share * tokens)), (length + 1,) * n)


FULL = even(64, 1024)


def planned(
    *overrides: str, stats: DataStats | None = FULL, where: str = "h100-80gb", spec: Any = SPEC_7B
) -> Plan:
    asked = ["backend=torch", "train.pack=false", "train.micro_batch=4", "train.keep_layers=0", *overrides]
    return make_plan(parse("data: {loss_on: all}", "test", asked), spec, KNOWN[where], stats)


def took(*overrides: str, rate: Rate = H100, **how: Any) -> Duration:
    return duration(planned(*overrides, **how), rate)


@pytest.mark.parametrize(("where", "backend", "device"), PLACES)
def test_every_place_has_its_constants(where: str, backend: str, device: str) -> None:
    plan = planned(f"backend={backend}", f"device={device}", where=where, spec=SMALL)
    found = duration(plan, CPU if device == "cpu" else H100)
    assert plan.device.value == device
    assert 0 < found.low < found.tokens_per_s < found.high
    fitted = SPEEDS[backend, device].rows > 0
    assert ("no step of" in found.why) == (not fitted)
    assert CPU.source in found.why or H100.source in found.why


def test_no_place_that_is_planned_is_missing() -> None:
    assert {(backend, device) for _, backend, device in PLACES} == set(SPEEDS)


@pytest.mark.parametrize(("where", "backend", "device"), PLACES)
def test_what_is_recomputed_costs(where: str, backend: str, device: str) -> None:
    speeds = [
        took(f"backend={backend}", f"train.keep_layers={n}", where=where, spec=SMALL, rate=CPU).tokens_per_s
        for n in (0, 15, 30)
    ]
    assert speeds == sorted(speeds) and len(set(speeds)) == 3


def test_layers_below_the_first_adapted_one_have_no_way_back() -> None:
    few = took("lora.last_layers=4")
    assert few.tokens_per_s > 1.5 * took().tokens_per_s
    assert took("lora.last_layers=4", "train.keep_layers=4").tokens_per_s > few.tokens_per_s


def test_a_longer_row_costs_more_a_token() -> None:
    speeds = [
        took("train.micro_batch=1", "train.max_length=40000", stats=even(8, n)).tokens_per_s
        for n in (4096, 16384, 32768)
    ]
    assert speeds == sorted(speeds, reverse=True) and len(set(speeds)) == 3


def test_a_window_bounds_what_a_long_row_costs() -> None:
    windowed = replace(SPEC_7B, window=1024)
    long, overrides = even(8, 16384), ("train.micro_batch=1", "train.max_length=40000")
    everything = took(*overrides, stats=long).tokens_per_s
    assert took(*overrides, stats=long, spec=windowed).tokens_per_s > everything
    assert took(spec=windowed, stats=even(8, 512)) == took(stats=even(8, 512))


def test_short_rows_are_slower_for_what_is_paid_by_the_pass() -> None:
    short = took("train.micro_batch=1", "train.batch_size=1", stats=even(8, 16))
    assert short.tokens_per_s < took("train.micro_batch=1", "train.batch_size=1").tokens_per_s / 4


def test_a_packed_base_is_unpacked_for_every_product() -> None:
    plain, packed = took(), took("quantize=4bit")
    assert packed.tokens_per_s < plain.tokens_per_s
    # By the pass: the more rows, the less of it.
    lost = []
    for rows in ("train.micro_batch=1", "train.micro_batch=8"):
        lost.append(1 - took("quantize=4bit", rows).tokens_per_s / took(rows).tokens_per_s)
    assert lost[0] > lost[1] > 0


def test_twice_the_rate_is_half_the_time() -> None:
    """Where neither Python nor the framework is waited for."""
    unhurried = replace(SPEEDS["torch", "cuda"], layer_s=0.0)
    plan, twice = planned(), replace(H100, flops=2 * H100.flops, bytes_per_s=2 * H100.bytes_per_s)
    now = duration(plan, H100, unhurried).step_seconds
    assert duration(plan, twice, unhurried).step_seconds == pytest.approx(now / 2)
    # With bytes as they were it is more than half, and the less, the more there is to compute.
    computing = replace(H100, flops=2 * H100.flops)
    gain = now / duration(plan, computing, unhurried).step_seconds
    assert 1.5 < gain < 2


def test_a_pass_of_few_rows_waits_for_the_weights() -> None:
    unhurried = replace(SPEEDS["torch", "cuda"], layer_s=0.0, traffic=1e-9, attention=1e9)
    seconds = {
        n: duration(
            planned("train.micro_batch=1", "train.batch_size=1", stats=even(8, n)), H100, unhurried
        ).step_seconds
        for n in (1, 8, 1024)
    }
    assert seconds[8] == pytest.approx(seconds[1], rel=0.05)  # eight times the work in the same time
    assert seconds[1024] > 4 * seconds[8]


def test_only_supervised_tokens_meet_the_head() -> None:
    stats = even(64, 1024, 0.1)
    asked = ["backend=torch", "train.pack=false", "train.micro_batch=4", "train.keep_layers=0"]
    assisted = make_plan(parse("", "test", asked), SPEC_7B, KNOWN["h100-80gb"], stats)
    assert duration(assisted, H100).tokens_per_s > took(stats=stats).tokens_per_s


def test_a_larger_adapter_costs() -> None:
    assert took("lora.rank=256").tokens_per_s < 0.95 * took("lora.rank=8").tokens_per_s


def test_a_larger_model_is_slower() -> None:
    assert took(spec=qwen2(5120, 48, 40, 8, 13824, 152064)).tokens_per_s < took().tokens_per_s


# ---- padding, packing, steps


def test_padding_is_paid_for_where_it_is_computed() -> None:
    stats = lengths_of(64, 100, 1000)
    torch, mlx = planned(stats=stats), planned("backend=mlx", stats=stats)
    for plan, padded in ((torch, False), (mlx, True)):
        passes, steps = passes_of(plan)
        assert steps == 8 and len(passes) == 16
        assert sum(p.tokens for p in passes) == sum(n - 1 for n in stats.lengths)
        assert all((p.positions > p.tokens) == padded for p in passes)


def test_packed_rows_hold_every_token_once() -> None:
    stats = lengths_of(64, 20, 400)
    plan = planned("backend=mlx", "train.pack=true", "train.max_length=2048", stats=stats)
    passes, steps = passes_of(plan)
    assert steps == 8
    assert sum(p.tokens for p in passes) == sum(n - 1 for n in stats.lengths)
    assert {p.positions % plan.row_length.value for p in passes} == {0}
    assert all(p.pairs == p.positions * plan.row_length.value for p in passes)  # under one mask


def test_packing_pays_where_padding_is_computed() -> None:
    stats = lengths_of(256, 20, 500)
    alone, together = (took("backend=mlx", f"train.pack={p}", stats=stats) for p in ("false", "true"))
    assert together.tokens_per_s > alone.tokens_per_s * 0.95
    # Where none is computed, it changes little, if a pass holds as much.
    whole = ("train.micro_batch=8", "train.keep_layers=0")
    alone, together = (took(*whole, f"train.pack={p}", stats=stats) for p in ("false", "true"))
    assert together.tokens_per_s == pytest.approx(alone.tokens_per_s, rel=0.1)


def test_a_long_run_is_judged_by_a_sample() -> None:
    passes, steps = passes_of(planned(stats=lengths_of(50_000, 20, 1000)))
    assert steps == 32 and len(passes) == 64
    assert passes_of(planned(stats=lengths_of(50_000, 20, 1000))) == (passes, steps)


def test_the_whole_training_is_its_steps() -> None:
    found, plan = took("train.epochs=3"), planned("train.epochs=3")
    assert plan.steps is not None and found.step_seconds is not None
    assert found.seconds == pytest.approx(plan.steps.value * found.step_seconds)
    assert found.tokens_per_s == pytest.approx(8 * 1024 / found.step_seconds)
    assert took("train.max_steps=5").seconds == pytest.approx(5 * found.step_seconds)


def test_validations_of_a_held_out_share_are_counted() -> None:
    plain, seldom = took("train.epochs=4"), took("train.epochs=4", "data.valid_share=0.5")
    often = took("train.epochs=4", "data.valid_share=0.5", "train.eval_every=1")
    assert plain.seconds is not None and seldom.seconds is not None and often.seconds is not None
    assert plain.seconds < seldom.seconds < often.seconds
    # As many rows as are trained on, forward only: less than an epoch of training each.
    assert often.seconds - plain.seconds < 32 * plain.seconds / 4
    assert often.tokens_per_s == plain.tokens_per_s
    # Of 64 rows that are trained on, half were as many held out, four fifths four times as many.
    most = took("train.epochs=4", "data.valid_share=0.8", "train.eval_every=1")
    assert most.seconds is not None
    assert most.seconds - plain.seconds == pytest.approx(4 * (often.seconds - plain.seconds))
    assert "validation is not counted" in took("data.valid=other.jsonl").why


def test_before_the_data_is_known_rows_are_full_and_the_end_is_not_known() -> None:
    found = took(stats=None)
    assert found.seconds is None and found.step_seconds is not None
    assert "2048 tokens until the data is read" in found.why
    assert took("train.max_steps=10", stats=None).seconds is None


def test_a_published_rate_widens_the_range() -> None:
    published = published_rate(KNOWN["h100-80gb"], "cuda", "bfloat16")
    assert published is not None
    measured, guessed = took(), took(rate=published)
    assert guessed.high / guessed.low > 1.5 * measured.high / measured.low
    assert "only published" in guessed.why and published.source in guessed.why
    # A peak is not taken for what a product reaches.
    assert guessed.tokens_per_s < took(rate=replace(published, measured=True)).tokens_per_s


# ---- what was timed


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import fit_speed  # pyright: ignore[reportMissingImports]

    return fit_speed


def timed() -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (BENCH / "speed.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_range_holds_every_timed_step_and_those_that_were_held_out(fit: ModuleType) -> None:
    counted: dict[tuple[str, str], int] = {}
    held_out = 0
    for row in timed():
        found = duration(fit.plan_of(row), fit.rate_of(row))
        assert found.low <= row["tokens_per_s"] <= found.high, (row, found)
        place, held = (row["backend"], row["device"]), bool(row.get("held_out"))
        counted[place] = counted.get(place, 0) + (not held)
        held_out += held
    assert held_out >= 8
    assert counted == {place: speed.rows for place, speed in SPEEDS.items() if speed.rows}


def test_the_range_says_something() -> None:
    for place, speed in SPEEDS.items():
        assert speed.spread <= (1.5 if speed.rows else 4), place


def test_the_fit_finds_constants_that_it_was_made_with(fit: ModuleType) -> None:
    """Steps made up with other constants are predicted by those that are fitted on them."""
    start = SPEEDS["torch", "cuda"]
    true = replace(start, product=start.product * 0.6, traffic=start.traffic * 2)
    rows = [row for row in timed() if (row["backend"], row["device"]) == ("torch", "cuda")]
    cases = []
    for row in rows:
        plan, rate = fit.plan_of(row), fit.rate_of(row)
        cases.append(({**row, "tokens_per_s": duration(plan, rate, true).tokens_per_s}, plan, rate))
    before, after = (max(map(abs, fit.errors(cases, s))) for s in (start, fit.fitted(cases, start)))
    assert after < 0.05 < before
