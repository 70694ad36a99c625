"""The machine is kept from falling asleep while a run goes.

    with keep_awake(os.getpid()) as how:       # 'kept awake by caffeinate …', '' where nothing was done
        ...

macOS has `caffeinate`, Linux with systemd has `systemd-inhibit`. Either runs beside the run and lets go when
the process `pid` ends, however it ends, so a killed run leaves no machine awake for ever. Nothing here ends a
run: where the program is missing or refuses, the machine sleeps as it would have. None of this was run on a
Mac.
"""

from __future__ import annotations

import os
import platform
import select
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

CAFFEINATE = "/usr/bin/caffeinate"
HELD = b"held\n"  # what our shell says once systemd-inhibit, having the lock, has started it
HOLD_S = (
    3.0  # logind answers in milliseconds; where there is none the message bus may think for half a minute
)
STAY_S = 0.1  # a caffeinate that refuses its arguments has ended by then
END_S = 2.0  # from asking to insisting
_LID = "a closed lid still puts it to sleep"

Popen = Callable[..., "subprocess.Popen[bytes]"]


@contextmanager
def keep_awake(pid: int, system: str = "", popen: Popen = subprocess.Popen) -> Iterator[str]:
    """Awake until the block is left or the process `pid` ends, whichever is first.

    system: as `platform.system()` says, the default. popen: for tests. Yields what was done, in words for a
    person, or ''. Raises nothing of its own.
    """
    keeper, words = _start(pid, system or platform.system(), popen)
    try:
        yield words
    finally:
        if keeper is not None:
            _end(keeper)


def _start(pid: int, system: str, popen: Popen) -> tuple[subprocess.Popen[bytes] | None, str]:
    """The process that keeps the machine awake, and words for it; (None, '') where there is none."""
    if system == "Darwin":
        # Named in full first: it is always there, and what else is called so on someone's PATH is not it.
        program = CAFFEINATE if os.access(CAFFEINATE, os.X_OK) else shutil.which("caffeinate")
        # -i: no idle sleep; -m: disks stay on; -s: no sleep at all, which macOS heeds on mains power only.
        keeper = _run(popen, program, ["-i", "-m", "-s", "-w", str(pid)])
        if keeper is not None and _stays(keeper):
            return keeper, f"kept awake by caffeinate until the run ends; {_LID}"
    elif system == "Linux":
        # tail ends with the run, and the lock with tail. The shell speaks only when the lock is held.
        waits = f"echo {HELD.decode().strip()}; exec tail --pid={pid} -f /dev/null"
        options = ["--what=idle:sleep", "--who=burnish", "--why=a model is trained", "--mode=block"]
        keeper = _run(popen, shutil.which("systemd-inhibit"), [*options, "sh", "-c", waits])
        if keeper is not None and _says_held(keeper) and _stays(keeper):
            return keeper, f"kept awake by systemd-inhibit until the run ends; {_LID}"
    else:
        return None, ""
    if keeper is not None:
        _end(keeper)
    return None, ""


def _run(popen: Popen, program: str | None, arguments: Sequence[str]) -> subprocess.Popen[bytes] | None:
    if program is None:
        return None
    settings: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        # Ctrl-C in the terminal is for the run, which goes on awake until its checkpoint is written; and
        # without a terminal nobody can be asked for a password.
        "start_new_session": True,
    }
    try:
        return popen([program, *arguments], **settings)
    except OSError:  # not executable, no more processes
        return None


def _stays(keeper: subprocess.Popen[bytes]) -> bool:
    try:
        keeper.wait(STAY_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _says_held(keeper: subprocess.Popen[bytes]) -> bool:
    assert keeper.stdout is not None
    ready, _, _ = select.select([keeper.stdout], [], [], HOLD_S)
    return bool(ready) and os.read(keeper.stdout.fileno(), len(HELD)) == HELD


def _end(keeper: subprocess.Popen[bytes]) -> None:
    """The whole group of it: systemd-inhibit has a child. It is a group of its own, led by `keeper`."""
    if keeper.poll() is None:
        for how in (signal.SIGTERM, signal.SIGKILL):
            with suppress(OSError):  # it has just ended by itself
                os.killpg(keeper.pid, how)
            with suppress(subprocess.TimeoutExpired):
                keeper.wait(END_S)
                break
    if keeper.stdout is not None:
        keeper.stdout.close()
