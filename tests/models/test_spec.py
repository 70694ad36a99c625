"""`read_spec`: what it says of a model, and what it says of a folder that is not one."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from burnish.errors import UserError
from burnish.models.spec import TensorInfo, read_config, read_header, read_spec

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 8,
    "intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10,
    "max_position_embeddings": 64, "eos_token_id": 3,
}


def tensors(head: bool = False) -> dict[str, np.ndarray]:
    made = {"model.embed_tokens.weight": (10, 8), "model.norm.weight": (8,)}
    for i in range(2):
        at = f"model.layers.{i}."
        made |= {f"{at}input_layernorm.weight": (8,), f"{at}post_attention_layernorm.weight": (8,),
                 f"{at}self_attn.q_proj.weight": (8, 8), f"{at}self_attn.k_proj.weight": (4, 8),
                 f"{at}self_attn.v_proj.weight": (4, 8), f"{at}self_attn.o_proj.weight": (8, 8),
                 f"{at}self_attn.q_proj.bias": (8,), f"{at}mlp.gate_proj.weight": (12, 8),
                 f"{at}mlp.up_proj.weight": (12, 8), f"{at}mlp.down_proj.weight": (8, 12)}
    if head:
        made["lm_head.weight"] = (10, 8)
    return {name: np.ones(shape, np.float32) for name, shape in made.items()}


def folder_of(path: Path, *, head: bool = False, **config: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors(head), path / "model.safetensors", {"format": "pt"})
    return path


def parts_of(path: Path, index: bool) -> Path:
    folder_of(path)
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    all_ = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    places = {name: names[i % 3] for i, name in enumerate(all_)}
    for file in names:
        save_file({k: all_[k] for k, f in places.items() if f == file}, path / file)
    if index:
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return path


def with_header(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def test_what_a_spec_says(tmp_path: Path):
    spec = read_spec(folder_of(tmp_path))
    assert (spec.model_type, spec.architecture, spec.n_layers) == ("llama", "LlamaForCausalLM", 2)
    assert (spec.n_heads, spec.n_kv_heads, spec.head_dim) == (4, 2, 2)
    assert (spec.vocab_size, spec.max_positions, spec.eos_ids) == (10, 64, (3,))
    assert spec.attention_linears == ("k_proj", "o_proj", "q_proj", "v_proj")
    assert spec.mlp_linears == ("down_proj", "gate_proj", "up_proj")
    assert spec.linears["self_attn.k_proj"] == (4, 8)  # out, in; norms and biases are not among them
    assert spec.parameters == sum(t.size for t in tensors().values())
    assert spec.weight_bytes == 4 * spec.parameters
    assert spec.tensors["model.norm.weight"] == TensorInfo("F32", (8,), "model.safetensors")


def test_what_a_config_may_leave_out(tmp_path: Path):
    spec = read_spec(folder_of(
        tmp_path, num_key_value_heads=None, intermediate_size=None, eos_token_id=None, architectures=None,
        max_position_embeddings=None,
    ))
    assert (spec.n_kv_heads, spec.intermediate_size, spec.eos_ids) == (4, 32, ())
    assert (spec.architecture, spec.max_positions) == ("", 0)


def test_a_head_dim_of_its_own(tmp_path: Path):
    assert read_spec(folder_of(tmp_path, head_dim=16)).head_dim == 16


def test_a_config_within_a_config(tmp_path: Path):
    assert read_spec(folder_of(tmp_path, text_config={"num_hidden_layers": 5})).n_layers == 5
    assert read_spec(folder_of(tmp_path, text_config=None)).n_layers == 2


@pytest.mark.parametrize(("head", "said", "tied"), [
    (False, None, True), (False, True, True), (True, None, False), (True, False, False),
    (True, True, True),  # some exports store the head of a tied model; it is not read
])
def test_tied(head: bool, said: bool | None, tied: bool, tmp_path: Path):
    assert read_spec(folder_of(tmp_path, head=head, tie_word_embeddings=said)).tied is tied


def test_a_head_that_was_not_downloaded(tmp_path: Path):
    with pytest.raises(UserError, match=r"no lm_head.weight"):
        read_spec(folder_of(tmp_path, tie_word_embeddings=False))


@pytest.mark.parametrize(("generation", "eos"), [
    ({"eos_token_id": [3, 7]}, (3, 7)), ({"eos_token_id": 9}, (9,)),
    ({"eos_token_id": None}, (3,)), ({}, (3,)),
])
def test_every_end_token_of_the_generation_config_counts(generation: dict, eos: tuple, tmp_path: Path):
    folder = folder_of(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    assert read_spec(folder).eos_ids == eos


def test_bfloat16_bytes(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "BF16", "shape": [3, 2], "data_offsets": [0, 12]}}).encode()
    info = read_header(with_header(tmp_path / "m.safetensors", header, b"\0" * 12))["a"]
    assert (info.shape, info.n_bytes) == ((3, 2), 12)


@pytest.mark.parametrize("index", [True, False])
def test_parts(index: bool, tmp_path: Path):
    spec = read_spec(parts_of(tmp_path, index))
    assert spec.parameters == sum(t.size for t in tensors().values())


@pytest.mark.parametrize("index", [True, False])
def test_a_part_that_is_missing_is_named(index: bool, tmp_path: Path):
    folder = parts_of(tmp_path, index)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"not complete(.|\n)*model-00002-of-00003.safetensors"):
        read_spec(folder)


def test_the_same_weights_under_other_names_do_not_count(tmp_path: Path):
    folder = folder_of(tmp_path)
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        save_file({"x": np.ones(1000, np.float32)}, folder / name)
    assert "x" not in read_spec(folder).tensors
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "x" not in read_spec(folder).tensors


@pytest.mark.parametrize("text", ["{", "", "[1]", '"x"', '{"weight_map": {}}', '{"weight_map": 3}', "{}"])
def test_an_index_that_is_not_one(text: str, tmp_path: Path):
    folder = folder_of(tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index.json"):
        read_spec(folder)


def test_a_folder_without_weights(tmp_path: Path):
    (folder_of(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no safetensors files"):
        read_spec(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_file(keep: int, tmp_path: Path):
    file = folder_of(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"not a whole safetensors file|truncated") as e:
        read_spec(tmp_path)
    assert e.value.hint == "download model.safetensors again"


@pytest.mark.parametrize("header", [
    b"{not json", b"\xff\xfe\xfd", b"[1, 2]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}',
    b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}',
])
def test_a_header_that_is_not_one(header: bytes, tmp_path: Path):
    with pytest.raises(UserError, match="header"):
        read_header(with_header(tmp_path / "m.safetensors", header))


def test_a_page_in_place_of_weights(tmp_path: Path):
    (tmp_path / "m.safetensors").write_bytes(b"<!DOCTYPE html><html></html>")
    with pytest.raises(UserError, match=r"not a whole safetensors file"):
        read_header(tmp_path / "m.safetensors")


def test_a_dtype_that_is_not_known(tmp_path: Path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    with pytest.raises(UserError, match=r"not known: F4"):
        read_header(with_header(tmp_path / "m.safetensors", header, b"\0"))


def test_a_config_that_is_not_there_or_not_json(tmp_path: Path):
    with pytest.raises(UserError, match=r"does not exist"):
        read_config(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config.json"):
        read_config(tmp_path)
    for text in ("{", "\x00", ""):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"is not JSON"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"expected a JSON object, got list"):
        read_config(tmp_path)


def test_a_gguf_file_in_place_of_a_folder(tmp_path: Path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"is a file, not a folder") as e:
        read_config(tmp_path / "m.gguf")
    assert "burnish convert" in e.value.hint


def test_a_generation_config_that_is_not_json(tmp_path: Path):
    (folder_of(tmp_path) / "generation_config.json").write_text("{")
    with pytest.raises(UserError, match=r"generation_config.json is not JSON"):
        read_spec(tmp_path)


def test_everything_that_is_missing_is_said_at_once(tmp_path: Path):
    folder = folder_of(tmp_path, hidden_size=None, vocab_size=None)
    with pytest.raises(UserError, match=r"hidden_size is missing(.|\n)*vocab_size is missing"):
        read_spec(folder)
