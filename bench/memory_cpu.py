"""Peak resident memory above the weights on the CPU: burnish with every layer recomputed beside HF Trainer.

    python bench/memory_cpu.py --model .cache/SmolLM2-135M-Instruct --length 2048 --steps 3

Both in float32, one row of random tokens a step, LoRA r=16 on all seven projections, AdamW; the peer is the
seed guide's Trainer with gradient checkpointing. Each runs in a fresh process, twice: every token a target,
and only the last 256 (a long prompt with a short answer).

Where the count begins is the same for both: the base is loaded and every weight read once, the libraries are
imported and have run a forward pass of eight tokens, freed memory is given back. From there VmHWM counts
afresh: adapter, gradients, optimizer, activations, logits and what the allocator wastes. A JSON line each,
then a table with the ratio ours / HF. Linux only, since only there can a process reset its own peak.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alone import GIB, alone, peak_bytes, reset_peak, say

MIB = 2**20
SHORT = 256  # targets of the row that is mostly prompt


@dataclass(frozen=True)
class Grown:
    who: str
    targets: int
    base_gib: float  # resident before the adapter is made
    peak_gib: float
    grown_mib: float
    loss_last: float


def ours(a: argparse.Namespace, targets: int) -> Grown:
    from burnish.training.environment import prepare_environment

    prepare_environment()
    from burnish.backends.torch.load import adapt, load_base
    from burnish.data.batches import Example, collate
    from burnish.machine.probe import probe
    from burnish.models.spec import read_spec
    from burnish.planning.plan import DataStats, make_plan
    from burnish.recipe import expand, parse

    overrides = [f"model={a.model}", f"train.max_length={a.length}", "train.keep_layers=0", *a.set]
    recipe = parse("{device: cpu, dtype: float32, train: {batch_size: 1}}", "bench", overrides)
    stats = DataStats(1, a.length, a.length, targets)
    plan = make_plan(recipe, read_spec(expand(a.model)), probe(Path.cwd()), stats)
    base = load_base(plan)
    resident = settled(base)
    learner, loss = adapt(base, plan), 0.0
    for tokens in rows(a):
        weights = np.zeros(len(tokens), np.float32)
        weights[-targets:] = 1
        weights[0] = 0
        loss = learner.step([collate([Example(tokens, weights)])], 2e-4).loss
    return grown("ours", targets, resident, loss)


def hf(a: argparse.Namespace, targets: int) -> Grown:
    from burnish.training.environment import prepare_environment

    prepare_environment()
    from guide import UNTRAINED, Row, guide_base, guide_model, guide_trainer

    base = guide_base(a.model)
    resident = settled(base)
    made = []
    for tokens in rows(a):
        row = [int(t) for t in tokens[:-1]]
        made.append(Row(row, [UNTRAINED] * (len(row) - targets) + row[-targets:]))
    with tempfile.TemporaryDirectory() as scratch:
        trainer, clock = guide_trainer(guide_model(base, True), made, a.steps, 1, True, 0, scratch)
        trainer.train()
    return grown("HF Trainer", targets, resident, clock.losses[-1])


def rows(a: argparse.Namespace) -> list[np.ndarray]:
    """One row a step; its last token is only predicted, so that `length` tokens run through the model."""
    return [np.random.default_rng(i).integers(3, 1000, a.length + 1).astype(np.int32) for i in range(a.steps)]


def settled(base: Any) -> int:
    """Resident bytes once all is there that is not training: weights read from disk, libraries warm."""
    import accelerate  # noqa: F401  (the Trainer's; imported on both sides)
    import torch
    from transformers import Trainer  # noqa: F401

    for p in base.parameters():
        p.sum()
    with torch.no_grad():
        base(input_ids=torch.arange(3, 11)[None], use_cache=False)
    return reset_peak()


def grown(who: str, targets: int, resident: int, loss: float) -> Grown:
    peak = peak_bytes()
    return Grown(
        who,
        targets,
        round(resident / GIB, 3),
        round(peak / GIB, 3),
        round((peak - resident) / MIB, 1),
        round(loss, 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--who", choices=["hf", "ours", "both"], default="both")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe overrides for ours")
    a = parser.parse_args()
    if sys.platform != "linux":
        raise SystemExit("this measures through /proc, which only Linux has")
    sides = [side for side in (hf, ours) if a.who in ("both", side.__name__)]
    table = []
    for targets in (a.length, min(SHORT, a.length // 2)):
        found = [alone(side, a, targets) for side in sides]
        for f in found:
            say(asdict(f))
        table.append((targets, [f.grown_mib for f in found]))
    if len(sides) < 2:
        return
    print(f"peak growth above the weights, 1×{a.length} tokens, MiB")
    print(f"{'targets':>8}{'HF Trainer':>12}{'ours':>10}{'ours / HF':>11}")
    for targets, (theirs, mine) in table:
        print(f"{targets:>8}{theirs:>12}{mine:>10}{mine / theirs:>11.2f}")


if __name__ == "__main__":
    main()
