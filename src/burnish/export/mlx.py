"""The tuned model as an MLX folder: 16 bits, or packed to 8 or 4.

    check_mlx(source, 4)                               # what cannot be done is said before any work
    report = write_mlx(Merged(source.base, source.adapter), source, folder, 4)

The adapter is added to the original weights, the sum is rounded to 16 bits and only then packed: the rounding
error is that of the sum and knows nothing of the adapter, whose direction is kept. Added to weights that are
packed already, most of it falls between two steps of their grid and is rounded away.

Even so packing adds noise, and noise where the adapter reads and writes can drown it. `standing` measures
that for each adapted matrix; those where it is low get 8 bits, and where that were most of them the model is
refused in 4.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from burnish import backends
from burnish.errors import Unsupported, UserError
from burnish.export.hf import check_hf, hf_bytes, write_hf
from burnish.export.merged import Merged
from burnish.models.folder import write_json
from burnish.models.spec import ModelSpec, read_config, read_spec

if TYPE_CHECKING:
    from burnish.export.source import Source

BITS = (16, 8, 4)
RAISED_BITS = 8
GROUP = 64  # numbers that share a scale, as mlx-lm's own conversion has it
# Of `Standing`. Measured on SmolLM2-135M with an adapter of rank 16 (20 rows of WikiSQL, nll of the answers;
# how far from the tuned model, as a share of what tuning changed): plain 4 bits 0.197, these limits 0.156
# with 12 % of the adapted weights in 8 bits, a limit of 1 instead of 0.5 0.132 with 32 %. A quarter of the
# weights in 8 bits: 0.139 taken by `above`, 0.181 at random, 0.189 by |ΔW|² / |E|², 0.169 by `kept` alone.
# `kept` is for what `above` does not see: weights that lie on the grid already, where E is -ΔW.
MOST_OFF, LEAST_ABOVE = 0.3, 0.5
# Share of the adapted weights. The adapter at 0.7 of its size: 33 % raised, and 0.95 of its effect is there.
# At half its size 4 bits leave 0.86, and 8 bits for nearly all of them would make no folder of 4.
MOST_RAISED = 0.5


@dataclass(frozen=True)
class MlxReport:
    """What was written. raised: the modules that got more bits than were asked for, and how many."""

    bits: int
    dtype: str  # of what is not packed, and of scales and biases
    packed: int  # matrices
    kept: int  # tensors that were not packed
    raised: Mapping[str, int]
    weight_bytes: int


def check_mlx(source: Source, bits: int) -> None:
    """Raises UserError for bits that there are not, a base that no adapter can be merged into, a missing mlx,
    and a model that mlx-lm does not know.
    """
    if bits not in BITS:
        raise UserError(f"bits: expected 16, 8 or 4, got {bits}", "--type 16bit, --type 8bit or --type 4bit")
    check_hf(source, half(source.base))
    base = source.base
    try:
        _mlx().check_class(base, read_config(base.folder))
    except Unsupported as e:
        raise UserError(str(e), "export it as a Hugging Face folder or as GGUF") from e


def mlx_bytes(base: ModelSpec, bits: int) -> int:
    """Of disk that writing takes at most: the merged weights, and beside them the packed ones with 32 bits of
    scale and bias for each group.
    """
    merged = hf_bytes(base, half(base))
    return merged if bits == 16 else merged + round(merged * (bits + 32 / GROUP) / 16)


def half(base: ModelSpec) -> str:
    """The 16-bit dtype that the merged weights get: float16 if most of the base is, else bfloat16, in which
    no weight is too large.
    """
    return "float16" if 2 * base.stored["F16"] > base.weight_bytes else "bfloat16"


def write_mlx(merged: Merged, source: Source, folder: Path, bits: int) -> MlxReport:
    """Fill the empty folder `folder`. Raises UserError for what `check_mlx` finds, for weights that are no
    numbers, and for an adapter that 4 bits would drown.
    """
    check_mlx(source, bits)
    dtype = half(merged.base)
    raised = _to_raise(merged, dtype) if bits == 4 else []
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=folder) as name:
        place = Path(name)
        whole = place / "merged"
        whole.mkdir()
        write_hf(merged, source, whole, dtype)
        if bits == 16:
            return _as_it_is(whole, folder, dtype)
        packed = _mlx().quantize_folder(whole, place / "packed", bits, group_size=GROUP, raised=raised)
        origin = json.loads((packed.out / "burnish.json").read_text(encoding="utf-8"))
        write_json(packed.out / "burnish.json", _origin(origin, merged))
        _move(packed.out, folder)
        shutil.rmtree(packed.out)
        _move(whole, folder)  # notices and code that packing does not carry over
    names = {module: RAISED_BITS for module in raised}
    return MlxReport(bits, packed.dtype, packed.quantized, packed.kept, names, packed.weight_bytes)


@dataclass(frozen=True)
class Standing:
    """How one matrix's adapter stands in the packed sum Q(W + ΔW), where E = Q(W + ΔW) - (W + ΔW).

    Over all of the matrix E is a thousand times larger than ΔW and the adapter works all the same, because
    it works in r × r directions of in × out: R, an orthonormal basis of the inputs that A reads, and P, of
    the outputs that B writes. Only the error there is in its way.
    """

    kept: float  # 1 + ⟨E, ΔW⟩ / |ΔW|²: 1 is all of it, 0 where it was rounded away
    above: float  # |ΔW|² / |PᵀE R|²; infinite where there is no error

    @property
    def stands(self) -> bool:
        return abs(self.kept - 1) <= MOST_OFF and self.above >= LEAST_ABOVE


def standing(merged: Merged, module: str, bits: int, dtype: str) -> Standing:
    """Of `module` packed to `bits` from weights in `dtype`. An adapter that changes nothing stands."""
    a, b = merged.adapter.modules[module]
    (reads, in_reads), (writes, in_writes) = np.linalg.qr(a.T), np.linalg.qr(b)
    change = merged.adapter.scale * (in_writes @ in_reads.T)  # ΔW = writes · change · readsᵀ
    size = float(np.sum(change**2))
    if size == 0 or a.shape[1] % GROUP:  # rows that are no whole groups are not packed
        return Standing(1.0, float("inf"))
    error, at = np.zeros_like(change), 0
    for rows in merged.chunks(f"{module}.weight"):
        off = _mlx().rounded(rows, bits, dtype, GROUP) - rows
        error += writes[at : at + len(rows)].T @ (off @ reads)
        at += len(rows)
    noise = float(np.sum(error**2))
    if not np.isfinite(size + noise):  # `write_hf` finds it and says whose fault it is
        return Standing(1.0, float("inf"))
    return Standing(1 + float(np.sum(error * change)) / size, size / noise if noise else float("inf"))


def _to_raise(merged: Merged, dtype: str) -> list[str]:
    """The adapted matrices that get 8 bits in a folder of 4. Raises UserError where they are most of them."""
    shapes = merged.adapter.shapes
    low = [module for module in shapes if not standing(merged, module, 4, dtype).stands]
    sizes = {module: outs * ins for module, (outs, ins) in shapes.items()}
    share = sum(sizes[module] for module in low) / sum(sizes.values())
    if share > MOST_RAISED:
        raise UserError(
            f"{merged.adapter.folder} would not survive 4 bits: in {len(low)} of the {len(shapes)} matrices "
            f"that it changes ({share:.0%} of their weights), the rounding error drowns the change",
            "--type 8bit, whose steps are 17 times finer",
        )
    return low


def _mlx() -> ModuleType:
    """burnish's packing, which imports mlx."""
    return backends.mlx_part("quantize")


def _as_it_is(whole: Path, folder: Path, dtype: str) -> MlxReport:
    """The merged folder, its config saying all that mlx-lm would otherwise take a default of."""
    spec = read_spec(whole)
    write_json(whole / "config.json", _mlx().spelled_out(spec, read_config(whole)))
    _move(whole, folder)
    return MlxReport(16, dtype, 0, len(spec.tensors), {}, spec.weight_bytes)


def _move(source: Path, folder: Path) -> None:
    """What is in `source` and not yet in `folder`, weights of another packing and their index aside."""
    done = any(folder.glob("*.safetensors"))
    for path in sorted(source.iterdir()):
        of_weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
        if not (folder / path.name).exists() and not (done and of_weights):
            path.rename(folder / path.name)


def _origin(said: Mapping[str, Any], merged: Merged) -> dict[str, Any]:
    """`burnish.json` of the packed folder: not the merged folder, which is gone, but what it was made of."""
    kept = {k: v for k, v in said.items() if k not in ("source", "source_sha256", "name")}
    return {
        "base": str(merged.base.folder.resolve()),
        "adapter": str(merged.adapter.folder.resolve()),
        **kept,
    }
