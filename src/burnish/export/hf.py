"""The tuned model as a Hugging Face folder, or its adapter alone as a PEFT folder.

    check_hf(source, "auto")                      # what cannot be done is said before any work
    write_hf(Merged(source.base, source.adapter), source, folder, "auto")

Tensors are merged, rounded once and written a chunk at a time, so memory holds the adapter and a few chunks
however large the model is. Every other file is the base's, with what training changed said in it: the chat
template, the tokens that end an answer, the dtype.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from burnish.backends.adapter_folder import ADAPTER, CONFIG
from burnish.errors import UserError, all_problems
from burnish.export.adapter import read_adapter
from burnish.export.merged import Merged
from burnish.export.source import Source
from burnish.models.folder import SHARD_BYTES, header_of, shards_of, write_index, write_json
from burnish.models.rope import with_rope_said_twice
from burnish.models.spec import DTYPE_BYTES, ModelSpec, TensorInfo, read_config
from burnish.models.weights import narrowed

AUTO = "auto"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # ours → safetensors'
_NAMES = {**{stored: name for name, stored in DTYPES.items()}, "F64": "float32"}
# Of buffers: positions, masks. They are no numbers that training changes, and are copied as they are.
_COUNTS = ("I64", "I32", "U64", "BOOL")
_COPY_BYTES = 16 << 20
# Of config.json, what is not true of the new folder; `_name_or_path` may be a place on someone's disk.
_DROPPED = ("quantization", "quantization_config", "compression_config", "_name_or_path")
_LEGAL = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")


def check_hf(source: Source, dtype: str) -> None:
    """Raises UserError for a dtype that is not known, and for a base that no adapter can be merged into."""
    if dtype not in (AUTO, *DTYPES):
        raise UserError(
            f"dtype: expected {AUTO}, {', '.join(DTYPES)}, got {dtype}",
            "leave it out to keep the dtype of the base",
        )
    base = source.base
    wrong = [
        f"{name} is stored as {info.dtype}"
        for name, info in base.tensors.items()
        if info.dtype not in (*_NAMES, *_COUNTS)
    ]
    if wrong:
        raise all_problems(
            f"{base.folder} holds packed weights, which an adapter cannot be merged into without loss:",
            wrong,
            "name the folder of the original 16-bit weights with --base FOLDER",
        )


def hf_bytes(base: ModelSpec, dtype: str) -> int:
    """Of the weights in that dtype ('auto': as stored)."""
    return sum(_n_bytes(info, dtype) for info in base.tensors.values())


def write_hf(merged: Merged, source: Source, folder: Path, dtype: str) -> None:
    """Fill the empty folder `folder`. dtype: 'bfloat16', 'float16', 'float32', or 'auto': each tensor keeps
    the one it has in the base.

    Raises UserError, naming the tensor, for a NaN or an infinity, and for what float16 cannot hold.
    """
    base = merged.base
    sizes = {name: _n_bytes(info, dtype) for name, info in base.tensors.items()}
    shards = shards_of(sizes, SHARD_BYTES)
    for file, names in shards.items():
        told = ((n, _stored_as(base.tensors[n], dtype), base.tensors[n].shape, sizes[n]) for n in names)
        with (folder / file).open("wb") as f:
            f.write(header_of(told, {"format": "pt"}))
            for name in names:
                _write_tensor(f, merged, name, dtype)
    if len(shards) > 1:
        write_index(folder, shards, sum(sizes.values()))
    config = read_config(base.folder)
    write_json(folder / "config.json", _config(config, dtype_of(base) if dtype == AUTO else dtype))
    write_json(folder / "generation_config.json", _generation(config, base.folder, source.tokenizer.stop_ids))
    source.tokenizer.save(folder)
    _copy_code_and_licence(base.folder, folder, code="auto_map" in config)


def write_adapter(source: Source, folder: Path) -> None:
    """Fill the empty folder `folder` with what PEFT loads (weights, config) and the tokenizer.

    Its config names the base by its hub id where that is known, else by the folder it is in. Raises UserError
    for a folder that holds no LoRA adapter of PEFT's.
    """
    read_adapter(source.adapter)  # what is damaged is found before it is passed on
    config = json.loads((source.adapter / CONFIG).read_text(encoding="utf-8"))
    write_json(folder / CONFIG, {**config, "base_model_name_or_path": base_of(source.base)})
    shutil.copyfile(source.adapter / ADAPTER, folder / ADAPTER)
    source.tokenizer.save(folder)


def base_of(base: ModelSpec) -> str:
    """What others load the base by: the hub id of a folder in the Hugging Face cache, else the folder."""
    return cached_id(base.folder) or str(base.folder.absolute())


def cached_id(folder: Path) -> str | None:
    """'Qwen/Qwen2.5-7B' of …/models--Qwen--Qwen2.5-7B/snapshots/REVISION, where the hub's library has it."""
    kept = [p for p in folder.absolute().parts if p.startswith("models--")]
    return kept[-1].removeprefix("models--").replace("--", "/") if kept else None


