"""A Hugging Face model folder becomes an MLX folder of 4 or 8 bits, tensor by tensor.

    report = quantize_folder(Path("Qwen2.5-7B-Instruct"), Path("Qwen2.5-7B-4bit"), 4)

mlx-lm builds its model from the folder without reading a weight: its arrays are promises, and packing them
(`nn.quantize`) makes more promises. Each is then kept, written and forgotten before the next, so memory holds
the tensors of one matrix however large the model is. The price is a header written before the data, from
shapes that are known before the values are.

What is packed is what mlx-lm's own conversion packs. All else keeps the dtype of the source, and so do scales
and biases: the product with a packed matrix is computed in their dtype, so float32 ones are the only way to
lose nothing but the packing. On a float32 source they cost half a bit a weight more; `dtype` narrows them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes, load_model

from burnish import __version__
from burnish.backends.mlx.device import translated
from burnish.backends.mlx.families import spelled_out
from burnish.errors import Unsupported, UserError, all_problems
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
from burnish.models.spec import ModelSpec, read_config, read_spec, weight_files

BITS = (4, 8)
RAISED_BITS = 8  # of modules that are to have more than the others
GROUP_SIZES = (32, 64, 128)  # that MLX's kernels have
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_STORED = {
    mx.float32: "F32",
    mx.bfloat16: "BF16",
    mx.float16: "F16",
    mx.float64: "F64",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.bool_: "BOOL",
}
# Tokenizer, generation settings, licence, code of the tokenizer's own; not the weights nor their index.
_COPIED = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
    "additional_chat_templates",
)
_OURS = ("config.json", "model.safetensors.index.json", "burnish.json")


@dataclass(frozen=True)
class QuantizeReport:
    source: Path
    out: Path
    architecture: str  # 'Qwen2ForCausalLM'
    bits: int
    group_size: int
    dtype: str  # of scales, biases and what is not packed
    quantized: int  # matrices that were packed
    kept: int  # tensors that were not
    parameters: int  # as they were before packing
    shards: int
    source_bytes: int
    weight_bytes: int  # written


def quantize_folder(
    source: Path,
    out: Path,
    bits: int,
    *,
    group_size: int = 64,
    dtype: str | None = None,
    raised: Collection[str] = (),
    force: bool = False,
) -> QuantizeReport:
    """Write the model of `source`, packed to `bits` (4 or 8), to the new folder `out`; with `force`, in place
    of a model folder there. dtype: of what is not packed; as in the source where left out. raised: modules,
    by mlx-lm's names ('model.layers.0.self_attn.q_proj'), that get 8 bits whatever the others get.

    Raises UserError, and leaves nothing behind, for a source that is not whole, is quantised already or holds
    NaN, an `out` that exists, or a disk that is too small; Unsupported where mlx-lm has no class for the
    model.
    """
    _check_asked(bits, group_size, dtype)
    out = out.resolve()  # OUT may be `.`, which has no name
    check_out(source, out, force)
    spec = read_spec(source)
    config = spelled_out(spec, read_config(source))
    _check_plain(spec, config)
    with _nothing_kept(), translated():
        model = open_folder(spec, config)
        if unknown := set(raised) - {name for name, _ in model.named_modules()}:
            raise Unsupported(f"mlx-lm has these modules under other names: {sorted(unknown)}", "model")
        if dtype:
            cast(model, lambda name, value: DTYPES[dtype])
        settings, finite = pack(model, bits, group_size, raised)
        arrays = dict(tree_flatten(model.parameters()))
        quantized = sum(name.endswith(".scales") for name in arrays)
        kept = len(arrays) - 3 * quantized
        held = _held_in(arrays)
        del model  # it would hold every array that is read
        weight_bytes = sum(a.nbytes for a in arrays.values())
        check_disk(out.parent, weight_bytes + SPARE_DISK_BYTES, "free some space, or choose another disk")
        with replacing(out) as partial:
            shards = _write_weights(partial, arrays, finite)
            _copy_rest(source, partial)
            write_json(partial / "config.json", {**config, **_said_of(settings, dtype)})
            _write_origin(partial, spec, config, bits, group_size)
    return QuantizeReport(
        source,
        out,
        spec.architecture,
        bits,
        group_size,
        held,
        quantized,
        kept,
        spec.parameters,
        len(shards),
        spec.weight_bytes,
        weight_bytes,
    )


def _check_asked(bits: int, group_size: int, dtype: str | None) -> None:
    again = "burnish convert FOLDER OUT --quantize 4bit"
    if bits not in BITS:
        raise UserError(f"bits: expected 4 or 8, got {bits}", again)
    if group_size not in GROUP_SIZES:
        raise UserError(
            f"group size: expected one of {', '.join(map(str, GROUP_SIZES))}, got {group_size}", again
        )
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype: expected {', '.join(DTYPES)}, got {dtype}", f"{again} --dtype bfloat16")


def _check_plain(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    said = config.get("quantization") or config.get("quantization_config")
    if spec.quantization is None and not said and not (spec.folder / "hf_quant_config.json").is_file():
        return
    how = f"{spec.quantization.bits} bits by MLX" if spec.quantization else f"{said!r:.80}"
    raise UserError(
        f"{spec.folder} is quantised already ({how}); to round it again would lose more than either",
        "burnish trains MLX folders as they are; for other bits begin with the unquantised model",
    )


# mlx-lm's words for tensors that are missing, or that its model has no place for.
_NOT_ITS_TENSORS = ("Missing", "Received")


def check_folder(spec: ModelSpec, config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """mlx-lm's classes for the folder; no weight is read. Raises Unsupported where there are none, UserError
    where mlx-lm would read other files than are meant.
    """
    _check_files(spec)
    return check_class(spec, config)


def check_class(spec: ModelSpec, config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """mlx-lm's classes for a model of this kind. Raises Unsupported where there are none."""
    try:
        return _get_classes(config)
    except ValueError as e:
        raise Unsupported(f"mlx-lm has no model class for model_type {spec.model_type!r}", "model") from e


