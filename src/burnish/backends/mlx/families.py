"""Where mlx-lm computes a family otherwise than the model was made to: put right, or refused.

mlx-lm reads the keys of config.json that it knows, and takes no notice of the others. What is here was found
by comparing tiny models of every family with transformers (tests/backends/test_mlx_families.py); it is about
what no check on the model alone could find, because mlx-lm agrees with itself.

Left as it is: mlx-lm rounds Gemma's embedding scale, sqrt(hidden size), to bfloat16, as the models were
trained; transformers in float32 does not (gradients up to 4e-4 apart where the root is no short number).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models import gemma
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from burnish.backends.mlx.decoder import Decoder
from burnish.errors import Unsupported
from burnish.models.rope import with_rope_said_twice
from burnish.models.spec import ModelSpec

# What transformers takes where config.json does not say, and mlx-lm takes something else.
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"rope_theta": 10_000.0},
    "smollm3": {"rope_theta": 2_000_000.0},
    "starcoder2": {"rope_theta": 10_000.0},
    "cohere": {"rope_theta": 500_000.0},
    "gemma2": {"query_pre_attn_scalar": 256},
}
# Families whose activation mlx-lm does not read from the config, and the one that it takes.
ACTIVATIONS = {"llama": "silu", "mistral": "silu", "qwen2": "silu", "qwen3": "silu", "starcoder2": "gelu"}
ATTENTION_CACHES = (KVCache, RotatingKVCache)


def as_mlx_lm_reads(spec: ModelSpec, config: Mapping[str, Any], length: int) -> dict[str, Any]:
    """config.json with its settings where mlx-lm looks for them. length: tokens of the longest example.

    Raises Unsupported where mlx-lm would compute something else than the config says.
    """
    kind, act = spec.model_type, config.get("hidden_act", config.get("hidden_activation"))
    if kind in ACTIVATIONS and act not in (None, ACTIVATIONS[kind]):
        raise Unsupported(
            f"mlx-lm's {kind} computes {ACTIVATIONS[kind]}, whatever the config says: {act}", "model"
        )
    if kind == "glm":
        raise Unsupported("mlx-lm's glm rotates whole heads where this model rotates a part of them", "model")
    said = spelled_out(spec, config)
    scaling = said.get("rope_scaling")
    if isinstance(scaling, Mapping) and "longrope" in (scaling.get("type"), scaling.get("rope_type")):
        said["rope_scaling"] = _short_factors(said, scaling, length)
    return said


def spelled_out(spec: ModelSpec, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what mlx-lm would look for elsewhere or take another default of."""
    # A head that is stored is a head: where the config does not say, mlx-lm would drop it.
    said = {**with_rope_said_twice(config), "tie_word_embeddings": spec.tied}
    return said | {k: v for k, v in DEFAULTS.get(spec.model_type, {}).items() if said.get(k) is None}


def _short_factors(config: Mapping[str, Any], scaling: Mapping[str, Any], length: int) -> dict[str, Any]:
    """LongRoPE has factors for rows within the original positions and others beyond; mlx-lm always takes the
    latter.
    """
    original = scaling.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    if original and length <= original and "short_factor" in scaling:
        return {**scaling, "long_factor": scaling["short_factor"]}
    raise Unsupported(
        f"in mlx-lm this model's rotation is that of rows beyond {original} tokens",
        "model",
        f"set train.max_length={original} or less, or backend=torch",
    )


def put_right(model: nn.Module, spec: ModelSpec) -> None:
    """Correct the modules that mlx-lm made, before their arrays are read."""
    inner: Any = getattr(model, "model", None)  # as the two families below name it
    if spec.model_type == "mistral" and spec.window:
        # Mistral 7B 0.1 sees a window back. mlx-lm loads it as a Llama, whose layers can but are not told to.
        inner.sliding_window, inner.swa_idx = spec.window, 0
        for layer in inner.layers:
            layer.use_sliding = True
    if spec.model_type == "gemma":
        for layer in inner.layers:
            layer.mlp.__class__ = _GemmaMLP


class _GemmaMLP(gemma.MLP):
    """Gemma's gelu is the one by tanh; mlx-lm takes the exact one (scores differ by 1e-3)."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


def check_attends(model: nn.Module) -> None:
    """Raises Unsupported for layers that carry a state from token to token, as Mamba's do."""
    others = {type(c).__name__ for c in make_prompt_cache(model) if not isinstance(c, ATTENTION_CACHES)}
    if others:
        raise Unsupported(
            f"this model has layers that do more than attend ({', '.join(sorted(others))}), which the engine "
            "does not train",
            "model",
        )


def check_window(decoder: Decoder, window: int | None, length: int) -> None:
    """Raises Unsupported where the config says that a token sees `window` positions back, and in mlx-lm it
    sees all. No layer is run: only the masks are looked at.
    """
    if window is None or length - 1 <= window:
        return
    _, calls = decoder.calls(mx.zeros((1, window + 1), mx.int32))
    masks = [call.mask for call in calls if isinstance(call.mask, mx.array)]
    if not any(not bool(mask[..., window, 0].any()) for mask in masks):
        raise Unsupported(
            f"this model sees {window} positions back, and in mlx-lm it sees all",
            "model",
            f"set train.max_length={window + 1} or less, or backend=torch",
        )
