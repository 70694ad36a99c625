"""burnish on MLX beside mlx-lm, random weights, LoRA r=16 on all seven projections.

    python bench/mlx_gpu.py --geometry 14b --length 2048 --steps 8 quantize=4bit train.keep_layers=0
    python bench/mlx_gpu.py --who ours --budget 41.6 …       # only ours; as if the GPU had that many GiB
    python bench/mlx_gpu.py --who ours --parts …             # the peak of each part of a step

Each runs in a process of its own, one after the other; every token is a target for both. The peer is mlx-lm's
own training step: its loss, its gradient checkpointing, compiled whole. Prints one JSON line each (median
step, peak as mx.get_peak_memory counts it), then the ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn, optimizers
from mlx.utils import tree_map
from mlx_lm.models import qwen2
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

from alone import side_by_side
from geometry import QWEN2, plan_for

GIB = 2**30
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def random_model(geometry: str, dtype: mx.Dtype) -> Any:
    """mlx-lm's Qwen2 with random weights of standard deviation 0.02, not yet evaluated."""
    hidden, layers, heads, kv, inner, words = QWEN2[geometry]
    args = qwen2.ModelArgs(
        model_type="qwen2",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        rms_norm_eps=1e-5,
        vocab_size=words,
        tie_word_embeddings=False,
    )
    mx.random.seed(0)
    model = qwen2.Model(args)
    draw = lambda p: (mx.random.normal(p.shape, dtype=dtype) * 0.02).astype(dtype)  # noqa: E731
    model.update(tree_map(draw, model.parameters()))
    return model


def timed(step: Callable[[], None], steps: int, tokens: int, who: str) -> None:
    gc.collect()
    mx.clear_cache()
    base, seconds = mx.get_active_memory(), []
    mx.reset_peak_memory()
    for _ in range(steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[2:])[len(seconds[2:]) // 2]
    found = {
        "who": who,
        "tokens_per_s": round(tokens / median, 1),
        "step_s": round(median, 4),
        "base_gib": round(base / GIB, 2),
        "peak_gib": round(mx.get_peak_memory() / GIB, 2),
    }
    print(json.dumps(found), flush=True)


def batch_of(tokens_BT: np.ndarray) -> Any:
    from burnish.data.batches import Example, collate

    return collate([Example(row, np.ones(len(row), np.float32)) for row in tokens_BT])


def ours(a: argparse.Namespace) -> None:
    from burnish.backends.mlx.load import DTYPES, adapt, device_of, prepare
    from burnish.training.environment import prepare_environment

    prepare_environment()  # MLX reads its settings at its first operation
    asked = ["backend=mlx", "train.clip=null", f"train.batch_size={a.rows}", "train.pack=false", *a.overrides]
    plan = plan_for(a.geometry, a.length, asked, int(a.budget * GIB))
    began = time.perf_counter()
    with mx.stream(mx.default_stream(device_of(plan.device.value))):
        model = random_model(a.geometry, DTYPES[plan.weights.value])
        prepare(model, plan)
        loaded = time.perf_counter()
        learner = adapt(model, plan)
    print(
        f"ours: {loaded - began:.1f} s to draw, {time.perf_counter() - loaded:.1f} s to open", file=sys.stderr
    )
    told = f"{plan.keep_layers.value} layers kept, slices of {plan.loss_slice.value}, "
    parts = ", ".join(f"{p.name} {p.n_bytes / GIB:.2f}" for p in plan.estimate)
    print(f"ours: {told}estimate {plan.total_bytes / GIB:.2f} GiB: {parts}", file=sys.stderr)
    draw = np.random.default_rng(0)

    def step() -> None:
        tokens = draw.integers(0, plan.spec.vocab_size, (a.rows, a.length + 1), dtype=np.int32)
        learner.step([batch_of(tokens)], 2e-4)

    if a.parts:
        with_parts(learner, step)
    timed(step, a.steps, a.rows * a.length, "ours")


def with_parts(learner: Any, step: Callable[[], None]) -> None:
    """One step in which every part is finished before the next begins: its time, and its peak."""
    step()
    step()
    engine, loss, optimizer = learner._engine, learner._loss, learner._optimizer
    for owner, name in (
        (engine, "forward"),
        (loss, "gradient"),
        (engine, "backward"),
        (optimizer, "stepped"),
    ):
        setattr(owner, name, partial(measured, name, getattr(owner, name)))
    step()
    for owner, name in ((engine, "forward"), (loss, "gradient"), (engine, "backward")):
        delattr(owner, name)


def measured(name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    mx.synchronize()
    before, began = mx.get_active_memory(), time.perf_counter()
    mx.reset_peak_memory()
    out = run(*args, **kwargs)
    mx.eval(out)
    mx.synchronize()
    seconds, after, peak = time.perf_counter() - began, mx.get_active_memory(), mx.get_peak_memory()
    sizes = ", ".join(f"{n} {b / GIB:.2f}" for n, b in (("before", before), ("peak", peak), ("after", after)))
    print(f"  {name}: {seconds:.3f} s; GiB {sizes}", file=sys.stderr)
    return out


def mlx_lm(a: argparse.Namespace) -> None:
    packed = next((o.split("=")[1] for o in a.overrides if o.startswith("quantize=")), "none")
    model = random_model(a.geometry, mx.float32 if a.geometry == "tiny" else mx.bfloat16)
    if packed != "none":
        nn.quantize(model, group_size=64, bits=int(packed.removesuffix("bit")))
    for module in model.modules():
        mx.eval([v for v in module.values() if isinstance(v, mx.array)])
    mx.clear_cache()
    model.freeze()
    keys = [("self_attn." if t[0] in "qkvo" else "mlp.") + t for t in TARGETS]
    settings = {"rank": 16, "scale": 1.0, "dropout": 0.0, "keys": keys}
    linear_to_lora_layers(model, len(model.layers), settings)
    model.train()
    grad_checkpoint(model.layers[0])
    mx.eval(model.parameters())
    optimizer = optimizers.AdamW(learning_rate=2e-4)
    state = [model.state, optimizer.state, mx.random.state]
    loss_and_gradient = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def compiled(tokens: mx.array, lengths: mx.array) -> mx.array:
        (loss, _), gradients = loss_and_gradient(model, tokens, lengths)
        optimizer.update(model, gradients)
        return loss

    def step() -> None:
        tokens = mx.random.randint(0, model.args.vocab_size, (a.rows, a.length + 1))
        mx.eval(state, compiled(tokens, mx.array([[0, a.length + 1]] * a.rows)))

    timed(step, a.steps, a.rows * a.length, "mlx-lm")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", default="tiny")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--who", choices=["ours", "mlx_lm", "both"], default="both")
    parser.add_argument("--budget", type=float, default=0, help="GiB of GPU memory, as if no more were there")
    parser.add_argument("--parts", action="store_true", help="print each part's time and peak first")
    parser.add_argument("overrides", nargs="*", help="recipe overrides, such as quantize=4bit")
    a = parser.parse_args()
    if a.who == "both":
        side_by_side("mlx_lm", "ours")
    else:
        {"ours": ours, "mlx_lm": mlx_lm}[a.who](a)


if __name__ == "__main__":
    main()
