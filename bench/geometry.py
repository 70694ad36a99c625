"""Models of true shape with random weights, for measuring speed and memory where no weights can be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from burnish.machine.probe import probe
from burnish.models.spec import ModelSpec, TensorInfo, linears_of
from burnish.planning.plan import DataStats, Plan, make_plan
from burnish.recipe import parse

# Hidden size, layers, heads, key-value heads, intermediate size, vocabulary: the published Qwen2 configs.
QWEN2 = {
    "tiny": (256, 4, 4, 2, 704, 4096),
    "1.5b": (1536, 28, 12, 2, 8960, 151936),
    "7b": (3584, 28, 28, 4, 18944, 152064),
    "14b": (5120, 48, 40, 8, 13824, 152064),
}


def config(name: str) -> Qwen2Config:
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


def random_model(name: str, device: str, dtype: torch.dtype, attention: str) -> Any:
    """The model on its device with random weights of standard deviation 0.02."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config(name), attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)


def plan_for(name: str, length: int, overrides: list[str]) -> Plan:
    """What burnish plans for this model on this machine, every token a target."""
    recipe = parse("data: {loss_on: all}", "bench", [f"train.max_length={length}", *overrides])
    return make_plan(recipe, spec(name), probe(Path.cwd()), DataStats(1, length, length, length))


def spec(name: str) -> ModelSpec:
    c = config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(c)
    tensors = {k: TensorInfo("BF16", tuple(v.shape), "random") for k, v in model.state_dict().items()}
    return ModelSpec(
        Path("random"),
        "qwen2",
        "Qwen2ForCausalLM",
        c.num_hidden_layers,
        c.hidden_size,
        c.intermediate_size,
        c.num_attention_heads,
        QWEN2[name][3],
        c.hidden_size // c.num_attention_heads,
        c.vocab_size,
        c.max_position_embeddings,
        False,
        (),
        tensors,
        linears_of(tensors),
    )


__all__ = ["QWEN2", "plan_for", "random_model", "spec"]
