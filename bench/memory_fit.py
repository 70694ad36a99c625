"""Predicted against measured peaks, for every row of bench/memory/*.jsonl, and the constants fitted anew.

    python bench/memory_fit.py            # how well src/burnish/planning/fitted.py does
    python bench/memory_fit.py --fit      # what would do best on the rows marked for fitting
    python bench/memory_fit.py --folders .cache PLACE   # the CPU's models; geometry.py makes tiny ones

On a GPU `--fit` uses every second configuration of a file, and the others only judge: both halves are
reported. The constants that stand were set by hand on an earlier call's rows; rows marked `new` are of
configurations that had not been measured by then, and the only ones never seen. On a CPU the fit uses the
rows that are not marked `new`, and the others, measured for judging alone, are the other half. A prediction
is made from what is known before a run: the case's own text, the spec, the plan's choices. On a GPU the
framework's part is left out on both sides, since its counter does not see it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from burnish.models.spec import ModelSpec, read_spec
from burnish.planning import memory
from burnish.planning.fitted import FITTED, Fitted
from burnish.planning.memory import Shape
from burnish.planning.plan import parts_of
from geometry import spec
from memory_grid import Case

ROWS = Path(__file__).parent / "memory"
CHANGES = (0.8, 0.9, 0.97, 1.03, 1.1, 1.25)


def rows_of(backend: str, device: str) -> list[dict[str, Any]]:
    path = ROWS / f"{backend}-{device}.jsonl"
    text = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [row for line in text if not (row := json.loads(line))["case"].endswith(":free")]


def spec_of(row: dict[str, Any], folders: Sequence[Path]) -> ModelSpec | None:
    if row["device"] != "cpu":
        return spec(row["model"])
    found = (folder for place in folders if (folder := place / row["model"]).is_dir())
    return next((read_spec(folder) for folder in found), None)


def predicted(row: dict[str, Any], found: ModelSpec) -> int:
    case = Case.of(row["case"])
    targets = tuple(k.rsplit(".", 1)[-1] for k in found.linears)
    shape = Shape(
        row["device"], row["dtype"], row["dtype"], case.quantize, case.rank, targets,
        tuple(range(found.n_layers)), case.rows, row.get("row_length") or case.length, row["keep_layers"],
        row["loss_slice"], case.share, case.passes, row.get("ahead", 0),
    )  # fmt: skip
    parts = parts_of(row["backend"], found)(shape)
    outside = 0 if row["device"] == "cpu" else next(p.n_bytes for p in parts if p.name == "framework")
    return memory.total(parts) - outside


def errors(rows: Sequence[tuple[dict[str, Any], ModelSpec]]) -> list[float]:
    return [predicted(row, found) / row["peak_bytes"] - 1 for row, found in rows]


def said(title: str, found: list[float]) -> str:
    if not found:
        return f"{title}: no rows"
    off = [abs(e) for e in found]
    return (
        f"{title}: {len(found)} rows, median {median(off):.1%}, worst {max(off):.1%}, "
        f"most too low {min(0.0, *found):.1%}"
        if len(found) > 1
        else f"{title}: 1 row, {found[0]:+.1%}"
    )


def fitted(backend: str, device: str, rows: Sequence[tuple[dict[str, Any], ModelSpec]]) -> Fitted:
    """Coordinate search from what there is: the sum of squared errors, those too low counted four times."""
    key = (backend, device)

    def cost(fit: Fitted) -> float:
        FITTED[key] = fit
        drift = sum(
            ((getattr(fit, f.name) or 1) / (getattr(start, f.name) or 1) - 1) ** 2 for f in fields(fit)
        )
        return sum(e * e * (4 if e < 0 else 1) for e in errors(rows)) + 1e-5 * drift

    start = best = FITTED[key]
    least = cost(best)
    for _ in range(12):
        before = least
        for field in fields(Fitted):
            for change in CHANGES:
                value = getattr(best, field.name) * change
                tried = replace(best, **{field.name: round(value) if field.type == "int" else value})
                if cost(tried) < least:
                    best, least = tried, cost(tried)
        if least > before * 0.999:
            break
    FITTED[key] = start
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--folders", type=Path, nargs="+", default=[Path(".cache")], help="the CPU's models")
    a = parser.parse_args()
    halves: dict[str, list[float]] = {"fitting half": [], "other half": [], "never seen": []}
    for backend, device in (("torch", "cuda"), ("mlx", "cuda"), ("torch", "cpu"), ("mlx", "cpu")):
        rows = [(r, s) for r in rows_of(backend, device) if (s := spec_of(r, a.folders)) is not None]
        unseen = [pair for pair in rows if pair[0].get("new")]
        halves_of = (rows[::2], rows[1::2])
        if device == "cpu":
            halves_of = ([pair for pair in rows if not pair[0].get("new")], unseen)
        parts = dict(zip(("fitting half", "other half"), halves_of, strict=True))
        parts |= {"never seen": unseen}
        if a.fit and rows:
            FITTED[backend, device] = fitted(backend, device, parts["fitting half"])
            print(FITTED[backend, device])
        for (row, _), error in zip(rows, errors(rows), strict=True):
            print(f"  {backend} {device} {row['case']:<40} {row['peak_bytes'] / 2**30:7.2f} GiB {error:+.1%}")
        for half, some in parts.items():
            halves[half] += errors(some)
            print(said(f"{backend} {device}, {half}", errors(some)))
    for half, found in halves.items():
        print(said(f"all, {half}", found))


if __name__ == "__main__":
    main()