# --- weights ---


def _stored_as(info: TensorInfo, dtype: str) -> str:
    """As safetensors names it. float64 becomes float32, the dtype that the sum is made in."""
    if info.dtype in _COUNTS:
        return info.dtype
    return DTYPES[_NAMES[info.dtype] if dtype == AUTO else dtype]


def _n_bytes(info: TensorInfo, dtype: str) -> int:
    return math.prod(info.shape) * DTYPE_BYTES[_stored_as(info, dtype)]


def _write_tensor(f: IO[bytes], merged: Merged, name: str, dtype: str) -> None:
    info = merged.base.tensors[name]
    if info.dtype in _COUNTS:
        _copy_tensor(f, merged.base.folder / info.file, info)
        return
    narrow_to = _NAMES[_stored_as(info, dtype)]
    for chunk in merged.chunks(name):
        if not np.isfinite(chunk).all():
            raise _not_finite(merged, name)
        narrow = narrowed(chunk, narrow_to)
        if not _is_finite(narrow):
            raise UserError(
                f"{name} has values beyond what {narrow_to} holds: the largest is {np.abs(chunk).max():g}",
                "take --type " + ("bf16 or f32" if narrow_to == "float16" else "f32"),
            )
        f.write(narrow.tobytes())


def _is_finite(narrow: np.ndarray) -> bool:
    """bfloat16 comes as 16 bits: in an infinity or a NaN, all of the exponent's are set."""
    if narrow.dtype == np.uint16:
        return not ((narrow & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(narrow).all())


def _not_finite(merged: Merged, name: str) -> UserError:
    """Whose fault it is: the adapter's, or the base's."""
    own = merged.adapter.modules.get(name.removesuffix(".weight"), ())
    if not all(np.isfinite(part).all() for part in own):
        return UserError(
            f"{merged.adapter.folder}: the adapter of {name} holds a NaN or an infinity",
            "export an earlier checkpoint of the run, or train again with a smaller train.lr",
        )
    file = merged.base.folder / merged.base.tensors[name].file
    return UserError(f"{file}: {name} holds a NaN or an infinity", f"download {file.name} again")


def _copy_tensor(f: IO[bytes], path: Path, info: TensorInfo) -> None:
    left = info.n_bytes
    with path.open("rb") as stored:
        stored.seek(info.begin)
        while left:
            data = stored.read(min(left, _COPY_BYTES))
            if not data:
                raise UserError(f"{path} ends too early", f"download {info.file} again")
            f.write(data)
            left -= len(data)


# --- what stands beside them ---


def dtype_of(base: ModelSpec) -> str:
    """That of most bytes, of the three."""
    return next((_NAMES[kind] for kind, _ in base.stored.most_common() if kind in _NAMES), "float32")


def _config(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The base's, with the dtype under its name of today and of transformers 4."""
    said = {k: v for k, v in config.items() if k not in _DROPPED} | {"dtype": dtype, "torch_dtype": dtype}
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        dtypes = {k: dtype for k in ("dtype", "torch_dtype") if k in inner}
        said["text_config"] = {k: v for k, v in inner.items() if k not in _DROPPED} | dtypes
    return with_rope_said_twice(said)


def _generation(config: Mapping[str, Any], base: Path, stop_ids: Sequence[int]) -> dict[str, Any]:
    """The base's settings, and the tokens that ended an answer in training. Where the base has none, what
    transformers would take from config.json.
    """
    path = base / "generation_config.json"
    if path.is_file():
        said = json.loads(path.read_text(encoding="utf-8"))  # an object: the spec was read from it
    else:
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        said = {k: config[k] for k in keys if config.get(k) is not None}
    if stop_ids:
        said["eos_token_id"] = list(stop_ids) if len(stop_ids) > 1 else stop_ids[0]
    return said


def _copy_code_and_licence(base: Path, folder: Path, code: bool) -> None:
    """Last, and never over a file that was written. code: the model brings Python of its own."""
    for path in sorted(base.iterdir()):
        wanted = path.name.upper().startswith(_LEGAL) or (code and path.suffix == ".py")
        if wanted and path.is_file() and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
