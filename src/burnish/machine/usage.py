"""Memory of this very process, as the operating system counts it."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from pathlib import Path

import psutil


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The largest resident size since the process began.

    On Linux VmHWM: ru_maxrss there begins at the size of the parent that forked the process.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def available_bytes() -> int:
    return psutil.virtual_memory().available


def give_back() -> None:
    """Freed memory that the C library holds on to goes back to the system, where the library can (glibc)."""
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
