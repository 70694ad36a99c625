"""Model folder → MLX folder: mlx-lm loads it, the weights are near, memory does not grow with the model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

mx = pytest.importorskip("mlx.core", reason="needs mlx and mlx-lm")
load_model = pytest.importorskip("mlx_lm.utils", reason="needs mlx and mlx-lm").load_model

from burnish.backends.mlx import quantize  # noqa: E402
from burnish.backends.mlx.quantize import quantize_folder  # noqa: E402
from burnish.errors import Unsupported, UserError  # noqa: E402
from burnish.models.quantized import Quantization  # noqa: E402
from burnish.models.spec import read_spec  # noqa: E402
from tests.tiny import tiny_model  # noqa: E402

IDS = [[5, 60, 7, 200, 33, 5, 5, 90, 11, 4]]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
SMOLLM2 = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama") / "model", "llama", tied=False, **SIZES)


def logits(folder: Path) -> np.ndarray:
    model, _ = load_model(folder)
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def change(folder: Path, **keys: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **keys}), encoding="utf-8")
    return folder


def floats(array: Any) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def in_bfloat16(folder: Path) -> Path:
    weights = {k: v.astype(mx.bfloat16) for k, v in mx.load(str(folder / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return change(folder, dtype="bfloat16")


def is_near(source: Path, out: Path, slack: float = 0.0) -> int:
    """Every packed weight within a step of the source's (a step is its group's scale); how many there are.

    slack: what rounding scales and biases to 16 bits may add, as a share of the largest weight.
    """
    before, after = mx.load(str(source / "model.safetensors")), mx.load(str(out / "model.safetensors"))
    settings = config_of(out)["quantization"]
    packed = [name.removesuffix(".scales") for name in after if name.endswith(".scales")]
    for name in packed:
        own = settings.get(name, settings)
        triple = (after[f"{name}.{leaf}"] for leaf in ("weight", "scales", "biases"))
        found = floats(mx.dequantize(*triple, own["group_size"], own["bits"]))
        expected, step = floats(before[f"{name}.weight"]), np.abs(floats(after[f"{name}.scales"]))
        # Half a step, but MLX shifts the grid so that zero lies on it: one end is then off by more.
        bound = step.repeat(own["group_size"], -1) + slack * np.abs(expected).max() + 1e-6
        assert (np.abs(found - expected) <= bound).all(), name
        assert np.abs(found - expected).mean() < 0.3 * step.mean() + slack * np.abs(expected).max(), name
    for name in after.keys() & before.keys():
        if name.removesuffix(".weight") not in packed:
            assert after[name].dtype == before[name].dtype and mx.array_equal(after[name], before[name]), name
    return len(packed)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_mlx_lm_makes_is_what_we_make(bits: int, llama: Path, tmp_path: Path):
    from mlx_lm.convert import convert

    report = quantize_folder(llama, tmp_path / "ours", bits)
    convert(str(llama), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=64)
    ours, theirs = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype and mx.array_equal(value, ours[name]), name
    assert config_of(tmp_path / "ours")["quantization"] == config_of(tmp_path / "theirs")["quantization"]
    assert (report.quantized, report.kept) == (3 * 7 + 2, 7)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_the_logits_are_those_of_the_rounded_weights(family: str, tied: bool, tmp_path: Path):
    source = tiny_model(tmp_path / "model", family, tied=tied, **SIZES)
    report = quantize_folder(source, tmp_path / "out", 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    assert is_near(source, tmp_path / "out") == report.quantized == 3 * 7 + (1 if tied else 2)
    rounded = shutil.copytree(source, tmp_path / "rounded")
    weights = mx.load(str(source / "model.safetensors"))
    packed = mx.load(str(tmp_path / "out" / "model.safetensors"))
    for name in [n.removesuffix(".scales") for n in packed if n.endswith(".scales")]:
        weights[f"{name}.weight"] = mx.dequantize(
            packed[f"{name}.weight"], packed[f"{name}.scales"], packed[f"{name}.biases"], 64, 4
        )
    mx.save_safetensors(str(rounded / "model.safetensors"), weights, {"format": "pt"})
    assert np.abs(logits(rounded) - logits(tmp_path / "out")).max() < 1e-3
    assert np.abs(logits(rounded) - logits(source)).max() > 1e-2


def test_what_the_report_and_the_spec_say(llama: Path, tmp_path: Path):
    report = quantize_folder(llama, tmp_path / "out", 4)
    spec, before = read_spec(tmp_path / "out"), read_spec(llama)
    assert spec.quantization == Quantization(4, 64)
    assert spec.linears == before.linears
    assert report.parameters == spec.parameters == before.parameters
    assert report.weight_bytes == spec.weight_bytes < before.weight_bytes / 5
    assert report.source_bytes == before.weight_bytes
    assert (report.bits, report.group_size, report.dtype, report.shards) == (4, 64, "float32", 1)
    assert report.architecture == "LlamaForCausalLM"


def test_the_dtype_is_the_sources(llama: Path, tmp_path: Path):
    source = in_bfloat16(shutil.copytree(llama, tmp_path / "model"))
    report = quantize_folder(source, tmp_path / "out", 4)
    kinds = {t.dtype for t in read_spec(tmp_path / "out").tensors.values()}
    assert (report.dtype, kinds) == ("bfloat16", {"U32", "BF16"})
    is_near(source, tmp_path / "out", slack=2**-7)


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16")])
def test_a_dtype_that_is_asked_for(dtype: str, stored: str, llama: Path, tmp_path: Path):
    assert quantize_folder(llama, tmp_path / "out", 8, dtype=dtype).dtype == dtype
    assert {t.dtype for t in read_spec(tmp_path / "out").tensors.values()} == {"U32", stored}
    config = config_of(tmp_path / "out")
    assert config["dtype"] == config["torch_dtype"] == dtype
    assert np.abs(logits(tmp_path / "out") - logits(llama)).max() < 0.2 * np.abs(logits(llama)).max()


def test_a_matrix_whose_rows_are_no_whole_groups_is_left_as_it_is(tmp_path: Path):
    source = tiny_model(tmp_path / "model", "llama", hidden_size=64, intermediate_size=96)
    report = quantize_folder(source, tmp_path / "out", 4)
    tensors = read_spec(tmp_path / "out").tensors
    assert tensors["model.layers.0.mlp.down_proj.weight"].dtype == "F32"
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == "U32"
    assert report.quantized == 3 * 6 + 2
    logits(tmp_path / "out")


def test_experts_are_stacked_and_the_router_has_eight_bits(tmp_path: Path):
    """mlx-lm's class renames and joins (`sanitize`), and says what it wants otherwise (`quant_predicate`)."""
    source = tiny_model(tmp_path / "model", "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2,
                        moe_intermediate_size=64, decoder_sparse_step=1, mlp_only_layers=[], **SIZES)
    change(source, num_experts=4)  # as mlx-lm reads it; transformers 5 writes num_local_experts
    report = quantize_folder(source, tmp_path / "out", 4)
    tensors = read_spec(tmp_path / "out").tensors
    assert tensors["model.layers.1.mlp.switch_mlp.up_proj.weight"].shape == (4, 64, 64 // 8)
    assert report.parameters == read_spec(tmp_path / "out").parameters
    router = config_of(tmp_path / "out")["quantization"]["model.layers.0.mlp.gate"]
    assert router == {"group_size": 64, "bits": 8}
    assert tensors["model.layers.0.mlp.gate.weight"].shape == (4, 64 // 4)
    assert np.isfinite(logits(tmp_path / "out")).all()


def test_shards_with_an_index(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    quantize_folder(llama, tmp_path / "one", 4)
    monkeypatch.setattr(quantize, "SHARD_BYTES", 20_000)
    report = quantize_folder(llama, tmp_path / "many", 4)
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert report.shards == len(files) > 3
    assert files[0] == f"model-00001-of-{report.shards:05d}.safetensors"
    assert max((tmp_path / "many" / f).stat().st_size for f in files) < 25_000
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == report.weight_bytes == read_spec(tmp_path / "many").weight_bytes
    assert np.array_equal(logits(tmp_path / "one"), logits(tmp_path / "many"))
    # and a source in parts
    parts = shutil.copytree(llama, tmp_path / "parts")
    whole = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    for i in (1, 2):
        save_file({k: v for n, (k, v) in enumerate(whole.items()) if n % 2 == i - 1},
                  parts / f"model-0000{i}-of-00002.safetensors")
    quantize_folder(parts, tmp_path / "joined", 4)
    assert np.array_equal(logits(tmp_path / "one"), logits(tmp_path / "joined"))


@pytest.mark.parametrize("missing", ["rope_theta", "rope_parameters"])
def test_the_rope_base_is_there_twice(missing: str, llama: Path, tmp_path: Path):
    """A folder that transformers 5 saved has no rope_theta; mlx-lm would take 10,000 and say nothing."""
    source = shutil.copytree(llama, tmp_path / "model")
    config = config_of(source)
    del config[missing]
    (source / "config.json").write_text(json.dumps(config))
    quantize_folder(source, tmp_path / "out", 8)
    found = config_of(tmp_path / "out")
    assert found["rope_theta"] == found["rope_parameters"]["rope_theta"] == 50_000.0
    model, _ = load_model(tmp_path / "out")
    assert model.args.rope_theta == 50_000.0
    eight = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert found["quantization"] == found["quantization_config"] == eight


def test_the_rest_of_the_folder_and_where_it_came_from(llama: Path, tmp_path: Path):
    source = shutil.copytree(llama, tmp_path / "My-Model")
    (source / "LICENSE").write_text("free")
    (source / "pytorch_model.bin").write_bytes(b"x" * 99)
    (source / "adapter_config.json").write_text("{}")
    quantize_folder(source, tmp_path / "out", 4)
    from transformers import AutoTokenizer

    tokenizers = [AutoTokenizer.from_pretrained(str(f)) for f in (source, tmp_path / "out")]
    said = [t.apply_chat_template([{"role": "user", "content": "a b"}], tokenize=False) for t in tokenizers]
    assert said[0] == said[1] and "user" in said[0]
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "tokenizer.json", "generation_config.json", "burnish.json"} <= made
    assert not made & {"pytorch_model.bin", "adapter_config.json"}
    origin = json.loads((tmp_path / "out" / "burnish.json").read_text())
    assert origin["source"] == str(source) and origin["name"] == "My-Model" and origin["bits"] == 4

    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert origin["source_sha256"] == {"model.safetensors": sha256(source / "model.safetensors")}
    assert origin["sha256"] == {name: sha256(tmp_path / "out" / name) for name in made - {"burnish.json"}}


# ---- what is refused, and what is left behind then


def refused(source: Path, out: Path, says: str, bits: int = 4, **how: Any) -> UserError:
    with pytest.raises(UserError, match=says) as e:
        quantize_folder(source, out, bits, **how)
    assert not [p for p in out.parent.iterdir() if p.name.startswith(".")] if out.parent.is_dir() else True
    return e.value


def test_what_is_asked(llama: Path, tmp_path: Path):
    refused(llama, tmp_path / "out", "bits: expected 4 or 8, got 3", bits=3)
    refused(llama, tmp_path / "out", "group size: expected one of 32, 64, 128, got 7", group_size=7)
    refused(llama, tmp_path / "out", "dtype: expected float32, bfloat16, float16, got int8", dtype="int8")
    refused(tmp_path / "none", tmp_path / "out", "does not exist")
    assert list(tmp_path.iterdir()) == []


def test_a_source_that_is_quantised_already(llama: Path, tmp_path: Path):
    quantize_folder(llama, tmp_path / "four", 4)
    refused(tmp_path / "four", tmp_path / "out", r"quantised already \(4 bits by MLX\)", bits=8)
    source = shutil.copytree(llama, tmp_path / "model")
    change(source, quantization_config={"quant_method": "fp8"})
    refused(source, tmp_path / "out", "quantised already .*fp8")


def test_a_model_that_mlx_lm_does_not_know(llama: Path, tmp_path: Path):
    source = change(shutil.copytree(llama, tmp_path / "model"), model_type="newllm")
    with pytest.raises(Unsupported, match="no model class for model_type 'newllm'"):
        quantize_folder(source, tmp_path / "out", 4)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_source_whose_tensors_are_not_the_models(llama: Path, tmp_path: Path):
    source = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, source / "model.safetensors")
    refused(source, tmp_path / "out", rf"mlx-lm cannot load .*(.|\n)*{name}")
    save_file(weights | {"model.layers.1.mlp.extra.weight": np.ones((64, 64), np.float32)},
              source / "model.safetensors")
    refused(source, tmp_path / "out", r"mlx-lm cannot load .*(.|\n)*mlp.extra")


def test_numbers_that_are_none(llama: Path, tmp_path: Path):
    source = shutil.copytree(llama, tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = np.nan
    save_file(weights, source / "model.safetensors")
    refused(source, tmp_path / "out", "up_proj.weight holds a NaN")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(weights, source / "model.safetensors")
    assert "bfloat16" in refused(source, tmp_path / "out", "up_proj.weight holds", dtype="float16").hint
    quantize_folder(source, tmp_path / "out", 4)


def test_too_small_a_disk(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 20))
    refused(llama, tmp_path / "out", "GiB free; the model needs")
    assert list(tmp_path.iterdir()) == []


def test_an_out_that_exists(llama: Path, tmp_path: Path):
    out = tmp_path / "out"
    quantize_folder(llama, out, 4)
    (out / "old.txt").write_text("old")
    assert "--force" in refused(llama, out, "exists").hint
    quantize_folder(llama, out, 8, force=True)
    assert not (out / "old.txt").exists() and config_of(out)["quantization"]["bits"] == 8
    source = shutil.copytree(llama, tmp_path / "model")
    refused(source, source, "lies inside", force=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    refused(llama, tmp_path / "home", "not a model folder", force=True)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stop_half_way_leaves_nothing_and_keeps_the_old(
    stop: type[BaseException], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"
    quantize_folder(llama, out, 4)
    (out / "mine.txt").write_text("mine")

    def stopped(*_: Any) -> None:
        assert (tmp_path / ".out.partial" / "model.safetensors").is_file()
        raise stop

    monkeypatch.setattr(quantize, "_copy_rest", stopped)
    limit = mx.set_cache_limit(12345)
    with pytest.raises(stop):
        quantize_folder(llama, out, 8, force=True)
    assert mx.set_cache_limit(limit) == 12345  # as it was found
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "mine.txt").is_file() and config_of(out)["quantization"]["bits"] == 4


# ---- memory


MEASURE = """
import sys
from pathlib import Path
import mlx.core as mx
from burnish.backends.mlx.quantize import quantize_folder
from burnish.machine.usage import peak_resident_bytes, resident_bytes
before = resident_bytes()
mx.reset_peak_memory()
quantize_folder(Path(sys.argv[1]), Path(sys.argv[2]), 4)
print(peak_resident_bytes() - before, mx.get_peak_memory())
"""


def wide_model(folder: Path, layers: int) -> int:
    """A llama in bfloat16 of that many layers of 25 MB, all of the same drawn numbers; bytes of a layer."""
    hidden, inner = 1024, 2816
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
              "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 16,
              "num_key_value_heads": 16, "vocab_size": 256, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
              "tie_word_embeddings": True}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    drawn = mx.random.normal((inner, hidden)).astype(mx.bfloat16)
    square, ones = drawn[:hidden], mx.ones(hidden, dtype=mx.bfloat16)
    one = {f"self_attn.{p}_proj.weight": square for p in "qkvo"}
    one |= {"mlp.gate_proj.weight": drawn, "mlp.up_proj.weight": drawn, "mlp.down_proj.weight": drawn.T,
            "input_layernorm.weight": ones, "post_attention_layernorm.weight": ones}
    weights = {f"model.layers.{i}.{k}": v for i in range(layers) for k, v in one.items()}
    weights |= {"model.embed_tokens.weight": drawn[:256], "model.norm.weight": ones}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return sum(v.nbytes for v in one.values())


def measured(source: Path, out: Path) -> tuple[int, int]:
    """Growth of the process, and MLX's own peak, in bytes."""
    environment = {**os.environ, "PYTHONPATH": str(Path(quantize.__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", MEASURE, str(source), str(out)], capture_output=True,
                          text=True, check=True, env=environment)
    resident, peak = map(int, done.stdout.split())
    return resident, peak


def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    """4 layers (103 MB) and 16 (411 MB): the larger takes no more than the smaller, within one layer."""
    layer_bytes = wide_model(tmp_path / "four", 4)
    wide_model(tmp_path / "sixteen", 16)
    small, small_peak = measured(tmp_path / "four", tmp_path / "a")
    large, large_peak = measured(tmp_path / "sixteen", tmp_path / "b")
    assert large < small + layer_bytes
    assert large < 3 * layer_bytes
    assert large_peak < layer_bytes and large_peak - small_peak < 1 << 20


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs .cache/SmolLM2-135M-Instruct")
def test_a_real_model(tmp_path: Path):
    report = quantize_folder(SMOLLM2, tmp_path / "out", 8)
    assert config_of(tmp_path / "out")["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert is_near(SMOLLM2, tmp_path / "out") == report.quantized == 211
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))[:2]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt, max_tokens=12)
