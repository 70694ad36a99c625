"""`keep_awake` with stand-ins for caffeinate and systemd-inhibit, which behave as those do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from burnish.machine import awake
from burnish.machine.awake import keep_awake

# As caffeinate does with -w: it ends when that process does. Who it is and what it was told goes to a file.
CAFFEINATE = """#!/bin/sh
echo "$$ $@" > '{note}'
while [ "$1" != -w ]; do shift; done
while kill -0 "$2" 2>/dev/null; do sleep 0.05; done
"""
# As systemd-inhibit does: a child, which it waits for.
INHIBIT = """#!/bin/sh
options=
while [ "${{1#--}}" != "$1" ]; do options="$options $1"; shift; done
"$@" &
echo "$$ $!$options" > '{note}'
wait $!
"""


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-ins, first on PATH, say who they are; a Mac's own is left alone."""
    monkeypatch.setattr(awake, "CAFFEINATE", str(tmp_path / "not there"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    program(tmp_path / "caffeinate", CAFFEINATE.format(note=tmp_path / "note"))
    program(tmp_path / "systemd-inhibit", INHIBIT.format(note=tmp_path / "note"))
    return tmp_path / "note"


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def runs(pid: int) -> bool:
    """Not even as a zombie, which kill(pid, 0) would take for alive."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def soon(what: Callable[[], bool]) -> bool:
    for _ in range(500):
        if what():
            return True
        time.sleep(0.02)
    return False


def noted(note: Path) -> list[str]:
    assert soon(lambda: note.exists() and note.read_text().endswith("\n"))
    return note.read_text().split()


def test_caffeinate_runs_while_the_block_does(note: Path):
    with keep_awake(os.getpid(), "Darwin") as words:
        own, *arguments = noted(note)
        assert arguments == ["-i", "-m", "-s", "-w", str(os.getpid())]
        assert runs(int(own))
        assert "caffeinate" in words and "lid" in words
    assert not runs(int(own))


def test_systemd_inhibit_runs_while_the_block_does(note: Path):
    with keep_awake(os.getpid(), "Linux") as words:
        own, child, *options = noted(note)
        assert "--what=idle:sleep" in options and "--mode=block" in options
        assert runs(int(own)) and runs(int(child))
        assert "systemd-inhibit" in words
    assert not runs(int(own))
    assert soon(lambda: not runs(int(child))), "the waiting child is ended with it"


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_an_exception_ends_it_and_goes_on(note: Path, system: str):
    with pytest.raises(ValueError, match="of the run"), keep_awake(os.getpid(), system):
        own = int(noted(note)[0])
        assert runs(own)
        raise ValueError("of the run")
    assert not runs(own)


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_it_ends_when_the_run_is_killed(note: Path, system: str):
    code = (
        "import os, time\nfrom burnish.machine import awake\nawake.CAFFEINATE = '/not/there'\n"
        f"with awake.keep_awake(os.getpid(), {system!r}) as words:\n    print(words, flush=True)\n"
        "    time.sleep(600)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None and "kept awake" in run.stdout.readline()
        own = int(noted(note)[0])
        assert runs(own)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        assert run.stdout is not None
        run.stdout.close()
    assert soon(lambda: not runs(own))


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_it_ends_when_another_process_does(note: Path, system: str):
    """The supervisor holds it for a worker that may be started again: the number given is what counts."""
    other = subprocess.Popen(["sleep", "600"])
    try:
        with keep_awake(other.pid, system):
            own = int(noted(note)[0])
            other.kill()
            other.wait()
            assert soon(lambda: not runs(own))
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_ctrl_c_in_the_terminal_is_not_for_it(note: Path, system: str):
    with keep_awake(os.getpid(), system):
        assert os.getsid(int(noted(note)[0])) != os.getsid(0)


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
def test_what_insists_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Path, system: str):
    monkeypatch.setattr(awake, "END_S", 0.2)
    stubborn = f"#!/bin/sh\ntrap '' TERM\necho $$ > '{note}'\necho held\nwhile :; do sleep 0.05; done\n"
    program(tmp_path / "caffeinate", stubborn)
    program(tmp_path / "systemd-inhibit", stubborn)
    with keep_awake(os.getpid(), system) as words:
        assert words
        own = int(noted(note)[0])
    assert not runs(own)


FAILURES: dict[str, str | None] = {
    "is missing": None,
    "refuses": "#!/bin/sh\necho 'Failed to inhibit: Access denied' >&2\nexit 1\n",
    "is no program": "\x7fELF nonsense",
    "ends at once": "#!/bin/sh\nexit 0\n",
    "speaks and ends": "#!/bin/sh\necho held\n",
}


@pytest.mark.parametrize("system", ["Darwin", "Linux"])
@pytest.mark.parametrize("text", FAILURES.values(), ids=FAILURES.keys())
def test_a_program_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Path, text: str | None, system: str
):
    for name in ("caffeinate", "systemd-inhibit"):
        if text is None:
            (tmp_path / name).unlink()
            monkeypatch.setenv("PATH", str(tmp_path))
        else:
            program(tmp_path / name, text)
    done = False
    with keep_awake(os.getpid(), system) as words:
        assert words == ""
        done = True
    assert done


def test_without_an_answer_from_logind_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Path
):
    monkeypatch.setattr(awake, "HOLD_S", 0.3)
    program(tmp_path / "systemd-inhibit", f"#!/bin/sh\necho $$ > '{note}'\nexec sleep 600\n")
    with keep_awake(os.getpid(), "Linux") as words:
        assert words == ""
        assert not runs(int(noted(note)[0]))


def test_other_systems_are_left_alone(note: Path):
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is started")

    with keep_awake(os.getpid(), "Windows", popen=never) as words:
        assert words == ""


def test_a_mac_s_own_is_taken_before_one_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: Path):
    program(tmp_path / "own", CAFFEINATE.format(note=note))
    monkeypatch.setattr(awake, "CAFFEINATE", str(tmp_path / "own"))
    started: list[str] = []

    def popen(command: list[str], **settings: Any) -> Any:
        started.append(command[0])
        return subprocess.Popen(command, **settings)

    with keep_awake(os.getpid(), "Darwin", popen=popen):
        assert started == [str(tmp_path / "own")]


def test_this_machine_is_no_reason_to_fail():
    with keep_awake(os.getpid()) as words:
        assert words == "" or "kept awake" in words
