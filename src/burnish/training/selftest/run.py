"""All of it: which backends are here, a process for each, and the report.

report = selftest("auto", "auto", quick=False, say=print)
report.text, report.right
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from burnish.errors import UserError
from burnish.machine.child import run_module
from burnish.machine.probe import MLX_CUDA, Machine, probe
from burnish.models.spec import read_spec
from burnish.planning.plan import make_plan
from burnish.training.process import signal_name
from burnish.training.selftest.checks import names
from burnish.training.selftest.lab import recipe_of
from burnish.training.selftest.report import TRUTH, Line, Report, facts, scrubbed
from burnish.training.selftest.world import CPU, GPU, MODEL, write_start, write_world

# For a process: a GPU that hangs says nothing. MLX on CUDA compiles its kernels at their first use: that took
# 270 s of a first selftest.
LIMIT_S = 900.0
LOOK_S = 0.2
Say = Callable[[str], None]
Keep = Callable[[Line], None]


@dataclass(frozen=True)
class Target:
    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend} on {self.device}"


def selftest(backend: str, device: str, quick: bool, say: Say, machine: Machine | None = None) -> Report:
    """`say` hears the report's text as it comes, line by line. Raises UserError where what is asked for is
    not here.
    """
    began = time.monotonic()
    with _place() as place:
        machine = machine or probe(place)
        targets = targets_of(machine, backend, device)
        against = _truth_of(machine, targets)
        report = Report(facts(machine), f"{against}, float32", (), 0.0, quick)
        for text in report.head:
            say(text)
        write_world(place, CPU if against.backend == "reference" else GPU)
        recipe = recipe_of(place, "reference", "cpu")
        write_start(place, make_plan(recipe, read_spec(place / MODEL), machine))
        lines: list[Line] = []

        def keep(line: Line) -> None:
            lines.append(replace(line, note=scrubbed(line.note, (place, place.resolve(), Path.home()))))
            say(lines[-1].text)

        _run(place, against, [TRUTH], keep)
        for target in targets:
            _run(place, target, names(quick), keep)
    report = replace(report, lines=tuple(lines), seconds=time.monotonic() - began)
    for text in report.end:
        say(text)
    return report


def targets_of(machine: Machine, backend: str, device: str) -> list[Target]:
    """What is to be tested: as asked, or each backend that is installed on the GPU that is here; on the CPU
    where there is none.
    """
    there = _there(machine)
    if not there:
        raise UserError(
            "neither torch nor mlx is installed, so there is nothing to test",
            "burnish doctor   says what to install",
        )
    gpus = [t for t in there if t.device != "cpu"]
    wanted = gpus if device == "auto" and gpus else there
    found = [t for t in wanted if backend in ("auto", t.backend)]
    if not found and device == "auto":  # a backend that only has the CPU here
        found = [t for t in there if backend in ("auto", t.backend)]
    if device != "auto":
        apple = {"mps": ("mps", "metal"), "metal": ("mps", "metal")}
        found = [t for t in found if t.device in apple.get(device, (device,))]
    if not found:
        asked = " on ".join(w for w in (backend, device) if w != "auto")
        raise UserError(
            f"{asked} is not on this machine; there is: {', '.join(map(str, there))}",
            "burnish selftest   takes what there is",
        )
    return found


def _there(machine: Machine) -> list[Target]:
    kinds = {g.kind for g in machine.gpus}
    found = []
    if machine.versions.get("torch"):
        found += [Target("torch", d) for d, kind in (("cuda", "cuda"), ("mps", "metal")) if kind in kinds]
        found.append(Target("torch", "cpu"))
    if machine.versions.get("mlx") and machine.versions.get("mlx-lm"):
        cuda = "cuda" in kinds and any(machine.versions.get(p) for p in MLX_CUDA)
        found += [Target("mlx", "cuda")] if cuda else []
        found += [Target("mlx", "metal")] if "metal" in kinds else []
        found.append(Target("mlx", "cpu"))
    return found


def _truth_of(machine: Machine, targets: Sequence[Target]) -> Target:
    """A CPU is held against NumPy; a GPU, with a larger model, against the CPU."""
    if any(t.device == "cpu" for t in targets):
        return Target("reference", "cpu")
    return Target("torch" if machine.versions.get("torch") else "mlx", "cpu")


def _run(place: Path, target: Target, checks: Sequence[str], keep: Keep) -> None:
    """The checks in a process of their own; where one takes it down, the ones after it in another."""
    left, number = list(checks), 0
    while left:
        number += 1
        found = place / f"{target.backend}-{target.device}-{left[0].replace(' ', '-')}.jsonl"
        with _Follower(found, keep) as follower:
            words = _ended(place, target, found, left)
        done = follower.ended
        left = left[left.index(done[-1]) + 1 :] if done else left
        if words and left:
            fallen = left.pop(0)
            keep(Line(fallen, str(target), fallen, "failed", note=words))
        elif not words:
            return


def _ended(place: Path, target: Target, file: Path, checks: Sequence[str]) -> str:
    """Run the child; how it ended, in words, or '' where it ended well."""
    module = "burnish.training.selftest.child"
    try:
        done = run_module(module, [str(place), target.backend, target.device, str(file), *checks], LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"it gave no answer within {LIMIT_S:.0f} s and was ended"
    if done.returncode == 0:
        return ""
    last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
    if done.returncode < 0:
        name = signal_name(-done.returncode)
        why = ", most likely because memory ran out" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{why}; its last words: {last}"
    return f"the process ended with code {done.returncode}: {last}"


class _Follower:
    """Reads a child's file as it grows, in a thread, and tells each line."""

    def __init__(self, file: Path, keep: Keep) -> None:
        self._file, self._keep, self._at = file, keep, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self.ended: list[str] = []  # names of checks

    def __enter__(self) -> _Follower:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._over.wait(LOOK_S):
            self._read()
        self._read()

    def _read(self) -> None:
        if not self._file.exists():
            return
        with self._file.open(encoding="utf-8") as file:
            file.seek(self._at)
            whole = file.read().rpartition("\n")[0]
        for text in whole.splitlines():
            told = json.loads(text)
            if "line" in told:
                self._keep(Line(**told["line"]))
            elif "ended" in told:
                self.ended.append(told["ended"])
        self._at += len(whole.encode()) + 1 if whole else 0


@contextmanager
def _place() -> Iterator[Path]:
    """A folder that is gone at the end, also where the end is Ctrl-C or SIGTERM."""
    with tempfile.TemporaryDirectory(prefix="burnish-selftest-") as made:
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield Path(made)
            return
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            yield Path(made)
        finally:
            signal.signal(signal.SIGTERM, before)
