"""What may go wrong on this machine, and the remedy: one `Check` for each thing looked at.

    for check in checks(probe(Path(".")), os.environ): ...

A check is a function from facts to a verdict. It asks nothing of the system, so a recorded machine gives the
same answer everywhere. 'problem' means that a run will fail or do harm, 'warning' that it will be slower or
surprising.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from burnish.machine.probe import MLX_CUDA, Machine

GIB = 1 << 30
PYTHONS = ((3, 11), (3, 13))  # first and last
# package → the oldest version that will do, the first that may not, is it needed; as in pyproject.toml
RANGES = {
    "torch": ((2, 11), (2, 16), True),
    "transformers": ((5, 17), (6,), True),
    "safetensors": ((0, 5), (1,), True),
    "numpy": ((1, 26), (3,), True),
    "peft": ((0, 21), (0, 22), True),
    "bitsandbytes": ((0, 46), (1,), False),
    "mlx": ((0, 32), (0, 34), False),
    "mlx-lm": ((0, 32, 2), (0, 34), False),
}
_MLX = "only `backend: mlx` needs it: pip install 'burnish[mlx]'"
OPTIONAL = {
    "bitsandbytes": "only `quantize: 4bit` of the torch backend needs it: pip install 'burnish[bnb]'",
    "mlx": _MLX,
    "mlx-lm": _MLX,
}
# The oldest macOS on which each torch's MPS runs: pytorch#133141 (2.5), pytorch#159275 and #163515 (2.9), and
# the source of 2.15, whose wheel still says 14.
MPS_NEEDS = (((2, 15), 15), ((2, 9), 14), ((2, 5), 13), ((1, 12), 12))
# What a 1.5B model in bfloat16, and a 135M one in float32, take to train; a 7B one and a small one, on disk.
SMALL_RAM_BYTES, LITTLE_RAM_BYTES = 4 * GIB, 1 * GIB
SMALL_DISK_BYTES, LITTLE_DISK_BYTES = 20 * GIB, 2 * GIB
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_DATASETS_CACHE")

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    found: str
    advice: str  # '' where there is nothing to do


def checks(machine: Machine, environment: Mapping[str, str] = MappingProxyType({})) -> list[Check]:
    """Every check, in the order a person would put things right. `environment`: `os.environ`, or a test's."""
    return [
        _python(machine),
        *_rosetta(machine),
        *_packages(machine),
        *_macos(machine),
        _device(machine),
        *_mlx(machine, environment),
        _cpu_bfloat16(machine),
        _ram(machine),
        *_swap(machine),
        _disk(machine),
        *_watermarks(machine, environment),
        *_hub(environment),
        *_folders(environment),
        *_offline(environment),
        *_proxies(environment),
    ]


def numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' → (2, 13, 0); '' → ()."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(n) for n in version)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB"


def _python(machine: Machine) -> Check:
    first, last = PYTHONS
    if first <= numbers(machine.python)[:2] <= last:
        return Check("Python", "ok", machine.python, "")
    wanted = f"{_dotted(first)} to {_dotted(last)}"
    return Check(
        "Python",
        "problem",
        f"{machine.python}, expected {wanted}",
        "make an environment with one: uv venv --python 3.12, or python3.12 -m venv .venv",
    )


def _rosetta(machine: Machine) -> list[Check]:
    if machine.system != "Darwin":
        return []
    if machine.arch == machine.python_arch == "arm64":
        return [Check("architecture", "ok", "arm64 Python on Apple silicon", "")]
    if machine.arch == "arm64":
        return [
            Check(
                "architecture",
                "problem",
                f"an {machine.python_arch} Python under Rosetta: it cannot use the GPU, and "
                "torch has no such builds since 2.3",
                "install an arm64 Python (/opt/homebrew/bin/brew install python@3.12) and "
                "make the environment again; python -c 'import platform; print(platform.machine())' tells",
            )
        ]
    return [
        Check(
            "architecture",
            "problem",
            "a Mac with an Intel processor: torch has no builds for it since 2.3",
            "use a Mac with Apple silicon, or Linux",
        )
    ]


def _packages(machine: Machine) -> list[Check]:
    found: list[Check] = []
    for package, (oldest, beyond, needed) in RANGES.items():
        version = machine.versions.get(package, "")
        install = f"pip install '{package}>={_dotted(oldest)},<{_dotted(beyond)}'"
        if not version:
            found.append(
                Check(
                    package,
                    "problem" if needed else "ok",
                    "not installed",
                    install if needed else OPTIONAL[package],
                )
            )
        elif oldest <= numbers(version) < beyond:
            found.append(Check(package, "ok", version, ""))
        else:
            wanted = f"at least {_dotted(oldest)} and before {_dotted(beyond)}"
            found.append(
                Check(package, "problem" if needed else "warning", f"{version}, expected {wanted}", install)
            )
    return found


