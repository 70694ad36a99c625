"""A tuned tiny model as an export's source, and what transformers and PEFT make of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from burnish.export.merged import Merged
from burnish.export.source import Source
from burnish.models.spec import ModelSpec, read_spec
from burnish.models.tokenizer import load_tokenizer
from tests.tiny import tiny_model, tiny_recipe

IDS = [int(i) for i in np.random.default_rng(0).integers(3, 280, 150)]  # over one batch of llama.cpp's


def whole(merged: Merged, name: str) -> np.ndarray:
    """A tensor in its own shape, float32."""
    return np.concatenate(list(merged.chunks(name))).reshape(merged.base.tensors[name].shape)


@dataclass(frozen=True)
class Tuned:
    source: Source
    peft_scale: float

    @property
    def spec(self) -> ModelSpec:
        return self.source.base

    @cached_property
    def merged(self) -> Merged:
        return Merged(self.spec, self.source.adapter)

    def live(self, adapted: bool = True) -> Any:
        """transformers' model in float32, PEFT's adapter on it."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        # Eager: Gemma 2 caps its attention scores, which torch's own attention cannot.
        model = AutoModelForCausalLM.from_pretrained(
            str(self.spec.folder), dtype=torch.float32, attn_implementation="eager"
        )
        return PeftModel.from_pretrained(model, str(self.source.adapter)) if adapted else model

    def scores(self, ids: Sequence[int] = IDS, adapted: bool = True) -> np.ndarray:
        """float64 [T - 1]: what base and adapter give each token after the first."""
        import torch

        with torch.no_grad():
            logits = self.live(adapted)(torch.tensor([list(ids)])).logits[0].double()
        return logits.log_softmax(-1).numpy()[range(len(ids) - 1), list(ids[1:])]


def tuned(
    folder: Path,
    family: str = "llama",
    *,
    base: Path | None = None,
    chat: bool = True,
    rank: int = 4,
    alpha: float = 8,
    rslora: bool = False,
    **overrides: Any,
) -> Tuned:
    """A tiny model under `folder`/model (or `base`), and an adapter that moves it far."""
    model = base or folder / "model"
    if base is None:
        # Two rope bases (Gemma 3): tiny_model writes all, then looks for the one.
        with suppress(KeyError) if family == "gemma3_text" else nullcontext():
            tiny_model(model, family, **overrides)
    spec = read_spec(model)
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    write_adapter(adapter, spec, rank, alpha, rslora)
    load_tokenizer(model).save(adapter)
    tokenizer = load_tokenizer(adapter, model=model)
    recipe = tiny_recipe(model)
    source = Source(folder, "tiny tuned", recipe, adapter, spec, tokenizer, "chat", chat, None)
    return Tuned(source, alpha / (rank**0.5 if rslora else rank))


def write_adapter(folder: Path, spec: ModelSpec, rank: int, alpha: float, rslora: bool) -> None:
    rng = np.random.default_rng(7)
    weights: dict[str, np.ndarray] = {}
    for name, info in spec.tensors.items():
        if "layers." in name and name.endswith("_proj.weight"):
            out, into = info.shape
            module = f"base_model.model.{name.removesuffix('.weight')}"
            weights[f"{module}.lora_A.weight"] = rng.normal(0, 0.1, (rank, into)).astype(np.float32)
            weights[f"{module}.lora_B.weight"] = rng.normal(0, 0.2, (out, rank)).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config: Mapping[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(spec.folder),
        "r": rank, "lora_alpha": alpha, "use_rslora": rslora, "bias": "none",
        "target_modules": sorted({k.split(".")[-3] for k in weights}), "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def gap(made: Tuned, path: Path, adapter: Path | None = None, wanted: np.ndarray | None = None) -> float:
    """The largest difference, in nats, between llama.cpp on the file and PEFT on the folders."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python: pip install 'burnish[gguf]'")
    from burnish.export.llama import open_llama

    consumer = open_llama(path, adapter)
    try:
        found = consumer.score(IDS)
    finally:
        consumer.close()
    return float(np.abs(found - (made.scores() if wanted is None else wanted)).max())
