"""Model folders whose weights MLX has packed: what `config.json` and the headers say of them.

A packed weight is U32 [out, in · bits / 32], with `scales` and `biases` [out, in / group_size] beside it; the
config's `quantization` says how, and may say otherwise for single modules. Modules that it does not name
share the group size and may differ in bits, which the shapes tell (mlx-lm reads them so, too).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from burnish.errors import UserError, all_problems

BITS = (2, 3, 4, 5, 6, 8)  # that MLX packs
_PACKED_ELSEWHERE = (".qweight", ".weight_packed", ".W_q")  # gptq and awq, compressed-tensors, hqq
_ANOTHER = "use an unquantised copy of the model, or one that mlx-lm quantised in its affine mode"

Shape = tuple[int, ...]


class Tensor(Protocol):
    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> Shape: ...


@dataclass(frozen=True)
class Quantization:
    """MLX's affine packing. In a folder of mixed bits, the bits of most modules."""

    bits: int
    group_size: int


def read_quantization(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[Quantization | None, dict[str, Shape]]:
    """How the folder is packed, and the true shape of every packed weight: '….q_proj.weight' → (out, in).

    (None, {}) for a folder that is not packed. Raises UserError for a packing that is not MLX's affine one,
    or where config and shapes contradict each other.
    """
    asked = config.get("quantization")
    asked = asked if isinstance(asked, Mapping) else {}
    _check_scheme(folder, config, asked, tensors)
    default = asked.get("group_size")
    found: dict[str, Shape] = {}
    kinds: Counter[Quantization] = Counter()
    problems: list[str] = []
    for name, info in tensors.items():
        module, _, leaf = name.rpartition(".")
        scales = tensors.get(f"{module}.scales")
        if leaf != "weight" or info.dtype != "U32" or scales is None:
            continue
        own = asked.get(module)
        own = own if isinstance(own, Mapping) else {}
        kind = _kind(info.shape, scales.shape, own.get("group_size", default), own.get("bits"))
        if kind is None:
            problems.append(f"{name}: U32 {list(info.shape)} with scales {list(scales.shape)}")
        else:
            kinds[kind] += 1
            found[name] = (*info.shape[:-1], scales.shape[-1] * kind.group_size)
    if problems:
        said = {k: v for k, v in asked.items() if not isinstance(v, Mapping)}
        raise all_problems(
            f"{folder}: these packed weights are not what config.json's quantization says ({said}):",
            problems,
            _ANOTHER,
        )
    return (kinds.most_common(1)[0][0] if kinds else None), found


def _kind(packed: Shape, scales: Shape, group_size: Any, bits: Any) -> Quantization | None:
    """From the shapes; None where they fit no packing, or not the bits that were stated."""
    if not isinstance(group_size, int) or group_size < 1 or packed[:-1] != scales[:-1]:
        return None
    into = scales[-1] * group_size
    told, rest = divmod(packed[-1] * 32, into) if into else (0, 0)
    if rest or told not in BITS or bits not in (None, told):
        return None
    return Quantization(told, group_size)


def _check_scheme(
    folder: Path, config: Mapping[str, Any], asked: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    modes = {asked.get("mode"), *(v.get("mode") for v in asked.values() if isinstance(v, Mapping))}
    other = sorted(str(m) for m in modes - {None, "affine"})
    if other:
        raise _not_trained(folder, f"MLX's {', '.join(other)}")
    linears = [name for name in tensors if ".layers." in name and name.endswith(".weight")]
    if any(name.endswith(_PACKED_ELSEWHERE) for name in tensors):
        how = config.get("quantization_config")
        how = how.get("quant_method") if isinstance(how, Mapping) else None
        raise _not_trained(folder, how or "packed weights that config.json does not explain")
    if not asked and any(tensors[n].dtype == "U32" and f"{n[:-6]}scales" in tensors for n in linears):
        raise _not_trained(folder, "packed weights, and config.json has no `quantization` to explain them")


def _not_trained(folder: Path, how: str) -> UserError:
    return UserError(f"{folder}: this folder is quantised in a form burnish does not train: {how}", _ANOTHER)
