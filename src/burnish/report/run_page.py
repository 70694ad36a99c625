"""A run as one HTML page that needs nothing else: no network, no script.

    check_target(path)                          # before the work: may the page be written there?
    write_run_page(path, run_facts(folder))

First what it was, whether it worked, what changed and what to do next; then the charts; then everything else.
However long the run was, the page stays small: charts are thinned, tables and answers have a limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from burnish.report import page
from burnish.report.charts import STYLE as CHART_STYLE
from burnish.report.charts import Line, Points, in_words, line_chart, short
from burnish.report.page import duration, gib, number, plain, table, warnings

MOST_EVENTS = 300  # in the table; events.jsonl has all
MOST_SAMPLES, MOST_TEXT = 20, 3_000  # questions; characters of a text
MOST_RECIPE = 50_000  # characters
LOUD = {"failed": "warn", "ended": "warn", "interrupted": "warn", "finished": "good"}
_STYLE = """
.state { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; border: 1px solid var(--line);
  background: var(--badge); font-size: .875rem; }
.state.good { background: var(--on); border-color: var(--on-line); }
.state.warn { background: var(--warn); border-color: var(--warn-line); }
pre.command { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .75rem;
  margin: .15rem 0 .6rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 0 1rem; }
.pair > div { border: 1px solid var(--line); border-radius: 6px; } .pair h4 { margin: .4rem .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .4rem; overflow-wrap: anywhere; white-space: pre-wrap; }
h4 { font-size: .875rem; font-weight: 500; color: var(--soft); }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } pre, tr, li { break-inside: avoid; } }
"""


def check_target(path: Path) -> None:
    """Raises UserError where `path` is in no folder, is one, or is a file that is not such a page."""
    page.check_target(path, "report", "--out", "report.html")


def write_run_page(path: Path, facts: Mapping[str, Any]) -> None:
    """Write the page whole, or not at all. Raises UserError where it may not be written."""
    page.write_html(path, run_page(facts), "--out")


def run_page(told: Mapping[str, Any]) -> str:
    """The page for what `run_facts` told."""
    kind = told["state"]["kind"]
    parts = [
        f"<h1>{escape(told['name'])}</h1>\n<p class=verdict>"
        f'<span class="state {LOUD.get(kind, "going")}">{escape(told["state"]["words"])}</span> '
        f"{escape(told['verdict'])}</p>\n<p class=soft>{escape(what_it_was(told))}</p>",
        _failure(told["failure"]),
        _list("What changed", told["changed"]),
        _next(told["next"]),
        _samples(told["samples"]),
        _scores(told["scores"]),
        _charts(told),
        _section("Trouble on the way", _troubles(told)),
        _section("Memory", _memory(told["memory"])),
        _section("Time", _time(told["time"])),
        _section("What was trained", table(_trained(told))),
        _folded(f"Events ({len(told['events']):,})", _events(told["events"])),
        _folded("Machine and versions", table(_environment(told["environment"]))),
        _folded("Recipe", f"<pre>{escape(_cut(told['recipe'], MOST_RECIPE))}</pre>"),
        f"<p class=soft>{escape(told['run'])}</p>",
    ]
    body = "\n".join(p for p in parts if p)
    return page.html_page(f"Run {told['name']}", page.mark("report"), body, CHART_STYLE + _STYLE)


def what_it_was(told: Mapping[str, Any]) -> str:
    """In a sentence: the base model, the adapter, the rows."""
    lora, train, data, engine = told["lora"], told["train"], told["data"], told["engine"]
    parts = [plain(told["model"]) or "a model that was not recorded"]
    if lora["rank"] is not None:
        layers = f" in {lora['layers']} layers" if lora["layers"] else ""
        parts.append(f"LoRA of rank {lora['rank']}{layers}")
    if data.get("examples"):
        parts.append(f"{data['examples']:,} rows of {data['tokens']:,} tokens")
    if number(train["lr"]) is not None:
        parts.append(f"learning rate {train['lr']:g}")
    if engine["backend"]:
        parts.append(f"{plain(engine['backend'])} on {plain(engine['device'])}")
    return f"{', '.join(parts)}."


# --- first things ---


def _failure(failure: Mapping[str, Any] | None) -> str:
    if not failure:
        return ""
    what = failure["what"] or failure["error"] or "the reason was not recorded"
    words = failure["error"] if failure["error"] != what else ""
    hint = f"In its own words: {_cut(words)}" if words else ""
    return _section("What went wrong", warnings([(_cut(what), hint, [_cut(t) for t in failure["try"]])]))


def _list(title: str, items: Sequence[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>\n" for item in items)
    return f"<h2>{escape(title)}</h2>\n<ul>\n{lines}</ul>" if items else ""


def _next(steps: Sequence[Mapping[str, str]]) -> str:
    lines = [
        f"{escape(s['what'])}"
        + (f"<pre class=command>{escape(s['command'])}</pre>" if s["command"] else "<br>")
        for s in steps
    ]
    return "<h2>What to do next</h2>\n<div>" + "\n".join(lines) + "</div>" if lines else ""


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
    shown = []
    for sample in samples[:MOST_SAMPLES]:
        cells = []
        for when in ("before", "after"):
            note = f" ({sample[f'{when}_note']})" if sample.get(f"{when}_note") else ""
            answer = sample.get(when)
            text = "<span class=soft>not asked</span>" if answer is None else escape(_cut(answer.strip()))
            cells.append(f"<div><h4>{when} training{escape(_cut(note))}</h4><pre>{text}</pre></div>")
        shown.append(f"<h3>{escape(_cut(sample['question']))}</h3>\n<div class=pair>{''.join(cells)}</div>")
    left = len(samples) - len(shown)
    more = f"<p class=soft>{left:,} more in events.jsonl.</p>" if left > 0 else ""
    return _section("Answers before and after", "\n".join(shown) + more)


def _scores(scores: Sequence[Mapping[str, Any]]) -> str:
    def cell(score: Mapping[str, Any] | None) -> str:
        return (
            f"{score['percent']:.1f} % ({score['correct']:,} of {score['total']:,})"
            if score
            else "not scored"
        )

    rows = [(s["task"], cell(s.get("before")), cell(s.get("after"))) for s in scores]
    return _section("Scores", table(rows, True, ("task", "before", "after")) if rows else "")


# --- charts ---


def _charts(told: Mapping[str, Any]) -> str:
    series, losses = told["series"], told["losses"]
    marks = [
        (step, plain(e.get("cause")) or e["event"])
        for e in told["troubles"]
        if e["event"] in ("recovered", "skipped") and (step := number(e.get("step"))) is not None
    ]
    loss = [
        Line("each step", series["loss"], "raw"),
        Line(f"mean of {losses['smoothed_over']}", series["smoothed"], "main"),
        Line("validation", series["valid"], "other", dots=len(series["valid"]) <= 50),
    ]
    predicted = told["memory"]["predicted"]
    memory = [
        Line("in use", _gib(series["now_bytes"]), "raw"),
        Line("peak so far", _gib(series["peak_bytes"]), "main"),
    ]
    ends = [series["now_bytes"][0][0], series["now_bytes"][-1][0]] if series["now_bytes"] else []
    if predicted:
        memory.append(Line("predicted", [(x, predicted / 2**30) for x in ends], "limit"))
    figures = [
        _figure("Loss", loss, marks),
        _figure("Learning rate", [Line("learning rate", series["lr"], "main")], marks),
        _figure("Gradient norm", [Line("before clipping", series["grad_norm"], "main")], marks),
        _figure("Tokens a second", [Line("each step", series["tokens_per_s"], "main")], marks),
        _figure("Memory, GiB", memory, marks),
    ]
    drawn = "\n".join(f for f in figures if f)
    return f"<h2>Step by step</h2>\n<div class=charts>\n{drawn}\n</div>" if drawn else ""


def _figure(title: str, lines: Sequence[Line], marks: Sequence[tuple[float, str]]) -> str:
    svg = line_chart(title, lines, marks)
    return (
        f"<figure><h3>{escape(title)}</h3>\n{svg}\n<figcaption>{escape(in_words(lines))}.</figcaption></figure>"
        if svg
        else ""
    )


def _gib(points: Points) -> list[tuple[float, float | None]]:
    return [(x, None if y is None else y / 2**30) for x, y in points]


# --- tables ---


def _troubles(told: Mapping[str, Any]) -> str:
    """Recoveries, skipped steps, pauses, and what the run itself noted."""
    rows = [_row(e) for e in told["troubles"]]
    rows += [("", "noted", _cut(note)) for note in told["notes"]]
    return table(_some(rows), heads=("step", "what", "more")) if rows else ""


def _memory(memory: Mapping[str, Any]) -> str:
    rows = [
        (plain(p.get("part")), gib(p["bytes"]), plain(p.get("why")))
        for p in sorted(memory["parts"], key=lambda p: -p["bytes"])
    ]
    named = (
        ("predicted in all", "predicted", "what the plan counted on"),
        ("budget", "budget", "what there was"),
        ("rehearsed", "rehearsed", "the longest step, measured before the first one"),
        ("peak", "peak", "the most that was measured while it ran"),
    )
    rows += [(name, gib(memory[key]), why) for name, key, why in named if memory[key]]
    if not rows:
        return ""
    off = memory["off_percent"]
    how = "" if off is None else _off(off)
    return (f"<p>{escape(how)}</p>\n" if how else "") + table(rows, heads=("part", "memory", "why"))


def _off(percent: float) -> str:
    if abs(percent) < 0.5:
        return "What was predicted is what was measured."
    return f"Predicted was {abs(percent):.0f} % {'more' if percent > 0 else 'less'} than the measured peak."


def _time(time: Mapping[str, Any]) -> str:
    named = (
        ("in all", "whole"), ("in steps", "steps"), ("rehearsal", "rehearsal"),
        ("loading, answers, validation, saving", "other"), ("paused", "paused"),
        ("recoveries", "recoveries"), ("lost to faults, with steps done again", "lost"),
        ("a step, usually", "median_step"),
    )  # fmt: skip
    rows = [(name, duration(time[key])) for name, key in named if time[key]]
    if time["repeated_steps"]:
        rows.append(("steps done again", f"{time['repeated_steps']:,}"))
    if time["sessions"] > 1:
        rows.append(("begun or gone on with", f"{time['sessions']:,} times"))
    return table(rows) if rows else ""


def _trained(told: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data, lora, train = told["data"], told["lora"], told["train"]
    yield "model", plain(told["model"])
    if data.get("tokens"):
        yield "rows", f"{data['examples']:,} to train on, {data['valid_examples']:,} to validate on"
        yield (
            "tokens",
            f"{data['tokens']:,}, {data['trained']:,} of them trained ({data['trained_percent']:.1f} %)",
        )
    if data.get("dropped") or data.get("truncated"):
        yield "too long", f"{data['dropped']:,} rows left out, {data['truncated']:,} cut"
    yield "steps", f"{told['state']['step']:,} of {told['state']['steps']:,}"
    groups = (("", told["files"]), ("LoRA ", lora), ("", train), ("", told["engine"]))
    for prefix, group in groups:
        for key, value in group.items():
            if value not in (None, "", [], 0.0):
                words = ", ".join(map(plain, value)) if isinstance(value, list) else plain(value)
                yield f"{prefix}{key.replace('_', ' ')}", _cut(words)
    if told["adapter"]:
        yield "adapter", told["adapter"]
    for export in told["exports"]:
        proven = "proven" if export.get("proven") else "not proven"
        yield "export", f"{export['folder']}: {plain(export.get('to'))} {plain(export.get('type'))}, {proven}"


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    """In order. Where they are too many, saved checkpoints are left out first, then the middle."""
    some = events if len(events) <= MOST_EVENTS else [e for e in events if e["event"] != "saved"]
    left = len(events) - len(some)
    rows = _some([_row(e) for e in some])
    said = f"<p class=soft>{left:,} saved checkpoints are not listed.</p>\n" if left else ""
    return said + table(rows, heads=("step", "what", "more"))


def _some(rows: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    left, half = len(rows) - MOST_EVENTS, MOST_EVENTS // 2
    if left <= 0:
        return list(rows)
    return [*rows[:half], ("", "…", f"{left:,} more in events.jsonl"), *rows[-half:]]


def _row(event: Mapping[str, Any]) -> tuple[str, str, str]:
    """(step, what, the rest as 'name value')."""
    step = number(event.get("step"))
    rest = [
        f"{key.strip('_').replace('_', ' ')}: {_value(key, value)}"
        for key, value in event.items()
        if key not in ("event", "step") and value not in ("", None, [], {})
    ]
    return "" if step is None else f"{step:,.0f}", _cut(event["event"]), _cut("; ".join(rest), 600)


def _value(key: str, value: object) -> str:
    n = number(value)
    if n is None:
        return plain(value)
    if key.endswith("_bytes"):
        return gib(n)
    return duration(n) if key == "seconds" and n >= 0 else short(n)


def _environment(environment: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in environment.items():
        if isinstance(value, Mapping):
            words = ", ".join(f"{k} {plain(v)}" for k, v in value.items() if v)
        elif isinstance(value, list):
            words = " ".join(map(plain, value))
        else:
            words = _value(key, value) if key.endswith("_bytes") else plain(value)
        if words:
            yield key.replace("_", " "), _cut(words)


# --- pieces ---


def _section(title: str, inner: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{inner}" if inner else ""


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n{inner}\n</details>" if inner else ""


def _cut(text: str, most: int = MOST_TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]} … and {len(text) - most:,} more characters"
