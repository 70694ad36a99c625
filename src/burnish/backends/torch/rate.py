"""A large product and a large copy on torch, for `burnish.backends.rate`."""

from __future__ import annotations

from collections.abc import Callable

import torch

Run = Callable[[], None]


def prepare(device: str, dtype: str, sizes: tuple[int, int, int], copy_bytes: int) -> tuple[Run, Run]:
    """As `burnish.backends.rate.Prepare` says."""
    kind: torch.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    # Drawn, not zeros: a GPU lowers its clock for the power that true numbers take.
    rows, inner, columns = sizes
    a = torch.randn(rows, inner, device=device, dtype=torch.float32).to(kind)
    b = torch.randn(columns, inner, device=device, dtype=torch.float32).to(kind).T  # as weights lie in memory
    out = torch.empty(rows, columns, device=device, dtype=kind)
    source = torch.zeros(copy_bytes, device=device, dtype=torch.uint8)
    target = torch.zeros(copy_bytes, device=device, dtype=torch.uint8)

    def product() -> None:
        torch.mm(a, b, out=out)
        _wait(device)

    def copy() -> None:
        target.copy_(source)
        _wait(device)

    return product, copy


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()
