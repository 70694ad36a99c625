"""How examples lie in rows: packed or one a row, rows of which lengths, how many in a forward pass.

An example of n tokens takes n - 1 positions of a row: its last token is only predicted.

Unpacked, a row holds one example. Where padding is computed and every new shape costs a compilation (MPS,
MLX), it is padded to one of at most FEW lengths, chosen to waste least on this data; elsewhere it stays as it
is.

Packed, all rows have one length, `row_length`. A window of PACK_WINDOW optimizer steps shares its examples
out: first-fit decreasing puts them into rows, and the rows are dealt to the steps as evenly as can be. A
larger window packs tighter (WikiSQL, 8 examples a step, rows of 512: 27 % of positions are padding with
windows of one step, 5 % with 32) and makes a step less exactly `batch_size` examples. The row length is the
one for which the windows' largest steps are smallest: it weighs padding and unevenness in one number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random

from burnish.planning.choice import Choice, DataStats
from burnish.recipe import Train

# More tokens than this in a forward pass make no matrix product faster, on a CPU or a GPU.
ENOUGH_TOKENS = {"cpu": 2048, "cuda": 8192, "mps": 2048, "metal": 2048}
# Where padding is computed, because every new shape compiles and keeps a graph (torch#132596): these devices,
# and mlx on any.
PADDED = ("mps",)
BUCKET = 64  # positions; fixed lengths are multiples of it
# MLX on a CPU compiles a shape in a moment, but computes attention's scores far slower than it multiplies
# (measured, SmolLM2 on two cores: attention is as dear as all else at rows of about 750), and is busy with
# few rows: a pass costs about 16 positions more, however small it is.
CPU_BUCKET, CPU_MASK_DOUBLES, CPU_PASS = 16, 750, 16
FEW = 8
PACK_WINDOW = 32  # optimizer steps whose examples are packed together
# The row length is looked for among this many lengths, on this many windows drawn from the data: a fraction
# of a second for ten thousand examples.
CANDIDATES, SAMPLES = 16, 3
# Rows so long that attention under one mask costs as much as all else in a layer: 6 × the hidden size by
# operations, less where scores are written to memory. Small models are the worst off, so it is theirs.
MASK_DOUBLES = 2048


Fits = Callable[[int, int], bool]  # (rows, length): a forward pass of that size has room


@dataclass(frozen=True)
class Place:
    """Where rows are computed."""

    backend: str
    device: str

    @property
    def padded(self) -> bool:
        """Is padding computed, and are packed rows attended under one mask?"""
        return self.backend == "mlx" or self.device in PADDED

    @property
    def mlx_cpu(self) -> bool:
        return self.backend == "mlx" and self.device == "cpu"

    @property
    def bucket(self) -> int:
        return CPU_BUCKET if self.mlx_cpu else BUCKET

    def cost(self, positions: float, length: int) -> float:
        """What so many positions cost in rows of this length, in positions of short rows."""
        if not self.padded:
            return positions
        return positions * (1 + length / (CPU_MASK_DOUBLES if self.mlx_cpu else MASK_DOUBLES))

    def __str__(self) -> str:
        return "with mlx" if self.backend == "mlx" else f"on {self.device}"


@dataclass(frozen=True)
class Layout:
    pack: Choice[bool]
    row_length: Choice[int]  # positions of a packed row, whether or not rows are packed
    lengths: Choice[tuple[int, ...]]  # that rows are padded to where they are not packed; (): as they are
    micro_batch: Choice[int]  # rows of a forward pass
    planned: int  # positions of the longest row
    step_rows: int  # rows of the largest step


def lay_out(
    train: Train,
    device: str,
    backend: str,
    longest: int,
    stats: DataStats | None,
    fits: Fits,
    alone: str = "",
) -> Layout:
    """longest: tokens of the longest example there is or, before the data is read, may be. alone: why a row
    cannot hold several examples; '': it can.
    """
    sizes = [n - 1 for n in stats.sizes] if stats is not None else []
    place, windows, most = Place(backend, device), _windows(train, sizes), train.batch_size
    lengths = _lengths(place, longest, sizes)
    planned = lengths.value[-1] if lengths.value else longest
    micro = _rows(train, device, planned, most, fits, "the whole batch at once")
    if place.mlx_cpu and train.micro_batch == "auto" and windows:
        micro = _fewer_rows(place, train.batch_size, windows, lengths.value, micro)
    row_length = _row_length(train, place, longest, windows, fits)
    pack = _pack(train, place, windows, row_length.value, lengths.value, planned, micro.value)
    if alone and train.pack == "auto":
        pack = Choice(False, alone)
    if pack.value:
        planned, most = row_length.value, _most_rows(windows, train.batch_size, row_length.value)
        micro = _rows(train, device, planned, most, fits, "every row of a step at once")
    return Layout(pack, row_length, lengths, micro, planned, most)


def up(positions: int, bucket: int = BUCKET) -> int:
    """Rounded up to a whole number of buckets."""
    return max(1, -(-positions // bucket)) * bucket


def few_lengths(positions: Sequence[int], few: int = FEW, bucket: int = BUCKET) -> tuple[int, ...]:
    """At most `few` multiples of `bucket`, ascending, that pad these rows least, one by one: the optimum.

    Dynamic programming over the buckets that hold a row: the cheapest way to serve the first j of them with k
    lengths ends in the j-th, after the cheapest way to serve the first i with k - 1.
    """
    held = sorted(Counter(up(n, bucket) for n in positions).items())
    tops, below = [top for top, _ in held], [0, *accumulate(n for _, n in held)]
    cost: list[float] = [0.0, *[float("inf")] * len(tops)]
    ways: list[list[int]] = []
    for _ in range(min(few, len(tops))):
        found, way = [0.0], [0]
        for j in range(1, len(tops) + 1):
            i = min(range(j), key=lambda i: cost[i] + (below[j] - below[i]) * tops[j - 1])
            found.append(cost[i] + (below[j] - below[i]) * tops[j - 1])
            way.append(i)
        cost = found
        ways.append(way)
    chosen, j = [], len(tops)
    for way in reversed(ways):
        if j:
            chosen.append(tops[j - 1])
            j = way[j]
    return tuple(reversed(chosen))


def first_fit(positions: Sequence[int], row_length: int) -> list[list[int]]:
    """First-fit decreasing: indices into `positions`, row by row, each row's sum at most `row_length`."""
    rows: list[list[int]] = []
    left: list[int] = []
    at, last = 0, -1
    for i in sorted(range(len(positions)), key=lambda i: -positions[i]):
        n = positions[i]
        assert n <= row_length, f"{n} positions in a row of {row_length}"
        # Rows that had no room for an example as long as this one still have none.
        at = at if n == last else 0
        while at < len(rows) and left[at] < n:
            at += 1
        if at == len(rows):
            rows.append([])
            left.append(row_length)
        rows[at].append(i)
        left[at] -= n
        last = n
    return rows


