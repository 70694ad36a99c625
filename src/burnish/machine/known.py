"""Machines by name, for a plan on one that is not at hand: `burnish plan RECIPE --machine m2-pro-32gb`.

    machine = known_machine("m2-pro-32gb")

Each is what `probe` would find on it with burnish[mlx] installed and nothing else open
(tests/machine/test_known.py holds them against recorded answers). No Mac's free memory here was measured.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from burnish.errors import UserError
from burnish.machine.probe import MIB, PACKAGES, Gpu, Machine, apple_gpu_bfloat16

GIB = 1 << 30
# What macOS itself takes after start-up: wired memory of about 2 GiB, then the window server and some four
# hundred daemons. Buffers and page tables grow with screens and RAM, so a larger Mac counts more. Meant to be
# too much rather than too little; a Mac in use has less free, and `burnish plan` on it says how much.
MACOS_SMALL_BYTES, MACOS_LARGE_BYTES, SMALL_MAC_BYTES = 7 * GIB // 2, 5 * GIB, 16 * GIB
LINUX_BYTES = 3 * GIB // 2  # what a Linux without desktop takes, its own file cache not counted
# The versions of constraints.txt, and of the extras that it does not name.
_EVERYWHERE = {
    "torch": "2.13.0",
    "mlx": "0.32.4",
    "mlx-lm": "0.32.2",
    "transformers": "5.23.0",
    "tokenizers": "0.23.3",
    "peft": "0.21.2",
    "accelerate": "1.15.0",
    "safetensors": "0.8.0",
    "numpy": "2.4.6",
    "gguf": "0.19.0",
}
_NVIDIA = {"mlx-cuda-13": "0.32.4", "bitsandbytes": "0.50.2"}
_FREE_DISK_BYTES = 100 * GIB
_PYTHON = "3.12.11"


def _versions(more: Mapping[str, str]) -> dict[str, str]:
    return {package: {**_EVERYWHERE, **more}.get(package, "") for package in PACKAGES}


def _mac(chip: str, ram_gib: int, cores: int) -> Machine:
    ram = ram_gib * GIB
    free = ram - (MACOS_SMALL_BYTES if ram <= SMALL_MAC_BYTES else MACOS_LARGE_BYTES)
    return Machine(
        system="Darwin",
        release="26.1",
        arch="arm64",
        python_arch="arm64",
        python=_PYTHON,
        chip=chip,
        cores=cores,
        ram_bytes=ram,
        free_ram_bytes=free,
        free_disk_bytes=_FREE_DISK_BYTES,
        unified=True,
        cpu_bfloat16=not chip.startswith("Apple M1"),  # sysctl hw.optional.arm.FEAT_BF16: M2 and later
        gpu_bfloat16=apple_gpu_bfloat16(chip),
        gpus=(Gpu(chip, "metal", ram, free),),
        versions=_versions({}),
    )


def _pc(
    chip: str, ram_gib: int, cores: int, cpu_bfloat16: bool = False, gpu: tuple[str, int, int] | None = None
) -> Machine:
    """gpu: its name, and MiB in all and free, as nvidia-smi prints them; all are Ampere or later."""
    gpus = () if gpu is None else (Gpu(gpu[0], "cuda", gpu[1] * MIB, gpu[2] * MIB),)
    return Machine(
        system="Linux",
        release="6.8.0",
        arch="x86_64",
        python_arch="x86_64",
        python=_PYTHON,
        chip=chip,
        cores=cores,
        ram_bytes=ram_gib * GIB,
        free_ram_bytes=ram_gib * GIB - LINUX_BYTES,
        free_disk_bytes=_FREE_DISK_BYTES,
        unified=False,
        cpu_bfloat16=cpu_bfloat16,
        gpu_bfloat16=gpu is not None,
        gpus=gpus,
        versions=_versions(_NVIDIA if gpu else {}),
        swap_bytes=0,
        openblas=True,
    )


KNOWN: Mapping[str, Machine] = {
    "m1-8gb": _mac("Apple M1", 8, 8),
    "m1-16gb": _mac("Apple M1", 16, 8),
    "m1-max-32gb": _mac("Apple M1 Max", 32, 10),
    "m2-pro-32gb": _mac("Apple M2 Pro", 32, 12),
    "m3-max-64gb": _mac("Apple M3 Max", 64, 16),
    "m3-max-96gb": _mac("Apple M3 Max", 96, 14),
    "m4-max-128gb": _mac("Apple M4 Max", 128, 16),
    "m2-ultra-192gb": _mac("Apple M2 Ultra", 192, 24),
    # With a desktop on the card, and without.
    "rtx-4090-24gb": _pc(
        "13th Gen Intel(R) Core(TM) i9-13900K", 64, 32, gpu=("NVIDIA GeForce RTX 4090", 24564, 23871)
    ),
    "h100-80gb": _pc(
        "Intel(R) Xeon(R) Platinum 8480+",
        128,
        16,
        cpu_bfloat16=True,
        gpu=("NVIDIA H100 80GB HBM3", 81559, 81008),
    ),
    "cpu-2-cores": _pc("AMD EPYC 7763 64-Core Processor", 16, 2),
}


def known_machine(name: str) -> Machine:
    """The machine of this name, whatever its capitals. Raises UserError with the nearest name."""
    found = KNOWN.get(name.strip().lower())
    if found is None:
        near = difflib.get_close_matches(name.strip().lower(), KNOWN, 1, 0.5)
        did = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no known machine {name!r}{did}", f"known are: {', '.join(KNOWN)}")
    return found
