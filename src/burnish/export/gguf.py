"""A tuned model as one GGUF file, or its adapter alone as another, for llama.cpp and what is built on it.

    check_gguf(source, "q4_k_m")                     # all that cannot be done, before any work
    report = write_gguf(Merged(base, adapter), source, Path("model.gguf"), "q4_k_m")

The sum of base and adapter is rounded once, to the type that was asked for. k-quants are made by llama.cpp
from a temporary float16 file beside the target; float16 keeps three bits more than bfloat16 for that, at the
same size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gguf
import numpy as np

from burnish.errors import UserError, all_problems
from burnish.export.adapter import read_adapter
from burnish.export.gguf_names import FAMILIES, ModelPlan, placed_matrix, plan_model
from burnish.export.gguf_quantise import K_QUANTS, check_quantiser, fallbacks, quantise
from burnish.export.gguf_tensors import KINDS, Kind, Stream, bytes_of, interleaved, kind_of
from burnish.export.gguf_vocabulary import Vocabulary, read_vocabulary
from burnish.export.merged import Merged
from burnish.models.spec import ModelSpec
from burnish.models.weights import narrowed

if TYPE_CHECKING:
    from burnish.export.source import Source

TYPES = (*KINDS, *K_QUANTS)
ADAPTER_TYPES = ("f32", "f16")
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_BEFORE_QUANTS = "f16"
# Bits per weight of a whole file, a little over what llama.cpp makes of common sizes.
_BITS = {"q6_k": 6.6, "q5_k_m": 5.8, "q4_k_m": 5.0}
_KEYS_BYTES = 32 << 20  # a vocabulary of 256,000 tokens and its merges
_VALUE_TYPES = {
    int: gguf.GGUFValueType.UINT32,
    float: gguf.GGUFValueType.FLOAT32,
    str: gguf.GGUFValueType.STRING,
}


@dataclass(frozen=True)
class GgufReport:
    bytes: int
    stored_as: Mapping[str, int]  # GGUF type → how many tensors
    notes: tuple[str, ...]  # what llama.cpp does otherwise than was asked or trained


def check_gguf(source: Source, type: str) -> None:
    """Raises UserError for whatever would stop `write_gguf`, weights out of range excepted."""
    if type not in TYPES:
        raise UserError(f"GGUF type: expected one of {', '.join(TYPES)}, got {type}", "take q8_0 or q4_k_m")
    if type in K_QUANTS:
        check_quantiser()
    _vocabulary(source, plan_model(source.base))


def gguf_bytes(base: ModelSpec, type: str) -> int:
    """Of disk at its fullest: the file, and for k-quants the one that it is made from."""
    shapes = [info.shape for info in base.tensors.values()]
    if type in KINDS:
        return _KEYS_BYTES + sum(bytes_of(s, kind_of(s, KINDS[type])) for s in shapes)
    packed = 0.0
    for shape in shapes:
        whole = bytes_of(shape, Kind.F32) / 4 * _BITS[type] / 8
        packed += whole if shape[-1] % 256 == 0 else bytes_of(shape, kind_of(shape, Kind.Q8_0))
    return _KEYS_BYTES + int(packed) + gguf_bytes(base, _BEFORE_QUANTS)


def write_gguf(merged: Merged, source: Source, path: Path, type: str) -> GgufReport:
    """Write the file `path`. Raises UserError as `check_gguf`, and for weights that the type cannot hold;
    what is half-written is removed then, and after an interruption.
    """
    plan = plan_model(merged.base)
    vocabulary = _vocabulary(source, plan)
    notes = [*plan.notes, *vocabulary.notes]
    if type in KINDS:
        stored = _write(merged, source, plan, vocabulary, path, type)
    else:
        check_quantiser()
        notes += fallbacks({n: t.shape for n, t in plan.tensors.items()}, type)
        before = path.with_name(f".{path.name}.{_BEFORE_QUANTS}")
        try:
            _write(merged, source, plan, vocabulary, before, _BEFORE_QUANTS)
            quantise(before, path, type)
        finally:
            before.unlink(missing_ok=True)
        stored = Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors)
    return GgufReport(path.stat().st_size, stored, tuple(notes))


def _vocabulary(source: Source, plan: ModelPlan) -> Vocabulary:
    return read_vocabulary(source, plan.tensors["token_embd.weight"].shape[0])


def _write(
    merged: Merged, source: Source, plan: ModelPlan, vocabulary: Vocabulary, path: Path, type: str
) -> Counter[str]:
    """How many tensors are stored in each type."""
    w = gguf.GGUFWriter(path, plan.family.arch)
    w.add_type(gguf.GGUFType.MODEL)
    w.add_name(source.name)
    w.add_file_type(_FILE_TYPES[type])
    w.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in plan.settings.items():
        _add(w, f"{plan.family.arch}.{key}", value)
    _add_vocabulary(w, vocabulary)
    streams = [Stream(merged, n, t, kind_of(t.shape, KINDS[type])) for n, t in plan.tensors.items()]
    for s in streams:
        w.add_tensor_info(s.name, s.placed.shape, np.dtype(np.float32), s.nbytes, raw_dtype=s.kind)
    factors = plan.rope_factors
    if factors is not None:
        w.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    _fill(w, path, [*streams, *([] if factors is None else [factors])])
    return Counter([*(s.kind.name for s in streams), *([] if factors is None else ["F32"])])


def _fill(w: gguf.GGUFWriter, path: Path, tensors: list[Stream | np.ndarray]) -> None:
    """Header, keys and data; the file goes again where that fails."""
    try:
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        for tensor in tensors:
            w.write_tensor_data(tensor)  # type: ignore[arg-type]  # it asks for nbytes and tofile alone
        w.close()
    except BaseException:  # Ctrl-C too
        for file in w.fout or ():
            file.close()
        path.unlink(missing_ok=True)
        raise


def _add(w: gguf.GGUFWriter, key: str, value: int | float | str) -> None:
    w.add_key_value(key, value, _VALUE_TYPES[type(value)])


def _add_vocabulary(w: gguf.GGUFWriter, v: Vocabulary) -> None:
    w.add_tokenizer_model(v.model)
    w.add_tokenizer_pre(v.pre)
    w.add_token_list(list(v.tokens))
    w.add_token_types(list(v.kinds))
    if v.model == "gpt2":
        w.add_token_merges(list(v.merges))
    else:
        w.add_token_scores(list(v.scores))
        w.add_add_space_prefix(v.add_space_prefix)
    names = {"unk": "unknown", "pad": "padding"}
    for key, number in v.ids.items():
        w.add_uint32(f"tokenizer.ggml.{names.get(key, key)}_token_id", number)
    w.add_add_bos_token(v.add_bos)
    w.add_add_eos_token(v.add_eos)
    if v.template:
        w.add_chat_template(v.template)


def write_gguf_adapter(source: Source, path: Path, type: str = "f32") -> None:
    """Write the adapter alone, for a GGUF file of its base (`llama-cli --lora`). type: f32 or f16.

    llama.cpp scales B·A by alpha / rank; the alpha written is rank times the adapter's own scale, which is
    the same but with rsLoRA. Raises UserError for an adapter that has no place in llama.cpp's model.
    """
    if type not in ADAPTER_TYPES:
        raise UserError(f"GGUF type of an adapter: expected f32 or f16, got {type}", "take f32")
    family = plan_model(source.base).family
    adapter = read_adapter(source.adapter)
    base, problems = source.base.tensors, []
    pairs: dict[str, np.ndarray] = {}
    for module, (a, b) in adapter.modules.items():
        placed = placed_matrix(family, source.base, module)
        info = base.get(f"{module}.weight")
        if placed is None or info is None or module in ("model.embed_tokens", "lm_head"):
            problems.append(f"{module}: not a linear layer of {source.base.folder} that llama.cpp adapts")
            continue
        if info.shape != (len(b), a.shape[1]):
            problems.append(f"{module}: expected (out, in) {info.shape}, got {(len(b), a.shape[1])}")
            continue
        name, heads = placed
        pairs[f"{name}.lora_a"] = a
        pairs[f"{name}.lora_b"] = interleaved(b, heads) if heads else b
    if problems:
        raise all_problems(
            f"{adapter.folder} cannot be written as a GGUF adapter:",
            problems,
            "export the merged model instead",
        )
    w = gguf.GGUFWriter(path, FAMILIES[source.base.architecture].arch)
    w.add_type(gguf.GGUFType.ADAPTER)
    w.add_name(source.name)
    w.add_file_type(_FILE_TYPES[type])
    w.add_string(gguf.Keys.Adapter.TYPE, "lora")
    w.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.scale * adapter.rank)
    kept = [
        np.ascontiguousarray(narrowed(t, {"f32": "float32", "f16": "float16"}[type])) for t in pairs.values()
    ]
    for name, tensor in zip(pairs, kept, strict=True):
        w.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes)
    _fill(w, path, list(kept))
