"""The exported folder as transformers loads it, held against base + adapter as PEFT runs them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from burnish.errors import UserError
from burnish.export import hf
from burnish.export.hf import base_of, check_hf, hf_bytes, write_adapter, write_hf
from burnish.export.merged import Merged
from burnish.export.source import Source
from burnish.models.folder import header_of
from burnish.models.spec import read_spec
from burnish.models.tokenizer import load_tokenizer
from burnish.models.weights import Weights, narrowed
from tests.export.gguf_world import whole
from tests.export.test_merged import CASES, change_config, pack, peft_adapter, peft_model
from tests.tiny import tiny_model, tiny_recipe

IDS = [[5, 60, 7, 200, 33, 5, 5, 90, 11, 4]]


def source_of(base: Path, adapter: Path) -> Source:
    return Source(
        adapter, "tuned", tiny_recipe(base), adapter, read_spec(base), load_tokenizer(base), "messages", True,
        None,
    )  # fmt: skip


def exported(base: Path, adapter: Path, out: Path, dtype: str = "auto") -> Path:
    source = source_of(base, adapter)
    check_hf(source, dtype)
    out.mkdir()
    write_hf(Merged(source.base, adapter), source, out, dtype)
    return out


def stock(folder: Path, **how: Any) -> Any:
    """As transformers alone loads it, after a check that it took every tensor (it only warns)."""
    import torch
    from transformers import AutoModelForCausalLM

    asked = {"dtype": torch.float32, **how}
    loaded: Any = AutoModelForCausalLM.from_pretrained(str(folder), output_loading_info=True, **asked)
    model, told = loaded
    assert not any(told.values()), told
    return model.eval()


def logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def settings(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """The weights of a folder in one file, changed in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    base = tiny_model(tmp_path / "base", num_hidden_layers=2)
    return base, peft_adapter(base, tmp_path / "adapter")


# --- the numbers ---


@pytest.mark.parametrize("case", CASES)
def test_transformers_gives_the_logits_of_base_and_adapter(case: str, tmp_path: Path):
    family, model, lora = CASES[case]
    base = tiny_model(tmp_path / "base", family, **model)
    adapter = peft_adapter(base, tmp_path / "adapter", **lora)
    found = logits(stock(exported(base, adapter, tmp_path / "out")))
    tuned = peft_model(base, adapter)
    live = logits(tuned)
    assert np.abs(live - logits(stock(base))).max() > 0.1  # the adapter does something
    assert np.abs(found - live).max() < 1e-5 * max(1.0, np.abs(live).max())
    assert np.abs(found - logits(tuned.merge_and_unload())).max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_has_no_tensor_of_its_own(tied: bool, tmp_path: Path):
    base = tiny_model(tmp_path / "base", "llama", tied=tied)
    out = exported(base, peft_adapter(base, tmp_path / "adapter"), tmp_path / "out")
    spec = read_spec(out)
    assert spec.tied == tied == ("lm_head.weight" not in spec.tensors)
    assert spec.tensors == read_spec(base).tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sum_is_rounded_once(dtype: str, small: tuple[Path, Path], tmp_path: Path):
    """Half a unit of the last place is one rounding; a product rounded before it is added gives more."""
    base, adapter = small
    exact = Merged(read_spec(base), adapter)
    out = read_spec(exported(base, adapter, tmp_path / "out", dtype))
    bits = {"bfloat16": 7, "float16": 10}[dtype]
    for name, info in out.tensors.items():
        expected = whole(exact, name).reshape(-1, info.shape[-1])
        found = np.concatenate(list(Weights(out).chunks(name)))
        unit = np.exp2(np.maximum(np.floor(np.log2(np.abs(expected) + 1e-30)), -14) - bits)
        assert (np.abs(found - expected) / unit).max() <= 0.5001, name
        assert info.dtype == {"bfloat16": "BF16", "float16": "F16"}[dtype]
        with np.errstate(over="raise"):
            np.testing.assert_array_equal(found, _rounded(expected, dtype), err_msg=name)


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """By torch, which shares no code with what is tested."""
    import torch

    return torch.from_numpy(values).to(getattr(torch, dtype)).float().numpy()


