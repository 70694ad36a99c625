"""The rope settings of a config, said in the words of every reader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def with_rope_said_twice(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the rope base at the top, as transformers 4 and mlx-lm read it, and in `rope_parameters`,
    as transformers 5 does; the same in `text_config`. What is there already stays.

    mlx-lm 0.32 takes a base of 10,000, and says nothing, where `rope_theta` is missing; a folder that
    transformers 5 saved has none.
    """
    said = {k: with_rope_said_twice(v) if k == "text_config" and v else v for k, v in config.items()}
    settings = said.get("rope_parameters")
    if isinstance(settings, Mapping):
        for key, value in _flat(settings).items():
            if said.get(key) is None:
                said[key] = value
    # Two bases (Gemma 3) are one of the things that transformers 5 makes of the old keys by itself.
    elif said.get("rope_theta") is not None and said.get("rope_local_base_freq") is None:
        scaling = dict(said.get("rope_scaling") or {})
        kind = scaling.pop("type", None) or scaling.pop("rope_type", None) or "default"
        scaling.pop("rope_type", None)
        said["rope_parameters"] = {"rope_type": kind, **scaling, "rope_theta": said["rope_theta"]}
    return said


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` → the keys that stood at the top before. By kind of layer: Gemma 3's two bases."""
    full, sliding = settings.get("full_attention"), settings.get("sliding_attention")
    flat: dict[str, Any] = {}
    if isinstance(sliding, Mapping):
        flat["rope_local_base_freq"] = sliding.get("rope_theta")
    one = full if isinstance(full, Mapping) else settings
    flat |= {k: one.get(k) for k in ("rope_theta", "partial_rotary_factor")}
    if one.get("rope_type", "default") != "default":
        moved = ("rope_theta", "partial_rotary_factor")
        flat["rope_scaling"] = {k: v for k, v in one.items() if k not in moved}
    return {k: v for k, v in flat.items() if v is not None}
