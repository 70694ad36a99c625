"""A function in a process of its own, and that process's memory: what the CPU scripts beside this file share.

    row = alone(measure, "ours", 2048)

A fresh process has no other side's caches, patches or freed memory. Its peak is VmHWM, which counts this
process image alone; ru_maxrss would begin at the size of the parent that forked it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
_STATUS = Path("/proc/self/status")
GIB = 2**30


def alone(function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """Run a module-level function in a fresh process, wait, and give what it returned."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **named).result()


def say(row: dict[str, Any]) -> None:
    print(json.dumps(row, ensure_ascii=False), flush=True)


def side_by_side(theirs: str, ours: str) -> None:
    """Run this script once with `--who theirs`, then with `--who ours`; print what they print, and the ratio.

    For scripts whose last line of each run has `tokens_per_s` and `peak_gib`.
    """
    results = []
    for who in (theirs, ours):
        command = [sys.executable, *sys.argv, "--who", who]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(out, end="", flush=True)
        results.append(json.loads(out.splitlines()[-1]))
    their, our = results
    print(
        f"speed ours / theirs: {our['tokens_per_s'] / their['tokens_per_s']:.2f}; "
        f"peak {our['peak_gib']} GiB against {their['peak_gib']} GiB"
    )


def peak_bytes() -> int:
    """The largest resident size since the process began, or since `reset_peak`."""
    if _STATUS.exists():
        return _status_bytes("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak() -> int:
    """Give freed memory back to the system and begin the peak anew: the resident size now. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
