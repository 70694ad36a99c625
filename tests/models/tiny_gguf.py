"""GGUF files made from tiny Hugging Face folders, the way llama.cpp's convert_hf_to_gguf.py makes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's `permute`: the two halves of each head's rows, one of each in turn."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[stem]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def tiny_tokens(folder: Path, vocab_size: int) -> dict[str, Any]:
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = saved["model"]["vocab"] | {t["content"]: t["id"] for t in saved["added_tokens"]}
    tokens, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [5] * vocab_size
    for token, i in vocab.items():
        tokens[i], kinds[i] = token, 1
    for t in saved["added_tokens"]:
        kinds[t["id"]] = 3
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "kinds": kinds, "template": template,
            "merges": [m if isinstance(m, str) else " ".join(m) for m in saved["model"]["merges"]]}


def write_gguf(
    folder: Path,
    path: Path,
    *,
    arch: str | None = None,
    permute: bool = True,
    quant: gguf.GGMLQuantizationType | None = None,
    tokens: Mapping[str, Any] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """The model of `folder` as one GGUF file. change: edits the tensors by GGUF name; more: adds keys."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = "llama" if config["model_type"] == "mistral" else config["model_type"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    w = gguf.GGUFWriter(path, arch or family)
    w.add_block_count(config["num_hidden_layers"])
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        w.add_key_length(config["head_dim"])
    _add_tokens(w, tokens or tiny_tokens(folder, config["vocab_size"]))
    tensors: dict[str, np.ndarray] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if family == "llama" and permute and ("q_proj" in name or "k_proj" in name):
            value = interleaved(value, heads if "q_proj" in name else kv)
        tensors[gguf_name(name)] = value
    change(tensors)
    for name, value in tensors.items():
        if quant is not None and value.ndim == 2 and value.shape[1] % 32 == 0:  # whole blocks
            w.add_tensor(name, quantize(value, quant), raw_dtype=quant)
        else:
            w.add_tensor(name, np.ascontiguousarray(value))
    more(w)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def _add_tokens(w: gguf.GGUFWriter, tokens: Mapping[str, Any]) -> None:
    w.add_tokenizer_model(tokens["model"])
    w.add_token_list(tokens["tokens"])
    w.add_token_types(tokens["kinds"])
    if "pre" in tokens:
        w.add_tokenizer_pre(tokens["pre"])
        w.add_token_merges(tokens["merges"])
    if "scores" in tokens:
        w.add_token_scores(tokens["scores"])
    if tokens.get("template"):
        w.add_chat_template(tokens["template"])
    w.add_eos_token_id(tokens.get("eos", 2))
    w.add_pad_token_id(tokens.get("pad", 0))
    if "bos" in tokens:
        w.add_bos_token_id(tokens["bos"])
    if "unk" in tokens:
        w.add_unk_token_id(tokens["unk"])
