"""Who owns a run folder: one process at a time.

    lock = locked(path)          # an open file; closing it, or dying, lets go
    in_use(path / LOCK)          # looks, and takes nothing

The lock is the system's (flock), so one that a dead process left behind is no lock: the number in the file
only says who it was.
"""

from __future__ import annotations

import fcntl
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from burnish.errors import EXIT_FAILED, UserError
from burnish.runs.atomic import sentence, sync

LOCK = "lock"


def locked(path: Path) -> IO[str]:
    """Make the folder where it is not there, and take it. Raises UserError where it is in use, or cannot be
    written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / LOCK).open("a+", encoding="utf-8")
    except OSError as e:
        raise UserError(
            f"{path} cannot be made or written: {e.strerror}",
            "choose another place with --out DIR",
            EXIT_FAILED,
        ) from e
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
    except OSError as e:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise UserError(
            f"{path} is in use by process {owner or 'unknown'}", "wait for it, or choose --out DIR"
        ) from e
    try:
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        sync(path)
    except OSError as e:
        with suppress(OSError):
            lock.close()
        raise sentence(e, path) from e
    return lock


def adopted(descriptor: int) -> IO[str]:
    """The lock that a parent process has taken and handed on: while either of the two lives, it holds."""
    os.set_inheritable(descriptor, False)
    lock = os.fdopen(descriptor, "a+", encoding="utf-8")
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    return lock


def release(lock: IO[str]) -> None:
    """The number goes with it: where locks cannot be listed, another process may be given it one day."""
    with suppress(OSError):
        lock.truncate(0)
    with suppress(OSError):
        lock.close()


def free(path: Path) -> bool:
    """Whether nobody owns the folder now. Takes the lock for a moment: for whoever has just let go of it."""
    try:
        with (path / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def in_use(lock: Path) -> bool:
    """Whether a process holds the lock, which is only looked at: to try it would be to take it for a moment.

    Linux lists locks. Elsewhere it is whether the process whose number is written there lives and is ours; a
    number given to another process since then would be taken for the run.
    """
    try:
        stat, written = lock.stat(), lock.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return False
    alive = written.isdecimal() and _alive(int(written))
    if sys.platform != "linux":
        return alive
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return alive
    place = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    held = [line.split() for line in lines if " -> " not in line]  # an arrow: one that waits for it
    # On some file systems (overlay, btrfs) the list has another device, or number, than `stat`.
    return any(place in parts or (alive and written in parts[4:5]) for parts in held)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (OSError, OverflowError):
        return False
    return True
