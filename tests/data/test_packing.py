"""Packed steps: every example once, no row too long, the same from any cursor; and the mask that isolates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.batches import Batch, Cursor, Example, collate_rows, order, steps, steps_per_epoch
from burnish.data.packing import (
    packed_split,
    packed_steps,
    padding_shares,
    planned_padding,
    segment_mask,
    window,
)
from burnish.planning.choice import DataStats
from burnish.planning.layout import PACK_WINDOW
from tests.tiny import tiny_plan

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=90)


def made(lengths: Sequence[int]) -> list[Example]:
    """Examples whose every token is their number."""
    return [
        Example(np.full(n, i, np.int32), np.array([0] + [1] * (n - 1), np.float32))
        for i, n in enumerate(lengths)
    ]


def numbers(batches: Sequence[Batch]) -> Counter[int]:
    """Positions of each example in these batches."""
    used = [b.tokens_BT[b.segments_BT > 0] for b in batches]
    return Counter(np.concatenate(used).tolist())


def same(a: Sequence[Batch], b: Sequence[Batch]) -> bool:
    fields = ("tokens_BT", "targets_BT", "weights_BT", "segments_BT", "positions_BT")
    pairs = [(getattr(x, f), getattr(y, f)) for x, y in zip(a, b) for f in fields]
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in pairs)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 4), st.integers(0, 200), st.integers(0, 5))
def test_an_epoch_is_every_example_once_in_as_many_steps_as_unpacked(
    lengths: list[int], size: int, micro: int, more: int, seed: int
) -> None:
    examples, room = made(lengths), max(lengths) - 1 + more
    n = steps_per_epoch(len(examples), size)
    epoch = list(islice(packed_steps(examples, size, micro, seed, Cursor(), room), n))
    assert numbers([b for micros, _ in epoch for b in micros]) == {i: k - 1 for i, k in enumerate(lengths)}
    assert epoch[-1][1] == Cursor(1, 0) and all(after.epoch == 0 for _, after in epoch[:-1])
    apart = list(islice(steps(examples, size, 1, seed, Cursor()), n))
    assert [after for _, after in epoch] == [after for _, after in apart]
    for micros, _ in epoch:
        assert micros and all(b.tokens_BT.shape[1] == room and len(b.tokens_BT) <= micro for b in micros)
        assert all(b.weight > 0 for b in micros), "a row without an example"


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(0, 100), st.integers(0, 150))
def test_a_cursor_goes_on_exactly_where_it_stopped(
    lengths: list[int], size: int, more: int, stop: int
) -> None:
    examples, room = made(lengths), max(lengths) - 1 + more
    whole = list(islice(packed_steps(examples, size, 2, 3, Cursor(), room), stop + 4))
    cursor = whole[stop - 1][1] if stop else Cursor()
    for (a, after_a), (b, after_b) in zip(whole[stop:], packed_steps(examples, size, 2, 3, cursor, room)):
        assert same(a, b) and after_a == after_b


@settings(max_examples=40, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(0, 200))
def test_rows_are_dealt_evenly_and_are_no_more_than_the_examples(
    lengths: list[int], size: int, more: int
) -> None:
    room = max(lengths) - 1 + more
    for number in range(-(-len(lengths) // (size * PACK_WINDOW))):
        dealt = window(lengths, size, 1, 0, number, room)
        rows = [len(step) for step in dealt]
        examples = sum(len(row) for step in dealt for row in step)
        assert max(rows) - min(rows) <= 1 and min(rows) >= 1
        assert sum(rows) <= examples, "one example a row is never better"
        assert len(dealt) == -(-examples // size)


def test_epochs_and_seeds_differ_and_windows_are_reproducible() -> None:
    lengths = [2 + i % 30 for i in range(500)]

    def dealt(seed: int, epoch: int, number: int = 0) -> list[list[list[int]]]:
        return window(lengths, 4, seed, epoch, number, 64)

    assert dealt(1, 0) == dealt(1, 0)
    assert dealt(1, 0) != dealt(1, 1) and dealt(1, 0) != dealt(2, 0) and dealt(1, 0) != dealt(1, 0, 1)


def test_rows_are_shuffled_among_the_steps() -> None:
    """First-fit decreasing leaves the longest first; a window that began with them would be a curriculum."""
    lengths = [2 + i % 60 for i in range(240)]
    longest = [max(lengths[i] for row in step for i in row) for step in window(lengths, 8, 1, 0, 0, 128)]
    assert longest != sorted(longest, reverse=True)


def test_each_window_deals_its_rows_in_an_order_of_its_own() -> None:
    """Equal lengths make equal rows, so only the dealing can differ."""

    def dealt(seed: int, epoch: int, number: int) -> list[int]:
        place = {int(i): at for at, i in enumerate(order(512, seed, epoch))}
        return [place[step[0][0]] % 128 for step in window([2] * 512, 4, seed, epoch, number, 4)]

    orders = [dealt(*which) for which in ((1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0))]
    assert all(sorted(o) == list(range(0, 128, 4)) for o in orders)
    assert all(a != b for a, b in combinations(orders, 2))


def test_where_rows_are_fewer_than_steps_the_fullest_are_split() -> None:
    lengths = [11] * 6 + [3] * 2  # 64 positions in all, one row of 64
    dealt = window(lengths, 2, 0, 0, 0, 64)
    assert [len(step) for step in dealt] == [1, 1, 1, 1]
    held = sorted(sum(lengths[i] - 1 for i in step[0]) for step in dealt)
    assert sum(held) == 64 and max(held) <= 22, "halves and quarters, not crumbs"


def test_validation_is_every_example_once() -> None:
    lengths = [2 + i * 7 % 40 for i in range(50)]
    batches = packed_split(made(lengths), 3, 64)
    assert numbers(batches) == {i: n - 1 for i, n in enumerate(lengths)}
    assert {len(b.tokens_BT) for b in batches[:-1]} == {3} and packed_split((), 3, 64) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(2, 6), max_size=4), min_size=1, max_size=4))
def test_the_mask_is_the_definition(rows: list[list[int]]) -> None:
    batch = collate_rows([made(row) for row in rows], 22)
    segments, mask = batch.segments_BT, segment_mask(batch.segments_BT)
    assert mask.shape == (len(rows), 22, 22) and mask.dtype == bool
    for b in range(len(rows)):
        for t in range(22):
            for s in range(22):
                assert mask[b, t, s] == (s <= t and segments[b, s] == segments[b, t]), (b, t, s)
    assert mask.any(axis=2).all(), "a softmax over nothing"


def test_shares_count_the_padding_of_the_batches_themselves() -> None:
    lengths = [2 + i * 11 % 90 for i in range(301)]
    examples, n = made(lengths), steps_per_epoch(301, 8)

    def share(epoch: list[tuple[list[Batch], Cursor]]) -> float:
        batches = [b for micros, _ in epoch for b in micros]
        return 1 - sum(b.n_tokens for b in batches) / sum(b.tokens_BT.size for b in batches)

    found = padding_shares(lengths, 8, 3, 5, 128, (64, 128))
    assert found.unpacked == pytest.approx(
        share(list(islice(steps(examples, 8, 3, 5, Cursor(), (64, 128)), n)))
    )
    assert found.packed == pytest.approx(
        share(list(islice(packed_steps(examples, 8, 3, 5, Cursor(), 128), n)))
    )
    loose = padding_shares(lengths, 8, 3, 5, 128)
    assert loose.unpacked == pytest.approx(share(list(islice(steps(examples, 8, 3, 5, Cursor()), n))))
    assert found.packed < loose.unpacked < found.unpacked


def test_a_plans_shares_do_not_depend_on_what_it_chose(tiny_folder: Path) -> None:
    lengths = tuple(2 + i * 11 % 60 for i in range(300))
    stats = DataStats(300, 61, sum(lengths), sum(lengths), lengths)
    plans = [
        tiny_plan(tiny_folder, stats, train={"pack": pack, "micro_batch": "auto"}) for pack in (True, False)
    ]
    packed, apart = map(planned_padding, plans)
    assert packed == apart and 0 < packed.packed < packed.unpacked
