"""Several examples a row, kept apart from one another: fewer positions computed for the same training.

    for micros, cursor in packed_steps(examples, batch_size, micro_batch, seed, cursor, row_length): ...

A window of PACK_WINDOW steps takes its examples off the epoch's order, first-fit decreasing puts them into
rows of one length, and the rows, shuffled, are dealt to the window's steps as evenly as can be. So

- an epoch is every example once, in as many steps as unpacked: ceil(n / batch_size);
- a step is about `batch_size` examples, not exactly: its rows are as even as can be, its examples are not;
- where there are fewer rows than steps, the fullest are split until every step has one;
- a window is a function of (lengths, seed, epoch, batch_size, row_length) alone, so a cursor goes on exactly.

Examples of a row are numbered by `segments_BT` and their positions restart: a token attends only within its
own example, and loss and gradients are those of the same examples one a row (tests/backends).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from burnish.data.batches import Batch, Cursor, Example, collate_rows, order
from burnish.planning.layout import PACK_WINDOW, first_fit
from burnish.planning.plan import Plan, make_plan

# Sets the dealing of rows apart from other draws of the same seed.
_DEAL = 0xDEA1

Rows = list[list[int]]  # indices of examples, row by row


@dataclass(frozen=True)
class PaddingShares:
    """Of all positions of an epoch's batches, the share that holds no token."""

    unpacked: float
    packed: float


def packed_steps(
    examples: Sequence[Example], batch_size: int, micro_batch: int, seed: int, cursor: Cursor, row_length: int
) -> Iterator[tuple[list[Batch], Cursor]]:
    """Endless steps from `cursor` on, as `batches.steps` gives them: micro-batches of `micro_batch` rows."""
    lengths = [len(e.tokens) for e in examples]
    for _, rows, after in numbered_rows(lengths, batch_size, seed, cursor, row_length):
        yield _micros([[examples[i] for i in row] for row in rows], micro_batch, row_length), after


def numbered_rows(
    lengths: Sequence[int], batch_size: int, seed: int, cursor: Cursor, row_length: int
) -> Iterator[tuple[Cursor, Rows, Cursor]]:
    """The same by the examples' numbers alone: where a step begins, its rows, what follows it."""
    epoch, step = cursor.epoch, cursor.index // batch_size
    while True:
        for number in range(step // PACK_WINDOW, -(-len(lengths) // (batch_size * PACK_WINDOW))):
            dealt = window(lengths, batch_size, seed, epoch, number, row_length)
            for rows in dealt[step - number * PACK_WINDOW :]:
                at, index = Cursor(epoch, step * batch_size), (step + 1) * batch_size
                yield at, rows, Cursor(epoch, index) if index < len(lengths) else Cursor(epoch + 1, 0)
                step += 1
        epoch, step = epoch + 1, 0


def window(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int, number: int, row_length: int
) -> list[Rows]:
    """The rows of each step of the epoch's window `number`. lengths: tokens of every example."""
    width = batch_size * PACK_WINDOW
    chosen = order(len(lengths), seed, epoch)[number * width : (number + 1) * width].tolist()
    positions = [lengths[i] - 1 for i in chosen]
    n_steps = -(-len(chosen) // batch_size)
    rows = _enough_rows(first_fit(positions, row_length), positions, n_steps)
    shuffled = np.random.default_rng([seed, epoch, number, _DEAL]).permutation(len(rows)).tolist()
    dealt = [[chosen[i] for i in rows[r]] for r in shuffled]
    edges = [len(rows) * s // n_steps for s in range(n_steps + 1)]
    return [dealt[a:b] for a, b in pairwise(edges)]


def packed_split(examples: Sequence[Example], micro_batch: int, row_length: int) -> list[Batch]:
    """All examples packed into micro-batches, for validation."""
    rows = first_fit([len(e.tokens) - 1 for e in examples], row_length)
    return _micros([[examples[i] for i in row] for row in rows], micro_batch, row_length)


def segment_mask(segments_BT: np.ndarray) -> np.ndarray:
    """bool [B, T, T]: may position t attend to position s? Where s ≤ t and both are of one segment.

    Padding (segment 0) attends to padding, so no row of the mask is empty and no softmax is of nothing.
    """
    length = segments_BT.shape[1]
    causal = np.tri(length, dtype=bool)
    return (segments_BT[:, :, None] == segments_BT[:, None, :]) & causal


def padding_shares(
    lengths: Sequence[int],
    batch_size: int,
    micro_batch: int,
    seed: int,
    row_length: int,
    fixed_lengths: Sequence[int] = (),
) -> PaddingShares:
    """Shares of padding in the first epoch's batches, as a backend that computes padding would meet them.

    Counted: positions without a token / all positions, Σ rows × length over micro-batches. lengths: tokens
    of every example, which takes one position less. Unpacked: a step's examples, longest first, `micro_batch`
    at a time, padded to their longest or to the first of `fixed_lengths` that holds it. Packed: rows of
    `row_length`, however many go into a forward pass.
    """
    assert len(lengths), "no examples, no shares"
    real = sum(lengths) - len(lengths)
    alone, permutation = 0, order(len(lengths), seed, 0).tolist()
    for start in range(0, len(lengths), batch_size):
        step = sorted((lengths[i] - 1 for i in permutation[start : start + batch_size]), reverse=True)
        for first in range(0, len(step), micro_batch):
            rows = step[first : first + micro_batch]
            alone += len(rows) * next((n for n in fixed_lengths if n >= rows[0]), rows[0])
    n_windows = -(-len(lengths) // (batch_size * PACK_WINDOW))
    windows = (window(lengths, batch_size, seed, 0, w, row_length) for w in range(n_windows))
    together = row_length * sum(len(rows) for steps in windows for rows in steps)
    return PaddingShares(1 - real / alone, 1 - real / together)


def planned_padding(plan: Plan) -> PaddingShares:
    """What this plan's data would hold of padding unpacked and packed, whichever the plan chose."""
    assert plan.stats is not None, "a plan tightened with the data knows its lengths"
    train = plan.recipe.train
    unpacked = plan.recipe.model_copy(update={"train": train.model_copy(update={"pack": False})})
    single = make_plan(unpacked, plan.spec, plan.machine, plan.stats)
    return padding_shares(
        plan.stats.sizes,
        train.batch_size,
        single.micro_batch.value,
        train.seed,
        plan.row_length.value,
        plan.lengths.value,
    )


def _enough_rows(rows: Rows, positions: Sequence[int], least: int) -> Rows:
    """At least `least` rows: the fullest of several examples is cut into two halves, and again."""
    while len(rows) < least:
        fullest = max(
            (r for r in range(len(rows)) if len(rows[r]) > 1),
            key=lambda r: sum(positions[i] for i in rows[r]),
        )
        halves: Rows = [[], []]
        for i in rows[fullest]:  # longest first, as first-fit decreasing left them
            min(halves, key=lambda half: sum(positions[j] for j in half)).append(i)
        rows = [*rows[:fullest], *halves, *rows[fullest + 1 :]]
    return rows


def _micros(rows: Sequence[Sequence[Example]], micro_batch: int, row_length: int) -> list[Batch]:
    return [collate_rows(rows[i : i + micro_batch], row_length) for i in range(0, len(rows), micro_batch)]
