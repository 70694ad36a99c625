"""`burnish convert`: what SOURCE holds decides what is made of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from burnish import backends
from burnish.cli.show import gib, print_json
from burnish.errors import Unsupported, UserError
from burnish.models.convert import convert_gguf
from burnish.models.mlx_adapter import kind_of, to_mlx, to_peft
from burnish.recipe import expand
from burnish.training.environment import prepare_environment

BITS = {"4bit": 4, "8bit": 8}


def convert_command(
    source: Path,
    out: Path,
    quantize: str | None,
    dtype: str | None,
    to: str | None,
    model: Path | None,
    force: bool,
    json: bool,
) -> None:
    prepare_environment()
    source, out = expand(str(source)), expand(str(out))
    if (source / "adapter_config.json").is_file():
        _only(f"{source} is an adapter folder", quantize=quantize, dtype=dtype)
        report, line = _adapter(source, out, to, expand(str(model)) if model else None, force)
    elif (source / "config.json").is_file():
        _only(f"{source} is a model folder", to=to, model=model)
        report, line = _model(source, out, quantize, dtype, force)
    elif source.is_dir():
        ran = (source / "adapter" / "adapter_config.json").is_file()
        raise UserError(
            f"{source} holds neither config.json nor adapter_config.json" + (": it is a run" if ran else ""),
            f"burnish convert {source / 'adapter'} {out}"
            if ran
            else "give a GGUF file, a model folder or an adapter folder",
        )
    elif not source.exists():  # before any option is said not to apply to it
        raise UserError(
            f"{source} does not exist", "give the path of one .gguf file, a model folder or an adapter folder"
        )
    else:
        _only(f"{source} is not a folder, so it is read as GGUF", to=to, model=model, quantize=quantize)
        report, line = _gguf(source, out, dtype, force)
    if json:
        print_json({**report, "source": str(source), "out": str(report["out"])})
    else:
        print(line)


def _only(what: str, **given: object) -> None:
    """Raises UserError for an option that means nothing here: it would be passed over in silence."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{what}: --{name} does not apply to it", f"leave --{name} out")


def _gguf(source: Path, out: Path, dtype: str | None, force: bool) -> tuple[dict[str, Any], str]:
    report = convert_gguf(source, out, dtype=dtype or "float32", force=force)
    kinds = ", ".join(f"{n} {kind}" for kind, n in report.stored_as.items())
    return asdict(report), (
        f"{report.out}: {report.architecture}, {report.parameters / 1e6:.0f} million parameters, "
        f"{report.dtype}, {gib(report.weight_bytes)} (from {gib(report.source_bytes)}: {kinds})"
    )


def _model(
    source: Path, out: Path, quantize: str | None, dtype: str | None, force: bool
) -> tuple[dict[str, Any], str]:
    again = f"burnish convert {source} {out} --quantize 4bit"
    if quantize is None:
        raise UserError(f"{source} is a model folder already; what should become of it?", again)
    if quantize not in BITS:
        raise UserError(f"quantize: expected {' or '.join(BITS)}, got {quantize}", again)
    try:
        quantize_folder = backends.mlx_part("quantize").quantize_folder
        report = quantize_folder(source, out, BITS[quantize], dtype=dtype, force=force)
    except Unsupported as e:
        raise UserError(f"{source} cannot be quantised: {e}", "train it with backend=torch") from e
    return asdict(report), (
        f"{report.out}: {report.architecture}, {report.parameters / 1e6:.0f} million parameters, "
        f"{report.bits} bits in groups of {report.group_size}, the rest {report.dtype}, "
        f"{gib(report.weight_bytes)} (from {gib(report.source_bytes)})"
    )


def _adapter(
    source: Path, out: Path, to: str | None, model: Path | None, force: bool
) -> tuple[dict[str, Any], str]:
    own = kind_of(source)
    other = {"peft": "mlx", "mlx": "peft"}[own]
    if to not in (None, other):
        problem = f"it is one of {own}'s already" if to == own else "expected mlx or peft"
        raise UserError(f"{source}: --to {to}: {problem}", f"burnish convert {source} {out} --to {other}")
    if model is not None and not model.is_dir():
        raise UserError(
            f"--model {model}: there is no such folder", "give the folder of the adapter's base model"
        )
    if other == "mlx":
        report = to_mlx(source, out, model=model, force=force)
    else:
        report = to_peft(source, out, model, force=force)
    name = {"mlx": "mlx-lm", "peft": "PEFT"}[other]
    return asdict(report), (
        f"{report.out}: {name} adapter, {report.kind}, rank {report.rank}, scale {report.scale:g}, "
        f"{report.modules} projections in {report.layers} layers"
        + (", with the config it had there before" if report.kept else "")
    )
