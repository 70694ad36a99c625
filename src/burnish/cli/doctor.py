"""`burnish doctor`"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import typer

from burnish.cli.show import console, gib, print_json
from burnish.errors import EXIT_FAILED
from burnish.machine.doctor import checks
from burnish.machine.doctor_place import read_place
from burnish.machine.health import Quick, read_health
from burnish.machine.probe import probe

_MARKS = {"ok": "✓", "warning": "!", "problem": "✗"}


def doctor_command(json: bool) -> None:
    machine, health = probe(Path.cwd()), read_health(Quick())
    place = read_place(Path.cwd(), Quick())
    found = checks(machine, os.environ, health, place)
    if json:
        print_json(
            {
                "machine": asdict(machine),
                "health": asdict(health),
                "place": asdict(place),
                "checks": [asdict(c) for c in found],
            }
        )
    else:
        out = console()
        gpus = ", ".join(f"{g.name} ({gib(g.total_bytes)})" for g in machine.gpus) or "none"
        out.print(
            f"{machine.chip}, {machine.cores} cores, {gib(machine.ram_bytes)} memory "
            f"({gib(machine.free_ram_bytes)} free), GPU: {gpus}, {gib(machine.free_disk_bytes)} free disk"
        )
        for check in found:
            out.print(f"{_MARKS[check.status]} {check.name}: {check.found}")
            if check.advice:
                out.print(f"    → {check.advice}")
    if any(c.status == "problem" for c in found):
        raise typer.Exit(EXIT_FAILED)
