"""The model, the adapter and the rows that a selftest is made with: small, random, the same everywhere.

    write_world(place, GPU)
    read_size(place), examples(size)

The model is a Qwen2 (biases, grouped queries with heads of 64, tied embeddings), with every weight drawn wide
enough that logits are far from uniform: a term left out must show. Weights are exact in bfloat16, so that one
folder means the same in either precision. The adapter's B is not zero: of a fresh adapter half of the
gradients are. All is written without a framework.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np

from burnish.backends import adapter_folder
from burnish.backends.adapter_folder import State
from burnish.data.batches import Example
from burnish.models.folder import header_of, write_json
from burnish.models.weights import narrowed, widened
from burnish.planning.plan import Plan

MODEL, START, DATA, SIZE = "model", "start", "data.jsonl", "size.json"
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
STOP = 2  # <|im_end|>
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = (("red", "apple pie"), ("blue", "deep sea"), ("green", "oak tree"), ("white", "cold snow"))
HEAD = 64
THETA = 50_000.0  # far from every default, so that a reader that misses it is found out
LETTERS = "abcdefghijklmnopqrstuvwxyz"
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Size:
    """Widths are multiples of 64: packing in 4 bits goes by groups of so many."""

    hidden: int
    intermediate: int
    layers: int
    kv_heads: int
    vocab: int
    rows: tuple[int, ...]  # tokens of the examples
    long: int  # tokens of the long row
    many: int  # such rows, to measure memory and speed with
    answer: int  # tokens that are generated


# For a CPU against the NumPy reference, and for a GPU. The long row is several of the blocks of queries that
# MLX's attention goes through (64 on a CPU; 2,048 positions of 6 heads are four on a GPU).
CPU = Size(128, 320, 4, 1, 1024, (97, 70, 45, 20), 401, 6, 10)
GPU = Size(384, 1024, 6, 2, 4096, (257, 193, 130, 65), 2049, 4, 16)


def write_world(place: Path, size: Size) -> None:
    """Everything that the checks read, into a folder that is there and empty."""
    model = place / MODEL
    model.mkdir()
    write_model(model, config_of(size), _weights(size))
    _write_tokenizer(model, size.vocab)
    rows = [json.dumps({"prompt": p, "completion": c}) for p, c in PAIRS]
    (place / DATA).write_text("\n".join(rows) + "\n", encoding="utf-8")
    write_json(place / SIZE, asdict(size))


def write_start(place: Path, plan: Plan) -> None:
    """The adapter that every comparison starts from, with the optimizer at rest."""
    rng, folder = np.random.default_rng(2), place / START
    shapes = adapter_folder.shapes(plan)
    drawn = {
        k: rng.normal(0, 0.1 if ".lora_B." in k else shape[1] ** -0.5, shape).astype(np.float32)
        for k, shape in shapes.items()
    }
    zeros = {k: np.zeros(shape, np.float32) for k, shape in shapes.items()}
    folder.mkdir()
    adapter_folder.write(folder, plan, State(drawn, zeros, zeros, 0))


def read_size(place: Path) -> Size:
    told = json.loads((place / SIZE).read_text(encoding="utf-8"))
    return Size(**{**told, "rows": tuple(told["rows"])})


def examples(size: Size) -> list[Example]:
    """Random tokens; most are targets, weighted 0.5, 1 or 2."""
    return [_example(np.random.default_rng([3, i]), n, size.vocab) for i, n in enumerate(size.rows)]


def long_example(size: Size) -> Example:
    return _example(np.random.default_rng(4), size.long, size.vocab)


def prompts(size: Size) -> list[list[int]]:
    rng = np.random.default_rng(5)
    return [rng.integers(len(SPECIALS), size.vocab, n).tolist() for n in (23, 1, 9)]


def write_model(folder: Path, config: Mapping[str, Any], weights: Arrays, dtype: str = "bfloat16") -> None:
    """dtype: 'bfloat16' or 'float32', what the file holds."""
    stored, name = {k: narrowed(v, dtype) for k, v in weights.items()}, {"bfloat16": "BF16", "float32": "F32"}
    sized = ((k, name[dtype], v.shape, v.nbytes) for k, v in stored.items())
    with (folder / "model.safetensors").open("wb") as f:
        f.write(header_of(sized, {"format": "pt"}))
        for array in stored.values():
            f.write(array.tobytes())
    write_json(folder / "config.json", {**config, "dtype": dtype})


def config_of(size: Size) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // HEAD,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "rope_theta": THETA,  # readers of before transformers 5 look for it here
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "bos_token_id": None,
        "eos_token_id": STOP,
        "pad_token_id": 0,
    }


def _weights(size: Size) -> dict[str, np.ndarray]:
    rng, found = np.random.default_rng(1), {}
    for name, shape in _shapes(size).items():
        if len(shape) == 2:
            wide = 2 if "embed" in name else 1  # logits with a deviation of about 2
            values = rng.normal(0, wide / math.sqrt(shape[1]), shape)
        else:
            values = rng.normal(1 if "norm" in name else 0, 0.1, shape)
        found[name] = widened(narrowed(values.astype(np.float32), "bfloat16"))
    return found


def _shapes(size: Size) -> dict[str, tuple[int, ...]]:
    wide, mid, kv = size.hidden, size.intermediate, size.kv_heads * HEAD
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size.vocab, wide)}
    layer = {
        "input_layernorm.weight": (wide,),
        "self_attn.q_proj.weight": (wide, wide),
        "self_attn.q_proj.bias": (wide,),
        "self_attn.k_proj.weight": (kv, wide),
        "self_attn.k_proj.bias": (kv,),
        "self_attn.v_proj.weight": (kv, wide),
        "self_attn.v_proj.bias": (kv,),
        "self_attn.o_proj.weight": (wide, wide),
        "post_attention_layernorm.weight": (wide,),
        "mlp.gate_proj.weight": (mid, wide),
        "mlp.up_proj.weight": (mid, wide),
        "mlp.down_proj.weight": (wide, mid),
    }
    for i in range(size.layers):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (wide,)}


def _example(rng: np.random.Generator, length: int, vocab: int) -> Example:
    weights = rng.choice([0.5, 1.0, 2.0], length) * (rng.random(length) < 0.7)
    weights[0], weights[-1] = 0, 1
    return Example(rng.integers(len(SPECIALS), vocab, length).astype(np.int32), weights.astype(np.float32))


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE of so many words, all of which decode: bytes, pairs of letters, and threes of them."""
    words = [*SPECIALS, *_byte_letters()]
    merges = list(islice(_merges(), vocab_size - len(words)))
    words += [a + b for a, b in merges]
    assert len(set(words)) == vocab_size, f"{len(set(words))} words of {vocab_size}"
    special = [
        {"id": i, "content": word, "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
        for i, word in enumerate(SPECIALS)
    ]  # fmt: skip
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {word: i for i, word in enumerate(words)}, "merges": [list(m) for m in merges],
    }  # fmt: skip
    write_json(
        folder / "tokenizer.json",
        {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
            "normalizer": None, "pre_tokenizer": by_bytes, "post_processor": None, "decoder": by_bytes,
            "model": model,
        },
    )  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[STOP], "pad_token": SPECIALS[0],
        "clean_up_tokenization_spaces": False, "model_max_length": 4096, "chat_template": CHATML,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in byte-level BPE: itself where it is printable, else one of
    those from 256 on.
    """
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(others)) for b in range(256)]


def _merges() -> Iterator[tuple[str, str]]:
    pairs = [a + b for a, b in product(LETTERS, LETTERS)]
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from product(pairs, LETTERS)
