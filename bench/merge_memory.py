"""Memory and time of merging an adapter into a large model: what writing a Hugging Face folder takes.

    python bench/merge_memory.py /big/disk                       # 14B: 28 GiB for the base, 28 for the merged
    python bench/merge_memory.py /big/disk --geometry 7b --layers 12 --dtype float16

A random Qwen2 of that shape in bfloat16 (a tensor's numbers are those of one block of random numbers, each
tensor from another place in it) and a random adapter of rank 16 on all seven projections are written to the
disk given, merged in a process of their own by `write_hf`, and rows of some tensors are read back and held
against W + s·B·A computed here. It prints one JSON line: seconds, the process's resident peak (what it holds
before it merges, libraries included, is `before`), bytes written, the largest error in units of the last
place of bfloat16. All that was written is removed again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from safetensors.numpy import save_file

from alone import alone, peak_bytes, say
from burnish.export.adapter import Adapter, read_adapter
from burnish.export.hf import hf_bytes, write_hf
from burnish.export.merged import Merged
from burnish.models.folder import SHARD_BYTES, header_of, shards_of, write_index, write_json
from burnish.models.spec import ModelSpec, read_spec
from burnish.models.tokenizer import load_tokenizer
from burnish.models.weights import Weights, narrowed
from geometry import QWEN2

MIB, RANK, ALPHA = 2**20, 16, 32
BLOCK = 24_000_001  # numbers; no row is a divisor of it, so rows of one tensor differ
THETA, SPARE_BYTES = 1e6, 2 << 30
FLOAT32 = 2.0**-22  # what a sum of seventeen terms in float32 may lose of each
Shapes = dict[str, tuple[int, ...]]


def tensor_shapes(geometry: str, layers: int) -> Shapes:
    hidden, _, heads, kv, inner, words = QWEN2[geometry]
    kv_width = kv * hidden // heads
    shapes: Shapes = {"model.embed_tokens.weight": (words, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
        for name, out in (("q", hidden), ("k", kv_width), ("v", kv_width)):
            shapes |= {f"{at}.self_attn.{name}_proj.weight": (out, hidden)}
            shapes |= {f"{at}.self_attn.{name}_proj.bias": (out,)}
        shapes |= {f"{at}.self_attn.o_proj.weight": (hidden, hidden)}
        shapes |= {f"{at}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (hidden, inner)}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}


def write_base(folder: Path, geometry: str, layers: int) -> ModelSpec:
    hidden, _, heads, kv, inner, words = QWEN2[geometry]
    shapes = tensor_shapes(geometry, layers)
    sizes = {name: 2 * int(np.prod(shape)) for name, shape in shapes.items()}
    drawn = np.random.default_rng(0).standard_normal(BLOCK, np.float32) * np.float32(0.02)
    block, shards = narrowed(drawn, "bfloat16"), shards_of(sizes, SHARD_BYTES)
    places = {name: i * 7919 % BLOCK for i, name in enumerate(shapes)}
    for file, names in shards.items():
        with (folder / file).open("wb") as f:
            f.write(header_of(((n, "BF16", shapes[n], sizes[n]) for n in names), {"format": "pt"}))
            for name in names:
                for piece in around(block, places[name], sizes[name] // 2):
                    f.write(piece.tobytes())
    write_index(folder, shards, sum(sizes.values()))
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": inner, "vocab_size": words, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "rope_theta": THETA, "tie_word_embeddings": False, "dtype": "bfloat16",
        "eos_token_id": 1,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_tokenizer(folder)
    return read_spec(folder)


def around(block: np.ndarray, at: int, count: int) -> Iterator[np.ndarray]:
    """`count` numbers of the block from `at` on, beginning again where it ends."""
    while count:
        piece = block[at : at + count]
        yield piece
        at, count = 0, count - len(piece)


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner, alphabet = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    inner.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet)
    inner.train_from_iterator(["burnish"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(str(folder))


def write_adapter_of(base: ModelSpec, folder: Path) -> None:
    rng, tensors = np.random.default_rng(1), {}
    for i in range(base.n_layers):
        for name, (out, into) in base.linears.items():
            at = f"base_model.model.model.layers.{i}.{name}"
            for leaf, shape in (("lora_A", (RANK, into)), ("lora_B", (out, RANK))):
                drawn = rng.standard_normal(shape, np.float32) * np.float32(0.05)
                tensors[f"{at}.{leaf}.weight"] = drawn
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    write_json(folder / "adapter_config.json", config)


def merge(base: Path, adapter: Path, out: Path, dtype: str) -> dict[str, Any]:
    spec = read_spec(base)
    source = SimpleNamespace(tokenizer=load_tokenizer(base))  # all that write_hf asks a source for
    before, began = peak_bytes(), time.monotonic()
    write_hf(Merged(spec, adapter), cast(Any, source), out, dtype)
    return {
        "seconds": round(time.monotonic() - began, 1),
        "peak_mib": round(peak_bytes() / MIB),
        "before_mib": round(before / MIB),
    }


def largest_error(base: ModelSpec, out: ModelSpec, adapter: Adapter) -> float:
    """Of rows at both ends and in the middle of some tensors, in units of the last place of bfloat16: half
    of one is a single rounding.
    """
    old, new, worst = Weights(base), Weights(out), 0.0
    last = base.n_layers - 1
    names = [
        f"model.layers.{i}.{linear}.weight" for i in sorted({0, last // 2, last}) for linear in base.linears
    ]
    for name in (*names, "model.embed_tokens.weight", "lm_head.weight"):
        rows = base.tensors[name].shape[0]
        for at in (0, rows // 2, rows - 8):
            expected = old.rows(name, at, at + 8).astype(np.float64)
            lost = FLOAT32 * np.abs(expected)
            own = adapter.modules.get(name.removesuffix(".weight"))
            if own is not None:
                b, a = own[1][at : at + 8].astype(np.float64), own[0].astype(np.float64)
                expected += ALPHA / RANK * b @ a
                lost += FLOAT32 * ALPHA / RANK * np.abs(b) @ np.abs(a)
            unit = np.exp2(np.floor(np.log2(np.abs(expected) + 1e-30)) - 7)
            # Where terms nearly cancel, what float32 lost of them is more than the last place of the rest.
            error = np.abs(new.rows(name, at, at + 8) - expected) - lost
            worst = max(worst, float((error / unit).max()))
    return worst


def run(place: Path, geometry: str, layers: int, dtype: str) -> dict[str, Any]:
    folders = {name: place / name for name in ("base", "adapter", "merged")}
    for folder in folders.values():
        folder.mkdir()
    base = write_base(folders["base"], geometry, layers)
    write_adapter_of(base, folders["adapter"])
    row = {"geometry": geometry, "layers": layers, "parameters": base.parameters, "dtype": dtype}
    row |= alone(merge, folders["base"], folders["adapter"], folders["merged"], dtype)
    merged = read_spec(folders["merged"])
    assert {n: t.shape for n, t in merged.tensors.items()} == {n: t.shape for n, t in base.tensors.items()}
    files = sorted(folders["merged"].glob("*.safetensors"))
    row |= {"bytes": sum(f.stat().st_size for f in files), "files": len(files)}
    if dtype in ("auto", "bfloat16"):
        row["error_bf16_ulp"] = round(largest_error(base, merged, read_adapter(folders["adapter"])), 4)
    assert row["bytes"] >= hf_bytes(base, dtype)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("place", type=Path, help="a folder on a disk with room for the model twice")
    parser.add_argument("--geometry", choices=QWEN2, default="14b")
    parser.add_argument("--layers", type=int, help="fewer, where the disk is too small")
    parser.add_argument("--dtype", default="auto")
    asked = parser.parse_args()
    layers = asked.layers or QWEN2[asked.geometry][1]
    numbers = sum(int(np.prod(s)) for s in tensor_shapes(asked.geometry, layers).values())
    needed_bytes = numbers * (2 + (4 if asked.dtype == "float32" else 2)) + SPARE_BYTES
    free_bytes = shutil.disk_usage(asked.place).free
    if free_bytes < needed_bytes:
        sys.exit(
            f"{asked.place} has {free_bytes >> 30} GiB free, {needed_bytes >> 30} are needed: try --layers"
        )
    with tempfile.TemporaryDirectory(dir=asked.place, prefix="merge-") as place:
        say(run(Path(place), asked.geometry, layers, asked.dtype))


if __name__ == "__main__":
    main()
