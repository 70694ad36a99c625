"""What llama.cpp calls a model's tensors and settings, and what it cannot say, known before any work.

    plan = plan_model(spec)            # raises UserError, listing everything
    plan.tensors["blk.0.attn_q.weight"].source      # 'model.layers.0.self_attn.q_proj.weight'

Every tensor of the base must have a place, or the file is not written: llama.cpp would load a model with one
bias too few, and it would answer, only worse. The names, the order of the q and k rows of a `llama`, and the
1 that is added to Gemma's norms are those of llama.cpp's own converter and loader.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.errors import UserError, all_problems
from burnish.models.rope import with_rope_said_twice
from burnish.models.spec import ModelSpec, read_config

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_ONE_NORM = {"post_attention_layernorm.weight": "ffn_norm.weight"}
_TWO_NORMS = {
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
_QKV_BIAS = {f"self_attn.{p}_proj.bias": f"attn_{p}.bias" for p in "qkv"}
_MORE_BIAS = {
    "self_attn.o_proj.bias": "attn_output.bias",
    **{f"mlp.{p}_proj.bias": f"ffn_{p}.bias" for p in ("gate", "up", "down")},
}
_QK_NORM = {f"self_attn.{p}_norm.weight": f"attn_{p}_norm.weight" for p in "qk"}
# Left behind by old converters; every reader computes it.
_COMPUTED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Family:
    arch: str  # llama.cpp's name of it
    layer: Mapping[str, str]  # the tensors of a layer that must be there: ours → GGUF's
    may: Mapping[str, str]  # those that may
    permuted: bool = False  # the two halves of each head of q and k interleaved
    norm_offset: float = 0.0  # added to norm weights: llama.cpp multiplies by w, Gemma by 1 + w
    pattern: int = 0  # every so many layers one sees everything, the others a window; 0: the same for all


_LLAMA = Family("llama", _LAYER | _ONE_NORM, _QKV_BIAS | _MORE_BIAS, permuted=True)
FAMILIES = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Family("qwen2", _LAYER | _ONE_NORM | _QKV_BIAS, {}),
    "Qwen3ForCausalLM": Family("qwen3", _LAYER | _ONE_NORM | _QK_NORM, {}),
    "GemmaForCausalLM": Family("gemma", _LAYER | _ONE_NORM, {}, norm_offset=1.0),
    "Gemma2ForCausalLM": Family("gemma2", _LAYER | _TWO_NORMS, {}, norm_offset=1.0, pattern=2),
    "Gemma3ForCausalLM": Family("gemma3", _LAYER | _TWO_NORMS | _QK_NORM, {}, norm_offset=1.0, pattern=6),
}
# Gemma's sizes for which llama.cpp scales attention by hidden size / heads, whatever the head's size.
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}


@dataclass(frozen=True)
class Placed:
    source: str  # Hugging Face's name
    shape: tuple[int, ...]
    heads: int = 0  # whose rows are interleaved; 0 where none are
    offset: float = 0.0


@dataclass(frozen=True)
class ModelPlan:
    family: Family
    tensors: Mapping[str, Placed]  # by GGUF name, in the base's order
    settings: Mapping[str, int | float | str]  # 'context_length' → 2048, without the architecture before it
    rope_factors: np.ndarray | None  # what each rope frequency is divided by (llama 3), float32 [head_dim/2]
    notes: tuple[str, ...]  # what a person should know of the file


def plan_model(spec: ModelSpec) -> ModelPlan:
    """Raises UserError that lists all that llama.cpp could not do as it was trained."""
    family = FAMILIES.get(spec.architecture)
    if family is None:
        raise UserError(
            f"GGUF: {spec.architecture} cannot be written; expected one of {', '.join(FAMILIES)}",
            "export it as a Hugging Face folder, and convert that with llama.cpp's convert_hf_to_gguf.py",
        )
    config = with_rope_said_twice(read_config(spec.folder))
    tensors, problems = _placed(spec, family)
    settings, notes = _settings(spec, family, config, problems)
    factors = _rope(spec, family, config, settings, problems)
    if problems:
        raise all_problems(
            f"{spec.folder} cannot be written as a GGUF file of a {family.arch}:",
            problems,
            "export it as a Hugging Face folder instead",
        )
    return ModelPlan(family, tensors, settings, factors, tuple(notes))


def placed_matrix(family: Family, spec: ModelSpec, module: str) -> tuple[str, int] | None:
    """GGUF's name of a linear layer ('blk.0.attn_q.weight') and the heads to interleave; None: none such."""
    name = _gguf_name(family, f"{module}.weight")
    return None if name is None else (name, _heads(family, spec, name))