def open_folder(spec: ModelSpec, config: dict[str, Any], *, trust_remote_code: bool = False) -> nn.Module:
    """mlx-lm's model of the folder, its weights not read yet. Raises as `check_folder`, and where mlx-lm
    cannot load it.
    """
    try:
        return load_model(
            spec.folder,
            lazy=True,
            model_config=config,
            get_model_classes=lambda config: check_folder(spec, config),
            trust_remote_code=trust_remote_code,
        )[0]
    except (Unsupported, UserError, MemoryError):
        raise
    # Keys that it needs and the config has not; one of its models ends the process if a package is missing.
    except (Exception, SystemExit) as e:
        problem = f"mlx-lm cannot load {spec.folder}: {type(e).__name__}: {str(e)[:500]}"
        if isinstance(e, FileNotFoundError) or str(e).startswith(_NOT_ITS_TENSORS):
            hint = f"check that the folder is whole and that its config.json is that of a {spec.model_type}"
            raise UserError(problem, hint) from e
        raise Unsupported(problem, "model") from e


def _check_files(spec: ModelSpec) -> None:
    """mlx-lm reads every model*.safetensors there is, whatever the index names."""
    meant = {t.file for t in spec.tensors.values()}
    read = {p.name for p in spec.folder.glob("model*.safetensors")}
    if meant != read:
        problems = [f"{name}: there, but not of the model" for name in sorted(read - meant)]
        problems += [f"{name}: not called model*.safetensors" for name in sorted(meant - read)]
        raise all_problems(
            f"mlx-lm would not read the files of {spec.folder} that are meant:",
            problems,
            "move or rename those files, or set backend=torch",
        )


def cast(model: nn.Module, dtype_of: Callable[[str, mx.array], mx.Dtype]) -> None:
    """Floats to the dtype given for their name, save those that the model's class wants as they are."""
    wanted = getattr(model, "cast_predicate", lambda name: True)

    def narrowed(name: str, value: mx.array) -> mx.array:
        if not mx.issubdtype(value.dtype, mx.floating) or not wanted(name):
            return value
        return value.astype(dtype_of(name, value))

    model.update(tree_map_with_path(narrowed, model.parameters()))


