"""Exports that are wrong on purpose, in ways that other programs make them: a proof must refuse each."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from burnish.export.adapter import read_adapter


def fused_into_4bit(base_folder: Path, adapter_folder: Path, out: Path, dtype: str = "bfloat16") -> Path:
    """An MLX folder whose adapter was added to weights that were packed before, and packed again: what
    fusing on a 4-bit base does. Most of the change falls between two steps of the grid.

    base_folder: packed by MLX, or not packed: then it is packed to 4 bits first, with scales in `dtype`.
    """
    import mlx.core as mx

    from burnish.backends.mlx.quantize import quantize_folder

    with tempfile.TemporaryDirectory() as place:
        four = base_folder
        if not any(name.endswith(".scales") for name in _weights(base_folder)):
            four = Path(place) / "four"
            quantize_folder(base_folder, four, 4, dtype=dtype)
        weights, adapter = _weights(four), read_adapter(adapter_folder)
        out.mkdir(parents=True, exist_ok=True)
        for path in four.iterdir():
            if path.is_file() and ".safetensors" not in path.suffixes:
                shutil.copyfile(path, out / path.name)
        for module in adapter.modules:
            leaves = [f"{module}.{leaf}" for leaf in ("weight", "scales", "biases")]
            packed, scales, biases = (weights[leaf] for leaf in leaves)
            wide = mx.dequantize(packed, scales, biases, 64, 4)
            fused = wide + mx.array(adapter.change(module)).astype(wide.dtype)
            weights |= dict(zip(leaves, mx.quantize(fused, 64, 4)))
        mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    return out


def _weights(folder: Path) -> dict[str, Any]:
    import mlx.core as mx

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found.update(mx.load(str(path)))  # type: ignore[arg-type]
    return found
