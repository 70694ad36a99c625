"""Shapes without a model: each is held against transformers' own, and against the counts that hubs state."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.models.geometries import ALIASES, GEOMETRIES, PUBLISHED
from burnish.models.geometry import known, published_as, smaller, spec_from_config, spec_of_geometry
from burnish.models.spec import ModelSpec, read_spec
from burnish.recipe import load
from tests.tiny import tiny_model

TINY = {
    "vocab_size": 40, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}
# Parameters as the hubs' pages state them. Of Qwen3's two smallest those of the tied model: their files hold
# the head once more.
STATED = {
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264, "r1-distill-qwen-1.5b": 1_777_088_000, "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248, "llama-3.1-70b": 70_553_706_496,
    "deepseek-coder-1.3b": 1_346_471_936, "deepseek-coder-6.7b": 6_740_512_768,
    "deepseek-coder-7b": 6_910_365_696, "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400, "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320, "phi-3.5-mini": 3_821_079_552, "phi-4": 14_659_507_200,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624,
}


def of_transformers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """What transformers builds of a config, nothing of it in memory; a tied head is not stored."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind)
    tied = kind.tie_word_embeddings
    return {k: tuple(t.shape) for k, t in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {name: t.shape for name, t in spec.tensors.items()}


def config_of(short: str) -> dict[str, Any]:
    """A known model's config.json, written here again from the table."""
    g = GEOMETRIES[short]
    return {
        "model_type": g.model_type, "hidden_size": g.hidden, "num_hidden_layers": g.layers,
        "num_attention_heads": g.heads, "num_key_value_heads": g.kv_heads, "head_dim": g.head_dim,
        "intermediate_size": g.intermediate, "vocab_size": g.vocab, "tie_word_embeddings": g.tied,
        "pad_token_id": 0,
    }


@pytest.mark.parametrize(("kind", "more"), [
    ("llama", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"head_dim": 10}),
    ("llama", {"tie_word_embeddings": True}), ("llama", {"num_key_value_heads": None}),
    ("mistral", {}), ("mistral", {"head_dim": 8}), ("mistral", {"attention_bias": True}),
    ("qwen2", {}), ("qwen2", {"tie_word_embeddings": True}), ("qwen2", {"attention_bias": True}),
    ("qwen3", {"head_dim": 8}), ("qwen3", {"head_dim": 8, "attention_bias": True}),
    ("gemma2", {"head_dim": 8}), ("gemma2", {"head_dim": 8, "attention_bias": True}),
    ("gemma2", {"head_dim": 8, "tie_word_embeddings": False}),
    ("phi3", {}), ("phi3", {"num_key_value_heads": None}), ("phi3", {"attention_bias": True}),
    ("smollm3", {}), ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("smollm3", {"tie_word_embeddings": False}),
])
def test_tensors_are_those_of_transformers(kind: str, more: dict[str, Any]):
    config = {**TINY, "model_type": kind, **more}
    spec = spec_from_config(config, Path("it"))
    assert shapes(spec) == of_transformers(config)
    assert {t.dtype for t in spec.tensors.values()} == {"BF16"}


@pytest.mark.parametrize("short", [
    "qwen2.5-0.5b", "qwen3-0.6b", "r1-distill-qwen-14b", "llama-3.2-1b", "deepseek-coder-6.7b",
    "mistral-nemo-12b", "gemma-2-27b", "phi-3.5-mini", "phi-4", "smollm2-360m", "smollm3-3b",
])
def test_a_known_model_at_its_true_size(short: str):
    assert shapes(spec_of_geometry(short)) == of_transformers(config_of(short))


@pytest.mark.parametrize(("short", "parameters"), STATED.items())
def test_a_known_model_has_the_parameters_that_are_stated(short: str, parameters: int):
    assert spec_of_geometry(short).parameters == parameters


def test_models_without_a_stated_count_share_the_shapes_of_one_that_has():
    alike = {"r1-distill-qwen-7b": "qwen2.5-7b", "r1-distill-qwen-14b": "qwen2.5-14b",
             "r1-distill-qwen-32b": "qwen2.5-32b", "r1-distill-llama-8b": "llama-3.1-8b",
             "r1-distill-llama-70b": "llama-3.1-70b", "mistral-7b-v0.2": "mistral-7b-v0.1"}
    assert {*known()} == {*STATED, *alike}
    for one, other in alike.items():
        assert shapes(spec_of_geometry(one)) == shapes(spec_of_geometry(other))


def test_the_folder_of_a_real_model_says_the_same(tmp_path: Path):
    folder = Path(".cache/SmolLM2-135M-Instruct")
    if not folder.is_dir():
        pytest.skip("SmolLM2-135M-Instruct is not here; `make demo` fetches it")
    found, table = read_spec(folder), spec_of_geometry(folder.name)
    assert shapes(found) == shapes(table)
    same = replace(found, folder=table.folder, tensors=table.tensors)
    assert same == table


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_config_says_what_the_folder_says(family: str, tmp_path: Path):
    folder = tiny_model(tmp_path / "m", family)
    found = read_spec(folder)
    told = spec_from_config(json.loads((folder / "config.json").read_text()), folder)
    assert shapes(told) == shapes(found)
    assert replace(told, tensors=found.tensors) == found


def test_what_a_known_model_says():
    spec = spec_of_geometry("Mistral-7B-v0.1")
    assert (spec.folder, spec.architecture) == (Path("Mistral-7B-v0.1"), "MistralForCausalLM")
    assert (spec.window, spec.max_positions, spec.eos_ids, spec.tied) == (4096, 32768, (2,), False)
    assert spec.linears["self_attn.k_proj"] == (1024, 4096)
    assert spec_of_geometry("mistral-7b-v0.3").window is None
    assert spec_of_geometry("gemma-2-2b").window == 4096 and spec_of_geometry("gemma-2-2b").tied
    assert spec_of_geometry("deepseek-coder-7b").eos_ids == ()  # not confirmed, so not said


