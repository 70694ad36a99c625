"""Base + adapter as GGUF: llama.cpp's own log-probabilities are those of transformers and PEFT."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf as gguf_library
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from burnish.errors import UserError
from burnish.export import gguf, gguf_tensors
from burnish.export.gguf import TYPES, check_gguf, gguf_bytes, write_gguf, write_gguf_adapter
from burnish.export.gguf_names import FAMILIES, Placed, plan_model
from burnish.export.gguf_tensors import KINDS, Stream, interleaved
from burnish.export.merged import Merged
from burnish.models.convert import convert_gguf, open_gguf
from burnish.models.spec import read_spec
from tests.export.gguf_world import Tuned, gap, tuned, whole
from tests.tiny import tiny_model

SMOLLM2 = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"
GEMMA = {
    "tied": True,
    "num_hidden_layers": 7,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 16,
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3_000.0},
}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 50_000.0, "factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS_OF_MODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tied": True}),
    "llama, every head its own": ("llama", {"num_key_value_heads": 4}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, 3.1's rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50_000.0, "factor": 4.0}},
    ),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "qwen2, yarn with a factor": ("qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
    "mistral, wide heads": ("mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, untied": ("qwen2", {"tied": False}),
    "qwen3": ("qwen3", {}),
}
GEMMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"tied": True, "head_dim": 16}),
    "gemma2": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 9.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "rope_parameters": GEMMA3_ROPE}),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return tuned(tmp_path_factory.mktemp("llama"))


@pytest.mark.llama
@pytest.mark.parametrize("kind", KINDS_OF_MODEL)
def test_llama_cpp_scores_as_peft_does(kind: str, tmp_path: Path):
    """Measured: 3e-6 to 1e-5 nats over 149 tokens whose scores span 5; the adapter moves them by 2 to 5."""
    family, overrides = KINDS_OF_MODEL[kind]
    made = tuned(tmp_path / "run", family, **overrides)
    check_gguf(made.source, "f32")
    report = write_gguf(made.merged, made.source, tmp_path / "m.gguf", "f32")
    assert gap(made, tmp_path / "m.gguf") < 1e-4
    assert np.abs(made.scores() - made.scores(adapted=False)).max() > 0.5  # or nothing is shown
    assert set(report.stored_as) == {"F32"} and report.bytes == (tmp_path / "m.gguf").stat().st_size


@pytest.mark.llama
@pytest.mark.parametrize("kind", GEMMAS)
def test_gemma(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Looser: llama.cpp's GELU on a CPU is a table of float16, which is 0.01 to 0.03 nats here. With the same
    rounding in transformers 0.003 are left, where float32 sums fall to the other side of a float16.
    """
    import torch
    from transformers.activations import GELUTanh

    def rounded(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0 * x, torch.where(x >= 10, x, y))

    family, overrides = GEMMAS[kind]
    made = tuned(tmp_path / "run", family, **overrides)
    write_gguf(made.merged, made.source, tmp_path / "m.gguf", "f32")
    assert gap(made, tmp_path / "m.gguf") < 0.1
    monkeypatch.setattr(GELUTanh, "forward", rounded)
    assert gap(made, tmp_path / "m.gguf") < 0.01


@pytest.mark.llama
@pytest.mark.parametrize(("type", "limit"), [("f16", 0.03), ("bf16", 0.3), ("q8_0", 0.5)])
def test_the_rounded_types(type: str, limit: float, tmp_path: Path, llama: Tuned):
    """llama.cpp rounds what it multiplies such weights by as well. Measured: 0.007, 0.07 and 0.17 nats."""
    report = write_gguf(llama.merged, llama.source, tmp_path / "m.gguf", type)
    assert 1e-4 < gap(llama, tmp_path / "m.gguf") < limit
    # The rows of 48 (what goes down) are no whole blocks of 32.
    matrices = {"Q8_0": 20, "F16": 3} if type == "q8_0" else {type.upper(): 23}
    assert report.stored_as == {**matrices, "F32": 7}


@pytest.mark.llama
def test_control_without_the_order_of_q_and_k(tmp_path: Path, llama: Tuned, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gguf_tensors, "interleaved", lambda rows, heads: rows)
    write_gguf(llama.merged, llama.source, tmp_path / "m.gguf", "f32")
    assert gap(llama, tmp_path / "m.gguf") > 0.1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_read_back_bit_for_bit(family: str, tmp_path: Path):
    made = tuned(tmp_path / "run", family)
    write_gguf(made.merged, made.source, tmp_path / "m.gguf", "f32")
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == made.merged.base.tensors.keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, whole(made.merged, name), err_msg=name)
    spec = read_spec(tmp_path / "back")
    for key in ("n_layers", "n_heads", "n_kv_heads", "head_dim", "max_positions", "vocab_size", "tied"):
        assert getattr(spec, key) == getattr(made.spec, key), key
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_theta"] == 50_000.0
    assert (
        config["rms_norm_eps"] == json.loads((made.spec.folder / "config.json").read_text())["rms_norm_eps"]
    )


