"""A folder to work in, with data, a recipe and a model, and the command line run inside it.

    said = world.burnish("train", "recipe.yaml", "train.lr=1", "--out", "out")
    said.code, said.out, said.err

The command runs in this very process (loading torch anew would cost seconds), through the same `main` as the
console script; what would be a traceback is in `said.err`.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import burnish.cli

PAIRS = [{"prompt": f"question {i}", "completion": f"answer {i % 5}"} for i in range(12)]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def events(self) -> list[dict[str, Any]]:
        """What `train --json` printed."""
        return [json.loads(line) for line in self.out.splitlines()]

    def event(self, name: str) -> dict[str, Any]:
        """The only event of that name."""
        (found,) = [e for e in self.events if e["event"] == name]
        return found


@dataclass
class World:
    root: Path
    model: Path
    asked: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.asked = {
            "model": str(self.model), "device": "cpu", "dtype": "float32", "data": {"train": "data.jsonl"},
            "lora": {"rank": 2, "alpha": 4},
            "train": {"batch_size": 4, "max_length": 64, "max_steps": 2, "lr": 0.01, "keep_layers": 0},
            "generation": {"max_new_tokens": 4, "greedy": True},
        }  # fmt: skip
        self.rows(PAIRS)
        self.recipe()

    @property
    def out(self) -> Path:
        return self.root / "out"

    def recipe(self, **changes: Any) -> None:
        """Change the recipe for good and write it. Sections are merged."""
        for key, value in changes.items():
            known = self.asked.get(key, {})
            self.asked[key] = {**known, **value} if isinstance(value, Mapping) else value
        self.write("recipe.yaml", yaml.safe_dump(self.asked, allow_unicode=True))

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def rows(self, rows: Sequence[object], name: str = "data.jsonl") -> Path:
        return self.write(name, "".join(json.dumps(r) + "\n" for r in rows))

    def copied_model(self) -> Path:
        """A copy of the model, to be spoilt; the recipe is about it from now on."""
        folder = self.root / "model"
        shutil.copytree(self.model, folder)
        self.recipe(model="model")
        return folder

    def train(self, *more: str, out: str = "out") -> Said:
        return self.burnish("train", "recipe.yaml", "--out", out, "--json", *more)

    def burnish(self, *args: str, stdin: str = "") -> Said:
        """`train` without its supervisor, whose child would load torch anew for seconds; what supervision
        does is tested in tests/training/test_supervise.py.
        """
        here = ("--in-process",) if args[:1] == ("train",) and "--help" not in args else ()
        return run(self.root, (*args, *here), stdin)

    def tree(self) -> dict[str, bytes]:
        """Every file (and folder, as b'') below the root."""
        return {
            str(p.relative_to(self.root)): p.read_bytes() if p.is_file() else b""
            for p in sorted(self.root.rglob("*"))
        }


def run(cwd: Path, args: Sequence[str], stdin: str = "") -> Said:
    out, err, before = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin)
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv, sys.stdin = ["burnish", *args], io.StringIO(stdin)
        try:
            burnish.cli.main()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        except BaseException:  # what Python would print, and its exit code
            traceback.print_exc(file=err)
            code = 1
        finally:
            sys.argv, sys.stdin = before
    return Said(code, out.getvalue(), err.getvalue())
