"""A large product and a large copy on MLX, for `burnish.backends.rate`."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

Run = Callable[[], None]


def prepare(device: str, dtype: str, sizes: tuple[int, int, int], copy_bytes: int) -> tuple[Run, Run]:
    """As `burnish.backends.rate.Prepare` says."""
    mx.set_default_device(mx.Device(mx.cpu if device == "cpu" else mx.gpu))
    kind: mx.Dtype = {"float32": mx.float32, "bfloat16": mx.bfloat16}[dtype]
    # Drawn, not zeros: a GPU lowers its clock for the power that true numbers take.
    rows, inner, columns = sizes
    a = mx.random.normal((rows, inner)).astype(kind)
    b = mx.random.normal((columns, inner)).astype(kind)  # as weights lie in memory
    source = mx.zeros(copy_bytes // 4, dtype=mx.float32)
    mx.eval(a, b, source)

    def product() -> None:
        mx.eval(a @ b.T)

    def copy() -> None:
        mx.eval(source + 1)  # a plain copy would be none: arrays are shared until one is changed

    return product, copy
