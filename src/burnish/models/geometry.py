"""A model's tensors without the model: from the table of known models, or from a config.json alone.

    spec = spec_of_geometry("qwen2.5-14b")            # or the name it is published under
    spec = spec_from_config(json.loads(text), Path("Qwen/Qwen2.5-14B"))

The safetensors headers of a folder or a hub are the truth (`spec.py`, `fetch.py`); this is for where they are
not to be had. Names and shapes are those that transformers gives a config (tests/models/test_geometry.py).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.errors import UserError, all_problems
from burnish.models.geometries import ALIASES, GEOMETRIES, PUBLISHED, Geometry, Published
from burnish.models.spec import ModelSpec, TensorInfo, decoder_config, spec_of_parts

_DTYPE = "BF16"  # what all of these are published in
_FILE = "model.safetensors"
_HEADERS = "name the model by its hub id (hf:OWNER/NAME): its safetensors headers say every shape"

Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class _Family:
    """How a model_type names its matrices, and what its class in transformers takes for keys left out."""

    architecture: str
    needed: tuple[str, ...] = ("num_key_value_heads",)  # beside those that every decoder needs
    tied: bool = False
    biased: tuple[str, ...] = ()  # projections that always have a bias
    may_bias: tuple[str, ...] = ()  # what `attention_bias: true` gives one
    mlp_may_bias: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: bool = False  # q and k, each head by itself
    fused: bool = False  # q, k and v in one matrix, gate and up in another


_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", (), may_bias=_QKVO, mlp_may_bias=True),
    "mistral": _Family("MistralForCausalLM"),
    "qwen2": _Family("Qwen2ForCausalLM", biased=_QKVO[:3]),
    "qwen3": _Family(
        "Qwen3ForCausalLM", ("num_key_value_heads", "head_dim"), may_bias=_QKVO, head_norms=True
    ),
    "gemma2": _Family(
        "Gemma2ForCausalLM",
        ("num_key_value_heads", "head_dim"),
        tied=True,
        may_bias=_QKVO,
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
    ),
    "phi3": _Family("Phi3ForCausalLM", (), fused=True),
    "smollm3": _Family("SmolLM3ForCausalLM", tied=True, may_bias=_QKVO, mlp_may_bias=True),
}


def known() -> tuple[str, ...]:
    """The short names of the models in the table, such as 'qwen2.5-14b'."""
    return tuple(GEOMETRIES)


def spec_of_geometry(name: str) -> ModelSpec:
    """A known model's spec, by its short name or the one it is published under ('qwen2.5-14b',
    'Qwen2.5-14B-Instruct', 'Qwen/Qwen2.5-14B-Instruct'), in any case. `folder` is the name; weights are BF16.

    Raises UserError, with the nearest known names, for one that is not in the table.
    """
    model = published_as(name)
    if model is None:
        near = difflib.get_close_matches(_plain(name), [*_names(), *GEOMETRIES, *ALIASES], 3, 0.6)
        asked = f"; did you mean {' or '.join(near)}?" if near else ""
        raise UserError(
            f"{name} is not a model that burnish knows the shapes of{asked}", f"known: {', '.join(known())}"
        )
    return spec_from_config(_config(model), Path(name))


def published_as(name: str) -> Published | None:
    """Which known model a name stands for. Of a hub id, the owner must be right, too."""
    plain = _plain(name)
    plain = ALIASES.get(plain, plain)
    if "/" in plain:
        return next((m for m in PUBLISHED if m.hub_id.lower() == plain), None)
    return _names().get(plain) or next((m for m in PUBLISHED if m.geometry == plain), None)


def smaller(spec: ModelSpec) -> tuple[str, ...]:
    """Short names of the known models of the same family with fewer parameters, largest first; empty where
    the family is not known.
    """
    family = _family_of(spec)
    sizes = {name: _parameters(g) for name, g in GEOMETRIES.items() if g.family == family}
    fewer = (name for name, size in sizes.items() if size < spec.parameters)
    return tuple(sorted(fewer, key=lambda name: -sizes[name]))


def spec_from_config(
    config: Mapping[str, Any], folder: Path, generation: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The spec of a model of which only config.json is there; every tensor counts as BF16.

    folder: where the model is, or how it is named. generation: its generation_config.json, if there is one.
    Raises UserError where the config does not say enough: a model_type whose tensors are not known here,
    packed weights, more than a language model, or keys left out.
    """
    whole = decoder_config(config, folder)
    family = _FAMILIES.get(whole["model_type"])
    packed = next((k for k in ("quantization", "quantization_config") if config.get(k)), None)
    if family is None or config.get("text_config"):
        raise UserError(
            f"{folder}: config.json alone does not tell the shapes of a {config.get('model_type')}; it does "
            f"for {', '.join(_FAMILIES)}",
            _HEADERS,
        )
    if packed:
        raise UserError(f"{folder}: config.json alone does not tell how its weights are packed", _HEADERS)
    missing = [k for k in ("intermediate_size", *family.needed) if not whole.get(k)]
    if missing:
        raise all_problems(
            f"{folder}: config.json alone does not tell the shapes:",
            [f"{k} is missing" for k in missing],
            _HEADERS,
        )
    said = {
        **whole,
        "architectures": whole.get("architectures") or [family.architecture],
        "tie_word_embeddings": whole.get("tie_word_embeddings", family.tied),
    }
    tensors = {name: TensorInfo(_DTYPE, shape, _FILE) for name, shape in _tensors(said, family)}
    return spec_of_parts(folder, said, tensors, generation or {})


