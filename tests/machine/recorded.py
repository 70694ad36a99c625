"""Machines as their commands and files describe them; `Recorded` replays one to `probe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

GIB = 1 << 30
GPU_QUERY = "nvidia-smi --query-gpu=uuid,name,memory.total,memory.free --format=csv,noheader,nounits"
CAP_QUERY = "nvidia-smi --query-gpu=compute_cap --format=csv,noheader,nounits"
INSTALLED = {
    "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "safetensors": "0.8.0", "numpy": "2.4.6"
}


MLX = {"mlx": "0.32.4", "mlx-lm": "0.32.2"}


@dataclass(frozen=True)
class Recorded:
    """A `System` that knows only what was written down: commands by their words, files by their path."""

    name: str = "Linux"
    release: str = "6.8.0-79-generic"
    machine: str = "x86_64"
    commands: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    affinity: int = 8
    ram: tuple[int, int, int] = (16 * GIB, 12 * GIB, 0)  # total, available, swap
    versions: Mapping[str, str] = field(default_factory=lambda: INSTALLED)
    python_version: str = "3.12.11"
    disk: int = 300 * GIB

    def uname(self) -> tuple[str, str, str]:
        return self.name, self.release, self.machine

    def python(self) -> str:
        return self.python_version

    def run(self, *command: str) -> str | None:
        return self.commands.get(" ".join(command))

    def read(self, path: str) -> str | None:
        return self.files.get(path)

    def variable(self, name: str) -> str | None:
        return self.variables.get(name)

    def cores(self) -> int:
        return self.affinity

    def memory(self) -> tuple[int, int, int]:
        return self.ram

    def free_disk_bytes(self, folder: Path) -> int:
        return self.disk

    def version(self, package: str) -> str:
        return self.versions.get(package, "")


def with_mlx(machine: Recorded, *more: str) -> Recorded:
    """The same machine with mlx installed; `more`: packages that come with it, such as mlx-cuda-13."""
    return replace(machine, versions={**machine.versions, **MLX, **dict.fromkeys(more, MLX["mlx"])})


def mac(
    chip: str, macos: str, ram_gib: int, free_gib: int, cores: int, bf16: bool, machine: str = "arm64"
) -> Recorded:
    return Recorded(
        name="Darwin", release="24.6.0", machine=machine, affinity=cores,
        ram=(ram_gib * GIB, free_gib * GIB, 2 * GIB),
        commands={
            "sysctl -n machdep.cpu.brand_string": f"{chip}\n",
            "sysctl -n sysctl.proc_translated": "0\n" if machine == "arm64" else "1\n",
            # The M1 has no such key at all, and sysctl fails.
            **({"sysctl -n hw.optional.arm.FEAT_BF16": "1\n"} if bf16 else {}),
            "sw_vers -productVersion": f"{macos}\n",
        },
    )


def cpuinfo(model: str, flags: str) -> str:
    core = f"vendor_id\t: GenuineIntel\nmodel name\t: {model}\nflags\t\t: {flags}\n"
    return f"processor\t: 0\n{core}\nprocessor\t: 1\n{core}"


M1_8 = mac("Apple M1", "14.6.1", 8, 3, 8, bf16=False)
M1_16 = mac("Apple M1", "15.5", 16, 11, 8, bf16=False)
M2_MAX_32 = mac("Apple M2 Max", "15.5", 32, 24, 12, bf16=True)
M2_PRO_32 = mac("Apple M2 Pro", "15.5", 32, 22, 12, bf16=True)
M4_MAX_128 = mac("Apple M4 Max", "26.1", 128, 110, 16, bf16=True)
ROSETTA = mac("Apple M1", "14.6.1", 16, 8, 8, bf16=False, machine="x86_64")
RTX_4090 = Recorded(
    affinity=32, ram=(64 * GIB, 58 * GIB, 8 * GIB),
    commands={
        GPU_QUERY: "GPU-1f5a5c2e-0000-1111-2222-333344445555, NVIDIA GeForce RTX 4090, 24564, 23871\n",
        CAP_QUERY: "8.9\n",
    },
    files={"/proc/cpuinfo": cpuinfo("13th Gen Intel(R) Core(TM) i9-13900K", "fpu sse2 avx2 fma avx_vnni")},
)
H100 = Recorded(
    affinity=16, ram=(2000 * GIB, 1900 * GIB, 0),
    commands={
        GPU_QUERY: "GPU-aaaa, NVIDIA H100 80GB HBM3, 81559, 81008\n"
                   "GPU-bbbb, NVIDIA H100 80GB HBM3, 81559, 40000\n",
        CAP_QUERY: "9.0\n9.0\n",
    },
    files={
        "/proc/cpuinfo": cpuinfo("Intel(R) Xeon(R) Platinum 8480+", "fpu avx512_bf16 amx_bf16"),
        "/proc/self/cgroup": "0::/\n",
        "/sys/fs/cgroup/memory.max": f"{128 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{10 * GIB}\n",
        "/sys/fs/cgroup/memory.stat": f"anon 1\nfile 2\ninactive_file {4 * GIB}\nactive_file 3\n",
        "/sys/fs/cgroup/cpu.max": "max 100000\n",
    },
)
CONTAINER = Recorded(
    affinity=64, ram=(256 * GIB, 200 * GIB, 0),
    files={
        "/proc/cpuinfo": cpuinfo("AMD EPYC 7763 64-Core Processor", "fpu avx2 fma"),
        "/proc/self/cgroup": "0::/docker/abc\n",  # the host's path, which the container cannot see
        "/sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
        "/sys/fs/cgroup/memory.current": f"{1 * GIB}\n",
        "/sys/fs/cgroup/memory.stat": "inactive_file 0\n",
        "/sys/fs/cgroup/cpu.max": "200000 100000\n",
    },
)
