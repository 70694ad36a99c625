"""Examples to batches: a deterministic order, micro-batches of like length, and the cursor that travels with
them.

Nothing here depends on a framework. The order of epoch e is a permutation drawn from (seed, e), so a cursor
of two numbers is all that a checkpoint needs to go on exactly where it stopped. Here a row holds one example;
packing.py lays several into one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """One training sequence: weights[i] says how much tokens[i] counts as target; weights[0] is always 0."""

    tokens: np.ndarray  # int32 [T]
    weights: np.ndarray  # float32 [T]

    @property
    def trained(self) -> int:
        """How many of its tokens are targets."""
        return int(np.count_nonzero(self.weights[1:]))


@dataclass(frozen=True)
class Batch:
    """B rows of T positions. Position t reads tokens[b, t] and predicts targets[b, t], which counts
    weights[b, t].

    segments numbers the examples of a row from 1; 0 is padding, which stands only at a row's end. Tokens
    attend only within their own segment, and positions restart with each.
    """

    tokens_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32
    weights_BT: np.ndarray  # float32
    segments_BT: np.ndarray  # int32
    positions_BT: np.ndarray  # int32

    @property
    def weight(self) -> float:
        return float(self.weights_BT.sum(dtype=np.float64))

    @property
    def n_tokens(self) -> int:
        """Positions that hold a token: the padding is not counted."""
        return int(np.count_nonzero(self.segments_BT))


@dataclass(frozen=True)
class Cursor:
    """The next step begins `index` examples into the order of `epoch`: a whole number of batches.

    Packed steps take about as many examples each, not exactly; `index` then only says how many steps came
    before (packing.py).
    """

    epoch: int = 0
    index: int = 0


def collate(examples: Sequence[Example], lengths: Sequence[int] = ()) -> Batch:
    """Rows of one example each, padded on the right to the longest, or to the first of the ascending
    `lengths` that holds it.
    """
    longest = max(len(e.tokens) - 1 for e in examples)
    return collate_rows([[e] for e in examples], next((n for n in lengths if n >= longest), longest))


def collate_rows(rows: Sequence[Sequence[Example]], length: int) -> Batch:
    """Rows of several examples one after another, padded on the right to `length` positions.

    An example's last token is only predicted, so it takes one position less than it has tokens.
    """
    shape = (len(rows), length)
    tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for b, examples in enumerate(rows):
        start = 0
        for number, e in enumerate(examples, 1):
            n = len(e.tokens) - 1
            at = slice(start, start + n)
            tokens[b, at], targets[b, at], weights[b, at] = e.tokens[:-1], e.tokens[1:], e.weights[1:]
            segments[b, at], positions[b, at] = number, np.arange(n)
            start += n
    return Batch(tokens, targets, weights, segments, positions)


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n examples in this epoch (int64 [n])."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """The last step of an epoch may be smaller; no example is left out."""
    return -(-n // batch_size)


def split(examples: Sequence[Example], micro_batch: int, lengths: Sequence[int] = ()) -> list[Batch]:
    """One step's examples as micro-batches of at most `micro_batch` rows, longest first, so that like pads
    with like.
    """
    by_length = sorted(examples, key=lambda e: -len(e.tokens))
    return [collate(by_length[i : i + micro_batch], lengths) for i in range(0, len(by_length), micro_batch)]


def steps(
    examples: Sequence[Example],
    batch_size: int,
    micro_batch: int,
    seed: int,
    cursor: Cursor,
    lengths: Sequence[int] = (),
) -> Iterator[tuple[list[Batch], Cursor]]:
    """Endless steps from `cursor` on: each one's micro-batches, and the cursor that follows it."""
    for _, chosen, after in numbered_steps(len(examples), batch_size, seed, cursor):
        yield split([examples[i] for i in chosen], micro_batch, lengths), after


def numbered_steps(
    n: int, batch_size: int, seed: int, cursor: Cursor
) -> Iterator[tuple[Cursor, list[int], Cursor]]:
    """The same of n examples by their numbers alone: where a step begins, its examples, what follows it."""
    at = cursor
    while True:
        permutation = order(n, seed, at.epoch).tolist()
        for index in range(at.index, n, batch_size):
            end = index + batch_size
            after = Cursor(at.epoch, end) if end < n else Cursor(at.epoch + 1, 0)
            yield Cursor(at.epoch, index), permutation[index:end], after
        at = Cursor(at.epoch + 1, 0)
