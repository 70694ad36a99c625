"""Is the Python right, and what is installed in it: the doctor's first questions."""

from __future__ import annotations

from collections.abc import Mapping

from burnish.machine.doctor_check import Check, dotted, numbers
from burnish.machine.probe import Machine

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


def python(machine: Machine) -> Check:
    first, last = PYTHONS
    if first <= numbers(machine.python)[:2] <= last:
        return Check("Python", "ok", machine.python, "")
    wanted = f"{dotted(first)} to {dotted(last)}"
    return Check(
        "Python",
        "problem",
        f"{machine.python}, expected {wanted}",
        "make an environment with one: uv venv --python 3.12, or python3.12 -m venv .venv",
    )


def rosetta(machine: Machine) -> list[Check]:
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


def packages(machine: Machine) -> list[Check]:
    found: list[Check] = []
    for package, (oldest, beyond, needed) in RANGES.items():
        version = machine.versions.get(package, "")
        install = _install(package)
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
            wanted = f"at least {dotted(oldest)} and before {dotted(beyond)}"
            found.append(
                Check(package, "problem" if needed else "warning", f"{version}, expected {wanted}", install)
            )
    return found


def builds(machine: Machine) -> list[Check]:
    """Versions that are right each and wrong together, and a build of torch for another machine."""
    torch, numpy = machine.versions.get("torch", ""), machine.versions.get("numpy", "")
    found: list[Check] = []
    if () < numbers(torch) < (2, 3) and numbers(numpy) >= (2,):
        words = f"numpy {numpy} with torch {torch}, which was built for numpy 1 and fails where the two meet"
        found.append(Check("torch and numpy", "problem", words, _install("torch")))
    if torch.endswith("+cpu") and any(g.kind == "cuda" for g in machine.gpus):
        words = f"torch {torch} is the build for CPUs: it does not see the NVIDIA GPU"
        advice = f"pip uninstall -y torch && {_install('torch')}, without an --index-url that ends in /cpu"
        found.append(Check("torch build", "warning", words, advice))
    return found


def _install(package: str) -> str:
    oldest, beyond, _ = RANGES[package]
    return f"pip install '{package}>={dotted(oldest)},<{dotted(beyond)}'"


def openmp(environment: Mapping[str, str]) -> list[Check]:
    """The variable that silences OpenMP where it finds itself loaded twice; its own message warns of it."""
    name = "KMP_DUPLICATE_LIB_OK"
    value = environment.get(name, "")
    if value.strip().lower() not in ("1", "true", "t", "yes", "on"):
        return []
    words = f"{value}: two OpenMP libraries may run at once, which can crash or give wrong numbers, silently"
    advice = f"unset {name}; if 'libiomp5 already initialized' comes back, make a new environment with pip"
    return [Check(name, "warning", words, advice)]


def _mps_needs(torch: tuple[int, ...]) -> int:
    """The oldest macOS on which this torch uses the GPU."""
    return next((macos for since, macos in MPS_NEEDS if torch >= since), 0)


def macos(machine: Machine) -> list[Check]:
    torch = numbers(machine.versions.get("torch", ""))
    if machine.system != "Darwin" or machine.python_arch != "arm64" or not torch:
        return []
    have = (numbers(machine.release) or (0,))[0]
    if have >= _mps_needs(torch):
        return [Check("macOS", "ok", machine.release, "")]
    found = f"{machine.release}; the GPU of torch {dotted(torch)} needs macOS {_mps_needs(torch)}"
    advice = "update macOS"
    if have >= _mps_needs(RANGES["torch"][0]):  # some torch that burnish can use runs here
        too_new = min(since for since, macos in MPS_NEEDS if macos > have)
        advice += f", or pip install 'torch<{dotted(too_new)}'"
    return [Check("macOS", "problem", found, advice)]
