"""The facts of this machine, from the operating system; no framework is imported.

    machine = probe(Path("runs"))     # free disk space is that of the folder's volume

Everything outside this process is asked through one small `System`, so that tests replay recorded machines.
What the system does not tell is taken as absent, never as an error: a missing `nvidia-smi` means no NVIDIA
GPU. The price is that a broken driver looks like no driver; `burnish doctor` shows what was found.
"""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, Protocol

import psutil

MLX_CUDA = ("mlx-cuda-12", "mlx-cuda-13")  # either is mlx's part for NVIDIA GPUs
PACKAGES = (
    "torch",
    "mlx",
    "mlx-lm",
    *MLX_CUDA,
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "datasets",
    "numpy",
    "gguf",
)
MIB = 1 << 20
NO_LIMIT_BYTES = 1 << 60  # cgroup v1 writes 2^63 less a page where there is no limit
AMPERE = 8.0  # the first CUDA compute capability with bfloat16 arithmetic
_ARCHES = {"aarch64": "arm64", "AMD64": "x86_64", "ARM64": "arm64"}


@dataclass(frozen=True)
class Gpu:
    name: str
    kind: Literal["cuda", "metal"]
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Machine:
    system: str  # 'Darwin', 'Linux', 'Windows'
    release: str  # macOS version, or kernel release
    arch: str  # of the machine: 'arm64', 'x86_64'
    python_arch: str  # of this Python: differs under Rosetta
    python: str
    chip: str
    cores: int  # that this process may use
    ram_bytes: int  # or the container's limit, where that is smaller
    free_ram_bytes: int
    free_disk_bytes: int
    unified: bool  # CPU and GPU share memory
    cpu_bfloat16: bool  # bfloat16 arithmetic in hardware
    gpu_bfloat16: bool
    gpus: tuple[Gpu, ...]
    versions: Mapping[str, str]  # of torch, mlx, transformers, peft, …: '' where not installed
    swap_bytes: int | None = None  # None where the system grows it as needed (macOS), or it is not known
    openblas: bool = False  # Linux: the loader finds OpenBLAS, for mlx on the CPU


class System(Protocol):
    """What is asked of the world. None, or '', where it does not know."""

    def uname(self) -> tuple[str, str, str]: ...  # system, release, machine: as this process sees them
    def python(self) -> str: ...
    def run(self, *command: str) -> str | None: ...  # stdout of a command that succeeded
    def read(self, path: str) -> str | None: ...
    def variable(self, name: str) -> str | None: ...
    def cores(self) -> int: ...  # by affinity
    def memory(self) -> tuple[int, int, int]: ...  # bytes: total, available, swap
    def free_disk_bytes(self, folder: Path) -> int: ...
    def version(self, package: str) -> str: ...