def test_keys(tmp_path: Path, llama: Tuned):
    write_gguf(llama.merged, llama.source, tmp_path / "m.gguf", "q8_0")
    keys = {k: f.contents() for k, f in open_gguf(tmp_path / "m.gguf").fields.items()}
    assert keys["general.name"] == "tiny tuned"
    assert keys["general.file_type"] == gguf_library.LlamaFileType.MOSTLY_Q8_0
    assert keys["general.quantization_version"] == gguf_library.GGML_QUANT_VERSION
    assert keys["llama.vocab_size"] == len(keys["tokenizer.ggml.tokens"]) == 280
    assert keys["tokenizer.chat_template"] == llama.source.tokenizer.template


def test_a_window_ends_the_context(tmp_path: Path):
    made = tuned(tmp_path / "run", "mistral", sliding_window=96)
    plan = plan_model(made.spec)
    assert plan.settings["context_length"] == 96 and "sliding window" in plan.notes[0]


def test_memory_stays_near_the_chunk(tmp_path: Path):
    """A vocabulary of 400,000 tokens: 51 MB of float32, in chunks of 1 MiB."""
    tiny_model(tmp_path / "model", "llama", tied=True)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.embed_tokens.weight"] = np.ones((400_000, 32), np.float32)
    save_file(weights, path, {"format": "pt"})
    del weights
    made = tuned(tmp_path / "run", base=tmp_path / "model")
    name = "model.embed_tokens.weight"
    stream = Stream(made.merged, "token_embd.weight", Placed(name, (400_000, 32)), KINDS["q8_0"], 1 << 20)
    tracemalloc.start()
    with (tmp_path / "raw").open("wb") as file:
        stream.tofile(file)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "raw").stat().st_size == stream.nbytes == 400_000 * 34
    assert peak_bytes < 16 << 20


def test_chunks_of_any_size_are_the_same(tmp_path: Path, llama: Tuned):
    plan = plan_model(llama.spec)
    for name in ("blk.1.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_up.weight"):
        found = set()
        for chunk_bytes in (1, 4 * 32 * 8 * 3, 1 << 30):
            with (tmp_path / "raw").open("wb") as file:
                Stream(llama.merged, name, plan.tensors[name], KINDS["f32"], chunk_bytes).tofile(file)
            found.add((tmp_path / "raw").read_bytes())
        assert len(found) == 1, name


def test_interleaved_is_undone_by_convert():
    rows = np.arange(48.0).reshape(24, 2)
    order = np.arange(24).reshape(3, -1, 2).swapaxes(1, 2).reshape(-1)  # as models.convert.widened reads
    np.testing.assert_array_equal(interleaved(rows, 3)[order], rows)


# ---- the adapter alone


@pytest.mark.llama
@pytest.mark.parametrize(
    ("family", "rslora"), [("llama", False), ("llama", True), ("qwen2", False), ("qwen3", True)]
)
@pytest.mark.parametrize("type", ["f32", "f16"])
def test_base_and_adapter_are_the_merged_model(family: str, rslora: bool, type: str, tmp_path: Path):
    made = tuned(tmp_path / "run", family, rslora=rslora)
    nothing = tuned(tmp_path / "none", base=made.spec.folder, alpha=0)
    write_gguf(nothing.merged, nothing.source, tmp_path / "base.gguf", "f32")
    write_gguf_adapter(made.source, tmp_path / "lora.gguf", type)
    assert gap(made, tmp_path / "base.gguf", tmp_path / "lora.gguf") < (1e-4 if type == "f32" else 0.05)
    assert gap(made, tmp_path / "base.gguf") > 0.5  # it is the adapter that does it


