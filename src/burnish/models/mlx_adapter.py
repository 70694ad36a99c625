"""Adapters between PEFT's folder and mlx-lm's.

    to_mlx(Path("run/adapter"), Path("adapter-mlx"))                  # mlx_lm.generate --adapter-path
    to_peft(Path("adapter-mlx"), Path("adapter"), Path("Qwen2.5-7B"))   # peft.PeftModel.from_pretrained

The same numbers, lying the other way round: PEFT's A is [rank, in] and B [out, rank], mlx-lm's are [in, rank]
and [rank, out]. DoRA's magnitudes [out] are the same vector. mlx-lm knows one `scale` where PEFT has alpha,
rank and rsLoRA, and one number of layers, counted from the last. What it does not know is kept under keys it
does not read, `peft_config` and `peft_header`, so that the way back gives both files byte for byte. They are
used only where they still say what the folder says: mlx-lm may have trained it further.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish.errors import UserError, all_problems
from burnish.models.bits import Tensor, new_header, read_bits, write_bits
from burnish.models.folder import ADAPTER, check_out, replacing, write_json
from burnish.models.peft_config import lora_terms, read_adapter_config
from burnish.models.spec import ModelSpec, read_spec

PEFT_WEIGHTS, MLX_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"
_START = "base_model.model."
_MODULE = re.compile(r"model\.layers\.(\d+)\.(.+)")
_EXPERTS = re.compile(r"(^|\.)(experts|switch_mlp|switch_glu)(\.|$)")
# PEFT's leaf → mlx-lm's.
_LEAVES = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b", "lora_magnitude_vector": "m"}


@dataclass(frozen=True)
class AdapterReport:
    source: Path
    out: Path
    to: str  # 'mlx' or 'peft'
    kind: str  # 'lora' or 'dora'
    rank: int
    scale: float
    modules: int  # adapted projections
    layers: int  # that have one
    kept: bool  # to PEFT: the config and the file's layout are those it had there before


@dataclass(frozen=True)
class Adapter:
    """What both folders hold. tensors: by module, 'model.layers.3.self_attn.q_proj', then by mlx-lm's leaf,
    lying as mlx-lm has them.
    """

    kind: str  # 'lora' or 'dora'
    rank: int
    scale: float
    dropout: float
    tensors: Mapping[str, Mapping[str, Tensor]]

    @property
    def layers(self) -> list[int]:
        return sorted({_place(module)[0] for module in self.tensors})

    @property
    def keys(self) -> list[str]:
        """Paths within the layer, 'self_attn.q_proj'."""
        return sorted({_place(module)[1] for module in self.tensors})


def kind_of(folder: Path) -> str:
    """'peft' or 'mlx' for an adapter folder, by what its adapter_config.json holds."""
    config = read_adapter_config(folder)[0]
    if "peft_type" in config:
        return "peft"
    if "fine_tune_type" in config or "lora_parameters" in config:
        return "mlx"
    raise UserError(
        f"{folder / ADAPTER} is neither PEFT's (it has no peft_type) nor mlx-lm's (no fine_tune_type)",
        "give the folder of an adapter that one of them saved",
    )


def to_mlx(source: Path, out: Path, *, model: Path | None = None, force: bool = False) -> AdapterReport:
    """Write the PEFT adapter of `source` as mlx-lm's to the new folder `out`. model: the base model's folder,
    by default the one that the adapter names.

    Raises UserError for what mlx-lm cannot hold, all of it at once: adapters of embeddings, of the head or of
    experts, layers that are not the last ones, ranks that differ, trained biases or whole modules.
    """
    out = out.resolve()
    check_out(source, out, force, ADAPTER)
    config, text = read_adapter_config(source)
    stored, header = read_bits(source / PEFT_WEIGHTS)
    adapter = _from_peft(source, config, stored)
    base = model or Path(str(config.get("base_model_name_or_path") or ""))
    spec = read_spec(base) if model or (base.name and base.is_dir()) else None
    if spec:
        _check_fits(source, adapter, spec)
    count = _last_layers(source, adapter, config, spec)
    said = {
        "fine_tune_type": adapter.kind,
        "num_layers": count,
        "lora_parameters": {
            "rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": adapter.keys,
        },
        "model": str(base) if base.name else None,
        "peft_config": text,
        "peft_header": header,
    }  # fmt: skip
    modules = sorted(adapter.tensors, key=_place)
    weights = {f"{m}.{leaf}": t for m in modules for leaf, t in sorted(adapter.tensors[m].items())}
    with replacing(out) as partial:
        write_bits(partial / MLX_WEIGHTS, new_header(weights.items(), {"format": "mlx"}), weights)
        write_json(partial / ADAPTER, said)
        _carry(source, partial)
    return _report(source, out, "mlx", adapter, kept=False)


def to_peft(source: Path, out: Path, model: Path | None = None, *, force: bool = False) -> AdapterReport:
    """Write the mlx-lm adapter of `source` as PEFT's to the new folder `out`. model: the base model's folder,
    by default the one that the adapter names.

    Raises UserError for a folder of full weights, and for what does not fit the model.
    """
    out = out.resolve()
    check_out(source, out, force, ADAPTER)
    config, _ = read_adapter_config(source)
    adapter = _from_mlx(source, config, read_bits(source / MLX_WEIGHTS)[0])
    base = model or Path(str(config.get("model") or ""))
    kept = _kept(config, adapter)
    if model or kept is None:
        if not (model or (base.name and base.is_dir())):
            raise UserError(
                f"{source} names its base model as {config.get('model')!r}, which is no folder here",
                f"burnish convert {source} OUT --model FOLDER",
            )
        spec = read_spec(base)
        _check_fits(source, adapter, spec)
        kept = kept or _new_peft(adapter, base, spec)
    text, header = kept
    with replacing(out) as partial:
        write_bits(partial / PEFT_WEIGHTS, header, _in_peft(adapter))
        (partial / ADAPTER).write_text(text, encoding="utf-8", newline="")
        _carry(source, partial)
    return _report(source, out, "peft", adapter, kept=text == config.get("peft_config"))


def _carry(source: Path, out: Path) -> None:
    """What stands beside the weights: tokenizer, chat template, recipe. Without them the adapter would be
    asked otherwise than it was trained.
    """
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix != ".safetensors" and path.name != ADAPTER:
            shutil.copy2(path, out / path.name)


def _report(source: Path, out: Path, to: str, adapter: Adapter, kept: bool) -> AdapterReport:
    return AdapterReport(
        source, out, to, adapter.kind, adapter.rank, adapter.scale, len(adapter.tensors),
        len(adapter.layers), kept,
    )  # fmt: skip


def _from_peft(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Adapter:
    terms = lora_terms(config)
    problems = list(terms.problems)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        leaf = next((leaf for leaf in _LEAVES if name.endswith(f".{leaf}")), "")
        module = name.removeprefix(_START)[: -len(leaf) - 1] if leaf else ""
        if not name.startswith(_START) or not _MODULE.fullmatch(module):
            problems.append(f"{name}: not of a linear layer in model.layers")
        else:
            found.setdefault(module, {})[_LEAVES[leaf]] = (
                tensor if leaf.endswith("vector") else tensor.turned()
            )
    kind = "dora" if config.get("use_dora") else "lora"
    dropout = float(config.get("lora_dropout") or 0.0)
    return _checked(folder, Adapter(kind, terms.rank, terms.scale, dropout, found), problems, "mlx-lm")


def _from_mlx(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Tensor]) -> Adapter:
    kind, said = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    said = said if isinstance(said, Mapping) else {}
    problems = [] if kind in ("lora", "dora") else [f"fine_tune_type: expected lora or dora, got {kind}"]
    rank, scale = said.get("rank"), said.get("scale")
    if not isinstance(rank, int) or rank < 1 or not isinstance(scale, int | float):
        problems.append(f"lora_parameters: expected a rank and a scale, got {rank!r} and {scale!r}")
        rank, scale = 1, 1
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in _LEAVES.values() or not _MODULE.fullmatch(module):
            problems.append(f"{name}: not of a linear layer in model.layers")
        else:
            found.setdefault(module, {})[leaf] = tensor
    dropout = float(said.get("dropout") or 0.0)
    return _checked(folder, Adapter(kind, rank, float(scale), dropout, found), problems, "PEFT")


def _checked(folder: Path, adapter: Adapter, problems: list[str], other: str) -> Adapter:
    """The adapter, if every module is whole and a linear layer's. Raises UserError with all problems."""
    leaves = {"lora_a", "lora_b"} | ({"m"} if adapter.kind == "dora" else set())
    for module, own in adapter.tensors.items():
        if _EXPERTS.search(module):
            problems.append(f"{module}: an adapter of experts")
        elif own.keys() != leaves:
            got = ", ".join(sorted(own))
            problems.append(f"{module}: expected {', '.join(sorted(leaves))}, got {got} (mlx-lm's names)")
        elif (own["lora_a"].bits.shape[1:], own["lora_b"].bits.shape[:1]) != ((adapter.rank,),) * 2 or (
            "m" in own and own["m"].bits.shape != own["lora_b"].bits.shape[1:]
        ):
            shapes = {leaf: list(t.bits.shape) for leaf, t in own.items()}
            problems.append(f"{module}: not of rank {adapter.rank}: {shapes}")
    if not adapter.tensors and not problems:
        problems.append("it holds no weights")
    if problems:
        raise all_problems(
            f"{folder} is an adapter that {other}'s folder cannot hold:",
            problems,
            "adapters of linear layers in model.layers, with one rank and alpha, can be converted",
        )
    return adapter


