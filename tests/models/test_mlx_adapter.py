"""Adapters from PEFT to mlx-lm and back: the same logits in both, and both files byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from burnish.errors import UserError
from burnish.models.mlx_adapter import kind_of, to_mlx, to_peft
from tests.tiny import tiny_model

IDS = [[5, 60, 7, 200, 33, 5, 5, 90, 11, 4]]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("peft")
    return tiny_model(tmp_path_factory.mktemp("base") / "model", "llama", tied=False)


def adapter_of(model: Path, out: Path, dtype: str = "float32", **asked: Any) -> Path:
    """A PEFT adapter with every number drawn, as PEFT saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    asked = {"r": 4, "lora_alpha": 10, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.1} | asked
    base = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **asked))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                drawn = torch.empty_like(p).normal_(0, 0.3, generator=generator)
                p.copy_(p * (1 + drawn) if "magnitude" in name else drawn)
                p.data = p.data.to(getattr(torch, dtype))
    adapted.save_pretrained(str(out))
    return out


def peft_logits(model: Path, adapter: Path | None) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    if adapter is not None:
        base = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        return base(torch.tensor(IDS)).logits.numpy()


def mlx_logits(model: Path, adapter: Path | None) -> np.ndarray:
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    from mlx_lm.utils import load_adapters, load_model

    mlx, _ = load_model(model)
    if adapter is not None:
        mlx = load_adapters(mlx, str(adapter))
        mlx.eval()
    return np.array(mlx(mx.array(IDS)).astype(mx.float32))


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def change(folder: Path, **keys: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({**read(folder), **keys}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_gives_the_logits_that_peft_gives(kind: str, llama: Path, tmp_path: Path):
    peft = adapter_of(llama, tmp_path / "peft", **KINDS[kind])
    report = to_mlx(peft, tmp_path / "mlx")
    found, expected = mlx_logits(llama, tmp_path / "mlx"), peft_logits(llama, peft)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected - peft_logits(llama, None)).max() > 0.1  # the adapter does something
    assert report.kind == ("dora" if kind == "dora" else "lora")
    assert report.scale == (10 / 2 if kind == "rslora" else 10 / 4)
    assert (report.rank, report.modules, report.layers, report.to) == (4, 6, 3, "mlx")
    assert read(tmp_path / "mlx")["num_layers"] == 3
    assert read(tmp_path / "mlx")["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mlx", "peft"]


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_other_families(family: str, tmp_path: Path):
    model = tiny_model(tmp_path / "model", family)
    peft = adapter_of(model, tmp_path / "peft", target_modules=["k_proj", "v_proj", "o_proj", "gate_proj"])
    to_mlx(peft, tmp_path / "mlx")
    assert np.abs(mlx_logits(model, tmp_path / "mlx") - peft_logits(model, peft)).max() < 1e-4


def test_the_last_layers(llama: Path, tmp_path: Path):
    peft = adapter_of(llama, tmp_path / "peft", layers_to_transform=[1, 2], layers_pattern="layers")
    assert to_mlx(peft, tmp_path / "mlx").layers == 2
    assert read(tmp_path / "mlx")["num_layers"] == 2
    assert np.abs(mlx_logits(llama, tmp_path / "mlx") - peft_logits(llama, peft)).max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_bytes(kind: str, dtype: str, llama: Path, tmp_path: Path):
    peft = adapter_of(llama, tmp_path / "peft", dtype, **KINDS[kind])
    to_mlx(peft, tmp_path / "mlx")
    assert to_peft(tmp_path / "mlx", tmp_path / "back").kept
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (peft / name).read_bytes(), name


def test_there_and_back_of_files_that_others_wrote(llama: Path, tmp_path: Path):
    """Another order, other metadata, another way to write JSON, line ends of Windows."""
    peft = adapter_of(llama, tmp_path / "peft")
    text = json.dumps(read(peft), indent=7, ensure_ascii=False).replace("\n", "\r\n") + " "
    (peft / "adapter_config.json").write_bytes(text.encode())
    weights = load_file(peft / "adapter_model.safetensors")
    header: dict[str, Any] = {}
    at = 0
    for name in sorted(weights, reverse=True):
        end = at + weights[name].nbytes
        header[name] = {"shape": list(weights[name].shape), "dtype": "F32", "data_offsets": [at, end]}
        at = end
    said = json.dumps({**header, "__metadata__": {"made": "by hand"}}).encode() + b"   "
    data = b"".join(weights[name].tobytes() for name in header)
    (peft / "adapter_model.safetensors").write_bytes(len(said).to_bytes(8, "little") + said + data)
    to_mlx(peft, tmp_path / "mlx")
    to_peft(tmp_path / "mlx", tmp_path / "back")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (peft / name).read_bytes(), name


def trained_by_mlx(model: Path, out: Path, kind: str, num_layers: int, keys: list[str] | None) -> Path:
    """What `mlx_lm.lora` leaves behind, its own trainer run for three steps."""
    pytest.importorskip("mlx_lm")
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    mx.random.seed(3)
    mlx, _ = load_model(model)
    mlx.freeze()
    settings = {"rank": 3, "scale": 5.5, "dropout": 0.0, **({"keys": keys} if keys else {})}
    linear_to_lora_layers(mlx, num_layers, settings, use_dora=kind == "dora")
    out.mkdir()
    said = {"model": str(model), "fine_tune_type": kind, "num_layers": num_layers,
            "lora_parameters": settings}
    (out / "adapter_config.json").write_text(json.dumps(said, indent=4, sort_keys=True))
    rows = [([7 + i, 90, 3, 11, 5, 250, 9, 30], 0) for i in range(4)]
    args = TrainingArgs(batch_size=2, iters=3, val_batches=0, steps_per_report=10, steps_per_eval=100,
                        adapter_file=str(out / "adapters.safetensors"), max_seq_length=32)
    train(mlx, optim.Adam(learning_rate=0.05), rows, rows, args)
    return out


@pytest.mark.parametrize(("kind", "num_layers", "keys"), [
    ("lora", 2, ["self_attn.q_proj", "self_attn.v_proj"]), ("lora", 3, None), ("lora", -1, None),
    ("dora", 2, ["mlp.up_proj"]),
])
def test_peft_reads_what_mlx_trained(
    kind: str, num_layers: int, keys: list[str] | None, llama: Path, tmp_path: Path
):
    mlx = trained_by_mlx(llama, tmp_path / "mlx", kind, num_layers, keys)
    assert kind_of(mlx) == "mlx"
    report = to_peft(mlx, tmp_path / "peft", llama)
    found, expected = peft_logits(llama, tmp_path / "peft"), mlx_logits(llama, mlx)
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(expected - mlx_logits(llama, None)).max() > 1e-2
    config = read(tmp_path / "peft")
    assert (config["r"], config["lora_alpha"], report.kept) == (3, 16.5, False)
    assert config.get("layers_to_transform") == ([1, 2] if num_layers == 2 else None)
    assert config["target_modules"] == (
        [k.split(".")[1] for k in keys] if keys
        else ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    )
    # and from there to mlx-lm again
    to_mlx(tmp_path / "peft", tmp_path / "again")
    first, second = (load_file(f / "adapters.safetensors") for f in (mlx, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[k], second[k]) for k in first)


def test_projections_that_differ_from_layer_to_layer(llama: Path, tmp_path: Path):
    mlx = trained_by_mlx(llama, tmp_path / "mlx", "lora", 2, ["self_attn.q_proj", "self_attn.v_proj"])
    path = mlx / "adapters.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1.self_attn.v_proj" not in k}, path)
    to_peft(mlx, tmp_path / "peft")
    assert read(tmp_path / "peft")["target_modules"] == [
        "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj",
        "model.layers.2.self_attn.v_proj",
    ]
    assert np.abs(peft_logits(llama, tmp_path / "peft") - mlx_logits(llama, mlx)).max() < 1e-4


