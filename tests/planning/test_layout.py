"""How examples lie in rows: the fixed lengths are the best there are, rows fit, and packing says why."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from burnish.planning.choice import DataStats
from burnish.planning.layout import BUCKET, FEW, Layout, few_lengths, first_fit, lay_out, up
from burnish.recipe import Train

LENGTHS = st.lists(st.integers(1, 700), min_size=1, max_size=40)


def padded(positions: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(min(n for n in lengths if n >= p) for p in positions)


def stats_of(lengths: Sequence[int], longest: int | None = None) -> DataStats:
    return DataStats(len(lengths), longest or max(lengths), sum(lengths), sum(lengths), tuple(lengths))


def laid_out(
    lengths: Sequence[int], device: str, room: int = 1 << 30, backend: str = "torch", **asked: Any
) -> Layout:
    """room: positions of the largest forward pass that fits."""
    longest, stats = max(lengths), stats_of(lengths)
    return lay_out(Train(**asked), device, backend, longest, stats, lambda rows, n: rows * n <= room)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4))
@example([1, 64, 65, 128, 129, 700], 2)
def test_the_fixed_lengths_pad_least_of_all_choices(positions: list[int], few: int) -> None:
    found = few_lengths(positions, few)
    tops = sorted({up(p) for p in positions})
    others = [
        c for k in range(1, few + 1) for c in combinations(tops, min(k, len(tops))) if c[-1] == tops[-1]
    ]
    assert padded(positions, found) == min(padded(positions, c) for c in others)
    assert len(found) <= few and list(found) == sorted(set(found)) and all(n % BUCKET == 0 for n in found)


def test_more_lengths_than_are_allowed_are_not_taken() -> None:
    assert len(few_lengths([64 * i for i in range(1, 30)])) == FEW


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(0, 400))
def test_first_fit_holds_everything_once_in_rows_that_hold_it(positions: list[int], more: int) -> None:
    room = max(positions) + more
    rows = first_fit(positions, room)
    assert sorted(i for row in rows for i in row) == list(range(len(positions)))
    sums = [sum(positions[i] for i in row) for row in rows]
    assert max(sums) <= room
    # What begins a row had room in none before it, so no two rows could be one.
    assert all(a + b > room for a, b in combinations(sums, 2))
    assert rows == by_the_book(positions, room)


def by_the_book(positions: Sequence[int], room: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for i in sorted(range(len(positions)), key=lambda i: -positions[i]):
        for row in rows:
            if sum(positions[j] for j in row) + positions[i] <= room:
                row.append(i)
                break
        else:
            rows.append([i])
    return rows


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("lengths", [[2], [65] * 3, [66], list(range(2, 300)), [20] * 99 + [900]])
def test_a_row_is_a_multiple_of_64_and_holds_the_longest(lengths: list[int], device: str) -> None:
    for asked in (True, False):
        layout = laid_out(lengths, device, pack=asked)
        assert layout.row_length.value % BUCKET == 0 and layout.row_length.value >= max(lengths) - 1
        assert layout.pack.value is asked
        held = (
            layout.row_length.value
            if asked
            else layout.lengths.value[-1]
            if device == "mps"
            else max(lengths)
        )
        assert layout.planned == held


def test_validation_may_be_longer_than_training() -> None:
    layout = lay_out(Train(pack=True), "mps", "torch", 500, stats_of([30] * 50, 500), lambda rows, n: True)
    assert layout.row_length.value >= 499 and layout.lengths.value == (64, 512)


def test_a_row_is_near_what_a_step_needs_and_no_longer_than_memory_allows() -> None:
    lengths = [2 + i % 200 for i in range(1000)]
    roomy = laid_out(lengths, "cuda", pack=True)
    assert 600 <= roomy.row_length.value <= 1024, "8 examples of some 100 tokens"
    tight = laid_out(lengths, "cuda", room=384, pack=True)
    assert tight.row_length.value <= 384 and "memory allows no more" in tight.row_length.reason
    assert laid_out(lengths, "cuda", room=64, pack=True).row_length.value == 256, "the longest must fit"
    busy = laid_out(lengths, "cpu", pack=True, batch_size=256)
    assert 1536 <= busy.row_length.value <= 2560, "no product is faster with more than 2048"


def test_rows_under_one_mask_are_shorter_where_they_pad_as_little() -> None:
    lengths = [2 + i % 200 for i in range(1000)]
    free, masked = (laid_out(lengths, device, pack=True, batch_size=64) for device in ("cpu", "mps"))
    assert 199 < masked.row_length.value < free.row_length.value
    assert "under one mask" in masked.row_length.reason
    dear = laid_out([2040] * 100, "mps", pack=True, batch_size=64)
    assert dear.row_length.value == 2048, "the longest must fit"


def test_mlx_on_a_cpu_pads_to_finer_lengths_and_prefers_short_rows() -> None:
    lengths = [60 + i * 7 % 60 for i in range(400)] + [310]
    cpu, metal = (laid_out(lengths, device, backend="mlx") for device in ("cpu", "metal"))
    assert all(n % 16 == 0 for n in cpu.lengths.value) and cpu.lengths.value != metal.lengths.value
    assert metal.pack.value and not cpu.pack.value and "attend more than they save" in cpu.pack.reason
    assert cpu.micro_batch.value < 8 and "like length" in cpu.micro_batch.reason
    asked = laid_out(lengths, "cpu", backend="mlx", micro_batch=8)
    assert asked.micro_batch.value == 8


def test_families_that_do_not_pack_are_trained_one_example_a_row() -> None:
    lengths = [20 + i * 7 % 300 for i in range(400)]
    train, stats = Train(), DataStats(len(lengths), max(lengths), sum(lengths), sum(lengths), tuple(lengths))
    for asked, pack in ((train, False), (train.model_copy(update={"pack": True}), True)):
        layout = lay_out(asked, "metal", "mlx", max(lengths), stats, lambda rows, row: True, "it leaks")
        assert layout.pack.value is pack
        assert layout.pack.reason == ("as the recipe says" if pack else "it leaks")


@pytest.mark.parametrize("device", ["metal", "cuda"])
def test_mlx_pads_and_masks_on_a_gpu_as_mps_does(device: str) -> None:
    lengths = [20 + i * 7 % 300 for i in range(400)]
    cases: list[dict[str, Any]] = [{}, {"pack": True, "batch_size": 64}, {"batch_size": 1}]
    for asked in cases:
        mlx, mps = laid_out(lengths, device, backend="mlx", **asked), laid_out(lengths, "mps", **asked)
        assert mlx.lengths.value == mps.lengths.value != ()
        assert (mlx.pack.value, mlx.row_length.value) == (mps.pack.value, mps.row_length.value)
        assert "with mlx" in mlx.lengths.reason and "mps" not in f"{mlx.pack.reason} {mlx.lengths.reason}"
    assert laid_out(lengths, "cpu").lengths.value == ()


def test_a_layout_says_how_many_rows_a_step_has() -> None:
    lengths = [20 + i * 7 % 300 for i in range(400)]
    assert laid_out(lengths, "cpu", pack=False).step_rows == 8
    packed = laid_out(lengths, "mps", room=400, pack=True, batch_size=32)
    assert packed.micro_batch.value == 1 < packed.step_rows < 32


def test_mps_packs_where_less_is_computed_and_says_how_much() -> None:
    lengths = [20 + i * 7 % 300 for i in range(400)]
    packed = laid_out(lengths, "mps")
    assert packed.pack.value and "of positions packed" in packed.pack.reason
    alone = laid_out(lengths, "mps", batch_size=1)
    assert not alone.pack.value, "rows of one example, padded to the longest, are no gain"


def test_where_padding_is_dropped_packing_is_for_memory_only() -> None:
    lengths = [30] * 99 + [1000]
    for device in ("cpu", "cuda"):
        roomy = laid_out(lengths, device)
        assert not roomy.pack.value and "dropped before it is computed" in roomy.pack.reason
    enough = laid_out(lengths, "cuda", room=1000 * 7)
    assert enough.pack.value and "memory allows 7 of 8" in enough.pack.reason
    even = laid_out([600] * 99 + [1000], "cuda", room=1000 * 7)
    assert not even.pack.value, "rows that are half full cannot hold another"
    busy = laid_out(lengths, "cpu", room=1000 * 2)
    assert not busy.pack.value, "two rows of the longest are all a CPU asks for, and they fit"
    asked = laid_out(lengths, "cuda", room=1000 * 7, micro_batch=2)
    assert not asked.pack.value, "the recipe made the pass small, not memory"


def test_the_reference_backend_packs_only_when_asked() -> None:
    lengths = [30] * 99 + [1000]
    assert not laid_out(lengths, "cpu", room=1000, backend="reference").pack.value
    assert laid_out(lengths, "cpu", room=1000, backend="reference", pack=True).pack.value


def test_a_forward_pass_takes_the_rows_that_fit_it() -> None:
    lengths = [2 + i % 200 for i in range(1000)]
    assert laid_out(lengths, "cuda", pack=True).micro_batch.value == 1, "a step is one row"
    wide = laid_out(lengths, "cuda", room=5000, pack=True, batch_size=256)
    assert wide.micro_batch.value * wide.row_length.value <= 5000
    assert laid_out(lengths, "cuda", pack=True, micro_batch=3).micro_batch.value == 3


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("pack", [True, False, "auto"])
def test_before_the_data_is_read_the_longest_row_is_planned(device: str, pack: bool | str) -> None:
    layout = lay_out(Train(pack=pack, max_length=1000), device, "torch", 1000, None, lambda rows, n: True)  # type: ignore[arg-type]
    assert layout.row_length.value == 1024 and layout.planned in (1000, 1024)
    assert layout.pack.value == (device == "mps" if pack == "auto" else pack)


def test_lengths_that_are_not_known_count_as_the_mean() -> None:
    assert DataStats(3, 50, 90, 9).sizes == (50, 30, 30)
