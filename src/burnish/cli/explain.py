"""`burnish explain`: what an error message means, whatever program wrote it."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

from burnish.cli.failures import language_asked, told
from burnish.cli.show import print_json
from burnish.errors import EXIT_FAILED, UserError
from burnish.machine.diagnosis import diagnose, language_of
from burnish.recipe import expand


def explain_command(source: str, json: bool) -> None:
    language, _ = language_asked(sys.argv[1:], language_of(os.environ))
    text = sys.stdin.read() if source == "-" else _text(expand(source))
    found = diagnose(text, language)
    if found is None:
        raise UserError(
            "nothing in the catalogue matches this text; its own words say more than a guess would",
            "give the last lines, with the line that names the error",
            EXIT_FAILED,
        )
    if json:
        print_json(asdict(found))
    else:
        print(f"{found.id}\n{told(found, language)}\n  source: {found.source}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}", "name a file, or - for stdin") from e
