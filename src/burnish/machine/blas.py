"""A fast BLAS for MLX on a Linux CPU, where its wheel brings a slow one.

    use_openblas()          # before the first `import mlx.core`, and after torch, where both are wanted
    import mlx.core as mx

Measured on one core, float32 products of 1024 × 1024: 8 GFLOP/s with the wheel's BLAS, 133 with OpenBLAS.
A library that is loaded for everyone to see comes before MLX's own, as LD_PRELOAD would make it. But it comes
before torch's MKL too, in a process that imports torch later: as fast there, yet not the same bits. What was
imported before keeps what it has.
"""

from __future__ import annotations

import ctypes
import sys

NAMES = ("libopenblas.so.0", "libopenblasp.so.0")  # Debian's and Fedora's name for the one with threads


def use_openblas() -> str:
    """The name of the library that was loaded; '' where there is none, or no need: macOS has Accelerate."""
    if sys.platform != "linux":
        return ""
    for name in NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:  # not installed
            continue
        return name
    return ""
