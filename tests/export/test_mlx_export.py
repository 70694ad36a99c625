"""base + adapter as MLX folders: what mlx-lm reads of them, which bits, and what is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs torch, transformers and peft")
mx = pytest.importorskip("mlx.core", reason="needs mlx and mlx-lm")

from burnish.backends.mlx import quantize  # noqa: E402
from burnish.backends.mlx import stock as mlx_stock  # noqa: E402
from burnish.backends.torch import stock as torch_stock  # noqa: E402
from burnish.errors import Unsupported, UserError  # noqa: E402
from burnish.export import mlx as export  # noqa: E402
from burnish.export.adapter import Adapter, read_adapter  # noqa: E402
from burnish.export.merged import Merged  # noqa: E402
from burnish.export.mlx import check_mlx, mlx_bytes, standing, write_mlx  # noqa: E402
from burnish.export.source import Source  # noqa: E402
from burnish.models.spec import read_spec  # noqa: E402
from burnish.models.tokenizer import load_tokenizer  # noqa: E402
from tests.export.broken import fused_into_4bit  # noqa: E402
from tests.export.gguf_world import whole as whole_of  # noqa: E402
from tests.export.test_merged import peft_adapter  # noqa: E402
from tests.tiny import tiny_model, tiny_recipe  # noqa: E402

IDS = [5, 60, 7, 200, 33, 5, 5, 90, 11, 4, 250, 17, 3, 99, 140, 8]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
MODULE = "model.layers.1.mlp.up_proj"


def source_of(place: Path, family: str = "llama", tied: bool = False, **overrides: Any) -> Source:
    base = tiny_model(place / "base", family, tied=tied, **{**SIZES, **overrides})
    adapter = peft_adapter(base, place / "adapter")
    return Source(
        folder=adapter, name="tiny", recipe=tiny_recipe(base), adapter=adapter, base=read_spec(base),
        tokenizer=load_tokenizer(base), format="messages", chat=True, system=None,
    )  # fmt: skip


def written(source: Source, folder: Path, bits: int, adapter: Adapter | None = None) -> export.MlxReport:
    folder.mkdir()
    return write_mlx(Merged(source.base, adapter or source.adapter), source, folder, bits)


def score(library: Any, folder: Path, adapter: Path | None = None) -> np.ndarray:
    consumer = library.open_stock(folder, adapter, dtype="float32")
    try:
        return consumer.score(IDS)
    finally:
        consumer.close()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def bits_of(folder: Path, module: str) -> int:
    """By the shapes: 32-bit words a row, over numbers a row."""
    found = mx.load(str(folder / "model.safetensors"))
    return found[f"{module}.weight"].shape[1] * 32 // (found[f"{module}.scales"].shape[1] * 64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source_of(tmp_path_factory.mktemp("llama"))


# ---- what mlx-lm reads


MODELS = [("llama", True), ("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", True)]


@pytest.mark.parametrize(("family", "tied"), MODELS)
def test_mlx_lm_scores_it_as_base_and_adapter(family: str, tied: bool, tmp_path: Path):
    """16 bits within bfloat16's rounding, 8 within 8 bits', 4 far from the base and nearer to the tuned."""
    source = source_of(tmp_path, family, tied)
    tuned = score(torch_stock, source.base.folder, source.adapter)
    change = np.abs(score(torch_stock, source.base.folder) - tuned).mean()
    off = {}
    for bits in (16, 8, 4):
        written(source, tmp_path / str(bits), bits)
        off[bits] = np.abs(score(mlx_stock, tmp_path / str(bits)) - tuned).mean()
    assert off[16] < 0.05 * change and off[8] < 0.1 * change and off[4] < change, (off, change)
    assert off[8] < off[4]


def test_16_bits_are_transformers_and_mlx_lms_alike(llama: Source, tmp_path: Path):
    report = written(llama, tmp_path / "out", 16)
    ours, theirs = score(torch_stock, tmp_path / "out"), score(mlx_stock, tmp_path / "out")
    assert np.abs(ours - theirs).max() < 2e-5
    spec = read_spec(tmp_path / "out")
    assert {t.dtype for t in spec.tensors.values()} == {"BF16"}
    assert (report.bits, report.dtype, report.packed, report.raised) == (16, "bfloat16", 0, {})
    assert report.weight_bytes == spec.weight_bytes == llama.base.weight_bytes / 2
    assert report.kept == len(spec.tensors)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_are_the_bits_that_mlx_lm_makes_of_the_merged_folder(bits: int, llama: Source, tmp_path: Path):
    from mlx_lm.convert import convert

    report = written(llama, tmp_path / "ours", bits)
    written(llama, tmp_path / "merged", 16)
    convert(str(tmp_path / "merged"), str(tmp_path / "theirs"), quantize=True, q_bits=bits, q_group_size=64)
    ours, theirs = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys() and report.raised == {}
    for name, value in theirs.items():
        assert value.dtype == ours[name].dtype and mx.array_equal(value, ours[name]), name
    assert config_of(tmp_path / "ours")["quantization"] == config_of(tmp_path / "theirs")["quantization"]
    assert (report.packed, report.kept, report.dtype) == (3 * 7 + 2, 7, "bfloat16")
    assert report.weight_bytes == read_spec(tmp_path / "ours").weight_bytes


def test_the_dtype_is_the_bases_where_that_has_16_bits(llama: Source, tmp_path: Path):
    weights = mx.load(str(llama.base.folder / "model.safetensors"))
    base = shutil.copytree(llama.base.folder, tmp_path / "base")
    half = {name: value.astype(mx.float16) for name, value in weights.items()}
    mx.save_safetensors(str(base / "model.safetensors"), half, {"format": "pt"})
    source = replace(llama, base=read_spec(base))
    assert written(source, tmp_path / "out", 8).dtype == "float16"
    assert {t.dtype for t in read_spec(tmp_path / "out").tensors.values()} == {"U32", "F16"}


def test_what_else_is_in_the_folder(tmp_path: Path):
    source = source_of(tmp_path / "made")
    for name in ("LICENSE", "NOTICE.txt"):
        (source.base.folder / name).write_text("free")
    written(source, tmp_path / "out", 4)
    made = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "LICENSE", "NOTICE.txt"} <= made
    assert {n for n in made if "safetensors" in n} == {"model.safetensors", "model.safetensors.index.json"}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == mx.load(str(tmp_path / "out" / "model.safetensors")).keys()
    origin = json.loads((tmp_path / "out" / "burnish.json").read_text())
    assert origin["base"] == str(source.base.folder) and origin["adapter"] == str(source.adapter)
    assert origin["bits"] == 4 and "source" not in origin  # a folder that is gone
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "out"]


def test_shards_stay_whole(llama: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Merged weights in two files, packed ones in four: none of the merged may be left among them."""
    written(llama, tmp_path / "one", 4)
    monkeypatch.setattr("burnish.export.hf.SHARD_BYTES", 150_000)
    monkeypatch.setattr(quantize, "SHARD_BYTES", 20_000)
    written(llama, tmp_path / "many", 4)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = {p.name for p in (tmp_path / "many").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files and len(files) > 3
    assert np.array_equal(score(mlx_stock, tmp_path / "one"), score(mlx_stock, tmp_path / "many"))


# ---- what survives 4 bits


def with_one_faint(adapter: Adapter, by: float) -> Adapter:
    a, b = adapter.modules[MODULE]
    return replace(adapter, modules={**adapter.modules, MODULE: (a, b * np.float32(by))})


def test_standing_is_measured_on_the_whole_matrices(llama: Source):
    """The same numbers from W + ΔW and its packed form as a whole, in float64."""
    merged = Merged(llama.base, read_adapter(llama.adapter))
    a, b = merged.adapter.modules[MODULE]
    change = merged.adapter.scale * b.astype(np.float64) @ a
    whole = whole_of(merged, f"{MODULE}.weight")
    error = quantize.rounded(whole, 4, "bfloat16") - whole.astype(np.float64)
    inputs, outputs = np.linalg.pinv(a) @ a, b @ np.linalg.pinv(b)  # onto what A reads and B writes
    found = standing(merged, MODULE, 4, "bfloat16")
    assert found.kept == pytest.approx(1 + (error * change).sum() / (change**2).sum(), rel=1e-4)
    assert found.above == pytest.approx((change**2).sum() / ((outputs @ error @ inputs) ** 2).sum(), rel=1e-3)
    eight = standing(merged, MODULE, 8, "bfloat16")
    assert found.stands and eight.above > 50 * found.above


def test_what_is_not_packed_or_not_changed_stands(tmp_path: Path, llama: Source):
    odd = source_of(tmp_path, intermediate_size=96)  # 96 numbers are no whole groups
    assert standing(Merged(odd.base, odd.adapter), "model.layers.0.mlp.down_proj", 4, "bfloat16").stands
    nothing = with_one_faint(read_adapter(llama.adapter), 0.0)
    assert standing(Merged(llama.base, nothing), MODULE, 4, "bfloat16").kept == 1.0


def test_a_change_that_4_bits_would_drown_gets_8(llama: Source, tmp_path: Path):
    adapter = with_one_faint(read_adapter(llama.adapter), 0.004)
    report = written(llama, tmp_path / "out", 4, adapter)
    assert report.raised == {MODULE: 8}
    assert config_of(tmp_path / "out")["quantization"][MODULE] == {"group_size": 64, "bits": 8}
    assert bits_of(tmp_path / "out", MODULE) == 8
    assert bits_of(tmp_path / "out", "model.layers.0.mlp.up_proj") == 4
    model: Any = quantize.load_model(tmp_path / "out")[0]
    assert (model.layers[1].mlp.up_proj.bits, model.layers[0].mlp.up_proj.bits) == (8, 4)
    written(llama, tmp_path / "eight", 8, adapter)
    raised, eight = (mx.load(str(tmp_path / f / "model.safetensors")) for f in ("out", "eight"))
    for leaf in ("weight", "scales", "biases"):
        assert mx.array_equal(raised[f"{MODULE}.{leaf}"], eight[f"{MODULE}.{leaf}"])
    assert np.isfinite(score(mlx_stock, tmp_path / "out")).all()
    assert read_spec(tmp_path / "out").parameters == llama.base.parameters


def test_an_adapter_that_4_bits_would_drown_is_refused(llama: Source, tmp_path: Path):
    faint = read_adapter(llama.adapter).scaled(0.002)
    with pytest.raises(UserError, match=r"would not survive 4 bits: in 2\d of the 21 m") as e:
        written(llama, tmp_path / "out", 4, faint)
    assert "--type 8bit" in e.value.hint
    assert list((tmp_path / "out").iterdir()) == [] and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert written(llama, tmp_path / "eight", 8, faint).bits == 8


def test_weights_that_lie_on_the_grid_take_no_faint_change(llama: Source, tmp_path: Path):
    """A base that was trained for 4 bits, say: rounding W + ΔW gives W back, and no noise tells of it."""
    base = shutil.copytree(llama.base.folder, tmp_path / "base")
    weights = mx.load(str(base / "model.safetensors"))
    for name, value in weights.items():
        if value.ndim == 2:
            steps = mx.clip(mx.round(value / 0.0625), -8, 7).reshape(-1, 64)
            steps[:, 0], steps[:, 1] = -8, 7  # each group spans all steps, so its grid is this one
            weights[name] = (steps * 0.0625).reshape(value.shape)
    mx.save_safetensors(str(base / "model.safetensors"), weights, {"format": "pt"})
    merged = Merged(read_spec(base), read_adapter(llama.adapter).scaled(0.05))
    found = standing(merged, MODULE, 4, "float32")
    assert abs(found.kept) < 0.3 and not found.stands
    assert found.above > export.LEAST_ABOVE  # this alone would have let it pass


def test_fused_into_4_bits_is_far_from_what_was_trained(tmp_path: Path):
    """The broken export that a proof must refuse: an adapter of ordinary size, most of it gone."""
    source = source_of(tmp_path)
    adapter = read_adapter(source.adapter).scaled(0.05)
    source.adapter.joinpath("adapter_config.json").write_text(
        json.dumps(json.loads((source.adapter / "adapter_config.json").read_text()) | {"lora_alpha": 0.5})
    )
    assert read_adapter(source.adapter).scale == pytest.approx(adapter.scale)
    fused_into_4bit(source.base.folder, source.adapter, tmp_path / "broken")
    written(source, tmp_path / "four", 4)
    base = {n: v for n, v in mx.load(str(source.base.folder / "model.safetensors")).items()}
    kept = {}
    for name in ("broken", "four"):
        folder = tmp_path / name
        assert np.isfinite(score(mlx_stock, folder)).all()
        found, parts = mx.load(str(folder / "model.safetensors")), []
        for module in adapter.modules:
            triple = (found[f"{module}.{leaf}"] for leaf in ("weight", "scales", "biases"))
            now = np.array(mx.dequantize(*triple, 64, bits_of(folder, module)).astype(mx.float32))
            before = quantize.rounded(np.array(base[f"{module}.weight"]), 4, "bfloat16")
            change = adapter.change(module)
            parts.append((((now - before) * change).sum(), (change**2).sum()))
        kept[name] = sum(p[0] for p in parts) / sum(p[1] for p in parts)
    assert abs(kept["four"] - 1) < 0.1 and kept["broken"] < 0.4, kept


# ---- what is refused


def test_bits_that_there_are_not(llama: Source):
    with pytest.raises(UserError, match="bits: expected 16, 8 or 4, got 5"):
        check_mlx(llama, 5)


def test_mlx_is_missing(llama: Source, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "burnish.backends.mlx.quantize")
    monkeypatch.delattr("burnish.backends.mlx.quantize")
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(UserError, match="needs mlx, which is not installed") as e:
        check_mlx(llama, 4)
    assert "burnish[mlx]" in e.value.hint


def test_a_model_that_mlx_lm_does_not_know(llama: Source, tmp_path: Path):
    base = shutil.copytree(llama.base.folder, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(config_of(base) | {"model_type": "newllm"}))
    with pytest.raises(UserError, match="no model class for model_type 'newllm'"):
        check_mlx(replace(llama, base=read_spec(base)), 16)


def test_a_base_that_is_packed(llama: Source, tmp_path: Path):
    quantize.quantize_folder(llama.base.folder, tmp_path / "four", 4)
    with pytest.raises(UserError, match="packed weights"):
        check_mlx(replace(llama, base=read_spec(tmp_path / "four")), 4)


def test_a_name_that_mlx_lm_does_not_have(llama: Source, tmp_path: Path):
    """Else a matrix that needs 8 bits would get 4 without a word."""
    with pytest.raises(Unsupported, match=r"other names: \['model.layers.9.mlp.up_proj'\]"):
        quantize.quantize_folder(
            llama.base.folder, tmp_path / "out", 4, raised=[MODULE, "model.layers.9.mlp.up_proj"]
        )
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_none(llama: Source, tmp_path: Path):
    """Named as what they are, and not taken for a change that drowns."""
    a, b = read_adapter(llama.adapter).modules[MODULE]
    broken = replace(read_adapter(llama.adapter), modules={MODULE: (a, b * np.float32("nan"))})
    with pytest.raises(UserError, match=rf"the adapter of {MODULE}.weight holds a NaN"):
        written(llama, tmp_path / "out", 4, broken)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("bits", [16, 4])
def test_a_stop_half_way_leaves_nothing_beside(bits: int, llama: Source, tmp_path: Path, monkeypatch: Any):
    def stopped(*_: Any, **__: Any) -> None:
        assert len(list((tmp_path / "out").glob(".packing-*/merged/model.safetensors"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "quantize_folder" if bits == 4 else "spelled_out", stopped)
    with pytest.raises(KeyboardInterrupt):
        written(llama, tmp_path / "out", bits)
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and list((tmp_path / "out").iterdir()) == []


def test_the_disk_it_takes(llama: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Counted where it is most: when both are written and neither is gone."""
    most = 0
    shutil_rmtree = shutil.rmtree

    def counted(path: Any, *args: Any, **how: Any) -> None:
        nonlocal most
        most = max(most, sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors")))
        shutil_rmtree(path, *args, **how)

    monkeypatch.setattr(export.shutil, "rmtree", counted)
    for bits in (16, 8, 4):
        most = 0
        written(llama, tmp_path / str(bits), bits)
        shutil_rmtree(tmp_path / str(bits))
        headers = 20_000
        assert most - headers < mlx_bytes(llama.base, bits) < 1.1 * most, bits


def test_importing_it_imports_no_framework():
    names = "('torch', 'transformers', 'mlx')"
    code = f"import burnish.export.mlx, sys; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