def _check_fits(folder: Path, adapter: Adapter, spec: ModelSpec) -> None:
    problems = []
    for module, own in adapter.tensors.items():
        layer, key = _place(module)
        got = (own["lora_b"].bits.shape[1], own["lora_a"].bits.shape[0])
        expected = spec.linears.get(key)
        if expected is None or layer >= spec.n_layers:
            problems.append(f"{module}: the model has no such linear layer")
        elif got != expected:
            problems.append(f"{module}: expected (out, in) {expected}, got {got}")
    if problems:
        raise all_problems(
            f"{folder} is not an adapter of {spec.folder}:", problems, "--model FOLDER names the right one"
        )


def _last_layers(folder: Path, adapter: Adapter, config: Mapping[str, Any], spec: ModelSpec | None) -> int:
    """How many of the last layers mlx-lm adapts. Raises UserError where the adapter leaves one out."""
    have = adapter.layers
    if spec is None and not _every_layer(config):
        raise UserError(
            f"{folder} adapts some layers; how many the model has is not known, as its base model "
            f"{config.get('base_model_name_or_path')!r} is no folder here",
            f"burnish convert {folder} OUT --model FOLDER",
        )
    n_layers = spec.n_layers if spec else have[-1] + 1

    def could(layer: int) -> bool:
        """Layers of another kind have no such projections, and mlx-lm passes them by."""
        return not spec or any(f"model.layers.{layer}.{key}.weight" in spec.tensors for key in adapter.keys)

    left_out = [i for i in range(have[0], n_layers) if i not in have and could(i)]
    if left_out:
        raise UserError(
            f"{folder} adapts layers {have} of {n_layers}; mlx-lm adapts the last layers of a model, and "
            f"here {left_out} are left out",
            "train with lora.last_layers, or use the adapter with PEFT",
        )
    return n_layers - have[0]