def test_what_was_kept_counts_only_while_it_is_true(llama: Path, tmp_path: Path):
    """mlx-lm trains on and saves weights beside an old config, or somebody changes the scale."""
    peft = adapter_of(llama, tmp_path / "peft")
    to_mlx(peft, tmp_path / "mlx")
    parameters = read(tmp_path / "mlx")["lora_parameters"]
    change(tmp_path / "mlx", lora_parameters={**parameters, "scale": 7.0})
    assert not to_peft(tmp_path / "mlx", tmp_path / "back").kept
    assert read(tmp_path / "back")["lora_alpha"] == 28
    assert np.abs(peft_logits(llama, tmp_path / "back") - mlx_logits(llama, tmp_path / "mlx")).max() < 1e-4

    change(tmp_path / "mlx", lora_parameters=parameters)
    path = tmp_path / "mlx" / "adapters.safetensors"
    weights = {k: v + np.float32(0.1) for k, v in load_file(path).items()}
    save_file(weights, path)  # the same form: the config holds, the numbers are the new ones
    assert to_peft(tmp_path / "mlx", tmp_path / "new").kept
    found = load_file(tmp_path / "new" / "adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    np.testing.assert_array_equal(
        found[f"base_model.model.{name}.lora_A.weight"].T, weights[f"{name}.lora_a"]
    )
    save_file({k: v for k, v in weights.items() if "layers.0." not in k}, path)
    assert not to_peft(tmp_path / "mlx", tmp_path / "fewer").kept
    assert read(tmp_path / "fewer")["layers_to_transform"] == [1, 2]


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_of(llama, tmp_path_factory.mktemp("plain") / "peft")


