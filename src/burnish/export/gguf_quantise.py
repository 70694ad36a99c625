"""k-quants, by llama.cpp itself: its `llama-quantize` where that is installed, else the Python binding.

kept = quantise(Path("m.f16.gguf"), Path("m.q4.gguf"), "q4_k_m")

python -m burnish.export.gguf_quantise IN OUT TYPE        # the binding, in a process that may crash
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.errors import EXIT_FAILED, UserError
from burnish.export.llama import kept_log, why
from burnish.machine.child import ask, tell

K_QUANTS = ("q6_k", "q5_k_m", "q4_k_m")
TOOL = "llama-quantize"
_BLOCK = 256  # weights of a row that share one scale of scales
# Where rows are no whole blocks llama.cpp takes these, and says so only in its log.
_INSTEAD: Mapping[str, str] = {"q6_k": "q8_0", "q5_k_m": "q5_1 or q8_0", "q4_k_m": "q5_0 or q8_0"}


def check_quantiser() -> None:
    """Raises UserError where there is none."""
    if shutil.which(TOOL) is None and importlib.util.find_spec("llama_cpp") is None:
        raise UserError(
            f"{', '.join(K_QUANTS)} are made by llama.cpp, which is not installed",
            f"pip install 'burnish[gguf]', or put {TOOL} on the PATH, or take q8_0",
        )


def fallbacks(shapes: Mapping[str, tuple[int, ...]], type: str) -> list[str]:
    """What llama.cpp will store otherwise, as a sentence; none where all rows are whole blocks."""
    odd = sorted(n for n, shape in shapes.items() if len(shape) == 2 and shape[-1] % _BLOCK)
    if type not in K_QUANTS or not odd:
        return []
    return [
        f"{len(odd)} matrices have rows that are no multiple of {_BLOCK}, {odd[0]} for one: llama.cpp stores "
        f"them as {_INSTEAD[type]} (f16 where they are no multiple of 32 either)"
    ]


def quantise(source: Path, out: Path, type: str) -> None:
    """Raises UserError where it fails; then nothing is at `out`."""
    try:
        tool = shutil.which(TOOL)
        if tool is None:
            ask("burnish.export.gguf_quantise", [str(source), str(out), type])
        else:
            _run(tool, source, out, type)
    except BaseException:  # Ctrl-C too: half a file would pass for a whole one
        out.unlink(missing_ok=True)
        raise


def _run(tool: str, source: Path, out: Path, type: str) -> None:
    done = subprocess.run(
        [tool, str(source), str(out), type.upper()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode or not out.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise UserError(
            f"{tool} ended with code {done.returncode}: {said}",
            f"take a newer {TOOL}, or take it off the PATH and pip install 'burnish[gguf]'",
            EXIT_FAILED,
        )


def _by_binding(source: Path, out: Path, type: str) -> dict[str, Any]:
    import llama_cpp

    cpp: Any = llama_cpp
    kept_log().clear()
    kinds = {
        "q6_k": cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
        "q5_k_m": cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
        "q4_k_m": cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    }
    settings = cpp.llama_model_quantize_default_params()
    settings.ftype = kinds[type]
    code = cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    if code or not out.is_file():
        raise UserError(
            f"llama.cpp could not quantise {source.name} to {type} (code {code}): {why()}",
            "take q8_0, which needs no llama.cpp",
            EXIT_FAILED,
        )
    return {"bytes": out.stat().st_size}


if __name__ == "__main__":
    sys.exit(tell(lambda: _by_binding(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