class ThisSystem:
    """The real one."""

    def uname(self) -> tuple[str, str, str]:
        return platform.system(), platform.release(), platform.machine()

    def python(self) -> str:
        return platform.python_version()

    def run(self, *command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):  # not installed, or hanging on a broken driver
            return None
        return done.stdout if done.returncode == 0 else None

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def cores(self) -> int:
        try:
            return len(psutil.Process().cpu_affinity() or ())
        except AttributeError:  # macOS has no affinity, and psutil there no such method
            return os.cpu_count() or 1

    def memory(self) -> tuple[int, int, int]:
        ram = psutil.virtual_memory()
        return ram.total, ram.available, psutil.swap_memory().total

    def free_disk_bytes(self, folder: Path) -> int:
        """Of the nearest folder that exists: the run folder may not have been made yet."""
        folder = folder.absolute()
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def version(self, package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""


def probe(folder: Path, system: System | None = None) -> Machine:
    """This machine, with the free disk space of `folder`'s volume. `system` is for tests."""
    ask: System = system or ThisSystem()
    name, release, seen_arch = ask.uname()
    python_arch = _ARCHES.get(seen_arch, seen_arch)
    mac = name == "Darwin"
    total, available, swap = ask.memory()
    limit, used = _cgroup_memory(ask) if name == "Linux" else (None, 0)
    if limit is not None and limit < total:
        total, available = limit, min(available, max(0, limit - used))
    arch = "arm64" if mac and _sysctl(ask, "sysctl.proc_translated") == "1" else python_arch
    chip = _chip(ask, name) or seen_arch
    if mac and python_arch == "arm64":
        gpus, unified, gpu_bfloat16 = (Gpu(chip, "metal", total, available),), True, apple_gpu_bfloat16(chip)
    else:
        gpus, unified, gpu_bfloat16 = _nvidia(ask, total, available)
    return Machine(
        system=name,
        release=(ask.run("sw_vers", "-productVersion") or release).strip() if mac else release,
        arch=arch,
        python_arch=python_arch,
        python=ask.python(),
        chip=chip,
        cores=_cores(ask, name),
        ram_bytes=total,
        free_ram_bytes=available,
        free_disk_bytes=ask.free_disk_bytes(folder),
        # A Mac's memory is shared even where an x86 Python cannot reach its GPU.
        unified=unified or (mac and arch == "arm64"),
        cpu_bfloat16=_cpu_bfloat16(ask, name),
        gpu_bfloat16=gpu_bfloat16,
        gpus=gpus,
        versions={package: ask.version(package) for package in PACKAGES},
        swap_bytes=None if mac else swap,
        # Named in full: on Debian /sbin is not on everyone's PATH.
        openblas=name == "Linux" and "libopenblas" in (ask.run("/sbin/ldconfig", "-p") or ""),
    )


def _sysctl(ask: System, key: str) -> str:
    return (ask.run("sysctl", "-n", key) or "").strip()


def _chip(ask: System, name: str) -> str:
    if name == "Darwin":
        return _sysctl(ask, "machdep.cpu.brand_string")
    found = re.search(r"^model name\s*:\s*(.+)$", ask.read("/proc/cpuinfo") or "", re.MULTILINE)
    if found:
        return found[1].strip()
    return (ask.read("/proc/device-tree/model") or "").strip("\0\n ")  # ARM boards


def _cpu_bfloat16(ask: System, name: str) -> bool:
    if name == "Darwin":
        return _sysctl(ask, "hw.optional.arm.FEAT_BF16") == "1"
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", ask.read("/proc/cpuinfo") or "", re.MULTILINE)
    return found is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(found[1].split())


def apple_gpu_bfloat16(chip: str) -> bool:
    """GPU family Apple9 has it: M3 and A17 Pro, and later. Before them Metal emulates it."""
    found = re.search(r"\bApple ([MA])(\d+)", chip)
    return found is not None and int(found[2]) >= {"M": 3, "A": 17}[found[1]]


def _cores(ask: System, name: str) -> int:
    """By affinity, and by the container's share of time."""
    cores = max(1, ask.cores())
    if name != "Linux":
        return cores
    quota, period = (ask.read("/sys/fs/cgroup/cpu.max") or "max 1").split()[:2]
    if quota == "max":
        quota = (ask.read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") or "-1").strip()
        period = (ask.read("/sys/fs/cgroup/cpu/cpu.cfs_period_us") or "1").strip()
    return cores if int(quota) <= 0 else min(cores, math.ceil(int(quota) / int(period)))


def _cgroup_memory(ask: System) -> tuple[int | None, int]:
    """Bytes of the tightest memory limit of this process's control groups, and of its use; (None, 0) if none.

    Page cache can be given back, so it is not used. In a container the path in /proc/self/cgroup is often
    the host's and is not there; the root is then the container's own group, and is always looked at.
    """
    tightest, used = None, 0
    for line in (ask.read("/proc/self/cgroup") or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = "/sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base, names = (
                "/sys/fs/cgroup/memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        parts = [p for p in path.split("/") if p]
        for n in range(len(parts) + 1):
            group = "/".join([base, *parts[:n]])
            limit = (ask.read(f"{group}/{names[0]}") or "max").strip()
            if (
                limit == "max"
                or int(limit) >= NO_LIMIT_BYTES
                or (tightest is not None and int(limit) >= tightest)
            ):
                continue
            cache = re.search(rf"^{names[2]} (\d+)$", ask.read(f"{group}/memory.stat") or "", re.MULTILINE)
            tightest = int(limit)
            used = max(
                0, int((ask.read(f"{group}/{names[1]}") or "0").strip()) - (int(cache[1]) if cache else 0)
            )
    return tightest, used


def _nvidia(ask: System, ram_bytes: int, free_ram_bytes: int) -> tuple[tuple[Gpu, ...], bool, bool]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves; do they share the CPU's memory; have they all bfloat16."""
    listed = _query(ask, "uuid,name,memory.total,memory.free")
    chosen = _visible([row[0] for row in listed], ask.variable("CUDA_VISIBLE_DEVICES"))
    if not chosen:
        return (), False, False
    gpus, unified = [], False
    for i in chosen:
        _, name, total, free = listed[i]
        if total.isdigit() and free.isdigit():
            gpus.append(Gpu(name, "cuda", int(total) * MIB, int(free) * MIB))
        else:  # GB10 and Jetson print [N/A]: their memory is the machine's
            unified = True
            gpus.append(Gpu(name, "cuda", ram_bytes, free_ram_bytes))
    # Asked apart: drivers before 510 do not know the word, and refuse the whole query.
    capabilities = _query(ask, "compute_cap")
    bfloat16 = len(capabilities) == len(listed) and all(_number(capabilities[i][0]) >= AMPERE for i in chosen)
    return tuple(gpus), unified, bfloat16


def _query(ask: System, fields: str) -> list[list[str]]:
    out = ask.run("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits") or ""
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.strip()]
    return [row for row in rows if len(row) == fields.count(",") + 1]


def _number(text: str) -> float:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0.0


def _visible(uuids: list[str], variable: str | None) -> list[int]:
    """Indices, as CUDA reads the variable: numbers or starts of UUIDs, up to the first that is not there."""
    if variable is None:
        return list(range(len(uuids)))
    chosen: list[int] = []
    for word in (w.strip() for w in variable.split(",")):
        if word.isdigit():
            matches = [int(word)] if int(word) < len(uuids) else []
        else:
            matches = [i for i, uuid in enumerate(uuids) if word.startswith("GPU-") and uuid.startswith(word)]
        if len(matches) != 1:
            break
        chosen += matches
    return chosen
