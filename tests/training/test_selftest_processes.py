"""The selftest's processes: one that dies is a line of the report, and whatever happens nothing is left."""

from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from burnish.training.selftest import run
from burnish.training.selftest.checks import SLOW
from burnish.training.selftest.report import AVOID, TRUTH, Line
from burnish.training.selftest.run import Target, selftest
from tests.training.selftest_world import TINY, TORCH, machine, made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("selftest") / "place", TINY)


CHILD, HUNG = "burnish.training.selftest.child", 99
# A child in which one check takes the process down. Of the others only two are left, which are quick.
FALLING = """
import os, signal, sys
from burnish.training.selftest import checks, child
def fall(lab):
    yield lab.line("packing", "before the fall", "told")
    {how}
checks.CHECKS["packing"] = fall
child.main(sys.argv[1:])
"""


def falling(how: str, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments of every child that was started."""
    started: list[list[str]] = []

    def run_module(module: str, arguments: Sequence[str], limit_s: float) -> Any:
        assert module == CHILD
        started.append(list(arguments))
        code = FALLING.format(how=how)
        src = str(Path(run.__file__).parents[3])
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": src}, check=False,
        )  # fmt: skip
        if done.returncode == HUNG:  # as `run_module` ends one that says nothing
            raise subprocess.TimeoutExpired(module, limit_s)
        return done

    monkeypatch.setattr(run, "run_module", run_module)
    return started


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "the process was ended by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, most likely because memory ran out"),
        ("print('libc: abort', file=sys.stderr); os._exit(7)", "ended with code 7: libc: abort"),
        (f"os._exit({HUNG})", "no answer within 900 s"),
    ],
)
def test_a_process_that_dies_is_a_line_and_not_the_end(
    how: str, words: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, lines = falling(how, monkeypatch), []
    asked = ["dropout", "packing", "micro-batches"]
    for old in place.glob("reference-cpu-*.jsonl"):
        old.unlink()
    run._run(place, Target("reference", "cpu"), asked, lines.append)
    assert [(line.check, line.status) for line in lines] == [
        ("dropout", "passed"), ("packing", "told"), ("packing", "failed"),
        ("micro-batches", "passed"), ("micro-batches", "passed"),
    ]  # fmt: skip
    assert words in lines[2].note
    assert [arguments[4:] for arguments in started] == [asked, ["micro-batches"]]


def test_a_process_that_dies_at_once_is_a_line_for_every_check(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.CompletedProcess([], 1, "", "ImportError: libcublas.so.13")
    monkeypatch.setattr(run, "run_module", lambda *_: done)
    lines: list[Line] = []
    run._run(place, Target("torch", "cuda"), ["dropout", "packing"], lines.append)
    assert [line.check for line in lines] == ["dropout", "packing"]
    assert all("libcublas" in line.note for line in lines)


def test_the_whole_in_processes_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As a person runs it, quickly; it is told line by line what the report holds, nothing is left, and
    nothing of theirs is in it.
    """
    backend = "torch" if find_spec("torch") else "mlx"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said: list[str] = []
    report = selftest(backend, "cpu", True, said.append)
    assert report.right, report.text
    assert "\n".join(said) == report.text
    assert {line.check for line in report.lines} == {*AVOID, "speed"} - set(SLOW)
    passed = sum(line.status == "passed" for line in report.lines)
    assert report.closing.startswith(f"all {passed} checks passed: what burnish computes here is what")
    assert "1 of them is a prediction confirmed" in report.closing
    assert list(tmp_path.iterdir()) == []
    told = json.dumps(report.as_json()) + report.text
    for private in (str(tmp_path), str(Path.home()), f"/{getpass.getuser()}", os.uname().nodename):
        assert private not in told


def test_a_broken_truth_fails_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    done = subprocess.CompletedProcess([], 1, "", f"OSError: {tmp_path}/lib/libopenblas.so: not found")
    monkeypatch.setattr(run, "run_module", lambda *_: done)
    report = selftest("torch", "cpu", True, lambda _: None, machine("", **TORCH))
    assert not report.right and report.lines[0].check == TRUTH
    assert report.lines[0].note.endswith("OSError: …/libopenblas.so: not found")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT"])
def test_ended_from_outside_it_leaves_nothing(how: str, tmp_path: Path) -> None:
    code = (
        "from burnish.training.selftest.run import selftest\n"
        "selftest('auto', 'cpu', False, lambda text: print(text, flush=True))"
    )
    src = str(Path(run.__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": src, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    until = time.monotonic() + 60
    while not list(tmp_path.glob("*/*.jsonl")) and time.monotonic() < until:
        time.sleep(0.05)
    children = psutil.Process(process.pid).children()
    assert children and list(tmp_path.iterdir())
    process.send_signal(signal.Signals[how])
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []
    psutil.wait_procs(children, timeout=30)
    assert not any(child.is_running() for child in children)
