"""burnish on torch beside transformers + PEFT, random weights, LoRA r=16 on all seven projections.

    python bench/torch_gpu.py --geometry 7b --length 2048 --steps 12 [--device cuda] [key=value …]
    python bench/torch_gpu.py --who ours …        # only one of the two, in this process

Each runs in a process of its own, one after the other; every token is a target for both. The peer is the seed
guide's loop: checkpointing, bfloat16 base, float32 adapter under autocast, AdamW, full logits. Prints one
JSON line each (median step, peak memory as the CUDA allocator counts it), then the ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from alone import side_by_side
from geometry import plan_for, random_model

GIB = 2**30


def timed(step: Callable[[], None], steps: int, device: str, tokens: int, who: str) -> None:
    base, seconds = allocated(device), []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    median = sorted(seconds[2:])[len(seconds[2:]) // 2]
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    print(
        json.dumps(
            {
                "who": who,
                "tokens_per_s": round(tokens / median, 1),
                "step_s": round(median, 4),
                "base_gib": round(base / GIB, 2),
                "peak_gib": round(peak / GIB, 2),
            }
        ),
        flush=True,
    )


def allocated(device: str) -> int:
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def ours(a: argparse.Namespace) -> None:
    from burnish.backends.torch import attention
    from burnish.backends.torch.load import DTYPES, adapt
    from burnish.data.batches import Example, collate
    from burnish.planning.plan import Choice

    attention.install()
    plan = plan_for(a.geometry, a.length, ["train.clip=null", f"train.batch_size={a.rows}", *a.overrides])
    if a.slice:
        plan = replace(plan, loss_slice=Choice(a.slice, "as asked"))
    model = random_model(a.geometry, plan.device.value, DTYPES[plan.weights.value], attention.NAME)
    learner = adapt(model, plan)
    words = plan.spec.vocab_size
    draw = np.random.default_rng(0)

    def step() -> None:
        tokens = draw.integers(0, words, (a.rows, a.length + 1), dtype=np.int32)
        batch = collate([Example(row, np.ones(len(row), np.float32)) for row in tokens])
        learner.step([batch], 2e-4)

    print(
        f"ours: {plan.keep_layers.value} layers kept, slices of {plan.loss_slice.value}, estimate "
        f"{plan.total_bytes / GIB:.2f} GiB",
        file=sys.stderr,
    )
    timed(step, a.steps, plan.device.value, a.rows * a.length, "ours")
    if a.profile:
        with torch.profiler.profile() as profile:
            step()
            torch.cuda.synchronize()
        print(
            profile.key_averages().table(
                sort_by="self_cuda_time_total", row_limit=30, max_name_column_width=60
            )
        )


def hf(a: argparse.Namespace) -> None:
    from peft import LoraConfig, get_peft_model

    device = a.device
    model = random_model(a.geometry, device, torch.bfloat16, "sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    model.train()

    def step() -> None:
        x = torch.randint(0, model.config.vocab_size, (a.rows, a.length), device=device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timed(step, a.steps, device, a.rows * a.length, "transformers + PEFT")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", default="tiny")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--who", choices=["ours", "hf", "both"], default="both")
    parser.add_argument("--slice", type=int, default=0, help="tokens of a loss slice, instead of the plan's")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one more step of ours")
    parser.add_argument("overrides", nargs="*", help="recipe overrides for ours, such as train.keep_layers=0")
    a = parser.parse_args()
    if a.who == "both":
        side_by_side("hf", "ours")
    else:
        {"ours": ours, "hf": hf}[a.who](a)


if __name__ == "__main__":
    main()