def test_an_adapter_without_a_place(tmp_path: Path, llama: Tuned):
    folder = tmp_path / "adapter"
    folder.mkdir()
    weights = {
        "base_model.model.model.layers.0.self_attn.other_proj.lora_A.weight": np.ones((4, 32), np.float32),
        "base_model.model.model.layers.0.self_attn.other_proj.lora_B.weight": np.ones((32, 4), np.float32),
    }
    save_file(weights, folder / "adapter_model.safetensors")
    config = (llama.source.adapter / "adapter_config.json").read_text()
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match="other_proj"):
        write_gguf_adapter(replace(llama.source, adapter=folder), tmp_path / "lora.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


# ---- said before any work, and nothing half-written


@pytest.mark.parametrize("type", TYPES)
def test_the_bytes_are_foretold(type: str, tmp_path: Path, llama: Tuned):
    if type in KINDS:
        report = write_gguf(llama.merged, llama.source, tmp_path / "m.gguf", type)
        weights = sum(t.n_bytes for t in open_gguf(tmp_path / "m.gguf").tensors)
        assert gguf_bytes(llama.spec, type) - gguf._KEYS_BYTES == weights and report.bytes > weights
    else:
        assert gguf_bytes(llama.spec, type) > gguf_bytes(llama.spec, "f16")


def test_an_unknown_architecture_and_type(llama: Tuned):
    other = replace(llama.source, base=replace(llama.spec, architecture="MambaForCausalLM"))
    with pytest.raises(UserError, match="MambaForCausalLM cannot be written; expected one of Llama"):
        check_gguf(other, "f16")
    with pytest.raises(UserError, match=r"expected one of f32, .*, got q3"):
        check_gguf(llama.source, "q3")


def test_tensors_too_many_and_too_few_are_named(llama: Tuned):
    tensors = dict(llama.spec.tensors)
    tensors["model.layers.0.self_attn.sinks"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError) as e:
        check_gguf(replace(llama.source, base=replace(llama.spec, tensors=tensors)), "f16")
    assert "sinks is not known" in e.value.message
    assert "model.layers.1.mlp.up_proj.weight is missing" in e.value.message


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("hidden_act", "relu", "another activation than relu"),
        (
            "rope_parameters",
            {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            "rope_type: .* got dynamic",
        ),
        ("rope_parameters", {**YARN, "beta_fast": 16}, "beta_fast: llama.cpp takes 32, got 16"),
        ("rope_parameters", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_settings_that_llama_cpp_does_not_have(key: str, value: Any, match: str, tmp_path: Path):
    folder = tiny_model(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    config[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=match):
        plan_model(read_spec(folder))


def test_every_family_is_tried():
    names = {
        f: FAMILIES[n].arch for f, n in (("mistral", "MistralForCausalLM"), ("llama", "LlamaForCausalLM"))
    }
    tried = {family for family, _ in (KINDS_OF_MODEL | GEMMAS).values()}
    archs = {names.get(f, f.removesuffix("_text")) for f in tried}
    assert archs == {f.arch for f in FAMILIES.values()}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("type", ["f32", "q4_k_m"])
def test_a_stop_half_way_leaves_nothing(
    type: str, stop: type[BaseException], tmp_path: Path, llama: Tuned, monkeypatch: pytest.MonkeyPatch
):
    seen = []

    def stopped(merged: Merged, name: str, *_: Any) -> Any:
        if name.startswith("model.layers.1"):
            seen.extend(p.stat().st_size for p in tmp_path.iterdir())
            raise stop
        return chunks(merged, name)

    monkeypatch.setattr(gguf, "check_quantiser", lambda: None)
    chunks = Merged.chunks
    monkeypatch.setattr(Merged, "chunks", stopped)
    with pytest.raises(stop):
        write_gguf(llama.merged, llama.source, tmp_path / "m.gguf", type)
    assert len(seen) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "match"), [(np.nan, "NaN"), (1e5, "65504")])
def test_a_weight_that_the_type_cannot_hold(value: float, match: str, tmp_path: Path):
    folder = tiny_model(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][3, 4] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    made = tuned(tmp_path / "run", base=folder)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=f"layers.2.mlp.up_proj.weight .*{match}"):
        write_gguf(made.merged, made.source, tmp_path / "out" / "m.gguf", "f16")
    assert not list((tmp_path / "out").iterdir())


# ---- the real model


@pytest.mark.slow
@pytest.mark.llama
def test_smollm2(tmp_path: Path):
    """Float32 against float32, over 30 layers. Measured with a trained adapter: 2e-5 nats."""
    if not SMOLLM2.is_dir():
        pytest.skip(f"SmolLM2 is not at {SMOLLM2}: run make")
    made = tuned(tmp_path / "run", base=SMOLLM2, rank=8)
    text = (
        "<|im_start|>user\nThe capital of France is<|im_end|>\n<|im_start|>assistant\nParis, I've 12 of it."
    )
    ids = made.source.tokenizer.encode(text)
    write_gguf(made.merged, made.source, tmp_path / "m.gguf", "f32")
    from burnish.export.llama import open_llama

    consumer = open_llama(tmp_path / "m.gguf")
    found = consumer.score(ids)
    consumer.close()
    assert np.abs(found - made.scores(ids)).max() < 2e-4
