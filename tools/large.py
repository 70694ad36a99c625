"""Print what has grown large in src and tests: files past 400 lines, functions past 60.

    python tools/large.py [FOLDER …]

A long file wants a reason or a split; nobody splits to please a number, so this never fails.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 400, 60


def large(folder: Path) -> Iterator[str]:
    """A line for each file and each function past its limit."""
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        n_lines = text.count("\n")
        if n_lines > FILE_LINES:
            yield f"{path}: {n_lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                n_lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if n_lines > FUNCTION_LINES:
                    yield f"{path}:{node.lineno}: {node.name}: {n_lines} lines"


def main(folders: list[str]) -> None:
    found = [line for folder in folders for line in large(Path(folder))]
    print(f"grown large (a file past {FILE_LINES} lines, a function past {FUNCTION_LINES}):")
    print("\n".join(f"  {line}" for line in found) if found else "  nothing")


if __name__ == "__main__":
    main(sys.argv[1:] or ["src", "tests"])
