"""Base + adapter as tensors: PEFT's own merge says what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from burnish.errors import UserError
from burnish.export.adapter import read_adapter
from burnish.export.merged import Merged
from burnish.models.spec import read_spec
from tests.export.gguf_world import whole
from tests.tiny import tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter that PEFT itself makes and saves, with random A and B. settings: LoraConfig's."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    asked = {"r": 4, "lora_alpha": 10, "target_modules": ALL, "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(stock, LoraConfig(**asked))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.empty_like(p).normal_(0, 0.15, generator=generator))
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def peft_model(base: Path, adapter: Path) -> Any:
    """transformers and PEFT alone, float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    return PeftModel.from_pretrained(stock, str(adapter)).eval()


def change_config(folder: Path, name: str, **settings: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


CASES = {
    "qwen2": ("qwen2", {}, {}),
    "llama untied, grouped heads": ("llama", {"tied": False}, {}),
    "llama tied": ("llama", {"tied": True}, {}),
    "mistral": ("mistral", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "one head of keys": ("llama", {"num_key_value_heads": 1}, {}),
    "rslora": ("qwen2", {}, {"use_rslora": True}),
    "last layer only": ("llama", {}, {"layers_to_transform": [2], "layers_pattern": "layers"}),
    "attention only": ("qwen2", {}, {"target_modules": ["q_proj", "v_proj"]}),
    "wide rank": ("llama", {}, {"r": 16, "lora_alpha": 8}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_that_of_pefts_merge(case: str, tmp_path: Path):
    family, model, lora = CASES[case]
    base = tiny_model(tmp_path / "base", family, **model)
    adapter = peft_adapter(base, tmp_path / "adapter", **lora)
    merged = Merged(read_spec(base), adapter)
    theirs = peft_model(base, adapter).merge_and_unload().state_dict()
    stored = load_file(base / "model.safetensors")
    changed = 0
    for name in merged.base.tensors:
        found = whole(merged, name)
        np.testing.assert_allclose(found, theirs[name].numpy(), atol=1e-6, err_msg=name)
        changed += bool(np.abs(found - stored[name]).max() > 1e-3)
    assert merged.base.tensors.keys() == stored.keys()
    assert changed == len(merged.adapter.modules) > 0


def test_the_scale_is_told_apart(tmp_path: Path):
    """alpha / rank is 2.5 here, alpha / √rank 5."""
    base = tiny_model(tmp_path / "base")
    assert read_adapter(peft_adapter(base, tmp_path / "a")).scale == 2.5
    assert read_adapter(peft_adapter(base, tmp_path / "b", use_rslora=True)).scale == 5.0


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 32 * 5, 4 * 32 * 7, 1 << 20])
def test_chunks_are_the_rows_in_order(chunk_bytes: int, tmp_path: Path):
    base = tiny_model(tmp_path / "base")
    merged = Merged(read_spec(base), peft_adapter(base, tmp_path / "adapter"))
    name = "model.layers.1.mlp.gate_proj.weight"
    chunks = list(merged.chunks(name, chunk_bytes))
    assert all(c.dtype == np.float32 and c.nbytes <= max(chunk_bytes, 4 * 32) for c in chunks)
    assert len(chunks) == -(-48 // max(1, chunk_bytes // (4 * 32)))
    np.testing.assert_allclose(np.concatenate(chunks), whole(merged, name), atol=1e-6)


def test_a_scaled_adapter_changes_that_much_more(tmp_path: Path):
    base = tiny_model(tmp_path / "base")
    adapter, name = (
        read_adapter(peft_adapter(base, tmp_path / "adapter")),
        "model.layers.0.mlp.up_proj.weight",
    )
    start = load_file(base / "model.safetensors")[name]
    once = whole(Merged(read_spec(base), adapter), name) - start
    twice = whole(Merged(read_spec(base), adapter.scaled(2)), name) - start
    np.testing.assert_allclose(twice, 2 * once, atol=1e-6)


# --- what is refused ---


def pack(folder: Path) -> None:
    """One weight as MLX packs it to 4 bits, and the config that says so."""
    path, name = folder / "model.safetensors", "model.layers.0.self_attn.q_proj"
    tensors = load_file(path)
    tensors[f"{name}.weight"] = np.zeros((32, 4), np.uint32)
    tensors |= {f"{name}.{leaf}": np.ones((32, 1), np.float32) for leaf in ("scales", "biases")}
    save_file(tensors, path, {"format": "pt"})
    change_config(folder, "config.json", quantization={"bits": 4, "group_size": 32})


def test_a_packed_base_is_refused(tmp_path: Path):
    base = tiny_model(tmp_path / "base")
    adapter = peft_adapter(base, tmp_path / "adapter")
    pack(base)
    with pytest.raises(UserError, match="packed to 4 bits") as e:
        Merged(read_spec(base), adapter)
    assert "--base" in e.value.hint


def test_another_models_adapter_is_refused_with_every_place(tmp_path: Path):
    base = tiny_model(tmp_path / "base", num_hidden_layers=2)
    other = tiny_model(tmp_path / "other", intermediate_size=64)
    with pytest.raises(UserError) as e:
        Merged(read_spec(base), peft_adapter(other, tmp_path / "adapter", target_modules=["up_proj"]))
    assert "model.layers.0.mlp.up_proj: expected (out, in) (48, 32), got (64, 32)" in e.value.message
    assert "model.layers.2.mlp.up_proj: the base has no such weight" in e.value.message


def test_a_head_that_is_stored_but_tied_takes_no_adapter(tmp_path: Path):
    """Readers take the embedding matrix: the change would be lost without a word."""
    base = tiny_model(tmp_path / "base", "llama", tied=False)
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    Merged(read_spec(base), adapter)  # of its own: fine
    change_config(base, "config.json", tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head: the head is the embedding matrix"):
        Merged(read_spec(base), adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True}, {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 8}},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]}, {"fan_in_fan_out": True}, {"alora_invocation_tokens": [5]},
        {"init_lora_weights": "pissa_niter_4"}, {"peft_type": "IA3"}, {"r": 8},
    ],
)  # fmt: skip
def test_what_is_not_one_plain_product_is_refused(settings: dict[str, Any], tmp_path: Path):
    base = tiny_model(tmp_path / "base")
    adapter = peft_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    change_config(adapter, "adapter_config.json", **settings)
    with pytest.raises(UserError):
        read_adapter(adapter)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_folder_without_its_files_is_no_adapter(name: str, tmp_path: Path):
    adapter = peft_adapter(tiny_model(tmp_path / "base"), tmp_path / "adapter")
    (adapter / name).unlink()
    with pytest.raises(UserError, match=f"holds no {name}"):
        read_adapter(adapter)


def test_a_cut_file_is_a_sentence(tmp_path: Path):
    adapter = peft_adapter(tiny_model(tmp_path / "base"), tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_adapter(adapter)
