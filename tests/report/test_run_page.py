"""The page of a run: whole, escaped, small, in need of nothing; and its charts, by their geometry."""

from __future__ import annotations

import html
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.report.charts import HEIGHT, WIDTH, Line, line_chart, smooth, thinned, ticks
from burnish.report.run_facts import run_facts
from burnish.report.run_page import check_target, run_page, write_run_page
from tests.report.test_data_page import Reader
from tests.report.test_run_facts import PLANNED, folder_of, stepped, steps

EVIL = "<script>alert('x')</script> & \"q\" ]]> \u2028 </title></svg></pre>"
END = {"event": "finished", "step": 40, "seconds": 30.0, "from_step": 40, "peak_bytes": 4 << 30}
CHARTS = ["Loss", "Learning rate", "Gradient norm", "Tokens a second", "Memory, GiB"]


def svgs(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, re.DOTALL)


def check_geometry(svg: str) -> None:
    """Every coordinate lies in the view box, is a number, and ticks rise from left to right and upwards."""
    assert f'viewBox="0 0 {WIDTH} {HEIGHT}"' in svg
    assert not re.search(r"\b(nan|inf)\b", svg, re.IGNORECASE)
    for name, value in re.findall(r'\b(x|y|x1|x2|y1|y2|cx|cy)="([^"]*)"', svg):
        assert 0 <= float(value) <= (WIDTH if "x" in name else HEIGHT), (name, value)
    for points in re.findall(r'points="([^"]*)"', svg):
        at = [tuple(map(float, p.split(","))) for p in points.split()]
        assert len(at) > 1 and [x for x, _ in at] == sorted(x for x, _ in at)
        assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in at)
    for axis, place in (("x", "x"), ("y", "y")):
        found = re.findall(rf'<text class={axis} x="([^"]+)" y="([^"]+)"[^>]*>([^<]+)<', svg)
        values = [float(text.replace(",", "")) for _, _, text in found]
        where = [float(x if place == "x" else y) for x, y, _ in found]
        assert values == sorted(set(values)), f"labels of the {axis} axis repeat or fall: {values}"
        assert where == sorted(where, reverse=axis == "y")
        assert axis == "x" or len(values) > 1


def page_of(root: Path, *events: dict[str, Any], **more: Any) -> str:
    return run_page(run_facts(folder_of(root, *events, **more)))


def test_first_things_come_first(tmp_path: Path):
    answers = [
        {"event": "answered", "when": w, "question": "why?", "answer": f"{w} it"} for w in ("before", "after")
    ]
    page = page_of(tmp_path / "r", PLANNED, answers[0], *steps(1, 40), answers[1], END)
    read = Reader(page)
    assert read.all("h1") == ["mine"]
    assert read.all("h2")[:4] == [
        "What changed",
        "What to do next",
        "Answers before and after",
        "Step by step",
    ]
    told = run_facts(tmp_path / "r")
    assert html.escape(told["verdict"]) in page.split("<h2>")[0]
    commands = [t for t in read.all("pre") if t.startswith("burnish ")]
    assert commands == [s["command"] for s in told["next"]]
    assert commands[0].startswith("burnish generate ") and "--to ollama" in commands[1]
    assert "before it" in read.all("pre") and "after it" in read.all("pre")


def test_charts_are_drawn_in_their_boxes(tmp_path: Path):
    valid = [{"event": "validated", "step": n, "loss": 1 + 1 / n} for n in (10, 20, 40)]
    page = page_of(tmp_path / "r", PLANNED, *steps(1, 40), *valid, END)
    found = svgs(page)
    assert [re.search("<title>(.*?)</title>", s)[1] for s in found] == CHARTS  # type: ignore[index]
    for svg in found:
        check_geometry(svg)
        assert 'role="img"' in svg and 'aria-label="' in svg
    assert found[0].count("<circle") == 3 + 1, "three validations, and the legend's"
    kinds = set(re.findall(r'class="line (\w+)"', found[0]))
    assert kinds == {"raw", "main", "other"}
    assert "svg .other { stroke: var(--warn-line); stroke-dasharray" in page, "told apart without colour too"


