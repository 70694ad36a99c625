"""Charts as inline SVG, drawn by hand: no script, no library, legible in a terminal's colours and in none.

    line_chart("loss", [Line("each step", points, "raw"), Line("smoothed", smooth(points, 9), "main")])

A point is (step, value); a value of None is one that was not finite or not recorded, and breaks the line.
Lines differ by colour and by dash. `thinned` keeps extremes, so that a spike of one step in 100,000 is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from burnish.report.page import number

Points = Sequence[tuple[float, float | None]]

WIDTH, HEIGHT = 480, 250  # of the view box; on a phone it is shown at about three quarters of that
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 30, 42  # margins: for numbers, the last number's half, legend, steps
POINTS = 800  # of a line
TICKS = 5  # about so many an axis
MOST_MARKS = 60
STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 23rem), 1fr)); gap: 1rem; }
figure { margin: 0; break-inside: avoid; } figcaption { font-size: .875rem; color: var(--soft); }
svg { display: block; width: 100%; height: auto; max-width: 42rem; }
svg text { font: 13px system-ui, sans-serif; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.head { fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .raw { stroke: var(--bar); stroke-width: 1; opacity: .55; } svg .main { stroke: var(--bar); }
svg .other { stroke: var(--warn-line); stroke-dasharray: 7 4; }
svg .limit { stroke: var(--on-line); stroke-dasharray: 2 4; }
svg .dot { stroke: none; } svg .dot.raw, svg .dot.main { fill: var(--bar); opacity: 1; }
svg .dot.other { fill: var(--warn-line); } svg .dot.limit { fill: var(--on-line); }
svg .mark { stroke: var(--warn-line); stroke-width: 1; stroke-dasharray: 1 3; }
"""


@dataclass(frozen=True)
class Line:
    name: str
    points: Points
    kind: Literal["raw", "main", "other", "limit"]  # thin, bold, dashed, dotted
    dots: bool = False  # points are few, and each is a measurement


@dataclass(frozen=True)
class _Frame:
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point lies in the view box."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def line_chart(title: str, lines: Sequence[Line], marks: Sequence[tuple[float, str]] = ()) -> str:
    """An SVG with round numbers at its axes; '' where no line has a point. marks: (step, what happened)."""
    drawn = [line for line in lines if any(y is not None for _, y in line.points)]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points if y is not None]
    low = 0.0 if 0 <= min(ys) <= max(ys) / 2 else min(ys)  # from nothing, unless that would flatten it
    y_ticks, x_ticks = ticks(low, max(ys)), [t for t in ticks(min(xs), max(xs)) if t == round(t)]
    x = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    frame = _Frame(x, (y_ticks[0], y_ticks[-1]))
    parts = [
        f"<title>{escape(title)}</title><desc>{escape(in_words(drawn))}</desc>",
        *_axes(frame, x_ticks, y_ticks),
        *_marks(frame, marks),
        *(part for line in drawn for part in _line(frame, line)),
        *_legend(drawn),
    ]
    label = escape(f"{title}: {in_words(drawn)}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">\n' + "\n".join(
        [*parts, "</svg>"]
    )


