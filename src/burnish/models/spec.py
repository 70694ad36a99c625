"""What a model is, read from `config.json` and the safetensors headers; no weight is loaded.

    spec = read_spec(Path("~/models/SmolLM2").expanduser())
    spec.attention_linears        # ('k_proj', 'o_proj', 'q_proj', 'v_proj')

A header costs a few kilobytes however large the model is, and it is the truth about shapes and dtypes; the
config is only asked for what headers cannot tell (heads, vocabulary ties, positions).
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from burnish.errors import UserError, all_problems
from burnish.models.quantized import Quantization, read_quantization
from burnish.recipe import Recipe, expand, is_hub_id

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "U64": 8,
    "I32": 4,
    "U32": 4,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)\.weight$")
_PART = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


@dataclass(frozen=True)
class TensorInfo:
    dtype: str  # as safetensors names it: 'F32', 'BF16', …
    shape: tuple[int, ...]
    file: str
    begin: int = field(default=0, compare=False)  # byte of the file; 0 where only shapes are known

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ModelSpec:
    folder: Path
    model_type: str  # 'qwen2', 'llama', …
    architecture: str  # 'Qwen2ForCausalLM'
    n_layers: int
    hidden_size: int
    intermediate_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool  # the head is the embedding matrix
    eos_ids: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]
    linears: Mapping[str, tuple[int, int]]  # 'self_attn.q_proj' → (out, in), of the first layer that has it
    window: int | None = None  # positions back that a token sees, itself included, in some layer or all
    quantization: Quantization | None = None  # of weights that are packed, as MLX packs them
    unpacked: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # packed weight → its true shape

    @property
    def parameters(self) -> int:
        """Packed weights are counted as what they unpack to, without the scales and biases beside them."""
        beside = {name[: -len("weight")] + leaf for name in self.unpacked for leaf in ("scales", "biases")}
        counted = (self.unpacked.get(k, t.shape) for k, t in self.tensors.items() if k not in beside)
        return sum(math.prod(shape) for shape in counted)

    @property
    def layer_weights(self) -> int:
        """Of the linear layers of one decoder layer."""
        return sum(math.prod(shape) for shape in self.linears.values())

    @property
    def weight_bytes(self) -> int:
        """As stored on disk."""
        return sum(t.n_bytes for t in self.tensors.values())

    @property
    def stored(self) -> Counter[str]:
        """Bytes of each dtype on disk, as safetensors names it."""
        found: Counter[str] = Counter()
        for t in self.tensors.values():
            found[t.dtype] += t.n_bytes
        return found

    @property
    def attention_linears(self) -> tuple[str, ...]:
        return tuple(sorted({k.rsplit(".", 1)[-1] for k in self.linears if "attn" in k or "attention" in k}))

    @property
    def mlp_linears(self) -> tuple[str, ...]:
        return tuple(sorted({k.rsplit(".", 1)[-1] for k in self.linears} - set(self.attention_linears)))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a model folder. Raises UserError where either is missing, or it is not JSON."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        hint = (
            f"burnish convert {folder} OUT   makes a folder of it"
            if folder.suffix == ".gguf"
            else ("set `model:` to a folder with config.json, safetensors files and a tokenizer")
        )
        raise UserError(f"model folder {folder} {what}", hint)
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} has no config.json, so it is not a Hugging Face model folder",
            "set `model:` to a folder with config.json, safetensors files and a tokenizer",
        )
    return _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    again = f"download {path.name} again"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not JSON: {e}", again) from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}", again)
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensor names, dtypes and shapes of one safetensors file; checks that the file is as long as it says.

    Format: 8 bytes little-endian header length, a JSON header, the data (huggingface/safetensors).
    """
    size = path.stat().st_size
    again = f"download {path.name} again"
    with path.open("rb") as f:
        head = f.read(8)
        n = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 2 <= n <= size - 8:
            raise UserError(f"{path} is not a whole safetensors file: {size} bytes, header length {n}", again)
        tensors, data_bytes = parse_header(f.read(n), str(path), path.name)
    end = 8 + n + data_bytes
    if size < end:
        raise UserError(f"{path} is truncated: {size} bytes on disk, its header promises {end}", again)
    return tensors


def parse_header(header: bytes, where: str, file: str) -> tuple[dict[str, TensorInfo], int]:
    """The tensors of a safetensors header (its JSON, without the length before it), and the bytes of data
    that it promises. where: the file as messages name it. Raises UserError where it is not such a header.
    """
    again = f"download {file} again"
    try:
        found = json.loads(header)
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{where}: the safetensors header is not JSON", again) from e
    try:
        found.pop("__metadata__", None)
        data_bytes = max((t["data_offsets"][1] for t in found.values()), default=0)
        data = 8 + len(header)
        tensors = {
            k: TensorInfo(t["dtype"], tuple(t["shape"]), file, data + t["data_offsets"][0])
            for k, t in found.items()
        }
    except (AttributeError, KeyError, TypeError, IndexError) as e:  # JSON, but not of this form
        raise UserError(f"{where}: its header lacks a dtype, shape or place", again) from e
    unknown = sorted({t.dtype for t in tensors.values()} - DTYPE_BYTES.keys())
    if unknown:
        raise UserError(
            f"{where} holds tensors of a dtype that is not known: {', '.join(unknown)}",
            "use an unquantised copy of the model",
        )
    return tensors, data_bytes


