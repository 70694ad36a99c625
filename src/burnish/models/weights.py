"""A model folder's tensors as numbers, some rows at a time: memory holds a chunk, however large the model.

    weights = Weights(spec)
    for rows in weights.chunks("model.embed_tokens.weight"):      # float32, whole rows of the matrix

Files are read, not mapped: pages of a mapped file count as resident, and would pass for memory in use.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from burnish.errors import UserError
from burnish.models.spec import DTYPE_BYTES, ModelSpec

CHUNK_BYTES = 64 << 20  # of float32, at a time
_FLOATS = {"F32": np.float32, "F16": np.float16, "F64": np.float64, "BF16": np.uint16}


class Weights:
    """Tensors of `spec.folder` by name. Holds no file open between calls."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    def chunks(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
        """Rows [n, in] of a matrix in float32, in order; a vector is one chunk [1, n].

        Raises UserError for a tensor that is no float, and for a file that ends too early.
        """
        rows, width = lying(self._spec.tensors[name].shape)
        step = max(1, chunk_bytes // (4 * width))
        for at in range(0, rows, step):
            yield self.rows(name, at, min(at + step, rows))

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """[stop - start, in] in float32, of a matrix [out, in] or of a vector taken as one row."""
        info = self._spec.tensors[name]
        if info.dtype not in _FLOATS:
            raise UserError(
                f"{self._spec.folder / info.file}: {name} is stored as {info.dtype}; expected one of "
                + ", ".join(_FLOATS),
                "use an unquantised copy of the model",
            )
        _, width = lying(info.shape)
        row_bytes = width * DTYPE_BYTES[info.dtype]
        path = self._spec.folder / info.file
        with path.open("rb") as f:
            f.seek(info.begin + start * row_bytes)
            data = f.read((stop - start) * row_bytes)
        if len(data) != (stop - start) * row_bytes:
            raise UserError(f"{path} ends within {name}", f"download {info.file} again")
        found = np.frombuffer(data, _FLOATS[info.dtype]).reshape(stop - start, width)
        return widened(found) if info.dtype == "BF16" else found.astype(np.float32)


def lying(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, numbers in a row) of a tensor as it lies: a vector is one row."""
    return (1, math.prod(shape)) if len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as 16 bits, in float32: its bits are the upper half of a float32's."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 → 'float32', 'float16' or 'bfloat16'; the last as 16 bits, rounded to nearest even (NumPy has
    no bfloat16). What is beyond float16 becomes an infinity.
    """
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):  # looked for by the caller
        return values.astype(np.dtype(dtype), copy=False)