def _gguf_name(family: Family, name: str) -> str | None:
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".", 3)
    if len(parts) < 4 or parts[:2] != ["model", "layers"]:
        return None
    leaf = {**family.layer, **family.may}.get(parts[3])
    return leaf and f"blk.{parts[2]}.{leaf}"


def _heads(family: Family, spec: ModelSpec, name: str) -> int:
    if not family.permuted:
        return 0
    return {"attn_q": spec.n_heads, "attn_k": spec.n_kv_heads}.get(name.split(".")[-2], 0)


def _placed(spec: ModelSpec, family: Family) -> tuple[dict[str, Placed], list[str]]:
    tensors: dict[str, Placed] = {}
    problems: list[str] = []
    for source, info in spec.tensors.items():
        name = _gguf_name(family, source)
        if source.endswith(_COMPUTED) or (source == "lm_head.weight" and spec.tied):
            continue  # a tied head is the embedding matrix, whatever copy of it is stored
        if name is None:
            problems.append(f"{source} is not known")
        else:
            offset = family.norm_offset if name.endswith("norm.weight") else 0.0
            tensors[name] = Placed(source, info.shape, _heads(family, spec, name), offset)
    wanted = [n for n in _OUTER if not (spec.tied and n == "lm_head.weight")]
    wanted += [f"model.layers.{i}.{leaf}" for i in range(spec.n_layers) for leaf in family.layer]
    problems += [f"{n} is missing" for n in wanted if n not in spec.tensors]
    if family.norm_offset and not spec.tied:
        problems.append(f"the head is not tied to the embedding matrix, as every {family.arch}'s is")
    return tensors, problems


def _settings(
    spec: ModelSpec, family: Family, config: Mapping[str, Any], problems: list[str]
) -> tuple[dict[str, int | float | str], list[str]]:
    notes: list[str] = []
    context = spec.max_positions
    if spec.window and spec.window < context and not family.pattern:
        context = spec.window  # llama.cpp's graph of these has no window: up to here it is the same
        notes.append(
            f"context_length is {context}: within it every token sees all before it, as in training; "
            f"llama.cpp has no sliding window for {family.arch}"
        )
    settings: dict[str, int | float | str] = {
        "vocab_size": _embedding_rows(spec),
        "context_length": context,
        "embedding_length": spec.hidden_size,
        "block_count": spec.n_layers,
        "feed_forward_length": spec.intermediate_size,
        "rope.dimension_count": spec.head_dim,
        "attention.head_count": spec.n_heads,
        "attention.head_count_kv": spec.n_kv_heads,
        "attention.key_length": spec.head_dim,
        "attention.value_length": spec.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
    }
    activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    # Gemma's first configs say gelu, and its code took the tanh form all the same.
    if activation not in (("gelu_pytorch_tanh", "gelu") if family.norm_offset else ("silu",)):
        problems.append(f"hidden_act: llama.cpp's {family.arch} has another activation than {activation}")
    if family.pattern:
        _add_gemma(spec, family, config, settings, problems)
    return settings, notes


def _embedding_rows(spec: ModelSpec) -> int:
    found = spec.tensors.get("model.embed_tokens.weight")
    return found.shape[0] if found else spec.vocab_size


