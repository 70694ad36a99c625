"""OpenBLAS for MLX on a Linux CPU: MLX computes with it, and torch, imported before, with what it had."""

from __future__ import annotations

import subprocess
import sys
from ctypes.util import find_library

import pytest

from burnish.machine import blas

# glibc prints to stderr where each symbol was found as a library is loaded.
FAST = """
import torch
from burnish.machine.blas import use_openblas
name = use_openblas()
import mlx.core as mx
mx.eval(mx.ones((8, 8)) @ mx.ones((8, 8)))
torch.ones(8, 8) @ torch.ones(8, 8)
print(name)
"""


def found_in(library: str, symbol: str, log: str) -> set[str]:
    """The libraries in which `library` found `symbol`, by the loader's own account."""
    found = set()
    for line in log.splitlines():
        if "binding file" in line and line.endswith(f"symbol `{symbol}'"):
            user, _, source = line.split("binding file ")[1].partition(" to ")
            if library in user:
                found.add(source.split(" [")[0].rsplit("/", 1)[-1])
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")
def test_mlx_takes_openblas_and_torch_keeps_its_own() -> None:
    pytest.importorskip("mlx.core", reason="mlx is not installed")
    if find_library("openblas") not in blas.NAMES:  # asked so, and not loaded: torch may yet be imported here
        pytest.skip(f"none of {', '.join(blas.NAMES)} is installed")
    run = subprocess.run(
        [sys.executable, "-c", FAST], env={"LD_DEBUG": "bindings", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout.strip() in blas.NAMES
    used = found_in("/libmlx.so", "cblas_sgemm", run.stderr)
    assert used and all("libopenblas" in name for name in used), used
    own = found_in("libtorch", "sgemm_", run.stderr)
    assert own and not any("openblas" in name for name in own), own


def test_where_there_is_none_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "NAMES", ("libopenblas-that-nobody-has.so",))
    assert blas.use_openblas() == ""


def test_a_mac_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.use_openblas() == ""
