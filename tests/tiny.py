"""Tiny models, tokenizers, plans and batches, built in the test that needs them.

    folder = tiny_model(tmp_path / "model", family="qwen3")
    plan = tiny_plan(folder, backend="reference", lora={"rank": 4}, train={"keep_layers": 0})
    learner = burnish.backends.open(plan)

Every weight is drawn, norms and biases included, wide enough that logits are far from uniform: a term left
out of an implementation must show. Building one takes some 20 ms once transformers is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from burnish.data.batches import Batch, Example
from burnish.data.batches import collate_rows as packed
from burnish.machine.probe import Gpu, Machine
from burnish.models.spec import read_spec
from burnish.planning.plan import DataStats, Plan, make_plan
from burnish.recipe import Recipe

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "the model answers the question", "a list of the words that the tokenizer should merge",
    "user assistant system", "question and answer and answer and question", "1 2 3 10 20 30 100",
)
MACHINE = Machine(
    system="Linux", release="6.1", arch="x86_64", python_arch="x86_64", python="3.11.0", chip="CPU", cores=2,
    ram_bytes=8 << 30, free_ram_bytes=6 << 30, free_disk_bytes=100 << 30, unified=False, cpu_bfloat16=False,
    gpu_bfloat16=False, gpus=(), versions={"mlx": "0.32.4", "mlx-lm": "0.32.2"},
)
GPU = Gpu("any", "cuda", 8 << 30, 8 << 30)


def tiny_tokenizer(folder: Path, vocab_size: int = 280) -> Path:
    """A byte-level BPE with ChatML, saved into `folder`; ids 0, 1, 2 are the special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    inner.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIALS[2], pad_token=SPECIALS[0],
        additional_special_tokens=[SPECIALS[1]], clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(folder))
    return folder


def tiny_model(
    folder: Path, family: str = "qwen2", tied: bool | None = None, seed: int = 0, **overrides: Any
) -> Path:
    """A random model folder with tokenizer. tied: None ties Qwen2 and Qwen3, as their small models are.

    `overrides` are keys of transformers' config (hidden_size, num_hidden_layers, sliding_window, …).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    theta = 50_000.0  # far from every default, so that a reader that misses it is found out
    keys = {
        "vocab_size": 280, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": family in ("qwen2", "qwen3") if tied is None else tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0, "dtype": "float32",
    }
    if family == "qwen3":
        keys["head_dim"] = 16  # not hidden / heads, as in Qwen3
    config = AutoConfig.for_model(family, **{**keys, **overrides})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.empty_like(p).normal_(0, 0.2, generator=generator)
            p.copy_(1 + 0.5 * drawn if "norm" in name else drawn)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    tiny_tokenizer(folder, config.vocab_size)
    path = folder / "config.json"
    saved = json.loads(path.read_text())
    # Readers of before transformers 5 look for it there.
    saved["rope_theta"] = saved["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(saved, indent=2))
    return folder


def tiny_recipe(model: Path, **overrides: Any) -> Recipe:
    """A recipe for `model`. Sections are merged: tiny_recipe(m, train={"lr": 1e-2}, device="cpu")."""
    asked: dict[str, Any] = {
        "model": str(model), "device": "cpu", "dtype": "float32",
        "lora": {"rank": 4, "alpha": 8},
        "train": {"batch_size": 8, "micro_batch": 8, "max_length": 64, "lr": 0.01, "seed": 5,
                  "keep_layers": 0},
    }
    for key, value in overrides.items():
        asked[key] = {**asked.get(key, {}), **value} if isinstance(value, Mapping) else value
    return Recipe.model_validate(asked)


def tiny_plan(model: Path, stats: DataStats | None = None, **overrides: Any) -> Plan:
    """The plan of `tiny_recipe` on a fixed two-core machine; with a GPU only where `device` asks for one."""
    recipe = tiny_recipe(model, **overrides)
    machine = MACHINE
    if recipe.device == "cuda":
        machine = replace(MACHINE, gpus=(GPU,), versions={**MACHINE.versions, "mlx-cuda-13": "0.32.4"})
    if recipe.device in ("mps", "metal"):
        machine = replace(MACHINE, gpus=(replace(GPU, kind="metal"),))
    return make_plan(recipe, read_spec(model), machine, stats)


def random_example(rng: np.random.Generator, length: int, vocab: int, trained: float = 0.6) -> Example:
    """Random tokens; about that share are targets, the last one always, with weights of 0.5, 1 or 2."""
    weights = rng.choice([0.5, 1.0, 2.0], length) * (rng.random(length) < trained)
    weights[0], weights[-1] = 0, 1
    return Example(rng.integers(3, vocab, length).astype(np.int32), weights.astype(np.float32))


def random_batch(rng: np.random.Generator, rows: int, length: int, vocab: int, segments: int = 1) -> Batch:
    """`rows` rows of `length` positions, each of `segments` examples of any length; most end in padding."""
    made = []
    for row in range(rows):
        room = length - int(rng.integers(0, max(1, length // 4)))
        room = length if row == 0 else max(room, 2 * segments)
        cuts = 2 * np.sort(rng.choice(np.arange(1, room // 2), segments - 1, replace=False))
        sizes = np.diff([0, *cuts, room])
        made.append([random_example(rng, int(n) + 1, vocab) for n in sizes])
    return packed(made, length)


def take(batch: Batch, rows: slice | Sequence[int]) -> Batch:
    """Some rows of a batch."""
    keep = rows if isinstance(rows, slice) else list(rows)
    return Batch(
        batch.tokens_BT[keep], batch.targets_BT[keep], batch.weights_BT[keep], batch.segments_BT[keep],
        batch.positions_BT[keep],
    )