def _lengths(place: Place, longest: int, sizes: list[int]) -> Choice[tuple[int, ...]]:
    if not place.padded:
        return Choice((), f"padding is dropped before it is computed {place}: rows stay as they are")
    top = up(longest - 1, place.bucket)
    if not sizes:
        return Choice((top,), "the longest row there may be; the data decides when it is read")
    found = few_lengths([*sizes, longest - 1], bucket=place.bucket)
    return Choice(found, f"every new shape compiles {place}; these pad the data's rows least")


def _rows(train: Train, device: str, length: int, most: int, fits: Fits, whole: str) -> Choice[int]:
    """How many rows of `length` a forward pass takes: `most`, or fewer for a reason."""
    if train.micro_batch != "auto":
        return Choice(train.micro_batch, "as the recipe says")
    enough = _enough(device, length)
    n = largest(min(most, enough), lambda rows: fits(rows, length), 1)
    if n == most:
        return Choice(n, whole)
    if n == enough:
        return Choice(n, f"{n * length} tokens keep the device busy")
    return Choice(n, "as many rows as memory allows")


def _fewer_rows(
    place: Place, batch_size: int, windows: list[list[int]], lengths: Sequence[int], most: Choice[int]
) -> Choice[int]:
    """Fewer rows a pass than `most`, where that saves more padding than the passes cost."""

    def cost(rows: int) -> float:
        passes = sum(-(-len(step) // rows) for step in _steps_of(windows, batch_size))
        return _padded_cost(place, windows, batch_size, rows, lengths) + CPU_PASS * passes

    rows = min((n for n in (1, 2, 4, 8, 16, 32) if n < most.value), key=cost, default=most.value)
    if cost(rows) >= cost(most.value):
        return most
    return Choice(rows, "rows of like length together: less padding")


def _enough(device: str, length: int) -> int:
    return max(1, ENOUGH_TOKENS[device] // length)


def largest(upto: int, fits: Callable[[int], bool], least: int) -> int:
    """The largest n in least…upto for which `fits(n)`; `least` if none does."""
    low, high = least, upto
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _windows(train: Train, sizes: list[int]) -> list[list[int]]:
    """Examples as they may meet in a window: drawn at random, so that they stand for any epoch."""
    dice, width = Random(train.seed), min(len(sizes), PACK_WINDOW * train.batch_size)
    return [dice.sample(sizes, width) for _ in range(SAMPLES)] if sizes else []


def _row_length(
    train: Train, place: Place, longest: int, windows: list[list[int]], fits: Fits
) -> Choice[int]:
    least, size = up(longest - 1), train.batch_size
    if not windows:
        return Choice(least, "the longest row there may be; the data decides when it is read")
    real, count = sum(map(sum, windows)), sum(map(len, windows))
    wanted = round(min(size * real / count, ENOUGH_TOKENS[place.device]))
    high = max(least, up(wanted * 5 // 4))
    fitting = largest(high // BUCKET, lambda n: fits(1, n * BUCKET), least // BUCKET) * BUCKET
    # Where rows are attended under one mask, a position costs more the longer its row; elsewhere it does not.
    masked = place.padded
    low = least if masked else max(least, up(wanted * 3 // 4))
    candidates = range(min(low, fitting), fitting + 1, BUCKET)
    candidates = candidates[:: -(-len(candidates) // CANDIDATES)]
    length = min(candidates, key=lambda n: place.cost(_largest_steps(windows, size, n), n))
    empty = 1 - real / _packed_positions(windows, size, length)
    if wanted <= least:
        why = "the longest example decides"
    elif masked and length < wanted * 3 // 4:
        why = "long rows under one mask attend more than they save"
    elif fitting < high:
        why = "memory allows no more"
    else:
        why = f"near the {wanted} positions that a step holds or keep the device busy"
    return Choice(length, f"{why}; about {empty:.0%} of packed rows is padding")


def _steps(window: list[int], batch_size: int) -> int:
    return -(-len(window) // batch_size)


def _largest_steps(windows: list[list[int]], batch_size: int, length: int) -> int:
    """Positions if every step had as many rows as the largest of its window."""
    cost = 0
    for window in windows:
        n_steps = _steps(window, batch_size)
        cost += -(-len(first_fit(window, length)) // n_steps) * n_steps * length
    return cost


def _most_rows(windows: list[list[int]], batch_size: int, length: int) -> int:
    """Rows of the largest step."""
    if not windows:
        return batch_size
    return max(-(-len(first_fit(w, length)) // _steps(w, batch_size)) for w in windows)


def _packed_positions(windows: list[list[int]], batch_size: int, length: int) -> int:
    """Positions of packed rows; a step has at least one."""
    return length * sum(max(len(first_fit(w, length)), _steps(w, batch_size)) for w in windows)


def _steps_of(windows: list[list[int]], batch_size: int) -> list[list[int]]:
    """The windows' steps where nothing is packed."""
    return [w[i : i + batch_size] for w in windows for i in range(0, len(w), batch_size)]


def _padded(
    windows: list[list[int]], batch_size: int, micro: int, lengths: Sequence[int]
) -> list[tuple[int, int]]:
    """(rows, length) of each pass where rows are padded to one of `lengths`, a step's longest together."""
    found = []
    for step in _steps_of(windows, batch_size):
        ordered = sorted(step, reverse=True)
        parts = [ordered[i : i + micro] for i in range(0, len(ordered), micro)]
        found += [(len(p), next(n for n in lengths if n >= p[0])) for p in parts]
    return found


def _padded_cost(
    place: Place, windows: list[list[int]], batch_size: int, micro: int, lengths: Sequence[int]
) -> float:
    return sum(place.cost(rows * n, n) for rows, n in _padded(windows, batch_size, micro, lengths))


def _pack(
    train: Train,
    place: Place,
    windows: list[list[int]],
    row_length: int,
    lengths: tuple[int, ...],
    planned: int,
    micro: int,
) -> Choice[bool]:
    """planned, micro: of a forward pass that is not packed."""
    if train.pack != "auto":
        return Choice(train.pack, "as the recipe says")
    if place.backend == "reference":
        return Choice(False, "the reference backend is not after speed")
    real, count = sum(map(sum, windows)), sum(map(len, windows))
    if place.padded:
        computed = f"padding is computed {place}"
        if not windows:
            return Choice(True, f"{computed}; the data decides when it is read")
        alone = sum(rows * n for rows, n in _padded(windows, train.batch_size, micro, lengths))
        together = _packed_positions(windows, train.batch_size, row_length)
        shares = f"{1 - real / together:.0%} of positions packed, {1 - real / alone:.0%} unpacked"
        if place.mlx_cpu:
            dear = _padded_cost(place, windows, train.batch_size, micro, lengths)
            longer = "; long packed rows would attend more than they save"
            cheaper = place.cost(together, row_length) <= dear
            return Choice(cheaper, f"{computed}: about {shares}{'' if cheaper else longer}")
        return Choice(together <= alone, f"{computed}: about {shares}")
    dropped = f"padding is dropped before it is computed {place}"
    if not windows:
        return Choice(False, f"{dropped}; the data decides when it is read")
    by_memory = train.micro_batch == "auto" and micro < min(train.batch_size, _enough(place.device, planned))
    if by_memory and 2 * real <= count * (planned - 1):
        why = f"memory allows {micro} of {train.batch_size} examples a pass, and most are far shorter than"
        return Choice(True, f"{why} the longest: packed rows fill the pass")
    return Choice(False, f"{dropped}: packing would save nothing")
