"""Memory of this very process, as the operating system counts it."""

from __future__ import annotations

import sys

import psutil


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def peak_resident_bytes() -> int:
    """The largest resident size since the process began (ru_maxrss: bytes on macOS, KiB on Linux)."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    return psutil.virtual_memory().available