def test_points_lie_where_their_values_are():
    svg = line_chart("t", [Line("a", [(0, 0.0), (5, 10.0), (10, 5.0)], "main")])
    (points,) = re.findall(r'points="([^"]*)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = [tuple(map(float, p.split(","))) for p in points.split()]
    assert x1 - x0 == pytest.approx(x2 - x1) and y2 - y1 == pytest.approx(y0 - y2) and y1 < y0
    ticks_y = dict(re.findall(r'<text class=y x="[^"]+" y="([^"]+)"[^>]*>([^<]+)<', svg))
    assert ticks_y[f"{y0 + 4:.1f}"] == "0" and ticks_y[f"{y1 + 4:.1f}"] == "10"


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.153, 2.01), (2e-6, 2e-4), (5, 5), (0, 0), (-3, 7), (1e-320, 1e-310), (-9e29, 9e29),
     (99.999, 100.001), (1, 1 + 1e-15), (0, 3.6e9), (-5, -5)],
)  # fmt: skip
def test_ticks_are_round_and_hold_the_range(low: float, high: float):
    found = ticks(low, high)
    assert 2 <= len(found) <= 9 and found == sorted(set(found))
    slack = 1e-6 * (found[-1] - found[0])
    assert found[0] <= low + slack and found[-1] >= high - slack
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step * 1.0001)), 3) in (1, 2, 5)
    check_geometry(line_chart("t", [Line("a", [(1, float(low)), (2, float(high))], "main")]))


def test_smoothing_is_a_mean_and_passes_over_gaps():
    points = [(1, 1.0), (2, 2.0), (3, None), (4, 6.0), (5, 8.0)]
    assert smooth(points, 3) == [(1, 1.5), (2, 1.5), (3, None), (4, 7.0), (5, 7.0)]


def test_thinning_keeps_extremes_ends_and_gaps():
    rng = random.Random(7)
    points: list[tuple[float, float | None]] = [(n, rng.random()) for n in range(1, 100_001)]
    points[31_415] = (31_416, 99.0)
    points[27_182] = (27_183, -99.0)
    points[50_123] = (50_124, None)
    kept = thinned(points, 800)
    assert len(kept) <= 1_000 and set(kept) <= set(points) and kept == sorted(kept, key=lambda p: p[0])
    assert {(31_416, 99.0), (27_183, -99.0), (50_124, None), points[0], points[-1]} <= set(kept)
    assert thinned(points[:800], 800) == points[:800]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "x", 1e300])
def test_values_that_are_no_numbers_break_lines_and_nothing_else(tmp_path: Path, bad: Any):
    keys = ("loss", "lr", "grad_norm", "tokens", "seconds", "now_bytes", "peak_bytes")
    some = [stepped(n, **(dict.fromkeys(keys, bad) if n in (1, 7, 9, 20) else {})) for n in range(1, 21)]
    found = svgs(page_of(tmp_path / "r", PLANNED, *some))
    assert len(found) == 5
    for svg in found:
        check_geometry(svg)
        assert len(re.findall(r'<polyline class="line main"', svg)) == 2
        assert '<circle class="dot main"' in svg, "step 8 stands alone"
    nothing = [stepped(n, **dict.fromkeys(keys, bad)) for n in range(1, 4)]
    page = page_of(tmp_path / "n", PLANNED, *nothing)
    assert svgs(page) == [] and "Step by step" not in page
    Reader(page)


def test_one_step_is_a_dot(tmp_path: Path):
    found = svgs(page_of(tmp_path / "r", PLANNED, stepped(1)))
    assert len(found) == 5 and all("<circle" in svg for svg in found)
    for svg in found:
        check_geometry(svg)


def test_recoveries_are_marked_told_and_counted(tmp_path: Path):
    recovered = {
        "event": "recovered", "step": 20, "cause": "memory", "reason": "out of memory", "seconds": 12.0,
        "action": "micro-batch 4 → 2", "repeated": 3, "diagnosis": "",
    }  # fmt: skip
    skipped = {"event": "skipped", "step": 25, "rows": ["data.jsonl:12"], "reason": "loss is NaN"}
    page = page_of(tmp_path / "r", PLANNED, *steps(1, 20), recovered, *steps(21, 40), skipped)
    read = Reader(page)
    assert "Trouble on the way" in read.all("h2")
    for part in ("out of memory", "micro-batch 4 → 2", "data.jsonl:12", "steps done again"):
        assert part in read.text
    assert all(svg.count("<line class=mark") == 2 for svg in svgs(page))


def test_a_failure_says_what_to_try(tmp_path: Path):
    failed = {
        "event": "failed", "step": 5, "error": "RuntimeError: E", "what": "the GPU was reset",
        "try_": "reboot", "diagnosis": "gpu-reset",
    }  # fmt: skip
    page = page_of(tmp_path / "r", PLANNED, *steps(1, 5), failed, checkpoints=(4,))
    text = Reader(page).text
    assert '<span class="state warn">failed</span>' in page
    assert "the GPU was reset" in text and "RuntimeError: E" in text and "reboot" in text
    assert "burnish resume" in text


