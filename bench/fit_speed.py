"""Predicted against measured speed, for every timed step that is on record, and the `SPEEDS` that fit best.

    python bench/fit_speed.py [FILE …] [--fit]      # bench/speed.jsonl, where no file is named

A line of bench/memory_grid.py (bench/memory/*.jsonl) is read as well as one of speed.jsonl's.

A row says what was trained (a geometry of bench/geometry.py or smollm2, rows × length or `lengths` of a data
set's examples), how, on which machine, how fast, and that machine's rate where it was measured
(`python -m burnish.backends.rate BACKEND DEVICE DTYPE 1`). `held_out`: predicted, but not fitted on. Without
--fit the constants of planning/duration.py are shown as they are.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import geometry
from burnish.machine.known import known_machine
from burnish.machine.rate import Rate, published_rate
from burnish.planning.choice import DataStats
from burnish.planning.duration import PUBLISHED_COPY, SPEEDS, Speed, duration
from burnish.planning.plan import Plan, make_plan
from burnish.recipe import parse

HERE = Path(__file__).parent
geometry.QWEN2.setdefault("smollm2", (576, 30, 9, 3, 1536, 49152))
CONSTANTS = ("product", "attention", "traffic", "unpack", "layer_s", "packed_s")
PULL = 0.02  # towards what stands in SPEEDS: few rows do not tell six constants apart
# Of the CPU that the rows of 'cpu-2-cores' are of: `python -m burnish.backends.rate torch cpu float32 1`.
CPU_BYTES_PER_S = {"torch": 9.1e10, "mlx": 5.0e9}

Row = Mapping[str, Any]


def rows_of(files: Sequence[Path]) -> list[Row]:
    found = [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    return [row if "rows" in row else _of_grid(row) for row in found]


def _of_grid(row: Row) -> Row:
    """A line of bench/memory_grid.py as one of ours."""
    model, quantize, shape, _, rank, *rest = row["case"].split(":")
    rows, length = (int(n) for n in shape.split("x"))
    more = {w[0]: int(w[1:]) for w in rest if w[0] in "ps" and w[1:].isdigit()}
    cpu = row["device"] == "cpu"
    same = {k: row[k] for k in ("backend", "device", "dtype", "keep_layers", "tokens_per_s")}
    return same | {
        "model": "smollm2" if model == "smol" else model, "quantize": quantize, "rows": rows,
        "length": length, "passes": more.get("p", 1), "share": more.get("s", 100) / 100,
        "rank": int(rank[1:]), "rate_flops": 2.3e11 if cpu else 605e12, "rate_bytes_per_s": None,
        "machine": "cpu-2-cores" if cpu else "h100-80gb", "source": f"bench/memory_grid.py {row['case']}",
    }  # fmt: skip


def plan_of(row: Row) -> Plan:
    passes = row.get("passes", 1)
    step = row["rows"] * passes
    sizes = row.get("lengths") or [row["length"] + 1] * step
    total = sum(sizes)
    stats = DataStats(len(sizes), max(sizes), total, max(1, round(row["share"] * total)), tuple(sizes))
    recipe = parse(
        "", "fit", [
            f"backend={row['backend']}", f"device={row['device']}", f"dtype={row['dtype']}",
            f"quantize={row['quantize']}", f"train.batch_size={step}", f"lora.rank={row.get('rank', 16)}",
            f"train.keep_layers={row['keep_layers']}", f"train.max_length={max(sizes)}",
            *([f"lora.last_layers={row['last_layers']}"] if "last_layers" in row else []),
            *([] if "lengths" in row else [f"train.micro_batch={row['rows']}", "train.pack=false"]),
        ],
    )  # fmt: skip
    machine = known_machine(row["machine"])
    machine = replace(machine, cpu_bfloat16=row.get("cpu_bfloat16", machine.cpu_bfloat16))
    return make_plan(recipe, geometry.spec(row["model"]), machine, stats)


def rate_of(row: Row) -> Rate | None:
    """As measured on the row's machine; its copies, where only its products were: what is usual of such."""
    if row["rate_flops"] is None:
        return None
    published = published_rate(known_machine(row["machine"]), row["device"], row["dtype"])
    copies = published.bytes_per_s * PUBLISHED_COPY if published else CPU_BYTES_PER_S[row["backend"]]
    return Rate(row["rate_flops"], row["rate_bytes_per_s"] or copies, row["machine"], True)


def errors(cases: Sequence[tuple[Row, Plan, Rate]], speed: Speed) -> list[float]:
    """log(predicted / measured), row by row."""
    found = (duration(plan, rate, speed).tokens_per_s / row["tokens_per_s"] for row, plan, rate in cases)
    return [math.log(n) for n in found]


def fitted(cases: Sequence[tuple[Row, Plan, Rate]], start: Speed) -> Speed:
    """Least squares, pulled a little towards `start`: steps along each constant, smaller and smaller."""

    def cost(speed: Speed) -> float:
        pull = sum(math.log(getattr(speed, c) / getattr(start, c)) ** 2 for c in CONSTANTS)
        return sum(e * e for e in errors(cases, speed)) + PULL * pull

    best, width, dice = start, 0.5, Random(0)
    lowest = cost(best)
    while width > 0.005:
        better = False
        for name in dice.sample(CONSTANTS, len(CONSTANTS)):
            for factor in (math.exp(width), math.exp(-width)):
                value = getattr(best, name) * factor
                value = min(value, 1.0) if name in ("product", "attention") else value
                other = replace(best, **{name: value})
                if cost(other) < lowest:
                    best, lowest, better = other, cost(other), True
        width = width if better else width / 2
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--fit", action="store_true", help="fit the constants first, and print them")
    a = parser.parse_args()
    files = a.files or [HERE / "speed.jsonl"]
    groups: dict[tuple[str, str], list[tuple[Row, Plan, Rate]]] = defaultdict(list)
    for row in rows_of(files):
        rate = rate_of(row)
        if rate is not None:
            groups[row["backend"], row["device"]].append((row, plan_of(row), rate))
    for place, cases in groups.items():
        speed = SPEEDS[place]
        learned = [case for case in cases if not case[0].get("held_out")]
        if a.fit and learned:
            speed = replace(fitted(learned, speed), rows=len(learned))
        shown = ", ".join(f"{c} {getattr(speed, c):.3g}" for c in CONSTANTS)
        print(f"\n{place[0]} on {place[1]}: {shown}")
        found = errors(cases, speed)
        for (row, plan, _), error in zip(cases, found, strict=True):
            size = "WikiSQL" if "lengths" in row else f"{row['rows']}×{row['length']}"
            told = f"{row['model']:7} {row['quantize']:4} {size:7} {plan.keep_layers.value:2} kept"
            predicted = row["tokens_per_s"] * math.exp(error)
            held = "  held out" if row.get("held_out") else ""
            print(f"  {told}: predicted {predicted:8.1f}, measured {row['tokens_per_s']:8.1f}, "
                  f"{math.expm1(error):+.1%}{held}")  # fmt: skip
        print(f"  worst: a factor of {math.exp(max(map(abs, found))):.2f}")


if __name__ == "__main__":
    main()
