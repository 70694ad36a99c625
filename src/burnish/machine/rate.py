"""How fast this machine multiplies and copies: measured once, or as its maker publishes.

    rate = measured_rate("torch", "cuda", "bfloat16") or published_rate(machine, "cuda", "bfloat16")

A measurement takes about a second and a framework's start, in a process of its own, so that the one that
plans loads no framework; the result is kept in the user's cache folder until chip, framework or threads
change. It is worth that second: a published rate is a peak that no product reaches, and CPUs have none.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from burnish.machine import chips
from burnish.machine.child import last_object, run_module
from burnish.machine.probe import Machine, probe

LIMIT_S = 60.0  # a framework that has not answered by then is hanging
_MEASURED = ("torch", "mlx")  # backends named as the package whose version a measurement belongs to
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Rate:
    """Of one device, in one dtype."""

    flops: float  # of a large matrix product, per second; a multiplication and an addition are two
    bytes_per_s: float  # of a large copy, read and written
    source: str  # 'measured on …', 'published: …'
    measured: bool


def measured_rate(
    backend: str,
    device: str,
    dtype: str,
    machine: Machine | None = None,
    seconds: float = 1.0,
    limit_s: float = LIMIT_S,
) -> Rate | None:
    """The rate of this machine, from the cache or measured now. dtype: the one that is computed in.

    machine: what `probe` found, where it is at hand. seconds: of measuring. limit_s: of the whole process.
    The process inherits this one's environment, so `prepare_environment` before it counts for it, too. What
    is measured on a CPU that others use now (a fifth of its rate was seen) holds now, and is not kept. None
    where the backend is not installed or is none to measure, and where the process fails or does not end in
    time: a plan without a rate is still a plan.
    """
    if backend not in _MEASURED:
        return None
    machine = machine or probe(Path.cwd())
    version = machine.versions.get(backend, "")
    if not version:
        return None
    chip, busy = _chip(machine, device), _busy(machine, device)
    key = _key(machine, chip, backend, device, dtype, version)
    kept = _cached(key)
    found = kept or _measure(backend, device, dtype, seconds, limit_s)
    if found is None:
        return None
    said = f"measured on {chip} with {backend} {version}"
    if kept is None and busy:
        return Rate(*found, f"{said}, which is busy with other work now", True)
    if kept is None:
        _keep(key, found)
    return Rate(*found, said, True)


def published_rate(machine: Machine, device: str, dtype: str) -> Rate | None:
    """What the makers of this GPU publish for it; None for a CPU and for GPUs that `chips` does not know."""
    if device == "cuda":
        gpu = next((g for g in machine.gpus if g.kind == "cuda"), None)
        card = chips.CARDS.get(gpu.name) if gpu else None
        flops = None if card is None else card.bfloat16 if dtype == "bfloat16" else card.float32
        if card is None or flops is None:
            return None
        return Rate(flops, card.bytes_per_s, f"published: {_chip(machine, device)}, {dtype} peak", False)
    if device in ("mps", "metal"):
        apple = chips.apple(machine.chip, machine.cores)
        if apple is None:
            return None
        cores = f"{apple.gpu_cores} GPU cores" + (" (the fewest it is sold with)" if apple.fewest else "")
        return Rate(
            apple.flops, apple.bytes_per_s, f"published: {machine.chip}, {cores}, float32 peak", False
        )
    return None


def cache_folder() -> Path:
    """Where the system keeps a user's caches. Raises RuntimeError where there is no home."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "burnish"
    asked = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says to ignore a relative one.
    return (Path(asked) if Path(asked).is_absolute() else Path.home() / ".cache") / "burnish"


def _chip(machine: Machine, device: str) -> str:
    gpu = next((g.name for g in machine.gpus if g.kind == "cuda"), machine.chip)
    return gpu if device == "cuda" else machine.chip


def _busy(machine: Machine, device: str) -> bool:
    """Do other processes want more than half of the cores this minute? Asked before ours begins."""
    if device != "cpu" or not hasattr(os, "getloadavg"):  # Windows has none
        return False
    return os.getloadavg()[0] > machine.cores / 2


def _key(machine: Machine, chip: str, backend: str, device: str, dtype: str, version: str) -> dict[str, str]:
    """All that another rate would be measured for. OpenBLAS makes MLX on a CPU twenty times faster."""
    key = {"chip": chip, "device": device, "dtype": dtype, "backend": backend, "version": version}
    key |= {"cores": str(machine.cores), "openblas": str(machine.openblas)} if device == "cpu" else {}
    return key | {name: os.environ[name] for name in _THREADS if name in os.environ}


def _measure(
    backend: str, device: str, dtype: str, seconds: float, limit_s: float
) -> tuple[float, float] | None:
    try:
        done = run_module("burnish.backends.rate", [backend, device, dtype, str(seconds)], limit_s)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return _numbers(last_object(done.stdout)) if done.returncode == 0 else None


def _numbers(told: dict[str, Any] | None) -> tuple[float, float] | None:
    """(FLOP/s, bytes/s); None where it is anything else."""
    try:
        found = float((told or {})["flops"]), float((told or {})["bytes_per_s"])
    except (ValueError, TypeError, KeyError):
        return None
    return found if all(math.isfinite(n) and n > 0 for n in found) else None


def _place(key: dict[str, str]) -> Path:
    return cache_folder() / f"rate-{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"


def _cached(key: dict[str, str]) -> tuple[float, float] | None:
    """None where it is not there, or is not what `_keep` wrote for this key."""
    try:
        told = last_object(_place(key).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):
        return None
    return _numbers(told) if told and told.get("key") == key else None


def _keep(key: dict[str, str], found: tuple[float, float]) -> None:
    """Write the cache whole or not at all. Where it cannot be written, the next plan measures again."""
    told = {"key": key, "flops": found[0], "bytes_per_s": found[1]}
    temporary = None
    try:
        place = _place(key)
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=place.parent, prefix=".tmp-", delete=False
        ) as f:
            temporary = Path(f.name)
            json.dump(told, f)
        os.replace(temporary, place)
        temporary = None
    except (OSError, RuntimeError):
        pass  # where it cannot be written, the next plan measures again
    finally:  # of an interruption too
        if temporary is not None:
            temporary.unlink(missing_ok=True)
