"""Models of true shape with random weights, for measuring speed and memory where no weights can be had.

    python bench/geometry.py tiny-wide FOLDER

writes one, for what reads a model from a disk.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from burnish.machine.probe import probe
from burnish.models.geometry import spec_from_config
from burnish.models.spec import ModelSpec
from burnish.planning.engine import MARGIN
from burnish.planning.plan import DataStats, Plan, make_plan
from burnish.recipe import parse

# Hidden size, layers, heads, key-value heads, intermediate size, vocabulary: the published Qwen2 configs.
QWEN2 = {
    "tiny": (256, 4, 4, 2, 704, 4096),
    "tiny-wide": (1024, 6, 16, 4, 2816, 8192),
    "tiny-deep": (512, 24, 8, 8, 1408, 32000),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
    "7b": (3584, 28, 28, 4, 18944, 152064),
    "14b": (5120, 48, 40, 8, 13824, 152064),
    "32b": (5120, 64, 40, 8, 27648, 152064),
}


def config(name: str) -> Any:
    from transformers import Qwen2Config

    hidden, layers, heads, kv, inner, words = QWEN2[name]
    return Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        intermediate_size=inner,
        vocab_size=words,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )


def random_model(name: str, device: str, dtype: Any, attention: str) -> Any:
    """The model on its device with random weights of standard deviation 0.02, as transformers makes it."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config(name), attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)


def random_folder(name: str, folder: Path) -> Path:
    """The same in float32 as a model's folder (without a tokenizer), for what reads weights from a disk."""
    import torch

    random_model(name, "cpu", torch.float32, "eager").save_pretrained(str(folder))
    return folder


def random_nf4(name: str, device: str, dtype: Any, attention: str) -> Any:
    """The same with its decoder layers' linear layers packed in NF4, as transformers loads them."""
    from importlib import import_module

    from torch import nn

    bnb: Any = import_module("bitsandbytes")

    model = random_model(name, device, dtype, attention)
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for leaf, linear in list(parent.named_children()):
                if type(linear) is nn.Linear:
                    packed = bnb.nn.Linear4bit(
                        linear.in_features, linear.out_features, linear.bias is not None, dtype, False,
                        "nf4", device="meta",
                    )  # fmt: skip
                    weight = bnb.nn.Params4bit(
                        linear.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4"
                    )
                    packed.weight, packed.bias = weight, linear.bias
                    packed.weight = weight.to(device)
                    setattr(parent, leaf, packed)
    return model


def plan_for(name: str, length: int, overrides: list[str], budget_bytes: int = 0) -> Plan:
    """What burnish plans for this model on this machine, every token a target.

    budget_bytes: of GPU memory, as if no more were there.
    """
    recipe = parse("data: {loss_on: all}", "bench", [f"train.max_length={length}", *overrides])
    machine = probe(Path.cwd())
    if budget_bytes:
        free = int(budget_bytes / (1 - MARGIN["cuda"]))
        machine = replace(machine, gpus=tuple(replace(g, free_bytes=free) for g in machine.gpus))
    return make_plan(recipe, spec(name), machine, DataStats(1, length, length, length))


def spec(name: str) -> ModelSpec:
    hidden, layers, heads, kv, inner, words = QWEN2[name]
    return spec_from_config(
        {
            "model_type": "qwen2", "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": inner,
            "vocab_size": words, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        },
        Path("random"),
    )  # fmt: skip


__all__ = ["QWEN2", "plan_for", "random_folder", "random_model", "random_nf4", "spec"]

if __name__ == "__main__":
    random_folder(sys.argv[1], Path(sys.argv[2]))
