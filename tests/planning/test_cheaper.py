"""After running out of memory: less of it for the same training, down to nothing more to give."""

from __future__ import annotations

from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings

from burnish.planning.choice import Choice, DataStats
from burnish.planning.levers import cheaper
from burnish.planning.memory import Part, Shape, total
from burnish.planning.plan import Plan, parts_of
from tests.planning.test_levers import SPECS, data, planned, plans, typed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(plans())
def test_cheaper_goes_down_to_nothing_and_touches_four_choices(plan: Plan) -> None:
    may_change = {"ahead", "micro_batch", "keep_layers", "loss_slice", "estimate", "shape"}
    before, after, n = plan, cheaper(plan), 0
    while after is not None:
        assert after.total_bytes <= before.total_bytes
        for field in fields(Plan):
            if field.name not in may_change:
                assert getattr(after, field.name) == getattr(before, field.name), field.name
        values = [
            (
                p.micro_batch.value,
                min(p.keep_layers.value, p.spec.n_layers),
                p.loss_slice.value,
                p.ahead.value,
            )
            for p in (before, after)
        ]
        lower = [b < a for a, b in zip(*values, strict=True)]
        assert sum(lower) == 1 and values[1][0] >= 1 and values[1][1] >= 0 and values[1][2] >= 64
        assert after.estimate == parts_of(after.backend.value, after.spec)(after.shape)
        for name in ("micro_batch", "keep_layers", "loss_slice", "ahead"):
            assert getattr(after.shape, name) == getattr(after, name).value
        before, after, n = after, cheaper(after), n + 1
        assert n < 20
    # What is left, if anything, would take more.
    for name, least in (("keep_layers", 0), ("loss_slice", 64)):
        least_shape = replace(before.shape, **{name: least})
        parts = parts_of(before.backend.value, before.spec)(least_shape)
        trained = before.spec.n_layers - min(before.layers.value)
        now = min(getattr(before.shape, name), trained if name == "keep_layers" else 1 << 60)
        assert now <= least or total(parts) > before.total_bytes


@pytest.mark.parametrize("stats", [None, data(300, 20, 200)], ids=["unread", "read"])
@pytest.mark.parametrize("pack", ["true", "false"])
@pytest.mark.parametrize("where", ["m4-max-128", "h100", "cpu"])
def test_cheaper_ends_with_one_row_nothing_kept_and_the_smallest_slice(
    where: str, pack: str, stats: DataStats | None
) -> None:
    asked = ("train.max_length=512", "train.batch_size=64", f"train.pack={pack}", "train.micro_batch=4")
    plan = planned(where, *asked, spec=SPECS["qwen2-1.5b"], stats=stats)
    assert plan.micro_batch.value == 4 and plan.keep_layers.value > 1
    seen = [plan]
    while (after := cheaper(seen[-1])) is not None:
        seen.append(after)
    rows, kept, slices = (
        [getattr(p, name).value for p in seen] for name in ("micro_batch", "keep_layers", "loss_slice")
    )
    assert (rows[-1], kept[-1], slices[-1]) == (1, 0, 64)
    if plan.ahead.value:  # nothing ahead of the device comes before all else
        assert (rows[1], seen[1].ahead.value) == (4, 0)
        rows, kept, slices = rows[1:], kept[1:], slices[1:]
    n = rows.index(1)  # first rows, then layers, then the slice
    assert rows[: n + 1] == [rows[0] >> i for i in range(n + 1)] and len(set(kept[: n + 1])) == 1
    halved = [kept[0] // 2, 0] if kept[0] > plan.spec.n_layers // 2 else [0]
    assert kept[n + 1 : n + 1 + len(halved)] == halved and slices[n + len(halved)] == slices[0]
    assert seen[-1].total_bytes < plan.total_bytes
    for p in seen:  # the estimate is the one that make_plan has for these numbers
        if p.loss_slice == plan.loss_slice:
            fixed = (f"train.micro_batch={p.micro_batch.value}", f"train.keep_layers={p.keep_layers.value}")
            same = typed(plan, [*fixed, f"train.pack={pack}"])
            if (same.row_length, same.ahead.value) == (p.row_length, p.ahead.value):
                # Of a packed step's rows only the most there may be is known to a plan.
                exact = pack == "false" or stats is None
                assert same.estimate == p.estimate if exact else same.total_bytes <= p.total_bytes


def test_what_takes_more_memory_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def dear_passes(s: Shape) -> tuple[Part, ...]:
        return (Part("all", 100 * s.passes + s.keep_layers, "a pass costs more than a layer"),)

    monkeypatch.setattr("burnish.planning.levers.parts_of", lambda backend, spec: dear_passes)
    plan = planned("h100", "train.max_length=512", spec=SPECS["qwen2-1.5b"])
    plan = replace(plan, estimate=(Part("all", 100 + plan.keep_layers.value, "one pass"),))
    after = cheaper(plan)
    assert after is not None and after.micro_batch == plan.micro_batch
    assert after.keep_layers.value < plan.keep_layers.value


def test_a_loss_slice_stays_a_multiple_of_64() -> None:
    plan = planned("h100", "train.micro_batch=1", "train.keep_layers=0")
    after = cheaper(replace(plan, loss_slice=Choice(192, "any")))
    assert after is not None and after.loss_slice.value == 64


def test_with_dropout_rows_a_pass_come_last() -> None:
    plan = planned("h100", "lora.dropout=0.1", "train.max_length=512", spec=SPECS["qwen2-1.5b"])
    rows = []
    after = cheaper(plan)
    while after is not None:
        rows.append(after.micro_batch.value)
        after = cheaper(after)
    assert rows[0] == plan.micro_batch.value and rows[-1] == 1
    assert all(later <= earlier for earlier, later in pairwise(rows))
