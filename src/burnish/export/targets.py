"""What a tuned model can become: for each target its types, its writer, and the program that will read it."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from burnish.backends.adapter_folder import ADAPTER
from burnish.errors import UserError
from burnish.export.adapter import read_adapter
from burnish.export.consume import Reading
from burnish.export.gguf import check_gguf, gguf_bytes, write_gguf, write_gguf_adapter
from burnish.export.hf import check_hf, dtype_of, hf_bytes, write_adapter, write_hf
from burnish.export.merged import Merged, check_fits
from burnish.export.mlx import check_mlx, mlx_bytes, write_mlx
from burnish.export.ollama import check_ollama, modelfile
from burnish.export.source import Source
from burnish.models.mlx_adapter import to_mlx
from burnish.models.spec import ModelSpec

Notes = list[str]
GGUF_TYPES = ("q8_0", "f16", "bf16", "f32", "q6_k", "q5_k_m", "q4_k_m")
_DTYPES = {"auto": "auto", "bf16": "bfloat16", "f16": "float16", "f32": "float32"}
_MLX_BITS = {"16bit": 16, "8bit": 8, "4bit": 4}


@dataclass(frozen=True)
class Target:
    name: str
    types: tuple[str, ...]  # the first is taken where none is named
    check: Callable[[Source, str], None]  # raises UserError for whatever can be known before any work
    n_bytes: Callable[[Source, str], int]  # of disk, at its fullest
    write: Callable[[Source, Path, str], Notes]  # fills an empty folder
    reading: Callable[[Source, Path, str, Path], Reading]  # last: a folder for the proof's time
    limits: Callable[[Source, str], tuple[str, str]]  # a key of LIMITS
    card: str  # a key of the card's
    package: str  # that reads it
    extra: str  # of burnish's, that installs it


def target(to: str, lora_only: bool) -> Target:
    """Raises UserError for a target that there is not."""
    found = (ADAPTERS if lora_only else TARGETS).get(to)
    if found:
        return found
    if to in TARGETS:
        raise UserError(
            f"--to {to} --lora-only: Ollama takes no adapter on its own for most models",
            f"leave --lora-only out, or use --to {' or --to '.join(ADAPTERS)}",
        )
    raise UserError(
        f"--to: expected one of {', '.join(TARGETS)}, got {to}", "burnish export RUN OUT --to gguf"
    )


def check_reader(target: Target) -> None:
    """Raises UserError where the program that will use the export is not here to prove it."""
    if importlib.util.find_spec(target.package) is None:
        raise UserError(
            f"the proof loads the export with {target.package}, which is not installed",
            f"pip install 'burnish[{target.extra}]', or leave the proof out with --no-proof",
        )


def stored_type(base: ModelSpec) -> str:
    """'f32', 'f16' or 'bf16': how most bytes of the base are stored."""
    return next(type for type, dtype in _DTYPES.items() if dtype == dtype_of(base))


# --- Hugging Face ---


def _write_hf(source: Source, folder: Path, type: str) -> Notes:
    write_hf(Merged(source.base, source.adapter), source, folder, _DTYPES[type])
    return []


def _hf_limits(source: Source, type: str) -> tuple[str, str]:
    kind = stored_type(source.base) if type == "auto" else type
    return "hf", _DTYPES[kind]


def _write_adapter(source: Source, folder: Path, type: str) -> Notes:
    write_adapter(source, folder)
    return []


# --- MLX ---


def _write_mlx(source: Source, folder: Path, type: str) -> Notes:
    report = write_mlx(Merged(source.base, source.adapter), source, folder, _MLX_BITS[type])
    if not report.raised:
        return []
    return [
        f"{len(report.raised)} of {report.packed} matrices have {max(report.raised.values())} bits: at "
        f"{report.bits} the adapter would not have survived in them"
    ]


def _write_mlx_adapter(source: Source, folder: Path, type: str) -> Notes:
    folder.rmdir()  # the converter makes its own
    to_mlx(source.adapter, folder, model=source.base.folder)
    return []


# --- GGUF and Ollama ---


def gguf_name(source: Source, type: str) -> str:
    words = "".join(c if c.isalnum() or c in "-_." else "-" for c in source.name)
    return f"{words}-{type}.gguf"


def _write_gguf(source: Source, folder: Path, type: str) -> Notes:
    merged = Merged(source.base, source.adapter)
    return list(write_gguf(merged, source, folder / gguf_name(source, type), type).notes)


def _gguf_reading(source: Source, folder: Path, type: str, _: Path) -> Reading:
    return Reading("gguf", folder / gguf_name(source, type))


def _gguf_bytes(source: Source, type: str) -> int:
    return gguf_bytes(source.base, type)


def _write_ollama(source: Source, folder: Path, type: str) -> Notes:
    notes = _write_gguf(source, folder, type)
    (folder / "Modelfile").write_text(modelfile(source, gguf_name(source, type)), encoding="utf-8")
    return notes


def _check_ollama(source: Source, type: str) -> None:
    check_ollama(source)
    check_gguf(source, type)


def _write_gguf_adapter(source: Source, folder: Path, type: str) -> Notes:
    write_gguf_adapter(source, folder / gguf_name(source, "lora"))
    return []


def _gguf_adapter_reading(source: Source, folder: Path, type: str, between: Path) -> Reading:
    """An adapter needs its base as GGUF to be read; that one is made for the proof, and goes with it."""
    base = between / "base.gguf"
    bare = Merged(source.base, read_adapter(source.adapter).scaled(0.0))
    write_gguf(bare, source, base, stored_type(source.base))
    return Reading("gguf", base, folder / gguf_name(source, "lora"))


def _check_adapter(source: Source, type: str) -> None:
    check_fits(source.base, read_adapter(source.adapter))


def _check_mlx_adapter(source: Source, type: str) -> None:
    _check_adapter(source, type)
    with tempfile.TemporaryDirectory() as place:  # it says all that mlx-lm cannot hold, and takes no time
        to_mlx(source.adapter, Path(place) / "adapter", model=source.base.folder)


def _check_gguf_adapter(source: Source, type: str) -> None:
    _check_adapter(source, type)
    check_gguf(source, stored_type(source.base))


def _adapter_bytes(source: Source, type: str) -> int:
    """In float32 at the most, whatever it is stored in."""
    return 2 * (source.adapter / ADAPTER).stat().st_size


def _gguf_adapter_bytes(source: Source, type: str) -> int:
    return _adapter_bytes(source, type) + gguf_bytes(source.base, stored_type(source.base))


TARGETS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target(
            "hf", tuple(_DTYPES), lambda s, t: check_hf(s, _DTYPES[t]),
            lambda s, t: hf_bytes(s.base, _DTYPES[t]), _write_hf, lambda s, f, t, _: Reading("hf", f),
            _hf_limits, "hf", "transformers", "",
        ),
        Target(
            "gguf", GGUF_TYPES, check_gguf, _gguf_bytes, _write_gguf, _gguf_reading,
            lambda s, t: ("gguf", t), "gguf", "llama_cpp", "gguf",
        ),
        Target(
            "mlx", tuple(_MLX_BITS), lambda s, t: check_mlx(s, _MLX_BITS[t]),
            lambda s, t: mlx_bytes(s.base, _MLX_BITS[t]), _write_mlx, lambda s, f, t, _: Reading("mlx", f),
            lambda s, t: ("mlx", t), "mlx", "mlx_lm", "mlx",
        ),
        Target(
            "ollama", GGUF_TYPES, _check_ollama, _gguf_bytes, _write_ollama, _gguf_reading,
            lambda s, t: ("gguf", t), "ollama", "llama_cpp", "gguf",
        ),
    )
}  # fmt: skip

ADAPTERS: Mapping[str, Target] = {
    t.name: t
    for t in (
        Target(
            "hf", ("adapter",), _check_adapter, _adapter_bytes, _write_adapter,
            lambda s, f, t, _: Reading("hf", s.base.folder, f), lambda s, t: ("hf", "adapter"), "adapter",
            "peft", "",
        ),
        Target(
            "mlx", ("adapter",), _check_mlx_adapter, _adapter_bytes, _write_mlx_adapter,
            lambda s, f, t, _: Reading("mlx", s.base.folder, f), lambda s, t: ("mlx", "adapter"),
            "mlx-adapter", "mlx_lm", "mlx",
        ),
        Target(
            "gguf", ("adapter",), _check_gguf_adapter, _gguf_adapter_bytes, _write_gguf_adapter,
            _gguf_adapter_reading, lambda s, t: ("gguf", "adapter"), "gguf-adapter",
            "llama_cpp", "gguf",
        ),
    )
}  # fmt: skip