def pack(
    model: nn.Module, bits: int, group_size: int, raised: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Replace what can be packed. Returns the config's `quantization`, with the modules that the model's
    class wants otherwise (routers of experts in 8 bits) and those that are `raised` to 8, and for each packed
    weight a promise whether it was finite: packing passes over a NaN.
    """
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    finite: dict[str, mx.array] = {}
    own = getattr(model, "quant_predicate", None)

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        weight = module.get("weight")
        if not hasattr(module, "to_quantized") or weight is None or weight.shape[-1] % group_size:
            return False
        asked = own(path, module) if own else True
        if asked and path in raised and bits < RAISED_BITS:
            asked = {"group_size": group_size, "bits": RAISED_BITS}
        if isinstance(asked, dict):
            settings[path] = dict(asked)
        if asked:
            finite[f"{path}.weight"] = mx.isfinite(weight).all()
        return asked

    nn.quantize(model, group_size, bits, class_predicate=how)
    return settings, finite


def rounded(weight: np.ndarray, bits: int, dtype: str = "float32", group_size: int = 64) -> np.ndarray:
    """What packing makes of some rows of a matrix that is stored in `dtype`: float32 [n, in] → the same."""
    rows = mx.array(weight).astype(DTYPES[dtype])
    packed, scales, biases = mx.quantize(rows, group_size, bits)
    wide = mx.dequantize(packed, scales.astype(mx.float32), biases.astype(mx.float32), group_size, bits)
    return np.array(wide)


def _held_in(arrays: Mapping[str, mx.array]) -> str:
    sizes: dict[str, int] = {}
    for value in arrays.values():
        name = next((n for n, dtype in DTYPES.items() if dtype == value.dtype), "")
        sizes[name] = sizes.get(name, 0) + value.size
    return max((n for n in sizes if n), key=lambda n: sizes[n])


def _write_weights(
    folder: Path, arrays: dict[str, mx.array], finite: dict[str, mx.array]
) -> dict[str, list[str]]:
    """Empties both as it goes, in the order of `arrays`, which is that of the layers."""
    shards = shards_of({name: a.nbytes for name, a in arrays.items()}, SHARD_BYTES)
    total_bytes = sum(a.nbytes for a in arrays.values())
    for file, names in shards.items():
        sized = ((n, _STORED[arrays[n].dtype], tuple(arrays[n].shape), arrays[n].nbytes) for n in names)
        with (folder / file).open("wb") as f:
            f.write(header_of(sized, {"format": "mlx"}))
            for name in names:
                f.write(_bytes_of(name, arrays.pop(name), finite.pop(name, None)))
    write_index(folder, shards, total_bytes)
    return shards


def _bytes_of(name: str, array: mx.array, finite: mx.array | None) -> memoryview:
    if mx.issubdtype(array.dtype, mx.floating):
        finite = mx.isfinite(array).all()
    if finite is not None:
        mx.eval(array, finite)  # together, so that the source is read once
        if not finite:
            raise UserError(
                f"{name} holds a NaN or an infinity",
                "download the weights again; if it is float16 that was asked for, take --dtype bfloat16",
            )
    return np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)).data


def _copy_rest(source: Path, out: Path) -> None:
    for path in sorted({p for pattern in _COPIED for p in source.glob(pattern)}):
        if path.name in _OURS or path.name.startswith("adapter"):
            continue
        if path.is_dir():
            shutil.copytree(path, out / path.name)
        else:
            shutil.copyfile(path, out / path.name)


def _said_of(settings: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """mlx-lm reads `quantization`; model hubs show `quantization_config`."""
    said: dict[str, Any] = {"quantization": settings, "quantization_config": settings}
    return {**said, "dtype": dtype, "torch_dtype": dtype} if dtype else said


def _write_origin(
    partial: Path, spec: ModelSpec, config: Mapping[str, Any], bits: int, group_size: int
) -> None:
    """`burnish.json`: from what and by what the folder was made, and the checksum of all that is in it."""
    sources = weight_files(spec.folder)
    origin = {
        "source": str(spec.folder.resolve()),
        "name": config.get("_name_or_path") or spec.folder.resolve().name,
        "source_sha256": {name: _checksum(spec.folder / name) for name in sources},
        "bits": bits,
        "group_size": group_size,
        "burnish": __version__,
        **{name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
        "sha256": {
            str(p.relative_to(partial)): _checksum(p) for p in sorted(partial.rglob("*")) if p.is_file()
        },
    }
    write_json(partial / "burnish.json", origin)


def _checksum(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@contextmanager
def _nothing_kept() -> Iterator[None]:
    """Buffers that are free go back to the system at once: MLX would keep as many as it ever used."""
    before = mx.set_cache_limit(0)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