def test_bfloat16_that_is_merged_keeps_what_peft_loses(tmp_path: Path):
    """A base in bfloat16: the sum is made in float32, so it is nearer the live model than PEFT's merge, which
    rounds the product first.
    """
    import torch

    base = tiny_model(tmp_path / "base", "llama", num_hidden_layers=2)
    wide = exported(
        base, peft_adapter(base, tmp_path / "none", r=1, lora_alpha=1), tmp_path / "b", "bfloat16"
    )
    adapter = peft_adapter(wide, tmp_path / "adapter")
    out = exported(wide, adapter, tmp_path / "out")
    theirs = peft_model(wide, adapter).to(torch.bfloat16).merge_and_unload().state_dict()
    exact, ours = Merged(read_spec(wide), adapter), Weights(read_spec(out))
    name = "model.layers.0.mlp.gate_proj.weight"
    expected = whole(exact, name)
    error = np.abs(np.concatenate(list(ours.chunks(name))) - expected).sum()
    assert error < 0.9 * np.abs(theirs[name].float().numpy() - expected).sum()


# --- dtypes ---


def test_auto_keeps_each_tensors_dtype(small: tuple[Path, Path], tmp_path: Path):
    """Mixed as some models are: norms in float32, a buffer of whole numbers, the rest in bfloat16."""
    base, adapter = small
    stored = load_file(base / "model.safetensors")
    path = base / "model.safetensors"
    kinds = {name: "F32" if "norm" in name else "BF16" for name in stored}
    buffer = np.arange(7, dtype=np.int64)
    sized = [(n, kinds[n], v.shape, v.size * (4 if kinds[n] == "F32" else 2)) for n, v in stored.items()]
    with path.open("wb") as f:
        f.write(header_of([*sized, ("model.position_ids", "I64", (7,), 56)], {"format": "pt"}))
        for name, value in stored.items():
            f.write((value if kinds[name] == "F32" else narrowed(value, "bfloat16")).tobytes())
        f.write(buffer.tobytes())
    spec = read_spec(base)
    out = read_spec(exported(base, adapter, tmp_path / "out"))
    assert {n: t.dtype for n, t in out.tensors.items()} == {n: t.dtype for n, t in spec.tensors.items()}
    assert settings(tmp_path / "out")["dtype"] == settings(tmp_path / "out")["torch_dtype"] == "bfloat16"
    info = out.tensors["model.position_ids"]
    assert (tmp_path / "out" / info.file).read_bytes()[info.begin :][:56] == buffer.tobytes()
    whole = read_spec(exported(base, adapter, tmp_path / "whole", "float32"))
    assert {t.dtype for t in whole.tensors.values()} == {"F32", "I64"}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