def _add_gemma(
    spec: ModelSpec,
    family: Family,
    config: Mapping[str, Any],
    settings: dict[str, int | float | str],
    problems: list[str],
) -> None:
    """Gemma 2 and 3: windows, caps on logits, and how attention is scaled."""
    if not spec.window:
        problems.append("sliding_window: expected a number")
        return
    settings["attention.sliding_window"] = spec.window
    kinds = config.get("layer_types")
    every = range(spec.n_layers)
    if kinds and any((kinds[i] == "sliding_attention") == ((i + 1) % family.pattern == 0) for i in every):
        problems.append(
            f"layer_types: expected every {family.pattern}th layer to see all, the others a window"
        )
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    for key, usual in caps.items():
        cap = config.get(key, usual if family.arch == "gemma2" else None)
        if (cap is None) if family.arch == "gemma2" else (cap is not None and key.startswith("attn")):
            problems.append(f"{key}: llama.cpp's {family.arch} cannot do {cap}")
        elif cap is not None:
            settings[key] = float(cap)
    scalar = config.get("query_pre_attn_scalar", 256)
    by_hidden = (family.arch, spec.n_layers) in _SCALED_BY_HIDDEN
    wanted = spec.hidden_size // spec.n_heads if by_hidden else spec.head_dim
    if scalar != wanted:
        problems.append(f"query_pre_attn_scalar: llama.cpp takes {wanted}, got {scalar}")


def _rope(
    spec: ModelSpec,
    family: Family,
    config: Mapping[str, Any],
    settings: dict[str, int | float | str],
    problems: list[str],
) -> np.ndarray | None:
    """The rope base and scaling into `settings`; llama 3's factors are a tensor of their own."""
    both = config.get("rope_parameters") or {}
    full = both.get("full_attention") or both
    base = full.get("rope_theta") or config.get("rope_theta") or (1e6 if family.arch == "gemma3" else 1e4)
    settings["rope.freq_base"] = float(base)
    if family.arch == "gemma3":
        local = (both.get("sliding_attention") or {}).get("rope_theta") or config.get("rope_local_base_freq")
        settings["rope.freq_base_swa"] = float(local or 1e4)
    if (full.get("partial_rotary_factor") or 1.0) != 1.0:
        problems.append(f"partial_rotary_factor: expected 1, got {full['partial_rotary_factor']}")
    scaling = full if "rope_type" in full else config.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "llama3":
        return llama3_factors(float(base), spec.head_dim, scaling)
    if kind == "linear":
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling["factor"])}
    elif kind == "yarn":
        _add_yarn(scaling, spec, settings, problems)
    elif kind != "default":
        problems.append(f"rope_type: expected default, llama3, linear or yarn, got {kind}")
    return None


def _add_yarn(
    scaling: Mapping[str, Any], spec: ModelSpec, settings: dict[str, int | float | str], problems: list[str]
) -> None:
    factor = float(scaling["factor"])
    usual = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    settings |= {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": int(
            scaling.get("original_max_position_embeddings") or spec.max_positions
        ),
    }
    if scaling.get("attention_factor") is not None:  # llama.cpp multiplies the usual one by this
        settings["rope.scaling.attn_factor"] = float(scaling["attention_factor"]) / usual
    for key, value in {"beta_fast": 32, "beta_slow": 1, "truncate": True}.items():
        if scaling.get(key, value) not in (value, None):
            problems.append(f"yarn's {key}: llama.cpp takes {value}, got {scaling[key]}")
    problems += [f"yarn's {k}: expected none" for k in ("mscale", "mscale_all_dim") if scaling.get(k)]


def llama3_factors(base: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """1 for short waves, `factor` for long ones, smooth between; float32 [head_dim / 2]."""
    waves = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    positions, low, high = (
        float(scaling[k]) for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((positions / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / float(scaling["factor"]) + smooth)).astype(np.float32)