@pytest.mark.parametrize(("name", "hub_id"), [
    ("qwen2.5-14b", "Qwen/Qwen2.5-14B"), ("QWEN2.5-14B", "Qwen/Qwen2.5-14B"),
    ("qwen2-14b", "Qwen/Qwen2.5-14B"), ("qwen2-7b", "Qwen/Qwen2-7B"),
    ("Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-14B-Instruct"), ("Qwen2.5-Coder-7B", "Qwen/Qwen2.5-Coder-7B"),
    ("qwen/qwen2.5-14b-instruct", "Qwen/Qwen2.5-14B-Instruct"),
    ("DeepSeek-R1-Distill-Qwen-14B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"),
    ("deepseek-coder-7b-base", "deepseek-ai/deepseek-coder-7b-base-v1.5"),
    ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"), ("llama-3-8b", "meta-llama/Meta-Llama-3-8B"),
    ("mistral-nemo-12b", "mistralai/Mistral-Nemo-Base-2407"), ("gemma-2-9b-it", "google/gemma-2-9b-it"),
])
def test_names(name: str, hub_id: str):
    model = published_as(name)
    assert model is not None and model.hub_id == hub_id
    assert spec_of_geometry(name).folder == Path(name)


def test_every_name_leads_somewhere():
    for name in (*known(), *ALIASES, *(m.hub_id for m in PUBLISHED)):
        assert published_as(name) is not None, name
    for model in PUBLISHED:
        assert published_as(model.hub_id) is model and model.geometry in GEOMETRIES
        assert published_as(model.hub_id.rpartition("/")[2]) is model


@pytest.mark.parametrize("recipe", [
    "deepseek-coder-7b", "demo", "medical-r1-14b", "medical-r1-32b-cuda", "mistral-7b-wikisql",
])
def test_the_models_of_our_recipes_are_known(recipe: str):
    assert spec_of_geometry(Path(load(recipe, []).model).name).parameters > 0


@pytest.mark.parametrize(("name", "meant"), [
    ("qwen2.5-14", "qwen2.5-14b"), ("Qwen2.5-7B-Instrct", "qwen2.5-7b-instruct"), ("gemma-2-9", "gemma-2-9b"),
])
def test_a_name_that_is_nearly_right(name: str, meant: str):
    with pytest.raises(UserError, match=f"{name} is not a model.*did you mean .*{meant}") as e:
        spec_of_geometry(name)
    assert "qwen2.5-14b" in e.value.hint


def test_a_name_that_is_nothing_like_one():
    for name in ("gpt2", "", "someone/Qwen2.5-7B"):  # another owner's model may have any shape
        with pytest.raises(UserError, match="is not a model that burnish knows"):
            spec_of_geometry(name)


def test_smaller_models_of_the_family():
    assert smaller(spec_of_geometry("DeepSeek-R1-Distill-Qwen-14B")) == (
        "r1-distill-qwen-7b", "r1-distill-qwen-1.5b",
    )
    assert smaller(spec_of_geometry("qwen3-8b")) == ("qwen3-4b", "qwen3-1.7b", "qwen3-0.6b")
    assert smaller(spec_of_geometry("smollm2-135m")) == ()
    assert smaller(spec_of_geometry("Meta-Llama-3-8B")) == ("llama-3.2-3b", "llama-3.2-1b")


def test_the_family_of_a_model_under_another_name():
    """By its shape, then by kind and vocabulary; a stranger has no family."""
    spec = replace(spec_of_geometry("smollm2-360m"), folder=Path("/models/mine"))
    assert smaller(spec) == ("smollm2-135m",)
    cut = replace(spec_of_geometry("gemma-2-27b"), folder=Path("/models/cut"), n_layers=40)
    assert smaller(cut) == ("gemma-2-9b", "gemma-2-2b")
    assert smaller(replace(spec, vocab_size=123)) == ()
    # a folder that has the name of another kind of model
    named = replace(spec_of_geometry("smollm2-360m"), folder=Path("/models/qwen3-8b"))
    assert smaller(named) == ("smollm2-135m",)


@pytest.mark.parametrize(("config", "says"), [
    ({"model_type": "deepseek_v3"}, "shapes of a deepseek_v3; it does for llama, "),
    ({"model_type": "gemma3", "text_config": {"model_type": "llama"}}, "shapes of a gemma3"),
    ({"model_type": "qwen3"}, "head_dim is missing"),
    ({"model_type": "qwen2", "num_key_value_heads": None}, "num_key_value_heads is missing"),
    ({"model_type": "llama", "intermediate_size": None}, "intermediate_size is missing"),
    ({"model_type": "llama", "quantization": {"bits": 4}}, "how its weights are packed"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "how its weights are packed"),
])
def test_configs_that_do_not_say_enough(config: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says) as e:
        spec_from_config({**TINY, **config}, Path("it"))
    assert "safetensors headers" in e.value.hint


def test_a_config_that_is_none():
    with pytest.raises(UserError, match=r"(?s)not the config of a decoder.*vocab_size is missing"):
        spec_from_config({**TINY, "model_type": "llama", "vocab_size": None}, Path("it"))


def test_the_table_needs_no_framework():
    code = (
        "import sys; from burnish.models.geometry import spec_of_geometry; spec_of_geometry('qwen2.5-72b'); "
        "print([m for m in ('numpy', 'torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
