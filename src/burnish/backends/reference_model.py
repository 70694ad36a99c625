"""The weights and the few numbers that the NumPy decoder needs, from a model folder.

    decoder = read_decoder(plan.spec)

Weights are widened to float64 once, when they are read: 8 bytes each, 1.1 GB for SmolLM2-135M. That is the
price of arithmetic without rounding to speak of, and the reason why this is no backend for a large model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from burnish.backends.adapter_folder import read_floats
from burnish.errors import Unsupported
from burnish.models.spec import ModelSpec, read_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Decoder:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    theta: float
    windows: tuple[int | None, ...]  # per layer: how many positions back it sees, itself included; None: all
    tensors: Mapping[str, np.ndarray]  # float64, named as in the model folder

    @property
    def head_VD(self) -> np.ndarray:
        tied = "lm_head.weight" not in self.tensors
        return self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"]


def read_decoder(spec: ModelSpec) -> Decoder:
    """Config and weights. Raises Unsupported, with the reason, for what the decoder does not cover."""
    config = read_config(spec.folder)
    if spec.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise Unsupported(f"the reference backend knows {known}; this model is {spec.model_type!r}")
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise Unsupported(f"the reference backend knows the activation silu; this model has {act!r}")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted({t.file for t in spec.tensors.values()}):
        tensors |= {k: v.astype(np.float64) for k, v in read_floats(spec.folder / file).items()}
    return Decoder(
        spec.n_layers,
        spec.n_heads,
        spec.n_kv_heads,
        spec.head_dim,
        float(config.get("rms_norm_eps", 1e-6)),
        _rope_theta(config),
        _windows(config, spec),
        tensors,
    )


def _rope_theta(config: Mapping[str, Any]) -> float:
    """transformers 5 writes `rope_parameters`, everything before it `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise Unsupported(f"the reference backend knows the rope type 'default'; this model has {kind!r}")
    return float(rope.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _windows(config: Mapping[str, Any], spec: ModelSpec) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if spec.model_type == "llama" or window is None:
        return (None,) * spec.n_layers
    if spec.model_type == "mistral":
        return (int(window),) * spec.n_layers
    if not config.get("use_sliding_window", False):
        return (None,) * spec.n_layers
    first = int(config.get("max_window_layers", spec.n_layers))
    kinds = config.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(spec.n_layers)
    ]
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
