"""`burnish convert`"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from burnish.cli.show import gib, print_json
from burnish.models.convert import convert_gguf
from burnish.recipe import expand
from burnish.training.environment import prepare_environment


def convert_command(source: Path, out: Path, dtype: str, force: bool, json: bool) -> None:
    prepare_environment()
    report = convert_gguf(expand(str(source)), expand(str(out)), dtype=dtype, force=force)
    if json:
        print_json({**asdict(report), "source": str(report.source), "out": str(report.out)})
        return
    kinds = ", ".join(f"{n} {kind}" for kind, n in report.stored_as.items())
    print(
        f"{report.out}: {report.architecture}, {report.parameters / 1e6:.0f} million parameters, "
        f"{report.dtype}, {gib(report.weight_bytes)} (from {gib(report.source_bytes)}: {kinds})"
    )
