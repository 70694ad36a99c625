"""Tensors of a safetensors file as bits: moved and turned, never read as numbers, so any dtype is exact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors

from burnish.errors import UserError, all_problems
from burnish.models.folder import header_of

_BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}


@dataclass(frozen=True)
class Tensor:
    dtype: str  # 'F32'
    bits: np.ndarray  # its numbers as unsigned integers of their size

    def turned(self) -> Tensor:
        return Tensor(self.dtype, np.ascontiguousarray(self.bits.T))


def read_bits(path: Path) -> tuple[dict[str, Tensor], str]:
    """Every tensor of a safetensors file, and its header as it stands. Raises UserError if it is not whole,
    or holds anything but floats.
    """
    again = f"save or download {path.name} again"
    try:
        data = path.read_bytes()
        found = safetensors.deserialize(data)
    except FileNotFoundError as e:
        raise UserError(f"{path.parent} holds no {path.name}, so its weights cannot be read", again) from e
    except safetensors.SafetensorError as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}", again) from e
    other = [f"{name} is stored as {t['dtype']}" for name, t in found if t["dtype"] not in _BITS]
    if other:
        raise all_problems(f"{path}: expected numbers in {', '.join(_BITS)}:", other, again)
    tensors = {
        name: Tensor(t["dtype"], np.frombuffer(t["data"], _BITS[t["dtype"]]).reshape(t["shape"]))
        for name, t in found
    }
    return tensors, data[8 : 8 + int.from_bytes(data[:8], "little")].decode("utf-8")


def write_bits(path: Path, header: str, tensors: Mapping[str, Tensor]) -> None:
    """A file that begins with `header`, whose names, dtypes and shapes are those of `tensors`."""
    places = json.loads(header)
    places.pop("__metadata__", None)
    with path.open("wb") as f:
        text = header.encode("utf-8")
        f.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(places, key=lambda n: places[n]["data_offsets"]):
            f.write(tensors[name].bits.tobytes())


def new_header(tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]) -> str:
    """For tensors in this order."""
    sized = ((name, t.dtype, t.bits.shape, t.bits.nbytes) for name, t in tensors)
    return header_of(sized, metadata)[8:].decode("utf-8")
