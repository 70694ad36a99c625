"""A PEFT adapter as numbers: for every adapted matrix the change it makes to it.

adapter = read_adapter(Path("runs/demo/adapter"))
adapter.change("model.layers.0.self_attn.q_proj", 0, 64)      # rows 0 to 63 of s·B·A, float32
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from burnish.backends.adapter_folder import ADAPTER, CONFIG, read_floats
from burnish.errors import UserError, all_problems

_START = "base_model.model."
# Settings of PEFT's under which the change is not s·B·A of one rank, or the base is another one.
_REFUSED = (
    "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_dora",
    "target_parameters", "trainable_token_indices", "layer_replication", "use_qalora",
    "alora_invocation_tokens", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip
# Ways to begin after which the rest of the base is no longer the one that others have.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Adapter:
    folder: Path
    rank: int
    scale: float  # s: alpha / rank, or alpha / √rank with rsLoRA
    modules: Mapping[
        str, tuple[np.ndarray, np.ndarray]
    ]  # 'model.layers.0.self_attn.q_proj' → A [r, in], B [out, r]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of the matrices that are changed, (out, in)."""
        return {module: (b.shape[0], a.shape[1]) for module, (a, b) in self.modules.items()}

    def change(self, module: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start to stop of s·B·A, float32 [n, in]."""
        a, b = self.modules[module]
        return np.float32(self.scale) * (b[start:stop] @ a)

    def scaled(self, by: float) -> Adapter:
        return replace(self, scale=self.scale * by)


def read_adapter(folder: Path) -> Adapter:
    """Raises UserError for a folder that is no LoRA adapter of PEFT's, or one that cannot be merged."""
    config = _config(folder)
    problems = [f"{key}: {config[key]!r:.60}" for key in _REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        problems.append(f"bias: expected none, got {config['bias']}")
    start = str(config.get("init_lora_weights") or "").lower()
    if start.startswith(_CHANGE_THE_BASE):
        problems.append(f"init_lora_weights: {start} begins from a changed base model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        problems.append(f"r and lora_alpha: expected numbers, got {rank!r} and {alpha!r}")
        rank, alpha = 1, 1
    try:
        stored = read_floats(folder / ADAPTER)
    except FileNotFoundError as e:
        raise UserError(f"{folder} holds no {ADAPTER}, so it is not an adapter folder") from e
    except SafetensorError as e:
        raise UserError(
            f"{folder / ADAPTER} is not a whole safetensors file: {e}", "copy the adapter folder again, whole"
        ) from e
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in stored.items():
        module, _, leaf = name.removeprefix(_START).removesuffix(".weight").rpartition(".")
        if leaf not in ("lora_A", "lora_B") or tensor.ndim != 2:
            problems.append(f"{name}: not the A or B of a linear layer")
        else:
            found.setdefault(module, {})[leaf] = tensor
    for module, own in found.items():
        if (
            own.keys() != {"lora_A", "lora_B"}
            or own["lora_A"].shape[0] != rank
            or own["lora_B"].shape[1] != rank
        ):
            problems.append(f"{module}: expected an A [{rank}, in] and a B [out, {rank}]")
    if not found and not problems:
        problems.append("it holds no weights")
    if problems:
        raise all_problems(
            f"{folder} is an adapter that cannot be merged:",
            problems,
            "plain LoRA of linear layers, with one rank and alpha, can be merged",
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter(folder, rank, scale, {m: (own["lora_A"], own["lora_B"]) for m, own in found.items()})


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{folder} holds no {CONFIG}, so it is not an adapter folder") from e
    except ValueError as e:
        raise UserError(f"{path} is not JSON: {e}", "copy the adapter folder again, whole") from e
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: expected a LoRA adapter of PEFT's",
            f"burnish convert {folder} OUT   makes one of an mlx-lm adapter",
        )
    return config
