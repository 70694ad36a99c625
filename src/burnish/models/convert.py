"""A GGUF file becomes a Hugging Face model folder that can be fine-tuned.

    report = convert_gguf(Path("SmolLM2.Q4_1.gguf"), Path("SmolLM2"), dtype="float32")

The file is mapped, not read, and each tensor is widened `CHUNK_BYTES` at a time straight into its safetensors
file, so that memory stays near two chunks however large the model or its vocabulary. The price is a writer of
our own for the safetensors format (an 8-byte length, a JSON header, the data). What was quantised stays
rounded: only its form changes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import gguf
import numpy as np
from gguf.quants import dequantize

from burnish.errors import UserError, all_problems
from burnish.models.gguf_config import Layout, read_layout, to_config, to_generation_config
from burnish.models.gguf_tokenizer import write_tokenizer

CHUNK_BYTES = 64 << 20  # of float32, widened at a time
SHARD_BYTES = 4 << 30
SPARE_DISK_BYTES = 64 << 20  # tokenizer, configs, the file system's own
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
    _check_out(source, out, force)
    reader = open_gguf(source)
    layout = read_layout(reader)
    _check_types(reader, source)
    shards = _shards(layout, ITEM_BYTES[dtype])
    weight_bytes = layout.parameters * ITEM_BYTES[dtype]
    _check_disk(out.parent, weight_bytes + SPARE_DISK_BYTES)
    partial = out.parent / f".{out.name}.partial"
    if partial.exists():  # of a process that was killed
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        _write_weights(partial, shards, layout, dtype)
        _write_json(partial / "config.json", to_config(layout, dtype))
        _write_json(partial / "generation_config.json", to_generation_config(layout))
        write_tokenizer(layout.metadata, partial)
        _put_in_place(partial, out)
    except BaseException:  # Ctrl-C too: a half-written folder would pass for a model
        shutil.rmtree(partial, ignore_errors=True)
        raise
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


def _check_out(source: Path, out: Path, force: bool) -> None:
    if not out.parent.is_dir():
        raise UserError(f"the folder {out.parent} does not exist", f"mkdir -p {out.parent}")
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out} exists", "choose another name, or pass --force to replace it")
    # --force replaces a model, never a home folder given by mistake.
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.json").is_file()):
        raise UserError(
            f"{out} is not a model folder (it has no config.json), so --force does not replace it",
            "choose another name",
        )
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{source} lies inside {out}, which would be replaced", "choose another name for OUT")


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


def _check_disk(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{folder} has {free_bytes / 2**30:.1f} GiB free; the model needs {needed_bytes / 2**30:.1f}",
            "free some space, choose another disk, or halve the size with --dtype bfloat16",
            1,
        )


def _shards(layout: Layout, item_bytes: int) -> dict[str, list[str]]:
    """File name → its tensors, in the GGUF file's order. One file where all fit in `SHARD_BYTES`."""
    groups: list[list[str]] = [[]]
    filled_bytes = 0
    for name, source in layout.tensors.items():
        n_bytes = math.prod(source.shape) * item_bytes
        if groups[-1] and filled_bytes + n_bytes > SHARD_BYTES:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(name)
        filled_bytes += n_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _write_weights(folder: Path, shards: Mapping[str, list[str]], layout: Layout, dtype: str) -> None:
    for file, names in shards.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in names:
            shape = layout.tensors[name].shape
            end = at + math.prod(shape) * ITEM_BYTES[dtype]
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins on a multiple of 8, as the format asks
        with (folder / file).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                _write_tensor(f, name, layout, dtype)
    if len(shards) > 1:
        total_bytes = layout.parameters * ITEM_BYTES[dtype]
        _write_json(
            folder / "model.safetensors.index.json",
            {
                "metadata": {"total_size": total_bytes},
                "weight_map": {name: file for file, names in shards.items() for name in names},
            },
        )


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


def narrowed(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 → the dtype asked for; bfloat16 as 16 bits, rounded to nearest even (NumPy has no bfloat16)."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    with np.errstate(over="ignore"):  # looked for by the caller
        return values.astype(np.dtype(dtype), copy=False)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put_in_place(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.replaced"
    if old.exists():  # of a process that was killed
        shutil.rmtree(old)
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise
    if old.exists():
        shutil.rmtree(old)
