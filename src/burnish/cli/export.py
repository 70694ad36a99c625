"""`burnish export`"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import typer

from burnish.cli.show import gib, print_json
from burnish.errors import EXIT_INTERRUPTED
from burnish.export.job import Exported, Request, export
from burnish.export.source import open_source
from burnish.recipe import expand
from burnish.training.environment import prepare_environment


def export_command(run: str, request: Request, base: Path | None, overrides: list[str], json: bool) -> None:
    prepare_environment()
    source = open_source(expand(run), expand(str(base)) if base else None, overrides)
    say = (lambda _: None) if json else (lambda text: print(f"burnish: {text}", file=sys.stderr, flush=True))
    signal.signal(signal.SIGTERM, _interrupted)
    try:
        done = export(source, request, say)
    except KeyboardInterrupt:
        print("burnish: interrupted; nothing was left behind", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if json:
        print_json(_facts(done))
        return
    seconds = sum(done.seconds.values())
    print(
        f"{done.out}: {done.to} {done.type}, {gib(done.n_bytes)}, {seconds:.0f} s, "
        f"peak {gib(done.peak_bytes)} while writing"
    )
    for name, n_bytes in done.files.items():
        print(f"  {name}  {gib(n_bytes)}")
    for note in done.notes:
        print(f"  {note}")
    print(done.proof.paragraph if done.proof else "It was not proven: --no-proof.")


def _interrupted(*_: object) -> None:
    """SIGTERM cleans up as Ctrl-C does."""
    raise KeyboardInterrupt


def _facts(done: Exported) -> dict[str, Any]:
    facts = {k: v for k, v in vars(done).items() if k not in ("proof", "out")}
    return {"out": str(done.out), **facts, "proof": done.proof.as_json() if done.proof else None}