def _tensors(config: Mapping[str, Any], family: _Family) -> Shapes:
    hidden, vocab = int(config["hidden_size"]), int(config["vocab_size"])
    yield "model.embed_tokens.weight", (vocab, hidden)
    for i in range(int(config["num_hidden_layers"])):
        for name, shape in _layer(config, family):
            yield f"model.layers.{i}.{name}", shape
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocab, hidden)


def _layer(config: Mapping[str, Any], family: _Family) -> Shapes:
    hidden, into = int(config["hidden_size"]), int(config["intermediate_size"])
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or hidden // heads)
    q, kv = heads * head_dim, int(config.get("num_key_value_heads") or heads) * head_dim
    biased = family.biased + (family.may_bias if config.get("attention_bias") else ())
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (into, hidden), "up_proj": (into, hidden), "down_proj": (hidden, into)}
    if family.fused:
        attention = {"qkv_proj": (q + 2 * kv, hidden), "o_proj": (hidden, q)}
        mlp = {"gate_up_proj": (2 * into, hidden), "down_proj": (hidden, into)}
    for name, shape in attention.items():
        yield f"self_attn.{name}.weight", shape
        if name in biased:
            yield f"self_attn.{name}.bias", shape[:1]
    if family.head_norms:
        yield from ((f"self_attn.{p}_norm.weight", (head_dim,)) for p in "qk")
    for name, shape in mlp.items():
        yield f"mlp.{name}.weight", shape
        if family.mlp_may_bias and config.get("mlp_bias"):
            yield f"mlp.{name}.bias", shape[:1]
    yield from ((f"{norm}.weight", (hidden,)) for norm in family.norms)


def _config(model: Published) -> dict[str, Any]:
    """The keys of its config.json that a spec is made of."""
    g = GEOMETRIES[model.geometry]
    return {
        **_shape_config(g),
        "max_position_embeddings": model.max_positions,
        "eos_token_id": list(model.eos) or None,
    }


def _shape_config(g: Geometry) -> dict[str, Any]:
    return {
        "model_type": g.model_type,
        "hidden_size": g.hidden,
        "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads,
        "num_key_value_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "intermediate_size": g.intermediate,
        "vocab_size": g.vocab,
        "tie_word_embeddings": g.tied,
        "sliding_window": g.window,
    }


def _parameters(g: Geometry) -> int:
    return sum(math.prod(shape) for _, shape in _tensors(_shape_config(g), _FAMILIES[g.model_type]))


def _family_of(spec: ModelSpec) -> str:
    """By the folder's name, by the shape, or by the kind and vocabulary; '' where nothing fits."""
    named = published_as(spec.folder.name)
    if named is not None and GEOMETRIES[named.geometry].model_type == spec.model_type:
        return GEOMETRIES[named.geometry].family
    alike = [g for g in GEOMETRIES.values() if (g.model_type, g.vocab) == (spec.model_type, spec.vocab_size)]
    same = (spec.hidden_size, spec.n_layers, spec.intermediate_size, spec.n_heads, spec.tied)
    for g in alike:
        if (g.hidden, g.layers, g.intermediate, g.heads, g.tied) == same:
            return g.family
    return alike[0].family if alike else ""


def _plain(name: str) -> str:
    return name.strip().rstrip("/").lower()


def _names() -> dict[str, Published]:
    """By the last part of the hub id."""
    return {m.hub_id.rpartition("/")[2].lower(): m for m in PUBLISHED}
