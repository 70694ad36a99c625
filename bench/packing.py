"""Packing on the CPU: burnish packed beside burnish unpacked, on WikiSQL with SmolLM2, turn about.

    python bench/packing.py --model .cache/SmolLM2-135M-Instruct [--data ../shared/data] [--steps 8]
    python bench/packing.py --micro-batch 2     # as where memory is short
    python bench/packing.py --padded            # as on a device that computes padding (MPS)

Each turn is a process of its own: unpacked, packed, packed, unpacked, … so that neither side has the quieter
half. The recipe is mistral-7b-wikisql's, with the adapter, the schedule and the 8 examples a step of
wikisql_cpu.py; more overrides with --set.
A token counts once if it is no padding; time is from the end of step 2 to the end of the last one. Padding is
counted over the first epoch (burnish.data.packing.padding_shares), whether or not this device computes it:
on a CPU the engine drops it, so there the ratio says what packing costs or saves beside that. With --padded
the plan and the engine are told that this CPU pads as MPS does: unpacked rows to one of a few lengths, packed
rows under one mask. Peaks include the framework. A JSON line each, then `packed / unpacked`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from alone import GIB, alone, peak_bytes, say

WARM = 2  # steps at the beginning that are not timed

LIKE_WIKISQL_CPU = (
    "lora.rank=16", "lora.targets=attention+mlp", "lora.last_layers=null", "train.batch_size=8",
    "train.lr=2e-4", "train.schedule=linear", "train.warmup_steps=5", "train.weight_decay=0.01",
    "train.clip=1", "train.seed=8137",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    who: str
    steps: int
    tokens: int  # of the timed steps, no padding
    seconds: float  # of the timed steps
    tokens_per_s: float
    peak_rss_gib: float
    micro_batch: int  # rows
    row_length: int | None  # positions of a packed row
    padding_unpacked: float
    padding_packed: float
    loss_first: float
    loss_last: float


def turn(a: argparse.Namespace, pack: bool, out: Path) -> Turn:
    """A few steps of the whole job, its records included; the run folder is `out`."""
    from burnish.data.packing import planned_padding
    from burnish.recipe import load
    from burnish.runs.events import Stepped
    from burnish.training.environment import prepare_environment
    from burnish.training.job import run_job
    from burnish.training.material import gather

    prepare_environment()
    if a.padded:
        import burnish.backends.torch.learner as learner
        import burnish.planning.layout as layout

        layout.PADDED = ("cpu", *layout.PADDED)
        learner.keeps_padding = lambda device: True
    file = Path(a.data).expanduser().absolute() / "wikisql" / "train.jsonl"
    overrides = [f"model={a.model}", f"data.train={file}", "data.valid=", "evaluate.task=none", "ask=[]"]
    overrides += ["device=cpu", "dtype=float32", f"train.max_steps={a.steps}", *LIKE_WIKISQL_CPU]
    overrides += [f"train.micro_batch={a.micro_batch}", f"train.pack={str(pack).lower()}"]
    recipe = load("mistral-7b-wikisql", [*overrides, *a.set])
    plan = gather(recipe, out.parent).plan
    ends, tokens, losses = [], [], []
    for event in run_job(recipe, out, resume=False, skip_before=True, stop=lambda: False):
        if isinstance(event, Stepped):
            ends.append(time.perf_counter())
            tokens.append(event.tokens)
            losses.append(event.loss)
    seconds, counted, padding = ends[-1] - ends[WARM - 1], sum(tokens[WARM:]), planned_padding(plan)
    return Turn(
        "packed" if pack else "unpacked",
        len(ends),
        counted,
        round(seconds, 2),
        round(counted / seconds, 1),
        round(peak_bytes() / GIB, 2),
        plan.micro_batch.value,
        plan.row_length.value if pack else None,
        round(padding.unpacked, 3),
        round(padding.packed, 3),
        round(losses[0], 4),
        round(losses[-1], 4),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="../shared/data", help="the folder that holds wikisql/")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a turn, 3 or more")
    parser.add_argument("--rounds", type=int, default=2, help="pairs of turns")
    parser.add_argument("--micro-batch", default="auto", help="rows a forward pass, of both sides")
    parser.add_argument("--padded", action="store_true", help="pad as MPS does, and compute it")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe overrides")
    a = parser.parse_args()
    if a.steps <= WARM:
        parser.error(f"--steps {a.steps}: the first {WARM} are not timed, so give {WARM + 1} or more")
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(a.rounds):
            for pack in (False, True) if number % 2 == 0 else (True, False):
                turns.append(alone(turn, a, pack, Path(scratch) / f"{number}-{pack}"))
                say(asdict(turns[-1]))
    speed, peak = {}, {}
    for who in ("unpacked", "packed"):
        mine = [t for t in turns if t.who == who]
        speed[who] = sum(t.tokens for t in mine) / sum(t.seconds for t in mine)
        peak[who] = max(t.peak_rss_gib for t in mine)
    print(
        f"real tokens/s: packed {speed['packed']:.1f}, unpacked {speed['unpacked']:.1f}, "
        f"packed / unpacked {speed['packed'] / speed['unpacked']:.2f}×; "
        f"padding {turns[0].padding_unpacked:.1%} → {turns[0].padding_packed:.1%}; "
        f"peak {peak['unpacked']:.2f} → {peak['packed']:.2f} GiB"
    )


if __name__ == "__main__":
    main()