def _mps_needs(torch: tuple[int, ...]) -> int:
    """The oldest macOS on which this torch uses the GPU."""
    return next((macos for since, macos in MPS_NEEDS if torch >= since), 0)


def _macos(machine: Machine) -> list[Check]:
    torch = numbers(machine.versions.get("torch", ""))
    if machine.system != "Darwin" or machine.python_arch != "arm64" or not torch:
        return []
    have = (numbers(machine.release) or (0,))[0]
    if have >= _mps_needs(torch):
        return [Check("macOS", "ok", machine.release, "")]
    found = f"{machine.release}; the GPU of torch {_dotted(torch)} needs macOS {_mps_needs(torch)}"
    advice = "update macOS"
    if have >= _mps_needs(RANGES["torch"][0]):  # some torch that burnish can use runs here
        too_new = min(since for since, macos in MPS_NEEDS if macos > have)
        advice += f", or pip install 'torch<{_dotted(too_new)}'"
    return [Check("macOS", "problem", found, advice)]


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
    names = ", ".join(f"{g.name} ({_gib(g.free_bytes)} of {_gib(g.total_bytes)} free)" for g in machine.gpus)
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
    found = f"{_gib(machine.free_ram_bytes)} free of {_gib(machine.ram_bytes)}"
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
        return [Check("swap", "ok", _gib(machine.swap_bytes), "")]
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
    found = f"{_gib(machine.free_disk_bytes)} free"
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
                    f"{high} instead of torch's 1.7",
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


def _hub(environment: Mapping[str, str]) -> list[Check]:
    endpoint = environment.get("HF_ENDPOINT")
    if not endpoint:
        return []
    if not endpoint.startswith(("https://", "http://")):
        return [
            Check(
                "HF_ENDPOINT",
                "problem",
                f"{endpoint} is not an address",
                "export HF_ENDPOINT=https://hf-mirror.com, or unset it",
            )
        ]
    if endpoint.rstrip("/") == "https://huggingface.co":
        return [Check("HF_ENDPOINT", "ok", endpoint, "")]
    return [
        Check(
            "HF_ENDPOINT",
            "warning",
            f"{endpoint}: models and data come from this mirror, and a token (HF_TOKEN) goes to it",
            "nothing to do if you trust it; unset HF_ENDPOINT for huggingface.co",
        )
    ]


def _folders(environment: Mapping[str, str]) -> list[Check]:
    found: list[Check] = []
    for name in (n for n in FOLDERS if environment.get(n)):
        path = environment[name]
        if path.startswith("~"):
            # A shell expands ~ only at the start of an unquoted value. huggingface_hub 1 expands it itself in
            # HF_HOME and HF_HUB_CACHE; datasets does not in HF_DATASETS_CACHE, nor do most scripts.
            found.append(
                Check(
                    name,
                    "warning",
                    f"{path}: the shell did not expand ~, and some programs will make a folder called ~",
                    f'export {name}="$HOME{path[1:]}"',
                )
            )
        elif name == "TRANSFORMERS_CACHE":
            found.append(
                Check(
                    name,
                    "warning",
                    f"{path}: transformers 5 does not read it",
                    f"export HF_HOME={path} instead",
                )
            )
        else:
            found.append(Check(name, "ok", f"{path}: downloads are kept there", ""))
    return found


def _offline(environment: Mapping[str, str]) -> list[Check]:
    on = [n for n in OFFLINE if environment.get(n, "").upper() in ("1", "ON", "YES", "TRUE")]
    if not on:
        return []
    return [
        Check(
            "offline",
            "warning",
            f"{', '.join(on)} set: nothing is downloaded, only what is there is used",
            f"unset {' '.join(on)} before burnish fetch",
        )
    ]


def _proxies(environment: Mapping[str, str]) -> list[Check]:
    found: list[Check] = []
    for name in PROXIES:
        value = environment.get(name) or environment.get(name.lower())
        if value:
            shown = re.sub(r"//[^/@]*@", "//…@", value)  # never a password in a report
            found.append(
                Check(
                    name,
                    "warning",
                    f"{shown}: every download goes through it",
                    "nothing to do if downloads work; else unset it, or set NO_PROXY for your mirror",
                )
            )
    return found
