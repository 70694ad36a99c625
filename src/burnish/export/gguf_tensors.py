"""Tensors into a GGUF file, some rows at a time: memory holds a chunk, however large the vocabulary.

`gguf.GGUFWriter` writes header, keys and padding; it takes anything for a tensor that knows its bytes and can
write itself to a file, which here does so chunk by chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import gguf
import numpy as np
from gguf.quants import quantize

from burnish.errors import EXIT_FAILED, UserError
from burnish.export.gguf_names import Placed
from burnish.export.merged import Merged
from burnish.models.weights import CHUNK_BYTES, lying, narrowed

Kind = gguf.GGMLQuantizationType
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "bf16": Kind.BF16, "q8_0": Kind.Q8_0}
_DTYPES = {Kind.F32: "float32", Kind.F16: "float16", Kind.BF16: "bfloat16"}


def kind_of(shape: tuple[int, ...], wanted: Kind) -> Kind:
    """Vectors stay float32, as llama.cpp needs them; rows that are no whole blocks become float16."""
    if len(shape) < 2:
        return Kind.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else Kind.F16


def bytes_of(shape: tuple[int, ...], kind: Kind) -> int:
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


@dataclass(frozen=True)
class Stream:
    """One tensor of a merged model, as `GGUFWriter.write_tensor_data` takes it."""

    merged: Merged
    name: str  # GGUF's
    placed: Placed
    kind: Kind
    chunk_bytes: int = CHUNK_BYTES

    @property
    def nbytes(self) -> int:
        return bytes_of(self.placed.shape, self.kind)

    def tofile(self, file: IO[bytes]) -> None:
        """Raises UserError for a weight that the type cannot hold."""
        for chunk in self._rows():
            if not np.isfinite(chunk).all():
                raise UserError(
                    f"{self.placed.source} holds a NaN or an infinity once the adapter is added",
                    "export another checkpoint of the run",
                    EXIT_FAILED,
                )
            file.write(self._packed(chunk).tobytes())

    def _rows(self) -> Iterator[np.ndarray]:
        """float32 [n, in], in llama.cpp's order: whole heads at a time where their rows are interleaved."""
        shape, heads = self.placed.shape, self.placed.heads
        if not heads or len(shape) < 2:
            for chunk in self.merged.chunks(self.placed.source, self.chunk_bytes):
                chunk = chunk + np.float32(self.placed.offset) if self.placed.offset else chunk
                yield interleaved(chunk.reshape(-1, 1), heads).reshape(1, -1) if heads else chunk
            return
        rows, width = lying(shape)
        head_bytes = 4 * width * (rows // heads)
        step_bytes = max(1, self.chunk_bytes // head_bytes) * head_bytes
        for chunk in self.merged.chunks(self.placed.source, step_bytes):
            yield interleaved(chunk, len(chunk) * heads // rows)

    def _packed(self, chunk: np.ndarray) -> np.ndarray:
        if self.kind not in _DTYPES:
            return quantize(np.ascontiguousarray(chunk), self.kind)
        narrow = narrowed(chunk, _DTYPES[self.kind])
        if self.kind == Kind.F16 and not np.isfinite(narrow).all():
            raise UserError(
                f"{self.placed.source} has values beyond float16's 65504",
                "export as bf16 or f32",
                EXIT_FAILED,
            )
        return narrow


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """[n, in], the two halves of each head's rows made one of each in turn: the order in which a `llama` of
    llama.cpp rotates them. `models.convert.widened` puts them back.
    """
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
