"""`burnish selftest`"""

from __future__ import annotations

import typer

from burnish.cli.show import console, print_json
from burnish.errors import EXIT_FAILED, UserError
from burnish.training.selftest.run import selftest

BACKENDS, DEVICES = ("auto", "torch", "mlx"), ("auto", "cpu", "cuda", "mps", "metal")


def selftest_command(backend: str, device: str, quick: bool, json: bool) -> None:
    for name, value, known in (("--backend", backend, BACKENDS), ("--device", device, DEVICES)):
        if value not in known:
            raise UserError(f"{name}: expected {', '.join(known)}, got {value}", "burnish selftest --help")
    out = console()
    report = selftest(backend, device, quick, (lambda _: None) if json else out.print)
    if json:
        print_json(report.as_json())
    if not report.right:
        raise typer.Exit(EXIT_FAILED)
