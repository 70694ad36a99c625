"""What our pages share: a style, the mark that tells them from a person's own files, tables, words, and care.

    check_target(path, "report", "--out", "report.html")    # before the work
    write_html(path, html_page(title, mark("report"), body), "--out")

Whatever comes from data is escaped here (`table`, `warnings`, titles) or by whoever calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from burnish.errors import UserError
from burnish.runs.atomic import write_text

_HEAD_BYTES = 1024  # the mark stands within these
LARGEST = 1e30  # beyond, a number is as good as infinite, and no chart can be drawn
STYLE = """
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
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; }
summary { cursor: pointer; padding: .4rem .75rem; overflow-wrap: anywhere; }
pre { margin: 0; padding: .75rem; border-top: 1px solid var(--line); white-space: pre-wrap;
  overflow-wrap: anywhere; font: .875rem/1.6 ui-monospace, monospace; }
"""


def mark(verb: str) -> str:
    """What stands in the head of a page that `burnish VERB` wrote, and in no other file."""
    return f'<meta name="generator" content="burnish {verb}">'


def check_target(path: Path, verb: str, option: str, usual: str) -> None:
    """Raises UserError where `path` is in no folder, is one, or is a file that is no page of `burnish VERB`.

    option: of the command line, that names another file. usual: a name for the page.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected a file for the page", f"{option} {path / usual}")
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
        raise UserError(f"{path} cannot be read: {e.strerror}", f"name another file with {option}") from e
    if head and mark(verb).encode() not in head:
        raise UserError(
            f"{path} is there already and is no page of `burnish {verb}`, so it is not replaced",
            f"name another file with {option}, or remove that one",
        )


def write_html(path: Path, html: str, option: str) -> None:
    """Write the page whole, or not at all. Raises UserError where it may not be written."""
    try:
        write_text(path, html)
    except UserError as e:
        raise UserError(e.message, f"name another file with {option}", e.exit_code) from e


def html_page(title: str, generator: str, body: str, style: str = "") -> str:
    """generator: of `mark`. style: rules beside the shared ones. title: not escaped yet."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{generator}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def table(rows: Iterable[Sequence[str]], numbers: bool = False, heads: Sequence[str] = ()) -> str:
    """Rows of cells, escaped here; the first of each row is its head. heads: of the columns, if any."""
    kind = " class=n" if numbers else ""
    lines = [
        f"<tr><th>{escape(head)}</th>" + "".join(f"<td{kind}>{escape(c)}</td>" for c in cells) + "</tr>"
        for head, *cells in rows
    ]
    if heads:
        first, *others = heads
        top = f"<tr><th>{escape(first)}</th>" + "".join(f"<th{kind}>{escape(h)}</th>" for h in others)
        lines.insert(0, f"{top}</tr>")
    return "<div class=wide><table>\n" + "\n".join(lines) + "\n</table></div>"


def warnings(items: Iterable[tuple[str, str, Sequence[str]]]) -> str:
    """A list of (message, hint, places), set off by colour and a bar; '' without items."""
    shown = []
    for message, hint, places in items:
        more = "".join(f"<li>{escape(p)}</li>" for p in places)
        shown.append(
            f"<li><strong>{escape(message)}</strong>"
            + (f"<br>{escape(hint)}" if hint else "")
            + (f"<ul>{more}</ul>" if more else "")
            + "</li>"
        )
    return "<ul class=warnings>\n" + "\n".join(shown) + "\n</ul>" if shown else ""


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def duration(seconds: float) -> str:
    """'45 s', '4 min 58 s', '7 h 03 min'; less than ten seconds to a tenth."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


# --- files that may be spoilt, and values from them ---


def event_lines(path: Path) -> list[dict[str, Any]]:
    """The events of a run's file, in order; [] without it. A line that a killed process left half-written is
    no event. Raises UserError where it may not be read.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "make it readable for you") from e
    found = []
    for line in raw.split(b"\n"):  # at newlines only: an answer may hold U+2028 and its like
        try:
            event = json.loads(line)
            if isinstance(event, dict) and isinstance(event.get("event"), str):
                found.append(event if event["event"] == "stepped" else clean(event))
        except (ValueError, RecursionError):
            continue
    return found


def json_of(path: Path) -> dict[str, Any]:
    """A file's JSON object; {} where there is none."""
    try:
        return mapping(clean(json.loads(path.read_bytes())))
    except (OSError, ValueError, RecursionError):
        return {}


def mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def clean(value: Any) -> Any:
    """The same without what neither a page, a terminal nor strict JSON can hold."""
    match value:
        case str():
            return plain(value)
        case float():
            return number(value)
        case list():
            return [clean(v) for v in value]
        case dict():
            return {plain(k): clean(v) for k, v in value.items()}
    return value


def plain(value: object) -> str:
    """As text. Half a surrogate pair and control characters, which a terminal obeys, become U+FFFD."""
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join("\ufffd" if _is_control(c) else c for c in text)


def _is_control(c: str) -> bool:
    return (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f" or "\ud800" <= c <= "\udfff"


def number(value: object) -> float | None:
    """None for what is no number, or one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < LARGEST and not math.isnan(value) else None
