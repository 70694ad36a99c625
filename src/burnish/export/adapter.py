"""A PEFT adapter as numbers: for every adapted matrix the change it makes to it.

adapter = read_adapter(Path("runs/demo/adapter"))
adapter.change("model.layers.0.self_attn.q_proj", 0, 64)      # rows 0 to 63 of s·B·A, float32
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from burnish.backends.adapter_folder import ADAPTER, read_floats
from burnish.errors import UserError, all_problems
from burnish.models.peft_config import lora_terms, read_adapter_config

_START = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    folder: Path
    rank: int
    scale: float  # s: alpha / rank, or alpha / √rank with rsLoRA
    # 'model.layers.0.self_attn.q_proj' → A [r, in], B [out, r]
    modules: Mapping[str, tuple[np.ndarray, np.ndarray]]

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
    config, _ = read_adapter_config(folder)
    terms = lora_terms(config)
    problems = [*terms.problems, *(["use_dora: True"] if config.get("use_dora") else [])]
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
        ranks = {own[leaf].shape[at] for leaf, at in (("lora_A", 0), ("lora_B", 1)) if leaf in own}
        if len(own) != 2 or ranks != {terms.rank}:
            problems.append(f"{module}: expected an A [{terms.rank}, in] and a B [out, {terms.rank}]")
    if not found and not problems:
        problems.append("it holds no weights")
    if problems:
        raise all_problems(
            f"{folder} is an adapter that cannot be merged:",
            problems,
            "plain LoRA of linear layers, with one rank and alpha, can be merged",
        )
    pairs = {m: (own["lora_A"], own["lora_B"]) for m, own in found.items()}
    return Adapter(folder, terms.rank, terms.scale, pairs)
