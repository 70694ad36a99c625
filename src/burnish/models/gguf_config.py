"""What a GGUF file says of its model, in Hugging Face's words: tensor names, shapes and `config.json`.

    layout = read_layout(gguf.GGUFReader("model.gguf"))
    layout.tensors["model.embed_tokens.weight"].shape      # (49152, 576)

Every tensor must be accounted for, both ways: a name that is missing or not known is an error, because a
model that loads with one bias too few still answers, only worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from burnish.errors import UserError, all_problems

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_EXTRA = {
    "llama": {},
    "qwen2": {f"attn_{p}.bias": f"self_attn.{p}_proj.bias" for p in "qkv"},
    "qwen3": {f"attn_{p}_norm.weight": f"self_attn.{p}_norm.weight" for p in "qk"},
}
# llama 3.1 and 3.2 keep their rope scaling as one factor per frequency; these are the settings they were made
# with.
_LLAMA3_ROPE = tuple(
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
)


@dataclass(frozen=True)
class Source:
    gguf: gguf.ReaderTensor
    shape: tuple[int, ...]  # (out, in), as Hugging Face has it
    heads: int  # whose rows are interleaved and must be put back; 0 where none are


@dataclass(frozen=True)
class Layout:
    metadata: Mapping[str, Any]  # every GGUF key with its value
    arch: str  # 'llama'
    tensors: Mapping[str, Source]  # by Hugging Face name, in the file's order
    tied: bool  # no output.weight: the head is the embedding matrix
    rope_scaling: Mapping[str, Any] | None  # as Hugging Face has it, without theta

    @property
    def architecture(self) -> str:
        return ARCHITECTURES[self.arch]

    @property
    def parameters(self) -> int:
        return sum(math.prod(s.shape) for s in self.tensors.values())

    def number(self, key: str, default: float | None = None) -> Any:
        """The single number under `ARCH.key`. Raises UserError where it is missing, or one per layer."""
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int | float):
            got = "nothing" if value is None else f"{value!r:.60}"
            raise UserError(
                f"GGUF key {self.arch}.{key}: expected one number, got {got}",
                "this model differs from layer to layer or is damaged; start from its safetensors folder",
            )
        return value


def read_layout(reader: gguf.GGUFReader) -> Layout:
    """Names, shapes and settings. Raises UserError for an unknown architecture, a tensor too many or few."""
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    arch = metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"GGUF architecture {arch}: expected one of {', '.join(ARCHITECTURES)} (Mistral files say llama)",
            "use the model's safetensors folder instead",
        )
    if metadata.get(f"{arch}.expert_count"):
        raise UserError(
            f"a mixture of {metadata[f'{arch}.expert_count']} experts ({arch}) is not supported",
            "use the model's safetensors folder instead",
        )
    if metadata.get("split.count", 0) > 1:
        raise UserError(
            f"this is one of {metadata['split.count']} parts of a split GGUF file",
            "join them first: llama-gguf-split --merge FIRST-PART.gguf WHOLE.gguf",
        )
    found = {t.name: t for t in reader.tensors}
    bare = Layout(metadata, arch, {}, "output.weight" not in found, None)
    names = _names(bare)
    factors = found.pop("rope_freqs.weight", None)
    problems = [f"{n} is missing" for n in names if n not in found] + [
        f"{n} is not known" for n in found if n not in names
    ]
    if problems:
        raise all_problems(
            f"the tensors of this file are not those of a {arch} with {bare.number('block_count')} layers:",
            problems,
            "use the model's safetensors folder instead",
        )
    heads = bare.number("attention.head_count")
    turned = (
        {"attn_q.weight": heads, "attn_k.weight": bare.number("attention.head_count_kv", heads)}
        if arch == "llama"
        else {}
    )
    tensors = {
        names[t.name]: Source(
            t, tuple(int(n) for n in reversed(t.shape)), turned.get(t.name.split(".", 2)[-1], 0)
        )
        for t in found.values()
    }
    return Layout(metadata, arch, tensors, bare.tied, _rope_scaling(bare, factors))


def _names(layout: Layout) -> dict[str, str]:
    """GGUF name → Hugging Face name, of every tensor that the file should hold."""
    names = {k: v for k, v in _OUTER.items() if not (layout.tied and k == "output.weight")}
    for i in range(layout.number("block_count")):
        names |= {f"blk.{i}.{k}": f"model.layers.{i}.{v}" for k, v in (_LAYER | _EXTRA[layout.arch]).items()}
    return names


def _rope_scaling(layout: Layout, factors: gguf.ReaderTensor | None) -> dict[str, Any] | None:
    if factors is not None:
        for settings in _LLAMA3_ROPE:
            if np.allclose(factors.data, _llama3_factors(layout, settings), rtol=1e-3):
                return settings
        raise UserError(
            "rope_freqs.weight: expected llama 3's factors (8 or 32 times 8,192 positions), got others",
            "use the model's safetensors folder instead",
        )
    kind = layout.metadata.get(f"{layout.arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise UserError(
            f"{layout.arch}.rope.scaling.type: expected none, linear or yarn, got {kind}",
            "use the model's safetensors folder instead",
        )
    settings = {"rope_type": kind, "factor": float(layout.number("rope.scaling.factor"))}
    if kind == "yarn":
        settings["original_max_position_embeddings"] = int(
            layout.number("rope.scaling.original_context_length")
        )
    return settings


def _llama3_factors(layout: Layout, settings: Mapping[str, Any]) -> np.ndarray:
    """What each frequency is divided by: 1 for short waves, `factor` for long ones, smooth between."""
    size = head_dim(layout)
    waves = 2 * math.pi * layout.number("rope.freq_base", 10000.0) ** (np.arange(0, size, 2) / size)
    positions, low, high = (
        settings[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    )
    smooth = np.clip((positions / waves - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / settings["factor"] + smooth)


def head_dim(layout: Layout) -> int:
    return layout.number(
        "attention.key_length", layout.number("embedding_length") // layout.number("attention.head_count")
    )


def to_config(layout: Layout, dtype: str) -> dict[str, Any]:
    """`config.json`. The rope base is there twice: transformers 5 reads `rope_parameters`; transformers 4 and
    mlx-lm 0.32 read `rope_theta` and, where it is missing, quietly take 10,000. So is the dtype's name."""
    heads = layout.number("attention.head_count")
    theta = float(layout.number("rope.freq_base", 10000.0))
    scaling = dict(layout.rope_scaling or {"rope_type": "default"})
    config: dict[str, Any] = {
        "architectures": [layout.architecture],
        "model_type": layout.arch,
        "vocab_size": layout.tensors["model.embed_tokens.weight"].shape[0],
        "hidden_size": layout.number("embedding_length"),
        "intermediate_size": layout.number("feed_forward_length"),
        "num_hidden_layers": layout.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": layout.number("attention.head_count_kv", heads),
        "head_dim": head_dim(layout),
        "max_position_embeddings": layout.number("context_length"),
        # The file holds float32; six digits give back the 1e-05 that was meant.
        "rms_norm_eps": float(f"{layout.number('attention.layer_norm_rms_epsilon'):.6g}"),
        "hidden_act": "silu",
        "attention_bias": layout.arch == "qwen2",
        "attention_dropout": 0.0,
        "tie_word_embeddings": layout.tied,
        "rope_parameters": {**scaling, "rope_theta": theta},
        "rope_theta": theta,
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **token_ids(layout),
    }
    if layout.rope_scaling:
        config["rope_scaling"] = scaling
    if layout.arch == "llama":
        config["mlp_bias"] = False
    else:
        config["use_sliding_window"] = False
    return config


def to_generation_config(layout: Layout) -> dict[str, Any]:
    """Every token that ends an answer, not only the one that ends a text."""
    ids = token_ids(layout)
    eot = layout.metadata.get("tokenizer.ggml.eot_token_id")
    ends = list(dict.fromkeys(i for i in (ids.get("eos_token_id"), eot) if i is not None))
    if ends:
        ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return ids


def token_ids(layout: Layout) -> dict[str, Any]:
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    found = {name: layout.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: value for name, value in found.items() if value is not None}
