"""What may go wrong on this machine, and the remedy: one `Check` for each thing looked at.

    for check in checks(probe(Path(".")), os.environ): ...

A check is a function from facts to a verdict. It asks nothing of the system, so a recorded machine gives the
same answer everywhere. 'problem' means that a run will fail or do harm, 'warning' that it will be slower or
surprising. What is said of Macs comes from documents and reports: nothing here was run on one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from burnish.machine.doctor_check import GIB, Check, gib
from burnish.machine.doctor_network import folders, hub, offline, proxies
from burnish.machine.doctor_now import heat, power, pressure
from burnish.machine.doctor_packages import builds, macos, openmp, packages, python, rosetta
from burnish.machine.doctor_place import Place, place_checks
from burnish.machine.health import Health
from burnish.machine.probe import MLX_CUDA, Machine

__all__ = ["Check", "checks"]

# What a 1.5B model in bfloat16, and a 135M one in float32, take to train; a 7B one and a small one, on disk.
SMALL_RAM_BYTES, LITTLE_RAM_BYTES = 4 * GIB, 1 * GIB
SMALL_DISK_BYTES, LITTLE_DISK_BYTES = 20 * GIB, 2 * GIB


def checks(
    machine: Machine,
    environment: Mapping[str, str] = MappingProxyType({}),
    health: Health | None = None,
    place: Place | None = None,
) -> list[Check]:
    """Every check, in the order a person would put things right. `environment`: `os.environ`, or a test's.
    Without `health` and `place` nothing is said of this moment and of the working folder.
    """
    now = health or Health()
    return [
        python(machine),
        *rosetta(machine),
        *packages(machine),
        *builds(machine),
        *macos(machine),
        _device(machine),
        *_mlx(machine, environment),
        *_metal(machine, environment),
        _cpu_bfloat16(machine),
        _ram(machine),
        *_swap(machine),
        *pressure(now, machine),
        *power(now),
        *heat(now),
        _disk(machine),
        *(place_checks(place) if place else []),
        *openmp(environment),
        *_watermarks(machine, environment),
        *hub(environment),
        *folders(environment),
        *offline(environment),
        *proxies(environment),
    ]


def _device(machine: Machine) -> Check:
    if not machine.gpus:
        return Check(
            "GPU",
            "warning",
            "none that can be used; training runs on the CPU",
            "small models only: try the demo recipe"
            if machine.system == "Darwin"
            else "small models only; nvidia-smi must list a GPU, and CUDA_VISIBLE_DEVICES let it through",
        )
    names = ", ".join(f"{g.name} ({gib(g.free_bytes)} of {gib(g.total_bytes)} free)" for g in machine.gpus)
    if machine.gpu_bfloat16:
        return Check("GPU", "ok", names, "")
    older = "before M3" if machine.gpus[0].kind == "metal" else "before Ampere (compute capability 8.0)"
    return Check(
        "GPU",
        "warning",
        f"{names}; chips {older} only emulate bfloat16",
        "nothing to do: the plan holds weights in bfloat16 and computes in float32",
    )


def _mlx(machine: Machine, environment: Mapping[str, str]) -> list[Check]:
    """Is it there where it is at home, and fast where it is not?"""
    there = all(machine.versions.get(p) for p in ("mlx", "mlx-lm"))
    if any(g.kind == "metal" for g in machine.gpus) and not there:
        found = "mlx and mlx-lm are not both installed: the plan takes torch, on MPS"
        return [Check("MLX", "warning", found, "pip install 'burnish[mlx]'")]
    if machine.system != "Linux" or not there or any(machine.versions.get(p) for p in MLX_CUDA):
        return []
    if machine.openblas or "openblas" in environment.get("LD_PRELOAD", ""):
        return [Check("MLX", "ok", "on the CPU, with OpenBLAS", "")]
    found = "on the CPU with the BLAS of its wheel: 4 GFLOP/s where OpenBLAS makes 195"
    advice = (
        "apt-get install libopenblas0-pthread: burnish finds it; one that is elsewhere: "
        "LD_PRELOAD=/path/to/libopenblas.so.0"
    )
    return [Check("MLX", "warning", found, advice)]


def _metal(machine: Machine, environment: Mapping[str, str]) -> list[Check]:
    """What one may meet on an Apple GPU, to be known and not to be put right."""
    if not any(g.kind == "metal" for g in machine.gpus):
        return []
    largest = f"one array may take about {gib(machine.ram_bytes * 2 // 3)}, two thirds of memory"
    name = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
    # The display's watchdog ends GPU work that takes long ('Impacting Interactivity'); it waits longer so.
    watchdog = (
        "1: the GPU may take longer over one piece of work before the system ends it"
        if environment.get(name) == "1"
        else f"not set here; burnish sets it for its own runs, for other programs: export {name}=1"
    )
    return [Check("Metal", "ok", largest, ""), Check(name, "ok", watchdog, "")]


def _cpu_bfloat16(machine: Machine) -> Check:
    if machine.cpu_bfloat16:
        return Check("CPU", "ok", f"{machine.chip}, {machine.cores} cores, bfloat16 in hardware", "")
    plain = f"{machine.chip}, {machine.cores} cores, no bfloat16 arithmetic"
    if machine.gpus:
        return Check("CPU", "ok", plain, "")
    return Check(
        "CPU", "warning", plain, "nothing to do: the plan computes in float32, which takes twice the memory"
    )


def _ram(machine: Machine) -> Check:
    found = f"{gib(machine.free_ram_bytes)} free of {gib(machine.ram_bytes)}"
    if machine.free_ram_bytes < LITTLE_RAM_BYTES:
        return Check("memory", "problem", found, "close other programs, or give the container more memory")
    if machine.free_ram_bytes < SMALL_RAM_BYTES:
        return Check(
            "memory", "warning", found, "close other programs before a long run; burnish plan says what fits"
        )
    return Check("memory", "ok", found, "")


def _swap(machine: Machine) -> list[Check]:
    if machine.system != "Linux" or machine.swap_bytes is None:
        return []
    if machine.swap_bytes:
        return [Check("swap", "ok", gib(machine.swap_bytes), "")]
    # With much memory a missing swap is a choice; with little it turns a short peak into a killed run.
    if machine.free_ram_bytes >= 4 * SMALL_RAM_BYTES:
        return [Check("swap", "ok", "none", "")]
    return [
        Check(
            "swap",
            "warning",
            "none: Linux kills the run the moment memory is short",
            "leave a margin (burnish plan shows it), or add swap: fallocate -l 8G /swapfile && "
            "mkswap /swapfile && swapon /swapfile",
        )
    ]


def _disk(machine: Machine) -> Check:
    found = f"{gib(machine.free_disk_bytes)} free"
    if machine.free_disk_bytes < LITTLE_DISK_BYTES:
        return Check(
            "disk",
            "problem",
            found,
            "free some space, or put models and runs on another disk (HF_HOME, --out)",
        )
    if machine.free_disk_bytes < SMALL_DISK_BYTES:
        return Check(
            "disk",
            "warning",
            f"{found}; a 7B model takes about 15",
            "put models on another disk (HF_HOME=/path)",
        )
    return Check("disk", "ok", found, "")


def _watermarks(machine: Machine, environment: Mapping[str, str]) -> list[Check]:
    found: list[Check] = []
    high = environment.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO")
    if machine.system == "Darwin" and high is not None:
        name = "PYTORCH_MPS_HIGH_WATERMARK_RATIO"
        if re.fullmatch(r"0*\.?0*", high.strip()) and high.strip():
            found.append(
                Check(
                    name,
                    "problem",
                    f"{high}: the GPU's memory limit is off, and a run that grows takes the "
                    "whole system down with it",
                    f"unset {name}; burnish plans within a budget instead",
                )
            )
        else:
            found.append(
                Check(
                    name,
                    "warning",
                    f"{high} instead of torch's 1.7, and instead of a recipe's care.mps_limit",
                    f"unset {name} unless you know why it is set",
                )
            )
    if machine.system == "Darwin" and environment.get("PYTORCH_ENABLE_MPS_FALLBACK") == "1":
        found.append(
            Check(
                "PYTORCH_ENABLE_MPS_FALLBACK",
                "warning",
                "1: operations that the GPU lacks run on the CPU, slowly and without a word",
                "unset PYTORCH_ENABLE_MPS_FALLBACK; burnish needs none of them",
            )
        )
    return found