def test_everything_of_the_data_is_escaped(tmp_path: Path):
    root = tmp_path / "<script>&"
    answer = {
        "event": "answered",
        "when": "after",
        "question": EVIL,
        "answer": EVIL,
        "rung": EVIL,
        "reason": EVIL,
    }
    events = [
        answer, {"event": "noted", "message": EVIL}, {"event": EVIL, EVIL: EVIL},
        {"event": "scored", "when": "after", "task": EVIL, "correct": 1, "total": 2},
        {"event": "recovered", "step": 3, "action": EVIL, "reason": EVIL}, {"event": "paused", "why": EVIL},
        {"event": "failed", "step": 3, "what": EVIL, "error": EVIL + "2", "try_": [EVIL]},
    ]  # fmt: skip
    run = folder_of(root, PLANNED, *steps(1, 40), *events)
    (run / "recipe.yaml").write_text(json.dumps({"name": EVIL, "model": EVIL, "data": {"train": EVIL}}))
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL, "versions": {EVIL: EVIL}, "gpus": [EVIL]}))
    part = {"part": EVIL, "bytes": 5, "why": EVIL}
    (run / "plan.json").write_text(json.dumps({"estimate": [part], "choices": {"backend": {"value": EVIL}}}))
    (run / "out").mkdir()
    (run / "out" / "export.json").write_text(json.dumps({"to": EVIL, "type": EVIL}))
    page = run_page(run_facts(run))
    assert "<script" not in page and "]]>" not in page and page.count("</title>") == page.count("<title>")
    read = Reader(page)
    assert read.text.count("<script>alert('x')</script>") >= 25
    assert not any(k.startswith("on") for _, attributes in read.tags for k in attributes)


def test_the_page_needs_nothing_else(tmp_path: Path):
    page = page_of(tmp_path / "r", PLANNED, *steps(1, 40), END)
    read = Reader(page)
    assert not {"script", "link", "img", "iframe"} & {t for t, _ in read.tags}
    assert not any({"src", "href", "style"} & set(a) for _, a in read.tags)
    assert not re.search(r"https?:|@import|url\(", page)
    for part in ("prefers-color-scheme: dark", "@media print", 'name="viewport"', 'charset="utf-8"'):
        assert part in page
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    assert used <= set(re.findall(r"(--[\w-]+):", page)), "a colour that is not defined"


def test_a_hundred_thousand_steps_are_a_small_page_and_a_spike_is_seen(tmp_path: Path):
    rng = random.Random(8)
    lines = []
    for n in range(1, 100_001):
        spike = {"loss": 777.0} if n == 61_803 else {"loss": rng.random()}
        spike |= {"grad_norm": 888.0} if n == 14_142 else {}
        lines.append(stepped(n, 100_000, **spike))
        if n % 50 == 0:
            lines.append({"event": "validated", "step": n, "loss": rng.random(), "best": False})
            lines.append({"event": "saved", "step": n, "folder": "f"})
    answers = [
        {"event": "answered", "when": "after", "question": f"{n}?", "answer": "&" * 9_999} for n in range(200)
    ]
    page = page_of(tmp_path / "r", PLANNED, *lines, *answers)
    assert len(page.encode()) < 1_000_000
    found = svgs(page)
    assert "highest 777 at step 61,803" in found[0] and "highest 888 at step 14,142" in found[2]
    for svg in found:
        check_geometry(svg)
    tops = [float(p.split(",")[1]) for p in re.findall(r'points="([^"]*)"', found[0])[0].split()]
    assert min(tops) < HEIGHT / 5 and sorted(tops)[2] > HEIGHT / 2, "one spike, far above the others"
    assert "180 more in events.jsonl" in page and "2,000 saved checkpoints are not listed" in page


def test_a_page_is_replaced_and_another_file_is_not(tmp_path: Path):
    told = run_facts(folder_of(tmp_path / "r", PLANNED, *steps(1, 3)))
    path = tmp_path / "report.html"
    for name in ("one", "two"):
        check_target(path)
        write_run_page(path, {**told, "name": name})
        assert f"<h1>{name}</h1>" in path.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r", "report.html"]
    path.write_text('<meta name="generator" content="burnish data">')
    with pytest.raises(UserError, match="no page of `burnish report`") as caught:
        check_target(path)
    assert "--out" in caught.value.hint
