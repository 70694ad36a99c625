"""WikiSQL with MLX on the CPU: burnish beside `mlx_lm lora`, on the same rows.

    python bench/mlx_cpu.py --model .cache/SmolLM2-135M-Instruct [--data ../shared/data] [--steps 16]

One process after the other, both with OpenBLAS where it is installed: mlx-lm's own `train_model`, then
burnish's whole job. Both: 8 rows a step, LoRA r=16 on all seven projections of every layer, float32, no
recomputation unless memory asks for it. A token counts once if it is no padding; mlx-lm's count is its own
(`trained_tokens`). Time is from the end of step 2 to the end of the last one. A JSON line each, then the
ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from alone import GIB, alone, peak_bytes, say

BATCH, WARM = 8, 2
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PROJECTIONS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def mlx_lm(a: Namespace, scratch: str) -> dict[str, Any]:
    from burnish.machine.blas import use_openblas

    use_openblas()
    import mlx.core as mx
    from mlx_lm.lora import CONFIG_DEFAULTS, load, load_dataset, train_model
    from mlx_lm.tuner.callbacks import TrainingCallback

    mx.set_default_device(mx.Device(mx.cpu))
    ends: list[tuple[float, int, float]] = []

    class Clock(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            ends.append((time.perf_counter(), train_info["trained_tokens"], train_info["train_loss"]))

    data = Path(scratch) / "data"
    data.mkdir()
    for part in ("train", "valid"):
        rows = (Path(a.data) / "wikisql" / f"{part}.jsonl").read_text("utf-8")
        (data / f"{part}.jsonl").write_text(rows if part == "train" else "\n".join(rows.splitlines()[:8]))
    settings = {
        "model": a.model, "train": True, "data": str(data), "num_layers": -1, "batch_size": BATCH,
        "iters": a.steps, "learning_rate": 2e-4, "optimizer": "adamw", "steps_per_report": 1,
        "steps_per_eval": 10**9, "val_batches": 1, "save_every": 10**9, "adapter_path": scratch,
        "lora_parameters": {"rank": 16, "dropout": 0.0, "scale": 1.0, "keys": list(PROJECTIONS)},
        "grad_checkpoint": a.checkpoint,
    }  # fmt: skip
    args = Namespace(**{**CONFIG_DEFAULTS, **settings})
    model, tokenizer = load(a.model)[:2]
    train_set, valid_set, _ = load_dataset(args, tokenizer)  # type: ignore[arg-type]
    train_model(args, model, train_set, valid_set, Clock())
    return row("mlx_lm lora", [end for end, _, _ in ends], [n for _, n, _ in ends], ends[-1][2])


def ours(a: Namespace, scratch: str) -> dict[str, Any]:
    from burnish.recipe import parse
    from burnish.runs.events import Planned, Stepped
    from burnish.training.environment import prepare_environment
    from burnish.training.job import run_job
    from wikisql_cpu import RECIPE

    prepare_environment()
    overrides = [f"model={a.model}", f"data.train={Path(a.data).absolute()}/wikisql/train.jsonl"]
    overrides += ["backend=mlx", f"train.max_steps={a.steps}", *a.set]
    ends, counts, loss, total = [], [], 0.0, 0
    recipe = parse(RECIPE, "bench", overrides)
    for event in run_job(recipe, Path(scratch) / "run", resume=False, skip_before=True, stop=lambda: False):
        if isinstance(event, Planned):
            chosen = event.summary["choices"]
            told = {k: chosen[k]["value"] for k in ("pack", "row_length", "micro_batch", "keep_layers")}
            say({"plan": told})
        elif isinstance(event, Stepped):
            total += event.tokens
            ends.append(time.perf_counter())
            counts.append(total)
            loss = event.loss
    return row("ours, mlx", ends, counts, loss)


def row(who: str, ends: list[float], counts: list[int], loss: float) -> dict[str, Any]:
    seconds, tokens = ends[-1] - ends[WARM - 1], counts[-1] - counts[WARM - 1]
    return {
        "who": who,
        "steps": len(ends),
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_rss_gib": round(peak_bytes() / GIB, 2),
        "loss_last": round(loss, 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="../shared/data", help="the folder that holds wikisql/")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--only", choices=["mlx_lm", "ours"])
    parser.add_argument("--checkpoint", action="store_true", help="mlx-lm's gradient checkpointing is on")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe overrides for ours")
    a = parser.parse_args()
    found = {}
    for name, side in (("mlx_lm", mlx_lm), ("ours", ours)):
        if a.only in (None, name):
            with tempfile.TemporaryDirectory() as scratch:
                found[name] = alone(side, a, scratch)
            say(found[name])
    if len(found) == 2:
        theirs, mine = found["mlx_lm"], found["ours"]
        ratio = mine["tokens_per_s"] / theirs["tokens_per_s"]
        peaks = f"{mine['peak_rss_gib']} GiB against {theirs['peak_rss_gib']}"
        print(f"real tokens/s, ours / mlx_lm lora: {ratio:.2f}×; peak {peaks}")


if __name__ == "__main__":
    main()
