"""A GGUF file becomes a Hugging Face model folder that can be fine-tuned.

    report = convert_gguf(Path("SmolLM2.Q4_1.gguf"), Path("SmolLM2"), dtype="float32")

The file is mapped, not read, and each tensor is widened `CHUNK_BYTES` at a time straight into its safetensors
file, so that memory stays near two chunks however large the model or its vocabulary. The price is a writer of
our own for the safetensors format (an 8-byte length, a JSON header, the data). What was quantised stays
rounded: only its form changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import gguf
import numpy as np
from gguf.quants import dequantize

from burnish.errors import UserError, all_problems
from burnish.models.folder import (
    SHARD_BYTES,
    SPARE_DISK_BYTES,
    check_disk,
    check_out,
    header_of,
    replacing,
    shards_of,
    write_index,
    write_json,
)
from burnish.models.gguf_config import Layout, read_layout, to_config, to_generation_config
from burnish.models.gguf_tokenizer import write_tokenizer
from burnish.models.weights import narrowed

CHUNK_BYTES = 64 << 20  # of float32, widened at a time
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # ours → safetensors'
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ConvertReport:
    source: Path
    out: Path
    architecture: str  # 'LlamaForCausalLM'
    dtype: str
    tensors: int
    parameters: int
    tied: bool
    shards: int
    source_bytes: int
    weight_bytes: int  # written
    stored_as: Mapping[str, int]  # GGUF type → how many tensors: what the weights went through


def convert_gguf(source: Path, out: Path, *, dtype: str = "float32", force: bool = False) -> ConvertReport:
    """Write the model of `source` to the new folder `out`; with `force`, in place of a model folder there.

    Raises UserError, and leaves nothing behind, for a file that is no whole GGUF file, an architecture,
    tensor type or tokenizer that is not known, an `out` that exists, or a disk that is too small.
    """
    if dtype not in DTYPES:
        raise UserError(
            f"dtype: expected {', '.join(DTYPES)}, got {dtype}",
            "burnish convert FILE.gguf OUT --dtype float32",
        )
    out = out.resolve()  # OUT may be `.`, which has no name
    check_out(source, out, force)
    reader = open_gguf(source)
    layout = read_layout(reader)
    _check_types(reader, source)
    sizes = {n: math.prod(t.shape) * ITEM_BYTES[dtype] for n, t in layout.tensors.items()}
    shards = shards_of(sizes, SHARD_BYTES)
    weight_bytes = layout.parameters * ITEM_BYTES[dtype]
    check_disk(
        out.parent,
        weight_bytes + SPARE_DISK_BYTES,
        "free some space, choose another disk, or halve the size with --dtype bfloat16",
    )
    with replacing(out) as partial:
        _write_weights(partial, shards, layout, dtype)
        write_json(partial / "config.json", to_config(layout, dtype))
        write_json(partial / "generation_config.json", to_generation_config(layout))
        write_tokenizer(layout.metadata, partial)
    types: dict[str, int] = {}
    for tensor in reader.tensors:
        types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
    return ConvertReport(
        source,
        out,
        layout.architecture,
        dtype,
        len(layout.tensors),
        layout.parameters,
        layout.tied,
        len(shards),
        source.stat().st_size,
        weight_bytes,
        types,
    )


def open_gguf(source: Path) -> gguf.GGUFReader:
    """The file, mapped. Raises UserError where it is not there, not GGUF, or shorter than its header says."""
    if not source.is_file():
        what = "is a folder, not a GGUF file" if source.is_dir() else "does not exist"
        raise UserError(f"{source} {what}", "give the path of one .gguf file")
    with source.open("rb") as f:
        magic = f.read(4)
    if magic != b"GGUF":
        raise UserError(
            f"{source} is not a GGUF file: expected it to begin with b'GGUF', got {magic!r}",
            "download the .gguf file again (a page of HTML or a Git LFS pointer is a common mistake)",
        )
    again = f"download {source.name} again"
    try:
        reader = gguf.GGUFReader(source)
    # gguf has no error type of its own; a cut file gives any of these.
    except (ValueError, IndexError, KeyError) as e:
        raise UserError(
            f"{source} is truncated or damaged ({source.stat().st_size} bytes): {e}", again
        ) from e
    if reader.byte_order != "I":
        raise UserError(f"{source} has the other byte order than this machine", again)
    return reader


def _check_types(reader: gguf.GGUFReader, source: Path) -> None:
    wrong: list[str] = []
    for kind in sorted({t.tensor_type for t in reader.tensors}):
        _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        try:
            if kind not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
                dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            names = [t.name for t in reader.tensors if t.tensor_type == kind]
            wrong.append(f"{kind.name} ({len(names)} tensors, the first is {names[0]})")
    if wrong:
        raise all_problems(
            f"{source} stores tensors in types that cannot be widened:",
            wrong,
            "download another quantisation of it: F16, Q8_0 and every Q*_K can be read",
        )


def _write_weights(folder: Path, shards: Mapping[str, list[str]], layout: Layout, dtype: str) -> None:
    for file, names in shards.items():
        shapes = {name: layout.tensors[name].shape for name in names}
        sized = ((n, DTYPES[dtype], s, math.prod(s) * ITEM_BYTES[dtype]) for n, s in shapes.items())
        with (folder / file).open("wb") as f:
            f.write(header_of(sized, {"format": "pt"}))
            for name in names:
                _write_tensor(f, name, layout, dtype)
    if len(shards) > 1:
        write_index(folder, shards, layout.parameters * ITEM_BYTES[dtype])


def _write_tensor(f: IO[bytes], name: str, layout: Layout, dtype: str) -> None:
    for chunk in widened(layout, name):
        if not np.isfinite(chunk).all():
            raise UserError(
                f"{layout.tensors[name].gguf.name} holds a NaN or an infinity", "download the GGUF file again"
            )
        narrow = narrowed(chunk, dtype)
        if dtype == "float16" and not np.isfinite(narrow).all():
            raise UserError(
                f"{name} has values beyond float16's 65504", "convert with --dtype bfloat16 or float32"
            )
        f.write(narrow.tobytes())


def widened(layout: Layout, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[np.ndarray]:
    """The tensor in float32 and in Hugging Face's row order, some rows at a time.

    A quantised row is whole blocks, so rows are reordered before they are widened: llama.cpp stores the q and
    k rows of a `llama` with the two halves of each head interleaved (`permute` in its convert_hf_to_gguf.py).
    """
    source = layout.tensors[name]
    data = source.gguf.data if len(source.shape) == 2 else source.gguf.data.reshape(1, -1)
    order = np.arange(len(data))
    if source.heads:
        order = order.reshape(source.heads, -1, 2).swapaxes(1, 2).reshape(-1)
    row_bytes = 4 * math.prod(source.shape) // len(data)
    rows = max(1, chunk_bytes // row_bytes)
    for at in range(0, len(data), rows):
        yield dequantize(data[order[at : at + rows]], source.gguf.tensor_type).astype(np.float32, copy=False)