def read_spec(folder: Path) -> ModelSpec:
    """The spec of a Hugging Face model folder. Raises UserError that says what is wrong with the folder."""
    config = decoder_config(read_config(folder), folder)
    tensors = _read_tensors(folder)
    generation = folder / "generation_config.json"
    return spec_of_parts(folder, config, tensors, _read_object(generation) if generation.is_file() else {})


def decoder_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The settings of the language model in a config.json (those within `text_config` on top). folder: as
    messages name it. Raises UserError that lists what a decoder's config must have and this one has not.
    """
    whole = {**config, **(config.get("text_config") or {})}
    needed = ("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    missing = [k for k in needed if not whole.get(k)]
    if missing:
        raise all_problems(
            f"{folder / 'config.json'} is not the config of a decoder:",
            [f"{k} is missing" for k in missing],
            "set `model:` to the folder of a language model",
        )
    return whole


def spec_of_parts(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    generation: Mapping[str, Any],
) -> ModelSpec:
    """The spec from what was read, wherever it was: config.json as `decoder_config` gives it, every
    safetensors header, and generation_config.json ({}: there is none). folder: where the model is, or how it
    is named. Raises UserError where they contradict each other.
    """
    has_head = any(k.endswith("lm_head.weight") for k in tensors)
    if not has_head and config.get("tie_word_embeddings") is False:
        raise UserError(
            f"{folder} is not complete: it has no lm_head.weight, and config.json says that "
            "the head is not the embedding matrix",
            "download the missing files",
        )
    quantization, unpacked = read_quantization(folder, config, tensors)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    eos = generation.get("eos_token_id")
    eos = config.get("eos_token_id") if eos is None else eos
    return ModelSpec(
        folder=folder,
        model_type=config["model_type"],
        architecture=(config.get("architectures") or [""])[0],
        n_layers=int(config["num_hidden_layers"]),
        hidden_size=hidden,
        intermediate_size=int(config.get("intermediate_size") or 4 * hidden),
        n_heads=heads,
        n_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or hidden // heads),
        vocab_size=int(config["vocab_size"]),
        max_positions=int(config.get("max_position_embeddings") or 0),
        # A head that is stored though the config says tied is not read.
        tied=not has_head or config.get("tie_word_embeddings") is True,
        eos_ids=tuple(eos) if isinstance(eos, list | tuple) else (eos,) if eos is not None else (),
        tensors=tensors,
        linears=linears_of(tensors, unpacked),
        window=_window(config),
        quantization=quantization,
        unpacked=unpacked,
    )


def _window(config: Mapping[str, Any]) -> int | None:
    window, kind = config.get("sliding_window"), config["model_type"]
    # Qwen configs carry a window that is off unless they say so; a Llama has none whatever they carry.
    used = config.get("use_sliding_window", not kind.startswith("qwen")) and kind != "llama"
    full = all(t == "full_attention" for t in config.get("layer_types") or ["sliding_attention"])
    return int(window) if window and used and not full else None


def how_to_get(name: str, hub: str = "hf") -> str:
    """The command that downloads OWNER/NAME, and the setting that then names it."""
    folder = f"~/models/{name.rpartition('/')[2]}"
    if hub == "ms":
        return f"modelscope download --model {name} --local_dir {folder}, then model={folder}"
    return f"hf download {name} --local-dir {folder}, then model={folder}"


def spec_of(recipe: Recipe) -> ModelSpec:
    """The spec of the recipe's model. Raises UserError where it names none, and as `read_spec` does."""
    if not recipe.model:
        raise UserError("the recipe names no model", "set model=FOLDER")
    if is_hub_id(recipe.model):
        raise UserError(
            f"model: {recipe.model} is a hub's id, which is enough to plan; training reads a folder",
            how_to_get(recipe.model[3:], "ms" if recipe.model.startswith("ms:") else "hf"),
        )
    return read_spec(expand(recipe.model))


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    names = weight_files(folder)
    if not names:
        raise UserError(f"{folder} holds no safetensors files", "download the weights in safetensors form")
    absent = [n for n in names if not (folder / n).is_file()]
    if absent:
        raise all_problems(
            f"{folder} is not complete; weight files that are not there:",
            absent,
            "download the missing files",
        )
    tensors: dict[str, TensorInfo] = {}
    for name in names:
        tensors |= read_header(folder / name)
    return tensors


def weight_files(folder: Path) -> list[str]:
    """Names of the files that should hold the weights, there or not: by the index, one file, or parts."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        places = _read_object(index).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise UserError(f"{index} has no weight_map", "download model.safetensors.index.json again")
        return sorted(set(places.values()))
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    # Beside the weights there may be the same ones under Mistral's own names, or an adapter.
    other = ("consolidated", "adapter")
    names = {p.name for p in folder.glob("*.safetensors") if not p.name.startswith(other)}
    for name in sorted(names):
        part = _PART.search(name)
        if part:
            stem, width = name[: part.start()], len(part[1])
            every = (f"{i:0{width}d}-of-{part[2]}" for i in range(1, int(part[2]) + 1))
            names |= {f"{stem}-{numbers}.safetensors" for numbers in every}
    return sorted(names)


def linears_of(
    tensors: Mapping[str, TensorInfo], unpacked: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, tuple[int, int]]:
    """'self_attn.q_proj' → (out, in), of the first layer that has it; packed weights as `unpacked` says."""
    found: dict[str, tuple[int, int]] = {}
    for name, info in tensors.items():
        match, shape = _LAYER.search(name), (unpacked or {}).get(name, info.shape)
        if match and len(shape) == 2 and "norm" not in match[2]:  # Cohere has a norm for each head
            found.setdefault(match[2], (shape[0], shape[1]))
    return found
