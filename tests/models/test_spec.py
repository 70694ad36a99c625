"""`read_spec`: what it says of a model, and what it says of a folder that is not one."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from burnish.errors import UserError
from burnish.models.quantized import Quantization
from burnish.models.rope import with_rope_said_twice
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


# ---- folders that are packed


PACKED = {**CONFIG, "hidden_size": 128, "intermediate_size": 256, "vocab_size": 32}


def packed_folder(path: Path, quantization: Any = None, bits: Mapping[str, int] | None = None, **config: Any):
    """As mlx-lm stores it; bits: of modules that are not packed to 4."""
    shapes = {"model.embed_tokens": (32, 128), "lm_head": (32, 128)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.q_proj": (128, 128), f"{at}self_attn.k_proj": (64, 128),
                   f"{at}mlp.down_proj": (128, 256), f"{at}mlp.switch_mlp.up_proj": (4, 64, 128)}
    made: dict[str, np.ndarray] = {"model.norm.weight": np.ones(128, np.float16),
                                   "model.layers.0.self_attn.q_proj.bias": np.ones(128, np.float16)}
    for name, shape in shapes.items():
        n_bits = (bits or {}).get(name, 4)
        if n_bits == 16:
            made[f"{name}.weight"] = np.ones(shape, np.float16)
            continue
        made[f"{name}.weight"] = np.zeros((*shape[:-1], shape[-1] * n_bits // 32), np.uint32)
        made |= {f"{name}.{k}": np.ones((*shape[:-1], shape[-1] // 64), np.float16)
                 for k in ("scales", "biases")}
    path.mkdir(parents=True, exist_ok=True)
    said = {"group_size": 64, "bits": 4} if quantization is None else quantization
    whole = {**PACKED, "tie_word_embeddings": False, "quantization": said, **config}
    (path / "config.json").write_text(json.dumps(whole))
    save_file(made, path / "model.safetensors", {"format": "mlx"})
    return path, sum(int(np.prod(s)) for s in shapes.values()) + 2 * 128, made


@pytest.mark.parametrize("said", [None, {"group_size": 64, "bits": 4, "mode": "affine"}])
def test_a_packed_folder(said: Any, tmp_path: Path):
    folder, parameters, made = packed_folder(tmp_path, said)
    spec = read_spec(folder)
    assert spec.quantization == Quantization(bits=4, group_size=64)
    assert spec.linears == {
        "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "mlp.down_proj": (128, 256),
    }
    assert spec.parameters == parameters
    assert spec.weight_bytes == sum(a.nbytes for a in made.values())
    assert spec.tensors["model.layers.0.self_attn.q_proj.weight"].dtype == "U32"


def test_a_folder_of_mixed_bits(tmp_path: Path):
    """Some modules named in the config, one that is not packed, one that only its shape tells of."""
    eight = {"group_size": 64, "bits": 8}
    said = {"group_size": 64, "bits": 4, "lm_head": eight, "model.embed_tokens": False}
    bits = {"lm_head": 8, "model.embed_tokens": 16, "model.layers.1.self_attn.k_proj": 6}
    folder, parameters, _ = packed_folder(tmp_path, said, bits)
    spec = read_spec(folder)
    assert spec.quantization == Quantization(4, 64)
    assert spec.unpacked["lm_head.weight"] == (32, 128)
    assert spec.unpacked["model.layers.1.self_attn.k_proj.weight"] == (64, 128)
    assert "model.embed_tokens.weight" not in spec.unpacked
    assert spec.parameters == parameters


def test_the_most_common_bits_are_those_of_the_folder(tmp_path: Path):
    bits = {f"model.layers.{i}.{k}": 8 for i in range(2) for k in ("self_attn.q_proj", "self_attn.k_proj")}
    bits |= {"model.layers.0.mlp.down_proj": 8, "model.layers.0.mlp.switch_mlp.up_proj": 8}
    assert read_spec(packed_folder(tmp_path, None, bits)[0]).quantization == Quantization(8, 64)


def test_a_plain_folder_has_no_quantization(tmp_path: Path):
    spec = read_spec(folder_of(tmp_path))
    assert spec.quantization is None and spec.unpacked == {}


@pytest.mark.parametrize(("said", "says"), [
    ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, "does not train: MLX's mxfp4"),
    ({"group_size": 64, "bits": 4, "lm_head": {"mode": "nvfp4", "bits": 4}}, "does not train: MLX's nvfp4"),
    ({}, "has no `quantization` to explain them"),
    ({"group_size": 64, "bits": 4, "lm_head": {"group_size": 64, "bits": 8}}, "lm_head.weight: U32"),
    ({"group_size": 48, "bits": 4}, r"not what config.json's quantization says(.|\n)*q_proj.weight: U32"),
    ({"bits": 4}, r"not what config.json's quantization says"),
])
def test_packings_that_are_refused(said: Any, says: str, tmp_path: Path):
    with pytest.raises(UserError, match=says) as e:
        read_spec(packed_folder(tmp_path, said)[0])
    assert "unquantised" in e.value.hint


@pytest.mark.parametrize(("method", "leaf"), [("gptq", "qweight"), ("compressed-tensors", "weight_packed")])
def test_weights_that_others_packed(method: str, leaf: str, tmp_path: Path):
    folder = folder_of(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    stored[f"{name}.{leaf}"] = np.ones((1, 8), np.int32)
    del stored[f"{name}.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(UserError, match=f"a form burnish does not train: {method}"):
        read_spec(folder)


def test_another_scheme_whose_shapes_can_be_read_is_left_alone(tmp_path: Path):
    """fp8: the shapes are the true ones, and whether it can be computed with is the backend's to say."""
    spec = read_spec(folder_of(tmp_path, quantization_config={"quant_method": "fp8"}))
    assert spec.quantization is None and spec.linears["self_attn.q_proj"] == (8, 8)


# ---- rope


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}


@pytest.mark.parametrize(("given", "added"), [
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}, {"rope_theta": 5e4}),
    ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6, "rope_type": "default"},
                          "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}},
     {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    ({"rope_theta": 5e4}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    ({"rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}),
    ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
     {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}),
    ({"rope_theta": 1e6, "rope_local_base_freq": 1e4}, {}),
    ({"rope_theta": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}}, {}),
    ({}, {}),
])
def test_the_rope_base_is_said_twice(given: dict[str, Any], added: dict[str, Any]):
    assert with_rope_said_twice(given) == {**given, **added}
    inner = with_rope_said_twice({"model_type": "x", "text_config": given})
    assert inner == {"model_type": "x", "text_config": {**given, **added}}
