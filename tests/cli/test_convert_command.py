"""`burnish convert`: what SOURCE holds decides what is made, and an option that means nothing is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.models.spec import read_spec
from tests.models.tiny_gguf import write_gguf
from tests.tiny import tiny_model
from tests.world import World


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(
        tmp_path_factory.mktemp("llama") / "model", "llama", hidden_size=64, intermediate_size=128
    )


@pytest.fixture(scope="module")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(llama))
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    out = tmp_path_factory.mktemp("adapter") / "peft"
    get_peft_model(base, config).save_pretrained(str(out))
    return out


def facts(w: World, *argv: object) -> dict[str, Any]:
    said = w.burnish("convert", *map(str, argv), "--json")
    assert said.code == 0, said.err
    return json.loads(said.out)


def line(w: World, *argv: object) -> str:
    said = w.burnish("convert", *map(str, argv))
    assert said.code == 0, said.err
    assert said.out.count("\n") == 1
    return said.out


def test_a_gguf_file(world: World, llama: Path):
    write_gguf(llama, world.root / "m.gguf")
    assert "LlamaForCausalLM" in line(world, "m.gguf", "a")
    report = facts(world, "m.gguf", "b", "--dtype", "bfloat16")
    assert (report["dtype"], report["source"]) == ("bfloat16", str(world.root / "m.gguf"))
    assert {t.dtype for t in read_spec(world.root / "a").tensors.values()} == {"F32"}
    assert {t.dtype for t in read_spec(world.root / "b").tensors.values()} == {"BF16"}


def test_a_model_folder(world: World, llama: Path):
    pytest.importorskip("mlx_lm")
    said = line(world, llama, "four", "--quantize", "4bit")
    assert "4 bits in groups of 64" in said and "the rest float32" in said
    report = facts(world, llama, "eight", "--quantize", "8bit", "--dtype", "bfloat16")
    assert (report["bits"], report["dtype"], report["source"]) == (8, "bfloat16", str(llama))
    assert Path(report["out"]) == world.root / "eight"
    for name, bits in (("four", 4), ("eight", 8)):
        spec = read_spec(world.root / name)
        assert spec.quantization and spec.quantization.bits == bits
        assert spec.parameters == report["parameters"]


def test_an_adapter_there_and_back(world: World, adapter: Path):
    said = line(world, adapter, "mlx")
    assert "mlx-lm adapter, lora, rank 4, scale 2, 3 projections in 3 layers" in said
    assert "with the config it had there before" in line(world, "mlx", "back", "--to", "peft")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (world.root / "back" / name).read_bytes() == (adapter / name).read_bytes()
    report = facts(world, adapter, "mlx", "--to", "mlx", "--force")
    assert (report["to"], report["rank"], report["scale"]) == ("mlx", 4, 2.0)


def test_an_adapter_whose_model_moved(world: World, adapter: Path, llama: Path):
    moved = shutil.copytree(adapter, world.root / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "gone", "layers_to_transform": [0, 1, 2]}
    (moved / "adapter_config.json").write_text(json.dumps(config))
    said = world.burnish("convert", "moved", "mlx")
    assert said.code == 2 and "--model FOLDER" in said.err
    assert "3 layers" in line(world, "moved", "mlx", "--model", llama)


CASES: list[tuple[list[str], str, str]] = [
    (["MODEL", "out"], "is a model folder already; what should become of it?", "--quantize 4bit"),
    (["MODEL", "out", "--quantize", "3bit"], "quantize: expected 4bit or 8bit, got 3bit", "--quantize 4bit"),
    (["MODEL", "out", "--to", "mlx"], "is a model folder: --to does not apply to it", "leave --to out"),
    (["MODEL", "out", "--quantize", "4bit", "--model", "x"], "--model does not apply", "leave --model out"),
    (["ADAPTER", "out", "--quantize", "4bit"], "is an adapter folder: --quantize does not", "leave"),
    (["ADAPTER", "out", "--dtype", "float16"], "is an adapter folder: --dtype does not", "leave"),
    (["ADAPTER", "out", "--to", "peft"], "--to peft: it is one of peft's already", "--to mlx"),
    (["ADAPTER", "out", "--to", "gguf"], "--to gguf: expected mlx or peft", "--to mlx"),
    (["m.gguf", "out", "--quantize", "4bit"], "read as GGUF: --quantize does not apply", "leave"),
    (["empty", "out"], "empty holds neither config.json nor adapter_config.json", "give a GGUF file"),
    (["gone", "out"], "gone does not exist", "give the path of one .gguf file"),
    (["gone", "out", "--quantize", "4bit"], "gone does not exist", "a model folder"),
    (["ADAPTER", "out", "--model", "gone"], "gone: there is no such folder", "the adapter's base model"),
    (["run", "out"], "nor adapter_config.json: it is a run", "run/adapter"),
    (["MODEL", "m.gguf", "--quantize", "4bit"], "m.gguf exists", "choose another name"),
    (["MODEL", "m.gguf", "--quantize", "4bit", "--force"], "m.gguf is not a model folder", "another name"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "says", "hint"), CASES, ids=[" ".join(c[0]) for c in CASES])
def test_what_is_refused(argv: list[str], says: str, hint: str, world: World, llama: Path, adapter: Path):
    if "4bit" in argv and "m.gguf" in argv[1:]:
        pytest.importorskip("mlx_lm")
    (world.root / "empty").mkdir()
    shutil.copytree(adapter, world.root / "run" / "adapter")
    (world.root / "m.gguf").write_bytes(b"GGUF")
    before = sorted(p.name for p in world.root.iterdir())
    places = {"MODEL": str(llama), "ADAPTER": str(adapter)}
    said = world.burnish("convert", *[places.get(a, a) for a in argv])
    assert said.code == 2 and says in said.err and hint in said.err and "Traceback" not in said.err
    assert sorted(p.name for p in world.root.iterdir()) == before


def test_without_mlx(world: World, llama: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    """Quantising says what is missing; adapters need no MLX."""
    for name in ("mlx", "mlx.core", "mlx_lm", "mlx_lm.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "burnish.backends.mlx.quantize", raising=False)
    said = world.burnish("convert", str(llama), "out", "--quantize", "4bit")
    assert said.code == 2 and "needs mlx, which is not installed" in said.err
    assert "pip install 'burnish[mlx]'" in said.err
    assert "mlx-lm adapter" in line(world, adapter, "mlx")


def test_a_model_that_mlx_lm_does_not_know(world: World, llama: Path):
    pytest.importorskip("mlx_lm")
    shutil.copytree(llama, world.root / "new")
    config = json.loads((world.root / "new" / "config.json").read_text())
    (world.root / "new" / "config.json").write_text(json.dumps({**config, "model_type": "newllm"}))
    said = world.burnish("convert", "new", "out", "--quantize", "4bit")
    assert said.code == 2 and "no model class for model_type 'newllm'" in said.err
    assert not (world.root / "out").exists()