def _every_layer(config: Mapping[str, Any]) -> bool:
    targets = config.get("target_modules")
    named = isinstance(targets, list) and not any("layers." in str(t) for t in targets)
    return named and config.get("layers_to_transform") is None and not config.get("exclude_modules")


def _kept(config: Mapping[str, Any], adapter: Adapter) -> tuple[str, str] | None:
    """PEFT's config and header as `to_mlx` was given them, if the folder is still what they describe."""
    text, header = config.get("peft_config"), config.get("peft_header")
    if not isinstance(text, str) or not isinstance(header, str):
        return None
    try:
        settings, tensors = json.loads(text), json.loads(header)
        tensors.pop("__metadata__", None)
        described = {k: Tensor(t["dtype"], np.zeros(t["shape"], np.bool_)) for k, t in tensors.items()}
        before = _from_peft(Path(), settings, described)
    except (ValueError, KeyError, TypeError, AttributeError, UserError):
        return None

    def form(a: Adapter) -> tuple[object, ...]:
        shapes = {
            (m, leaf): (t.dtype, t.bits.shape) for m, own in a.tensors.items() for leaf, t in own.items()
        }
        return a.kind, a.rank, a.scale, a.dropout, shapes

    return (text, header) if form(before) == form(adapter) else None


def _new_peft(adapter: Adapter, base: Path, spec: ModelSpec) -> tuple[str, str]:
    """adapter_config.json, and a header with the tensors in the order of their names."""
    alpha, layers = adapter.scale * adapter.rank, adapter.layers
    product = {f"model.layers.{i}.{key}" for i in layers for key in adapter.keys} == set(adapter.tensors)
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
        "r": adapter.rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adapter.dropout, "use_rslora": False, "use_dora": adapter.kind == "dora",
        "target_modules": _targets(adapter, spec) if product else sorted(adapter.tensors), "bias": "none",
        "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip
    if product and layers != list(range(spec.n_layers)):
        config |= {"layers_to_transform": layers, "layers_pattern": "layers"}
    in_order = sorted(_in_peft(adapter).items(), key=lambda named: named[0])
    return json.dumps(config, indent=2) + "\n", new_header(in_order, {"format": "pt"})


def _in_peft(adapter: Adapter) -> dict[str, Tensor]:
    """PEFT's names and ways of lying."""
    names = {v: k for k, v in _LEAVES.items()}
    return {
        f"{_START}{m}.{names[leaf]}": t if leaf == "m" else t.turned()
        for m, own in adapter.tensors.items()
        for leaf, t in own.items()
    }


def _targets(adapter: Adapter, spec: ModelSpec) -> list[str]:
    """Last names, which every reader knows, unless they would mean other layers as well."""
    last = {key.rsplit(".", 1)[-1] for key in adapter.keys}
    meant = sorted(key for key in spec.linears if key.rsplit(".", 1)[-1] in last)
    return sorted(last) if meant == adapter.keys else adapter.keys


def _place(module: str) -> tuple[int, str]:
    found = _MODULE.fullmatch(module)
    assert found
    return int(found[1]), found[2]
