"""What makers publish of their GPUs: peak rates and memory bandwidth, by the names that systems print.

Only what could be confirmed stands here. Not there: Apple's M5, whose GPU cores multiply 16-bit matrices in
units of their own, about which Apple publishes a ratio to M4 and no rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU. bfloat16: dense, on tensor cores, sums in float32; None: it has no such arithmetic."""

    bfloat16: float | None  # FLOP/s
    float32: float  # FLOP/s of its ordinary cores: float32 products are not rounded to TF32 here
    bytes_per_s: float


@dataclass(frozen=True)
class Apple:
    """The GPU of an Apple chip. 16-bit products on it are no faster than float32's before M5."""

    gpu_cores: int
    fewest: bool  # sold with more, too, under the same name and with as many CPU cores
    flops: float  # float32, FLOP/s
    bytes_per_s: float


# As nvidia-smi prints them.
CARDS: Mapping[str, Card] = {
    # NVIDIA's GA102 white paper, appendix A.
    "NVIDIA GeForce RTX 3090": Card(71 * TERA, 35.6 * TERA, 936 * GIGA),
    # NVIDIA's Ada white paper, appendix A.
    "NVIDIA GeForce RTX 4090": Card(165.2 * TERA, 82.6 * TERA, 1008 * GIGA),
    # NVIDIA's RTX Blackwell white paper: 838 sparse; dense half of it, with sums in float32 a quarter.
    "NVIDIA GeForce RTX 5090": Card(209.5 * TERA, 104.8 * TERA, 1792 * GIGA),
    # NVIDIA's A100 data sheet; the memory is what differs.
    "NVIDIA A100-SXM4-40GB": Card(312 * TERA, 19.5 * TERA, 1555 * GIGA),
    "NVIDIA A100-PCIE-40GB": Card(312 * TERA, 19.5 * TERA, 1555 * GIGA),
    "NVIDIA A100-SXM4-80GB": Card(312 * TERA, 19.5 * TERA, 2039 * GIGA),
    "NVIDIA A100 80GB PCIe": Card(312 * TERA, 19.5 * TERA, 1935 * GIGA),
    # NVIDIA's H100 data sheet, which prints sparse rates: half of 1,979 (SXM).
    "NVIDIA H100 80GB HBM3": Card(989 * TERA, 67 * TERA, 3350 * GIGA),
    # NVIDIA's L4 data sheet: half of 242, which is sparse.
    "NVIDIA L4": Card(121 * TERA, 30.3 * TERA, 300 * GIGA),
    # NVIDIA's T4 data sheet. Turing multiplies float16 on tensor cores (65), but not bfloat16.
    "Tesla T4": Card(None, 8.1 * TERA, 320 * GIGA),
}

# Float32 operations of a GPU core a second. M1: Apple, 2.6 teraflops with 8 (Pro 5.2 with 16, Max 10.4
# with 32). M2: Apple, 3.6 with 10 (Max 13.6 with 38, Ultra 27.2 with 76). M3 and M4, where Apple
# gives none: 128 lanes at the 1.4 and 1.68 GHz of public tables; other tables say up to 15 % and 7 % more.
_CORE_FLOPS = {"M1": 0.325 * TERA, "M2": 0.358 * TERA, "M3": 0.358 * TERA, "M4": 0.43 * TERA}
# Chip and CPU cores → GPU cores, whether there are variants with more, GB/s: Apple's specifications of Macs.
_APPLE: Mapping[tuple[str, int], tuple[int, bool, int]] = {
    ("M1", 8): (7, True, 68),
    ("M1 Pro", 8): (14, False, 200),
    ("M1 Pro", 10): (14, True, 200),
    ("M1 Max", 10): (24, True, 400),
    ("M1 Ultra", 20): (48, True, 800),
    ("M2", 8): (8, True, 100),
    ("M2 Pro", 10): (16, False, 200),
    ("M2 Pro", 12): (19, False, 200),
    ("M2 Max", 12): (30, True, 400),
    ("M2 Ultra", 24): (60, True, 800),
    ("M3", 8): (8, True, 100),
    ("M3 Pro", 11): (14, False, 150),
    ("M3 Pro", 12): (18, False, 150),
    ("M3 Max", 14): (30, False, 300),
    ("M3 Max", 16): (40, False, 400),
    ("M3 Ultra", 28): (60, False, 819),
    ("M3 Ultra", 32): (80, False, 819),
    ("M4", 8): (8, False, 120),
    ("M4", 10): (10, False, 120),
    ("M4 Pro", 12): (16, False, 273),
    ("M4 Pro", 14): (20, False, 273),
    ("M4 Max", 14): (32, False, 410),
    ("M4 Max", 16): (40, False, 546),
}


def apple(chip: str, cpu_cores: int) -> Apple | None:
    """The GPU of 'Apple M2 Pro' with so many CPU cores. A system tells its CPU cores and not its GPU's: where
    one goes with several, or the number is unknown (a share of them, in a container), the fewest are taken.
    """
    name = chip.removeprefix("Apple ").strip()
    rows = {cores: row for (known, cores), row in _APPLE.items() if known == name}
    if not rows:
        return None
    gpu_cores, more, gigabytes = rows.get(cpu_cores) or min(rows.values())
    several = more or cpu_cores not in rows
    return Apple(gpu_cores, several, gpu_cores * _CORE_FLOPS[name.split()[0]], gigabytes * GIGA)
