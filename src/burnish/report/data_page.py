"""The facts of prepared data as one HTML page that needs nothing else: no network, no script.

    check_target(path)                   # before the work: may the page be written there?
    write_page(path, facts(prepared, recipe, show=20))

Everything that comes from rows or names is escaped. What is trained is set off by colour and by an underline,
so that it is seen without colours too; special tokens are small badges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from burnish.errors import UserError
from burnish.runs.atomic import write_text

_MARK = '<meta name="generator" content="burnish data">'
_HEAD_BYTES = 1024  # the mark stands within these
_OPEN = 3  # examples that are unfolded from the start
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #63676e; --paper: #fbfbfa; --line: #dcdcd8;
  --on: #d9f2dd; --on-line: #2f8f46; --bar: #4a86c5; --warn: #fdf1d7;
  --warn-line: #c98a12; --badge: #e6e6e3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e1; --soft: #9a9ea6; --paper: #17191c;
  --line: #34373c; --on: #1d3d26; --on-line: #58b871; --bar: #5b93cd; --warn: #3a2f17;
  --warn-line: #c99a3c; --badge: #34373c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 56rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p.verdict { font-size: 1.1rem; margin: .25rem 0 0; } .soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
th { font-weight: 500; color: var(--soft); } td.n, th.n { text-align: right; }
.wide { overflow-x: auto; }
ul.warnings { list-style: none; padding: 0; margin: 0; }
ul.warnings > li { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .5rem .75rem;
  margin: .5rem 0; overflow-wrap: anywhere; }
ul.warnings ul { margin: .25rem 0 0; padding-left: 1.25rem; font-size: .875rem; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .2rem .6rem; align-items: center;
  font-size: .875rem; font-variant-numeric: tabular-nums; }
.bars .range { text-align: right; white-space: nowrap; color: var(--soft); }
.bars .bar { background: var(--bar); height: .9rem; border-radius: 2px; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
summary { cursor: pointer; padding: .4rem .75rem; overflow-wrap: anywhere; }
pre { margin: 0; padding: .75rem; border-top: 1px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere; font: .875rem/1.6 ui-monospace, monospace; }
mark { background: var(--on); color: inherit; border-bottom: 2px solid var(--on-line); }
b.special { font-weight: 400; font-size: .75rem; background: var(--badge); border: 1px solid var(--line);
  border-radius: 4px; padding: 0 .3em; color: var(--soft); }
mark b.special { border-color: var(--on-line); color: var(--ink); }
"""


def check_target(path: Path) -> None:
    """Raises UserError where `path` is in no folder, is one, or is a file that is not such a page."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file for the page", f"--html {path / 'data.html'}")
    if not path.parent.is_dir():
        raise UserError(
            f"there is no folder {path.parent} to write {path.name} to", f"mkdir -p {path.parent}"
        )
    try:
        with path.open("rb") as f:
            head = f.read(_HEAD_BYTES)
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "name another file with --html") from e
    if head and _MARK.encode() not in head:
        raise UserError(
            f"{path} is there already and is no page of `burnish data`, so it is not replaced",
            "name another file with --html, or remove that one",
        )


def write_page(path: Path, told: Mapping[str, Any]) -> None:
    """Write the page whole, or not at all. Raises UserError where it may not be written."""
    try:
        write_text(path, data_page(told))
    except UserError as e:
        raise UserError(e.message, "name another file with --html", e.exit_code) from e


def data_page(told: Mapping[str, Any]) -> str:
    """The page for what `burnish.data.facts.facts` told."""
    title = f"Data of {told['recipe']}"
    parts = [
        f"<h1>{escape(title)}</h1>\n<p class=verdict>{escape(told['verdict'])}</p>",
        _warnings(told["warnings"]),
        "<h2>How it is read</h2>\n" + _table(_reading(told)),
        "<h2>What is trained</h2>\n" + _counts(told),
        _histogram("Tokens a training row", told["train"], told["max_length"]),
        _histogram("Tokens a validation row", told["valid"], told["max_length"]),
        _bad_rows(told["bad_rows"]),
        _examples(told),
    ]
    body = "\n".join(p for p in parts if p)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{_MARK}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(rows: Iterable[Sequence[str]], numbers: bool = False) -> str:
    """Rows of escaped cells; the first of each is its head."""
    kind = " class=n" if numbers else ""
    lines = (
        f"<tr><th>{escape(head)}</th>" + "".join(f"<td{kind}>{escape(c)}</td>" for c in cells) + "</tr>"
        for head, *cells in rows
    )
    return "<div class=wide><table>\n" + "\n".join(lines) + "\n</table></div>"


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
    heads = ["training", "validation"][: len(parts)]
    head = "<tr><th></th>" + "".join(f"<th class=n>{h}</th>" for h in heads) + "</tr>\n"
    rows = []
    for key, name in _COUNTS:
        rows.append((name, *(f"{p[key]:,}" for p in parts)))
        if key == "trained":
            rows.append(("share trained", *(f"{p['trained_percent']:.1f} %" for p in parts)))
    return _table(rows, numbers=True).replace("<table>\n", f"<table>\n{head}", 1)


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
    if not found:
        return ""
    items = []
    for w in found:
        places = "".join(f"<li>{escape(p)}</li>" for p in w["places"])
        items.append(
            f"<li><strong>{escape(w['message'])}</strong><br>{escape(w['hint'])}"
            + (f"<ul>{places}</ul>" if places else "")
            + "</li>"
        )
    return "<h2>Warnings</h2>\n<ul class=warnings>\n" + "\n".join(items) + "\n</ul>"


def _bad_rows(bad: Mapping[str, Any]) -> str:
    if not bad["count"]:
        return ""
    table = _table((b["at"], b["why"]) for b in bad["rows"])
    return f"<h2>Skipped rows</h2>\n<details><summary>{bad['count']:,} rows</summary>\n{table}\n</details>"


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