def refused(go: Callable[[], object], says: str, out: Path) -> UserError:
    with pytest.raises(UserError, match=says) as e:
        go()
    assert not out.exists() and not [p for p in out.parent.iterdir() if p.name.startswith(".")]
    return e.value


@pytest.mark.parametrize(("keys", "says"), [
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: .*lm_head"),
    ({"bias": "all"}, "bias: expected none, got all"),
    ({"lora_bias": True}, "lora_bias: True"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: .*q_proj"),
    ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern: .*q_proj"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out: True"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    ({"peft_type": "IA3"}, "peft_type: expected LORA, got IA3"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4 begins from a changed base"),
    ({"r": 5}, "q_proj: not of rank 5"),
    ({"r": "four"}, "r and lora_alpha: expected numbers"),
    ({"use_dora": True}, "expected lora_a, lora_b, m, got lora_a, lora_b"),
])
def test_what_mlx_cannot_hold(keys: dict[str, Any], says: str, plain: Path, tmp_path: Path):
    peft = change(shutil.copytree(plain, tmp_path / "peft"), **keys)
    refused(lambda: to_mlx(peft, tmp_path / "mlx"), says, tmp_path / "mlx")


def test_all_that_is_wrong_is_said_at_once(plain: Path, tmp_path: Path):
    peft = change(shutil.copytree(plain, tmp_path / "peft"), bias="all", rank_pattern={"x": 1})
    refused(lambda: to_mlx(peft, tmp_path / "mlx"), r"rank_pattern(.|\n)*bias", tmp_path / "mlx")


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_of_the_head_and_of_embeddings(target: str, llama: Path, tmp_path: Path):
    peft = adapter_of(llama, tmp_path / "peft", target_modules=["q_proj", target])
    refused(lambda: to_mlx(peft, tmp_path / "mlx"), f"{target}.*: not of a linear layer", tmp_path / "mlx")


@pytest.mark.parametrize("expert", ["block_sparse_moe.experts.0.w1", "mlp.experts.7.up_proj"])
def test_adapters_of_experts(expert: str, plain: Path, tmp_path: Path):
    peft = shutil.copytree(plain, tmp_path / "peft")
    path = peft / "adapter_model.safetensors"
    save_file({k.replace("mlp.down_proj", expert): v for k, v in load_file(path).items()}, path)
    refused(lambda: to_mlx(peft, tmp_path / "mlx"), "an adapter of experts", tmp_path / "mlx")


def test_layers_that_are_not_the_last(llama: Path, tmp_path: Path):
    peft = adapter_of(llama, tmp_path / "peft", layers_to_transform=[0, 2], layers_pattern="layers")
    says = r"adapts layers \[0, 2\] of 3; .* here \[1\] are left out"
    refused(lambda: to_mlx(peft, tmp_path / "mlx"), says, tmp_path / "mlx")
    shutil.rmtree(peft)
    adapter_of(llama, peft, layers_to_transform=[0, 1], layers_pattern="layers")
    refused(lambda: to_mlx(peft, tmp_path / "mlx"), r"here \[2\] are left out", tmp_path / "mlx")


def test_a_base_model_that_moved(llama: Path, plain: Path, tmp_path: Path):
    """Where every layer is adapted nobody needs to look; else --model says where it is."""
    peft = change(shutil.copytree(plain, tmp_path / "peft"), base_model_name_or_path="someone/elsewhere")
    to_mlx(peft, tmp_path / "mlx")
    assert read(tmp_path / "mlx")["num_layers"] == 3
    shutil.rmtree(peft)
    adapter_of(llama, peft, layers_to_transform=[1, 2], layers_pattern="layers")
    change(peft, base_model_name_or_path="someone/elsewhere")
    out = tmp_path / "two"
    said = refused(lambda: to_mlx(peft, out), "'someone/elsewhere' is no folder", out)
    assert "--model FOLDER" in said.hint
    to_mlx(peft, out, model=llama)
    assert read(out)["num_layers"] == 2


def test_the_wrong_model(plain: Path, tmp_path: Path):
    other = tiny_model(tmp_path / "other", "llama", hidden_size=64)
    says = r"down_proj: expected \(out, in\) \(64, 48\), got \(32, 48\)"
    refused(lambda: to_mlx(plain, tmp_path / "mlx", model=other), says, tmp_path / "mlx")
    to_mlx(plain, tmp_path / "right")
    refused(lambda: to_peft(tmp_path / "right", tmp_path / "peft", other), says, tmp_path / "peft")


def test_a_layer_without_such_a_projection_is_passed_by(plain: Path, tmp_path: Path):
    """Hybrid models: only some layers have attention, and mlx-lm adapts those."""
    model = tiny_model(tmp_path / "model", "llama", tied=False)
    weights = load_file(model / "model.safetensors")
    cut = {k: v for k, v in weights.items() if "layers.1.self_attn" not in k}
    save_file(cut, model / "model.safetensors", {"format": "pt"})
    peft = change(shutil.copytree(plain, tmp_path / "peft"), base_model_name_or_path=str(model))
    path = peft / "adapter_model.safetensors"
    keep = {k: v for k, v in load_file(path).items() if "q_proj" in k and "layers.1." not in k}
    save_file(keep, path)
    assert to_mlx(peft, tmp_path / "mlx").layers == 2
    assert read(tmp_path / "mlx")["num_layers"] == 3


@pytest.mark.parametrize(("keys", "says"), [
    ({"fine_tune_type": "full"}, "expected lora or dora, got full"),
    ({"lora_parameters": {"scale": 1.0}}, "expected a rank and a scale, got None and 1.0"),
    ({"lora_parameters": {"rank": 2, "scale": 1.0}}, "not of rank 2"),
    ({"fine_tune_type": "dora"}, "expected lora_a, lora_b, m"),
])
def test_what_peft_cannot_hold(keys: dict[str, Any], says: str, plain: Path, tmp_path: Path):
    to_mlx(plain, tmp_path / "mlx")
    change(tmp_path / "mlx", **keys)
    refused(lambda: to_peft(tmp_path / "mlx", tmp_path / "peft"), says, tmp_path / "peft")


def test_mlx_adapters_of_switch_layers(plain: Path, tmp_path: Path):
    to_mlx(plain, tmp_path / "mlx")
    path = tmp_path / "mlx" / "adapters.safetensors"
    experts = {f"model.layers.0.mlp.switch_mlp.up_proj.{k}": np.zeros((2, 4, 4), np.float32)
               for k in ("lora_a", "lora_b")}
    save_file(load_file(path) | experts, path)
    refused(lambda: to_peft(tmp_path / "mlx", tmp_path / "peft"), "an adapter of experts", tmp_path / "peft")


def test_damaged_folders(plain: Path, tmp_path: Path):
    out = tmp_path / "out"
    peft = shutil.copytree(plain, tmp_path / "peft")
    weights = peft / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(lambda: to_mlx(peft, out), "not a whole safetensors file", out)
    weights.unlink()
    refused(lambda: to_mlx(peft, out), "holds no adapter_model.safetensors", out)
    (peft / "adapter_config.json").write_text("{")
    refused(lambda: to_mlx(peft, out), "adapter_config.json is not JSON", out)
    (peft / "adapter_config.json").write_text("[]")
    refused(lambda: kind_of(peft), "expected a JSON object, got list", out)
    (peft / "adapter_config.json").write_text("{}")
    refused(lambda: kind_of(peft), "neither PEFT's", out)


def test_an_out_that_exists(plain: Path, tmp_path: Path):
    out = tmp_path / "out"
    to_mlx(plain, out)
    with pytest.raises(UserError, match="exists"):
        to_mlx(plain, out)
    (out / "old.txt").write_text("old")
    to_mlx(plain, out, force=True)
    carried = {"README.md"}  # PEFT's own
    assert {p.name for p in out.iterdir()} - carried == {"adapter_config.json", "adapters.safetensors"}
    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "dear.txt").write_text("dear")
    with pytest.raises(UserError, match="not an adapter folder"):
        to_mlx(plain, letters, force=True)
    assert (letters / "dear.txt").is_file()


def test_what_stands_beside_the_weights_is_carried_along(tmp_path: Path, tiny_folder: Path) -> None:
    """Tokenizer, template, recipe: without them the adapter would be asked otherwise than it was trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    source = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(str(tiny_folder))
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(str(source))
    beside = {"recipe.yaml": "name: x\n", "burnish.json": "{}\n", "chat_template.jinja": "{{ messages }}"}
    for name, text in beside.items():
        (source / name).write_text(text)
    (source / "optimizer.safetensors").write_bytes(b"not carried")
    to_mlx(source, tmp_path / "mlx", model=tiny_folder)
    to_peft(tmp_path / "mlx", tmp_path / "back", tiny_folder)
    for folder in (tmp_path / "mlx", tmp_path / "back"):
        assert {name: (folder / name).read_text() for name in beside} == beside
        assert not (folder / "optimizer.safetensors").exists()
