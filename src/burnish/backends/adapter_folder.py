"""An adapter on disk: a plain PEFT folder, and the optimizer beside it.

    write(folder, plan, State(weights, first, second, step))
    state = read(folder, plan)          # validated against the plan: UserError lists everything that differs

`adapter_model.safetensors` and `adapter_config.json` are what peft.PeftModel.from_pretrained loads;
`optimizer.safetensors` holds AdamW's two moments per weight (`exp_avg.NAME`, `exp_avg_sq.NAME`, NAME being
the weight's in adapter_model.safetensors) and, as metadata, the number of steps taken, which is also all
there is of random state: dropout draws from (seed, step, …). All is float32 as it was in memory, so reading
back is bit-exact. The caller owns the folder's atomicity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from safetensors.numpy import save_file

from burnish.errors import Unsupported, UserError, all_problems
from burnish.models.peft_config import read_adapter_config
from burnish.models.weights import widened
from burnish.planning.plan import Plan

ADAPTER, CONFIG, OPTIMIZER = "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors"
Shapes = Mapping[str, tuple[int, ...]]
_PEFT, _MOMENTS = "base_model.model.", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """Everything that training changes. Keys are those of `shapes(plan)`; arrays are float32."""

    weights: Mapping[str, np.ndarray]
    first: Mapping[str, np.ndarray]  # AdamW's exp_avg
    second: Mapping[str, np.ndarray]  # AdamW's exp_avg_sq
    step: int  # optimizer steps taken


def modules(plan: Plan) -> tuple[str, ...]:
    """The adapted projections in layer order, 'model.layers.0.self_attn.q_proj'."""
    chosen = [name for name in plan.spec.linears if name.rsplit(".", 1)[-1] in plan.targets.value]
    return tuple(f"model.layers.{i}.{name}" for i in sorted(plan.layers.value) for name in sorted(chosen))


def shapes(plan: Plan) -> dict[str, tuple[int, int]]:
    """'model.layers.0.self_attn.q_proj.lora_A.weight' → (rank, in), '….lora_B.weight' → (out, rank)."""
    rank, found = plan.recipe.lora.rank, {}
    for module in modules(plan):
        out, into = plan.spec.linears[module.split(".", 3)[3]]
        found[f"{module}.lora_A.weight"] = (rank, into)
        found[f"{module}.lora_B.weight"] = (out, rank)
    return found


def scale(plan: Plan) -> float:
    """What B A is multiplied by: alpha/rank, or alpha/sqrt(rank) with rslora."""
    lora = plan.recipe.lora
    return lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)


def peft_config(plan: Plan) -> dict[str, Any]:
    """What `adapter_config.json` holds."""
    lora, layers = plan.recipe.lora, sorted(plan.layers.value)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(plan.spec.folder),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": sorted(plan.targets.value),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }
    if layers != list(range(plan.spec.n_layers)):
        config |= {"layers_to_transform": layers, "layers_pattern": "layers"}
    return config


def write(folder: Path, plan: Plan, state: State) -> None:
    weights = {_PEFT + k: _plain(v) for k, v in state.weights.items()}
    save_file(weights, folder / ADAPTER, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(peft_config(plan), indent=2) + "\n", encoding="utf-8")
    both = zip(_MOMENTS, (state.first, state.second), strict=True)
    moments = {f"{m}.{_PEFT}{k}": _plain(v) for m, arrays in both for k, v in arrays.items()}
    save_file(moments, folder / OPTIMIZER, metadata={"step": str(state.step)})


def read(folder: Path, plan: Plan, expected: Shapes | None = None) -> State:
    """What `write` wrote. Raises UserError that lists how the folder is not of this plan's adapter.

    expected: the adapter's names and shapes where the backend knows them better than `shapes(plan)`.
    """
    weights = read_weights(folder, plan, expected)
    path = folder / OPTIMIZER
    moments = _read(path)
    _check_shapes(path, moments, {f"{m}.{_PEFT}{k}": w.shape for m in _MOMENTS for k, w in weights.items()})
    with safetensors.safe_open(path, framework="numpy") as f:
        step = (f.metadata() or {}).get("step", "")
    if not step.isdecimal():
        raise UserError(f"{path}: expected the number of steps in its metadata, got {step!r}")
    first, second = ({k: moments[f"{m}.{_PEFT}{k}"] for k in weights} for m in _MOMENTS)
    return State(weights, first, second, int(step))


def read_weights(folder: Path, plan: Plan, expected: Shapes | None = None) -> dict[str, np.ndarray]:
    """The adapter alone, from any PEFT folder of the plan's shape and scale. UserError as for `read`."""
    _check_config(folder, plan)
    stored = {k.removeprefix(_PEFT): v for k, v in _read(folder / ADAPTER).items()}
    expected = shapes(plan) if expected is None else expected
    _check_shapes(folder / ADAPTER, stored, expected)
    # In the plan's order, not the file's: a sum over all weights rounds by its order; resuming is exact.
    return {k: stored[k] for k in expected}


def read_floats(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file in float32, widened where it is stored in 16 bits."""
    kinds, found = {"F64": np.float64, "F32": np.float32, "F16": np.float16}, {}
    for name, t in safetensors.deserialize(path.read_bytes()):
        if t["dtype"] == "BF16":
            flat = widened(np.frombuffer(t["data"], np.uint16))
        elif t["dtype"] in kinds:
            flat = np.frombuffer(t["data"], kinds[t["dtype"]]).astype(np.float32)
        else:
            problem = f"{path}: {name} is stored as {t['dtype']}; expected BF16 or {', '.join(kinds)}"
            raise Unsupported(problem, kind="dtype")
        found[name] = flat.reshape(t["shape"])
    return found


def _plain(array: np.ndarray) -> np.ndarray:
    """safetensors writes memory as it lies: rows must follow one another."""
    return np.ascontiguousarray(array, np.float32)


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_floats(path)
    except FileNotFoundError as e:
        raise UserError(f"{path.parent} holds no {path.name}, so it is not an adapter folder") from e
    except safetensors.SafetensorError as e:
        raise UserError(f"{path} is not a whole safetensors file: {e}") from e


def _check_config(folder: Path, plan: Plan) -> None:
    path = folder / CONFIG
    got, expected = {"use_rslora": False, **read_adapter_config(folder)[0]}, peft_config(plan)
    problems = [
        f"{key}: expected {expected[key]}, got {got.get(key)}"
        for key in ("peft_type", "r", "lora_alpha", "use_rslora")
        if got.get(key) != expected[key]
    ]
    if problems:
        raise all_problems(f"{path} is not of this run's adapter:", problems)


def _check_shapes(path: Path, got: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [f"{k} is missing" for k in expected if k not in got]
    problems += [f"{k} is not expected" for k in got if k not in expected]
    problems += [
        f"{k}: expected shape {list(shape)}, got {list(got[k].shape)}"
        for k, shape in expected.items()
        if k in got and got[k].shape != shape
    ]
    if problems:
        raise all_problems(
            f"{path} does not fit this model, or its settings of lora:",
            sorted(problems),
            "use the model that the adapter was trained for: its adapter_config.json names it",
            shown=5,
        )
