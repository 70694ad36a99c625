"""Measure a framework's rate on a device and print it as JSON: what `machine.rate` starts as a process.

    python -m burnish.backends.rate torch cuda bfloat16 1.0
    {"flops": 6.0e+14, "bytes_per_s": 2.9e+12}

The product is one of training's, tokens by a large model's matrix, because a device reaches less in it than
in a square one; on an H100 it is the one of bench/RESULTS.md, which the plan's constants are fitted on.
The copy is larger than any cache. Each is repeated for half of the time, and the fastest counts: what else
the machine does meanwhile is not its rate.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Protocol

from burnish.machine.blas import use_openblas

Sizes = tuple[int, int, int]  # rows × inner by inner × columns
SIZES: dict[str, Sizes] = {
    "cpu": (2048, 2048, 2048),
    "mps": (2048, 4096, 4096),
    "metal": (2048, 4096, 4096),
    "cuda": (2048, 5120, 13824),
}
COPY_BYTES = {"cpu": 128 << 20, "mps": 128 << 20, "metal": 128 << 20, "cuda": 512 << 20}
LEAST_RUNS = 3


Run = Callable[[], None]  # returns when the device has done it


class Prepare(Protocol):
    def __call__(self, device: str, dtype: str, sizes: Sizes, copy_bytes: int) -> tuple[Run, Run]:
        """A product of two matrices, rows × inner and inner × columns, and a copy of so many bytes."""
        ...


def measure(
    backend: str, device: str, dtype: str, seconds: float, sizes: Sizes | None = None, copy_bytes: int = 0
) -> dict[str, float]:
    """FLOP/s and bytes/s; sizes and copy_bytes are the device's own if not given. Raises as its framework."""
    sizes, copy_bytes = sizes or SIZES[device], copy_bytes or COPY_BYTES[device]
    product, copy = _prepare(backend)(device, dtype, sizes, copy_bytes)
    return {
        "flops": 2 * math.prod(sizes) / fastest(product, seconds / 2),
        "bytes_per_s": 2 * copy_bytes / fastest(copy, seconds / 2),
    }


def fastest(run: Run, seconds: float) -> float:
    """Seconds of the quickest of several runs, after one that is not counted."""
    run()
    began, best, runs = time.perf_counter(), float("inf"), 0
    while runs < LEAST_RUNS or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


def _prepare(backend: str) -> Prepare:
    if backend == "torch":
        from burnish.backends.torch.rate import prepare as torch_prepare

        return torch_prepare
    if backend == "mlx":
        use_openblas()  # before mlx is imported
        from burnish.backends.mlx.rate import prepare as mlx_prepare

        return mlx_prepare
    raise ValueError(f"no rate is measured of backend {backend!r}")


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))), flush=True)
