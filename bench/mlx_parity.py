"""MLX and torch train alike: SmolLM2 on WikiSQL, packed rows, on the CPU in float32, from one start.

    python bench/mlx_parity.py --model .cache/SmolLM2-135M-Instruct [--data ../shared/data] [--steps 50]

Both sides get the same recipe, the same adapter to begin with (torch draws it; optimizers are fresh) and the
same batches, in a process of its own each. Three JSON lines:

losses    `largest`: the largest |mlx - torch| of any step's loss; `at`: both losses at steps 1, 10, 20, …;
          `norms`: the largest relative difference of the gradient's norm before clipping.
scores    every token of the validation rows by both sides under equal weights, the adapter that torch trained
          and the one that mlx trained: largest and mean |mlx - torch|.
crossed   validation loss (Σ w·nll / Σ w) of each adapter on each side, and whether an adapter that was loaded
          and saved by the other side is the same to the byte.

The last line holds them against 5e-4 (losses), 2e-4 (scores) and equal bytes; the exit code is 1 where one is
beyond. On Linux mlx's matrix products are those of the system's BLAS: preload a threaded OpenBLAS, or this
takes many times as long.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from alone import alone, say

LOSS_BOUND, SCORE_BOUND = 5e-4, 2e-4
SIDES = ("torch", "mlx")
ADAPTER = "adapter_model.safetensors"
RECIPE = """
device: cpu
dtype: float32
data: {answer_after: "\\nA:"}
lora: {rank: 16, alpha: 16, targets: attention+mlp}
train: {batch_size: 8, micro_batch: 2, pack: true, lr: 2.0e-4, warmup_steps: 5, seed: 8137, max_length: 512}
"""


def opened(a: argparse.Namespace, backend: str) -> tuple[Any, Any]:
    """A learner with a fresh adapter, and the data."""
    from burnish.training.environment import prepare_environment

    prepare_environment()
    from burnish import backends
    from burnish.recipe import parse
    from burnish.training.material import gather

    folder = Path(a.data).expanduser().absolute() / "wikisql"
    asked = [f"data.{part}={folder / part}.jsonl" for part in ("train", "valid")]
    asked += [f"model={a.model}", f"backend={backend}", f"train.max_steps={a.steps}", *a.set]
    material = gather(parse(RECIPE, "bench", asked), Path.cwd())
    return backends.open(material.plan), material


def start(a: argparse.Namespace, out: Path) -> int:
    """The adapter that both begin with goes to `out`; the row length of both."""
    out.mkdir()
    learner, material = opened(a, "torch")
    learner.save(out)
    return material.plan.row_length.value


def train(
    a: argparse.Namespace, backend: str, begin: Path, row_length: int, out: Path
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step; the adapter goes to `out`."""
    from burnish.data.batches import Cursor
    from burnish.data.packing import packed_steps
    from burnish.training.schedule import learning_rate

    learner, material = opened(a, backend)
    learner.load_adapter(begin)
    recipe, found = material.plan.recipe.train, []
    examples = material.prepared.train.examples
    coming = packed_steps(examples, recipe.batch_size, recipe.micro_batch, recipe.seed, Cursor(), row_length)
    for step in range(a.steps):
        micros, _ = next(coming)
        stats = learner.step(micros, learning_rate(recipe, step, a.steps))
        found.append((stats.loss, stats.grad_norm))
        if a.verbose:
            print(f"{backend} step {step + 1}: {stats.loss:.6f}", file=sys.stderr, flush=True)
    out.mkdir()
    learner.save(out)
    return found


def judge(
    a: argparse.Namespace, backend: str, adapters: dict[str, Path], scratch: Path
) -> dict[str, tuple[np.ndarray, float, bool]]:
    """For each adapter: every trained token's nll, the validation loss, and whether its bytes come back."""
    from burnish.data.batches import split

    learner, material = opened(a, backend)
    batches, found = split(material.prepared.valid.examples[: a.rows], 4), {}
    for who, folder in adapters.items():
        learner.load_adapter(folder)
        scored = [(learner.score(b).nll_BT, b.weights_BT) for b in batches]
        nll = np.concatenate([n[w != 0] for n, w in scored])
        weights = np.concatenate([w[w != 0] for _, w in scored])
        again = scratch / f"{who} by {backend}"
        again.mkdir()
        learner.save(again)
        same = (again / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()
        found[who] = nll, float(np.average(nll.astype(np.float64), weights=weights)), same
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default=os.environ.get("BURNISH_DATA", "../shared/data"))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=20, help="validation rows that are scored")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe overrides")
    parser.add_argument("--verbose", action="store_true", help="each step's loss, as it comes")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        row_length = alone(start, a, scratch / "start")
        adapters = {side: scratch / side for side in SIDES}
        steps = {side: alone(train, a, side, scratch / "start", row_length, adapters[side]) for side in SIDES}
        torch, mlx = (np.array(steps[side]) for side in SIDES)
        apart = np.abs(mlx - torch)
        shown = [0, *range(9, a.steps, 10)]
        at = {str(i + 1): [round(float(x[i, 0]), 6) for x in (torch, mlx)] for i in shown if i < a.steps}
        largest = float(apart[:, 0].max())
        norms = float((apart[:, 1] / torch[:, 1]).max())
        say({"what": "losses", "steps": a.steps, "row_length": row_length, "largest": largest,
             "norms": norms, "torch, mlx at": at})  # fmt: skip
        judged = {side: alone(judge, a, side, adapters, scratch) for side in SIDES}
    scores = {who: np.abs(judged["mlx"][who][0] - judged["torch"][who][0]) for who in SIDES}
    say({"what": "scores", "rows": a.rows, "tokens": len(scores["torch"]), **{
        f"adapter of {who}": {"largest": float(d.max()), "mean": float(d.mean())}
        for who, d in scores.items()
    }})  # fmt: skip
    losses = {f"adapter of {who} on {side}": judged[side][who][1] for who in SIDES for side in SIDES}
    same = all(judged[side][who][2] for who in SIDES for side in SIDES)
    say({"what": "crossed", "validation": losses, "round trips byte-identical": same})
    worst = max(float(d.max()) for d in scores.values())
    verdicts = [
        f"losses {largest:.1e} of {LOSS_BOUND:.0e}{' FAILS' * (not largest <= LOSS_BOUND)}",
        f"scores {worst:.1e} of {SCORE_BOUND:.0e}{' FAILS' * (not worst <= SCORE_BOUND)}",
        f"round trips {'byte-identical' if same else 'differ: FAILS'}",
    ]
    print(f"mlx - torch over {a.steps} steps: " + ", ".join(verdicts))
    sys.exit(not (largest <= LOSS_BOUND and worst <= SCORE_BOUND and same))


if __name__ == "__main__":
    main()
