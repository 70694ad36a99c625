"""The facts of prepared data as one HTML page that needs nothing else: no network, no script.

    check_target(path)                   # before the work: may the page be written there?
    write_page(path, facts(prepared, recipe, show=20))

Everything that comes from rows or names is escaped. What is trained is set off by colour and by an underline,
so that it is seen without colours too; special tokens are small badges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from burnish.report import page
from burnish.report.page import table

_OPEN = 3  # examples that are unfolded from the start
_STYLE = """
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .2rem .6rem; align-items: center;
  font-size: .875rem; font-variant-numeric: tabular-nums; }
.bars .range { text-align: right; white-space: nowrap; color: var(--soft); }
.bars .bar { background: var(--bar); height: .9rem; border-radius: 2px; }
mark { background: var(--on); color: inherit; border-bottom: 2px solid var(--on-line); }
b.special { font-weight: 400; font-size: .75rem; background: var(--badge); border: 1px solid var(--line);
  border-radius: 4px; padding: 0 .3em; color: var(--soft); }
mark b.special { border-color: var(--on-line); color: var(--ink); }
"""


def check_target(path: Path) -> None:
    """Raises UserError where `path` is in no folder, is one, or is a file that is not such a page."""
    page.check_target(path, "data", "--html", "data.html")


def write_page(path: Path, told: Mapping[str, Any]) -> None:
    """Write the page whole, or not at all. Raises UserError where it may not be written."""
    page.write_html(path, data_page(told), "--html")


def data_page(told: Mapping[str, Any]) -> str:
    """The page for what `burnish.data.facts.facts` told."""
    title = f"Data of {told['recipe']}"
    parts = [
        f"<h1>{escape(title)}</h1>\n<p class=verdict>{escape(told['verdict'])}</p>",
        _warnings(told["warnings"]),
        "<h2>How it is read</h2>\n" + table(_reading(told)),
        "<h2>What is trained</h2>\n" + _counts(told),
        _histogram("Tokens a training row", told["train"], told["max_length"]),
        _histogram("Tokens a validation row", told["valid"], told["max_length"]),
        _bad_rows(told["bad_rows"]),
        _examples(told),
    ]
    body = "\n".join(p for p in parts if p)
    return page.html_page(title, page.mark("data"), body, _STYLE)


def _reading(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("files", told["container"]),
        ("format", f"{told['format']} ({told['why']})"),
        (
            "chat template",
            f"{told['template']}" + (f" ({told['template_why']})" if told["template_why"] else ""),
        ),
        ("longest allowed", f"{told['max_length']:,} tokens (train.max_length)"),
    ]
    if told["trimmed"]:
        rows.append(("trimmed", f"{told['trimmed']:,} texts lose outer white space to the template"))
    if told["held_out"]:
        rows.append(("validation", "taken from the training rows (data.valid_share)"))
    if told["normalized"]:
        rows.append(("normalised", f"{told['normalized']:,} rows differ in their normal form of Unicode"))
    if told["thoughts_dropped"]:
        rows.append(("reasoning", f"cut out of {told['thoughts_dropped']:,} answers (data.thinking: drop)"))
    padding = told["padding"]
    shares = f"{100 * padding['unpacked']:.1f} % of positions with one example a row"
    packed = f"{100 * padding['packed']:.1f} % packed into rows of {padding['row_length']:,} (train.pack)"
    rows.append(("padding", f"{shares}, {packed}"))
    return rows


_COUNTS = (
    ("rows", "rows"), ("conversations", "of them through the chat template"),
    ("many_turns", "of them with several answers"), ("tokens", "tokens"), ("trained", "trained tokens"),
    ("shortest", "tokens a row: shortest"), ("median", "median"), ("p90", "90 % up to"),
    ("p95", "95 % up to"), ("p99", "99 % up to"), ("longest", "longest"), ("answers", "answers"),
    ("reasoning", "with reasoning"),
    ("tool_calls", "tool calls"), ("too_long", "left out: too long"),
    ("untrained", "left out: nothing to train"), ("truncated", "cut"),
)  # fmt: skip


def _counts(told: Mapping[str, Any]) -> str:
    parts = [told[k] for k in ("train", "valid") if told[k]["rows"] or told[k]["dropped"]]
    heads = ["", *["training", "validation"][: len(parts)]]
    rows = []
    for key, name in _COUNTS:
        rows.append((name, *(f"{p[key]:,}" for p in parts)))
        if key == "trained":
            rows.append(("share trained", *(f"{p['trained_percent']:.1f} %" for p in parts)))
    return table(rows, numbers=True, heads=heads)


def _histogram(title: str, part: Mapping[str, Any], max_length: int) -> str:
    bins = part["histogram"]
    if not bins:
        return ""
    most = max(b["rows"] for b in bins)
    bars = "\n".join(
        f"<span class=range>{b['from']:,}–{b['to']:,}</span>"
        f'<span class=bar style="width:{100 * b["rows"] / most:.1f}%"></span><span>{b["rows"]:,}</span>'
        for b in bins
    )
    limit = f"<p class=soft>Longest {part['longest']:,}, allowed {max_length:,}.</p>"
    return f"<h2>{escape(title)}</h2>\n<div class=bars>\n{bars}\n</div>\n{limit}"


def _warnings(found: Sequence[Mapping[str, Any]]) -> str:
    listed = page.warnings((w["message"], w["hint"], w["places"]) for w in found)
    return f"<h2>Warnings</h2>\n{listed}" if listed else ""


def _bad_rows(bad: Mapping[str, Any]) -> str:
    if not bad["count"]:
        return ""
    rows = table((b["at"], b["why"]) for b in bad["rows"])
    return f"<h2>Skipped rows</h2>\n<details><summary>{bad['count']:,} rows</summary>\n{rows}\n</details>"


def _examples(told: Mapping[str, Any]) -> str:
    if not told["examples"]:
        return ""
    items = [
        f"<details{' open' if n <= _OPEN else ''}><summary>{n}. {escape(at)}</summary>\n"
        f"<pre>{''.join(_piece(p) for p in pieces)}</pre></details>"
        for n, (pieces, at) in enumerate(zip(told["examples"], told["example_places"], strict=True), 1)
    ]
    legend = "<p class=soft>What the model reads, and <mark>what of it is trained</mark>.</p>"
    return f"<h2>Examples</h2>\n{legend}\n" + "\n".join(items)


def _piece(piece: Mapping[str, Any]) -> str:
    text, at, parts = piece["text"], 0, []
    for start, end in piece["special"]:
        parts += [escape(text[at:start]), f"<b class=special>{escape(text[start:end])}</b>"]
        at = end
    inner = "".join([*parts, escape(text[at:])])
    return f"<mark>{inner}</mark>" if piece["trained"] else inner