def test_the_bytes_are_told_before(dtype: str, small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    out = exported(base, adapter, tmp_path / "out", dtype)
    assert hf_bytes(read_spec(base), dtype) == read_spec(out).weight_bytes
    import torch

    named = "float32" if dtype == "auto" else dtype
    assert settings(out)["dtype"] == settings(out)["torch_dtype"] == named
    assert stock(out, dtype="auto").dtype == getattr(torch, named)


def test_an_unknown_dtype_and_a_packed_base_are_refused_first(small: tuple[Path, Path]):
    base, adapter = small
    with pytest.raises(UserError, match="dtype: expected auto, bfloat16, float16, float32, got int4"):
        check_hf(source_of(base, adapter), "int4")
    pack(base)
    with pytest.raises(UserError, match="holds packed weights") as e:
        check_hf(source_of(base, adapter), "auto")
    assert "q_proj.weight is stored as U32" in e.value.message and "--base" in e.value.hint


@pytest.mark.parametrize("stored", ["F8_E4M3", "U8"])
def test_weights_that_are_no_floats_are_refused(stored: str, small: tuple[Path, Path]):
    base, adapter = small
    source = source_of(base, adapter)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = {**source.base.tensors, name: replace(source.base.tensors[name], dtype=stored)}
    with pytest.raises(UserError, match=f"{name} is stored as {stored}"):
        check_hf(replace(source, base=replace(source.base, tensors=tensors)), "auto")


# --- what cannot be written ---

WRONG = "model.layers.1.mlp.up_proj.weight"


def test_beyond_float16_is_an_error_that_names_the_tensor(small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    rewrite(base, lambda t: t[WRONG].__setitem__((3, 4), 70_000.0))
    with pytest.raises(UserError, match=f"{WRONG} has values beyond what float16 holds") as e:
        exported(base, adapter, tmp_path / "out", "float16")
    assert "the largest is 69999.8" in e.value.message  # with the adapter's change
    assert e.value.hint == "take --type bf16 or f32"
    exported(base, adapter, tmp_path / "wide", "bfloat16")


def test_beyond_bfloat16_too(small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    rewrite(base, lambda t: t["model.norm.weight"].__setitem__(0, np.float32(3.4e38)))
    with pytest.raises(UserError, match=r"model\.norm\.weight has values beyond what bfloat16 holds") as e:
        exported(base, adapter, tmp_path / "out", "bfloat16")
    assert e.value.hint == "take --type f32"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_bases_own_nan_is_the_bases_fault(value: float, small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    rewrite(base, lambda t: t[WRONG].__setitem__((3, 4), value))
    with pytest.raises(UserError, match=rf"model\.safetensors: {WRONG} holds a NaN or an infinity") as e:
        exported(base, adapter, tmp_path / "out")
    assert e.value.hint == "download model.safetensors again"


def test_the_adapters_nan_is_the_adapters_fault(small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][2, 1] = np.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=f"adapter: the adapter of {WRONG} holds a NaN") as e:
        exported(base, adapter, tmp_path / "out")
    assert "train.lr" in e.value.hint


# --- files ---


def test_shards_hold_what_one_file_holds(
    small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, adapter = small
    whole = exported(base, adapter, tmp_path / "whole")
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    out = exported(base, adapter, tmp_path / "out")
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = settings(out, "model.safetensors.index.json")
    parts = {name: tensor for file in files for name, tensor in load_file(out / file).items()}
    assert index["weight_map"] == {n: f for f in files for n in load_file(out / f)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in parts.values())
    for name, tensor in load_file(whole / "model.safetensors").items():
        np.testing.assert_array_equal(parts[name], tensor)
    np.testing.assert_array_equal(logits(stock(out)), logits(stock(whole)))


@pytest.mark.parametrize("spelt", ["both", "transformers 4", "transformers 5"])
def test_every_reader_finds_the_rope_base(spelt: str, small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    config = settings(base)
    dropped = {"both": "", "transformers 4": "rope_parameters", "transformers 5": "rope_theta"}[spelt]
    config.pop(dropped, None)
    (base / "config.json").write_text(json.dumps(config))
    out = exported(base, adapter, tmp_path / "out")
    told = settings(out)
    assert told["rope_theta"] == told["rope_parameters"]["rope_theta"] == 50_000.0
    assert np.abs(logits(stock(out)) - logits(peft_model(base, adapter))).max() < 1e-4


def test_the_config_says_nothing_of_packing_nor_of_where_it_was(small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    gone = {"quantization_config": {"quant_method": "x"}, "_name_or_path": "/home/someone/model"}
    change_config(base, "config.json", **gone)
    out = settings(exported(base, adapter, tmp_path / "out"))
    assert not out.keys() & {*gone, "quantization"}
    kept = settings(base)
    assert {k: out[k] for k in kept if k not in gone} == {k: v for k, v in kept.items() if k not in gone}


def test_code_and_licences_come_along(small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    for name in ("modeling_x.py", "LICENSE", "License.md", "NOTICE.txt", "README.md", "pytorch_model.bin"):
        (base / name).write_text(f"{name} of the base")
    plain = exported(base, adapter, tmp_path / "plain")
    assert not list(plain.glob("*.py"))  # not a model that runs any
    change_config(base, "config.json", auto_map={"AutoConfig": "modeling_x.C"})
    out = exported(base, adapter, tmp_path / "out")
    for name in ("modeling_x.py", "LICENSE", "License.md", "NOTICE.txt"):
        assert (out / name).read_text() == f"{name} of the base"
    assert not (out / "README.md").exists() and not (out / "pytorch_model.bin").exists()


def test_files_may_be_read_by_whom_the_umask_lets(small: tuple[Path, Path], tmp_path: Path):
    """The run's own adapter may be read by its owner alone: so safetensors writes it."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (small[1] / "adapter_model.safetensors").chmod(0o600)
    before = os.umask(0o022)
    try:
        out = exported(*small, tmp_path / "out")
        write_adapter(source_of(*small), alone)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in (*out.iterdir(), *alone.iterdir())} == {0o644}


# --- prompts and ends ---

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[a]{% endif %}"
)


def test_the_template_of_training_survives(small: tuple[Path, Path], tmp_path: Path):
    from transformers import AutoTokenizer

    base, adapter = small
    source = source_of(base, adapter)
    source = replace(source, tokenizer=source.tokenizer.with_template(TEMPLATE))
    (tmp_path / "out").mkdir()
    write_hf(Merged(source.base, adapter), source, tmp_path / "out", "auto")
    messages = [{"role": "user", "content": "问题"}]
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "[user]问题[a]" == source.tokenizer.chat(messages, ask=True)
    assert theirs("the model answers 问题")["input_ids"] == source.tokenizer.encode("the model answers 问题")


@pytest.mark.parametrize("told", [True, False])
def test_generate_ends_where_training_ended(told: bool, small: tuple[Path, Path], tmp_path: Path):
    """The token that ends an answer is one that the base does not end at. told: the base has settings."""
    import torch

    base, adapter = small
    path = base / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2, "temperature": 0.35, "do_sample": True}))
    if not told:
        path.unlink()
    plain = stock(exported(base, adapter, tmp_path / "plain"))
    ask = {"input_ids": torch.tensor(IDS), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    answer = plain.generate(**ask)[0, len(IDS[0]) :].tolist()
    end = answer[4]
    source = source_of(base, adapter)
    source = replace(source, tokenizer=source.tokenizer.with_stop(end))
    (tmp_path / "out").mkdir()
    write_hf(Merged(source.base, adapter), source, tmp_path / "out", "auto")
    generation = settings(tmp_path / "out", "generation_config.json")
    assert generation["eos_token_id"] == [2, end] and generation.get("temperature") == (
        0.35 if told else None
    )
    ended = stock(tmp_path / "out").generate(**ask)[0, len(IDS[0]) :].tolist()
    assert ended == answer[: answer.index(end) + 1] and len(ended) < len(answer)


# --- the adapter alone ---


def test_the_adapter_alone_is_what_peft_loads(small: tuple[Path, Path], tmp_path: Path):
    base, adapter = small
    (adapter / "recipe.yaml").write_text("model: /home/someone/model")
    change_config(adapter, "adapter_config.json", base_model_name_or_path="/gone")
    out = tmp_path / "out"
    out.mkdir()
    write_adapter(source_of(base, adapter), out)
    from peft import AutoPeftModelForCausalLM

    alone = AutoPeftModelForCausalLM.from_pretrained(str(out))  # finds the base by the config's own words
    np.testing.assert_allclose(logits(alone.eval()), logits(peft_model(base, adapter)), atol=1e-6)
    assert settings(out, "adapter_config.json")["base_model_name_or_path"] == str(base)
    assert (out / "tokenizer.json").is_file() and not (out / "recipe.yaml").exists()
    assert load_tokenizer(out, model=base).template == load_tokenizer(base).template


def test_a_base_of_the_hubs_cache_is_named_by_its_id(small: tuple[Path, Path], tmp_path: Path):
    spec = read_spec(small[0])
    kept = tmp_path / "hub" / "models--Qwen--Qwen2.5-7B" / "snapshots" / "a09a35458c"
    assert base_of(replace(spec, folder=kept)) == "Qwen/Qwen2.5-7B"
    assert base_of(spec) == str(small[0])
