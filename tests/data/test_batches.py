"""The order is a function of seed and epoch, and a cursor goes on where it stopped."""

from __future__ import annotations

from itertools import islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.data.batches import (
    Batch,
    Cursor,
    Example,
    collate,
    collate_rows,
    order,
    split,
    steps,
    steps_per_epoch,
)


def example(n: int, start: int = 0) -> Example:
    return Example(np.arange(start, start + n, dtype=np.int32), np.array([0, *[1] * (n - 1)], np.float32))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x.tokens_BT, y.tokens_BT) for x, y in zip(a, b))


def test_targets_are_the_next_tokens_and_padding_counts_nothing() -> None:
    batch = collate([example(5), example(3, 10)], (2, 4, 8))
    assert batch.tokens_BT.tolist() == [[0, 1, 2, 3], [10, 11, 0, 0]]
    assert batch.targets_BT.tolist() == [[1, 2, 3, 4], [11, 12, 0, 0]]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert (batch.weight, batch.n_tokens) == (6, 6)


def test_rows_are_as_long_as_the_longest_where_no_length_is_fixed() -> None:
    assert collate([example(6), example(3)]).tokens_BT.shape == (2, 5)


def test_several_examples_a_row_are_numbered_and_begin_at_position_0() -> None:
    batch = collate_rows([[example(4), example(3, 10)], [example(2, 20)]], 6)
    assert batch.tokens_BT.tolist() == [[0, 1, 2, 10, 11, 0], [20, 0, 0, 0, 0, 0]]
    assert batch.targets_BT.tolist() == [[1, 2, 3, 11, 12, 0], [21, 0, 0, 0, 0, 0]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 0, 0, 0, 0]]
    assert batch.weights_BT.tolist() == [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]


def test_every_example_once_an_epoch_and_another_order_each_epoch() -> None:
    seen = [order(10, 7, epoch).tolist() for epoch in range(3)]
    assert all(sorted(o) == list(range(10)) for o in seen)
    assert seen[0] != seen[1] != seen[2]
    assert order(10, 8, 0).tolist() != seen[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 23), st.integers(1, 7), st.integers(1, 7), st.integers(0, 12))
def test_a_cursor_goes_on_exactly_where_it_stopped(n: int, batch: int, micro: int, stop: int) -> None:
    examples = [example(2 + i % 5, 10 * i) for i in range(n)]
    whole = list(islice(steps(examples, batch, micro, 3, Cursor()), stop + 5))
    cursor = whole[stop - 1][1] if stop else Cursor()
    again = list(islice(steps(examples, batch, micro, 3, cursor), 5))
    for (a, after_a), (b, after_b) in zip(whole[stop:], again):
        assert same(a, b) and after_a == after_b


def test_the_last_step_of_an_epoch_is_smaller_and_nothing_is_left_out() -> None:
    examples = [example(3, 10 * i) for i in range(5)]
    epoch = list(islice(steps(examples, 2, 2, 0, Cursor()), steps_per_epoch(5, 2)))
    assert [sum(len(b.tokens_BT) for b in micros) for micros, _ in epoch] == [2, 2, 1]
    firsts = sorted(
        int(b.tokens_BT[r, 0]) for micros, _ in epoch for b in micros for r in range(len(b.tokens_BT))
    )
    assert firsts == [0, 10, 20, 30, 40]
    assert epoch[-1][1] == Cursor(1, 0)


def test_like_lengths_share_a_micro_batch() -> None:
    micros = split([example(n) for n in (3, 9, 4, 8)], 2)
    assert [b.tokens_BT.shape for b in micros] == [(2, 8), (2, 3)]


def test_each_micro_batch_takes_the_smallest_fixed_length_that_holds_it() -> None:
    examples = [example(n) for n in (3, 9, 4, 8)]
    assert [b.tokens_BT.shape for b in split(examples, 2, (4, 16))] == [(2, 16), (2, 4)]
    (micros, _) = next(steps(examples, 4, 2, 0, Cursor(), (4, 16)))
    assert [b.tokens_BT.shape for b in micros] == [(2, 16), (2, 4)]
