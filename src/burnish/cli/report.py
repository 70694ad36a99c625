"""`burnish report`"""

from __future__ import annotations

from pathlib import Path

from burnish.cli.show import console, print_json
from burnish.recipe import expand
from burnish.report.run_facts import check_run, run_facts
from burnish.report.run_page import check_target, what_it_was, write_run_page


def report_command(run: str, out: Path | None, json: bool) -> None:
    folder = expand(run)
    check_run(folder)
    page = folder / "report.html" if out is None else expand(str(out))
    check_target(page)
    told = run_facts(folder)
    write_run_page(page, told)
    if json:
        print_json({**told, "page": str(page)})
        return
    view = console()
    view.print(f"{told['name']}: {told['verdict']}")
    view.print(what_it_was(told))
    failure = told["failure"]
    if failure and failure["error"] and failure["error"] not in told["verdict"]:
        view.print(f"  in its own words: {failure['error']}")
    for line in told["changed"]:
        view.print(f"  {line}")
    for step in told["next"]:
        view.print(f"→ {step['what']}{': ' if step['command'] else ''}{step['command']}")
    view.print(f"page: {page}")