def in_words(lines: Sequence[Line]) -> str:
    """First, last, lowest and highest of each line, as a sentence."""
    said = []
    for line in lines:
        known = [(y, x) for x, y in line.points if y is not None]
        if not known:
            continue
        (first, _), (last, _), low, high = known[0], known[-1], min(known), max(known)
        if low[0] == high[0]:
            said.append(f"{line.name} {short(first)}")
            continue
        said.append(
            f"{line.name} from {short(first)} to {short(last)}, lowest {short(low[0])} at step {low[1]:,.0f},"
            f" highest {short(high[0])} at step {high[1]:,.0f}"
        )
    return "; ".join(said)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, rising, from at most `low` to at least `high`, and at least two of them."""
    size = max(abs(low), abs(high))
    if high - low <= 1e-9 * size or high - low < 1e-30:  # one value: something around it
        pad = size / 10 if size > 1e-30 else 1.0
        low, high = low - pad, high + pad
    step = _round_step((high - low) / TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, max(last, first + 1) + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next((n * power for n in (1, 2, 5) if n * power >= rough * 0.999), 10 * power)


def short(value: float) -> str:
    """A number of about three figures."""
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e7):
        return f"{value:.3g}"
    if size >= 100 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"


def smooth(points: Points, over: int) -> list[tuple[float, float | None]]:
    """The mean of the `over` points around each (odd; fewer at the ends); what is not finite is left out."""
    half, sums, counts = over // 2, [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y or 0.0))
        counts.append(counts[-1] + (y is not None))
    found: list[tuple[float, float | None]] = []
    for i, (x, y) in enumerate(points):
        a, b = max(0, i - half), min(len(points), i + half + 1)
        n = counts[b] - counts[a]
        found.append((x, (sums[b] - sums[a]) / n if n and y is not None else None))
    return found


def thinned(points: Points, most: int) -> list[tuple[float, float | None]]:
    """At most about `most` points: of each stretch its first, lowest, highest and last, and one gap."""
    if len(points) <= most:
        return list(points)
    size = -(-len(points) * 4 // most)
    kept: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        part = range(start, min(start + size, len(points)))
        known = sorted((points[i][1], i) for i in part if points[i][1] is not None)
        gap = next((i for i in part if points[i][1] is None), None)
        chosen = {part[0], part[-1]} | ({known[0][1], known[-1][1]} if known else set())
        kept += [points[i] for i in sorted(chosen if gap is None else chosen | {gap})]
    return kept


# --- what a run tells ---

SERIES = ("loss", "lr", "grad_norm", "now_bytes", "peak_bytes")


def of(events: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float | None]]:
    """(step, value) of each event; the step of each is a number."""
    return [(int(e["step"]), number(e.get(key))) for e in events]


def series(
    steps: Sequence[Mapping[str, Any]], valid: Sequence[Mapping[str, Any]]
) -> dict[str, list[tuple[float, float | None]]]:
    """Everything that steps and validations tell, thinned: loss, its mean, tokens a second and so on."""
    whole = {key: of(steps, key) for key in SERIES}
    whole["smoothed"] = smooth(whole["loss"], smoothed_over(len(steps)))
    seconds, tokens = of(steps, "seconds"), of(steps, "tokens")
    whole["tokens_per_s"] = [
        (n, None if not s or t is None else number(t / s))
        for (n, s), (_, t) in zip(seconds, tokens, strict=True)
    ]
    whole["valid"] = of(valid, "loss")
    return {key: thinned(points, POINTS) for key, points in whole.items()}


def smoothed_over(n_steps: int) -> int:
    """How many steps a smoothed loss is the mean of: odd, a fiftieth of the run, 5 at least."""
    return max(5, n_steps // 50) | 1


# --- drawing ---


def _axes(frame: _Frame, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Iterator[str]:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for value in y_ticks:
        _, y = frame.at(frame.x[0], value)
        yield f'<line class=grid x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
        yield f'<text class=y x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(value, y_ticks)}</text>'
    yield f'<line class=axis x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
    for value in x_ticks:
        if frame.x[0] <= value <= frame.x[1]:
            x, _ = frame.at(value, frame.y[0])
            yield f'<line class=axis x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}"/>'
            yield f'<text class=x x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{value:,.0f}</text>'
    middle = (LEFT + right) / 2
    yield f'<text x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">step</text>'


def _tick(value: float, ticks: Sequence[float]) -> str:
    """As many decimals as tell it from the next."""
    step = ticks[1] - ticks[0]
    if value == 0:
        return "0"
    if step < 1e-3 or abs(value) >= 1e7:
        figures = math.floor(math.log10(abs(value))) - math.floor(math.log10(step)) + 1
        return f"{value:.{min(12, max(1, figures))}g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"


def _line(frame: _Frame, line: Line) -> Iterator[str]:
    for stretch in _stretches(line.points):
        at = [frame.at(x, y) for x, y in stretch]
        if len(at) > 1:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
            yield f'<polyline class="line {line.kind}" points="{points}"/>'
        if len(at) == 1 or line.dots:
            yield from (f'<circle class="dot {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in at)


def _stretches(points: Points) -> Iterator[list[tuple[float, float]]]:
    """Between the gaps."""
    stretch: list[tuple[float, float]] = []
    for x, y in [*points, (0.0, None)]:
        if y is not None:
            stretch.append((x, y))
        elif stretch:
            yield stretch
            stretch = []


def _marks(frame: _Frame, marks: Sequence[tuple[float, str]]) -> Iterator[str]:
    for step, what in marks[:MOST_MARKS]:
        if frame.x[0] <= step <= frame.x[1]:
            x, _ = frame.at(step, frame.y[0])
            yield (
                f'<line class=mark x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{escape(f'step {step:,.0f}: {what}')}</title></line>"
            )


def _legend(lines: Sequence[Line]) -> Iterator[str]:
    x = LEFT
    for line in lines:
        yield f'<line class="line {line.kind}" x1="{x}" y1="14" x2="{x + 24}" y2="14"/>'
        if line.dots:
            yield f'<circle class="dot {line.kind}" cx="{x + 12}" cy="14" r="3"/>'
        yield f'<text class=head x="{x + 29}" y="18">{escape(line.name)}</text>'
        x += 45 + 7 * len(line.name)
