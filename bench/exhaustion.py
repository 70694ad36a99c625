"""Runs that start too large for the memory there really is, and what becomes of them: no fault is injected.

    python bench/exhaustion.py torch cuda --geometry 1.5b 0.85 0.6
    python bench/exhaustion.py mlx cuda --geometry 1.5b 0.85 0.6
    python bench/exhaustion.py torch cpu --geometry tiny-deep --by cgroup 0.8 0.6      # the kernel kills
    python bench/exhaustion.py torch cpu --geometry tiny-deep --by rlimit 0.8          # malloc gives nothing

A whole run is made twice through the supervisor, as `burnish train` makes it: first with all the memory of
the machine, then, for each share, with that share of what the first one took at its peak. The training
process is taken to that size after it has planned, so it starts with a plan that is too large. torch on a
GPU is held by its memory fraction; for MLX the rest of the card is taken away by another allocation; on a CPU
by a cgroup (version 1 or 2; the process is killed) or by RLIMIT_DATA (an allocation fails). Printed for each:
how it ended, every recovery, and the largest relative difference of its losses from the first run's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alone import GIB, alone
from geometry import random_folder

ROOT = Path(__file__).resolve().parents[1]
HELD = "BURNISH_BENCH_HELD"  # what the training process is to do once it has planned, as JSON
RECIPE = """
name: exhausted
data: {chat_template: never}
lora: {rank: 16}
train: {lr: 1.0e-4, warmup_steps: 2, save_every: 2}
"""


def child() -> int:
    """The training process, made small once its plan stands."""
    from burnish import backends
    from burnish.planning.plan import Plan
    from burnish.training import worker

    held = json.loads(os.environ[HELD])
    inner, kept = backends.open, []

    def opened(plan: Plan) -> Any:
        if held["bytes"]:
            kept.append(make_small(held, plan))
        return inner(plan)

    backends.open = opened  # type: ignore[assignment]
    return worker.main()


def make_small(held: dict[str, Any], plan: Any) -> Any:
    n_bytes, device = held["bytes"], plan.device.value
    if device == "cuda" and plan.backend.value == "torch":
        from memory_border import small_torch

        return small_torch(n_bytes)
    if device == "cuda":
        from memory_border import small_device

        return small_device(n_bytes)
    if held["by"] == "cgroup":
        return (Path(held["cgroup"]) / "cgroup.procs").write_text(str(os.getpid()))
    status = Path("/proc/self/status").read_text()
    data = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    now = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))
    limit = data + max(0, n_bytes - now)  # what is reserved already is not resident
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return None


@contextmanager
def cgroup(n_bytes: int, wanted: bool) -> Iterator[str]:
    """A cgroup of that size beside our own; '' where none is wanted. Needs root."""
    if not wanted:
        yield ""
        return
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    memory = next((path for _, kinds, path in lines if "memory" in kinds.split(",")), None)
    if memory is not None:
        place, name = Path("/sys/fs/cgroup/memory") / memory.strip("/"), "memory.limit_in_bytes"
    else:
        place, name = Path("/sys/fs/cgroup") / lines[0][2].strip("/"), "memory.max"
    folder = place / f"burnish-bench-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / name).write_text(str(n_bytes))
        yield str(folder)
    finally:
        for _ in range(50):  # the process may take a moment to be gone
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def run(a: argparse.Namespace, place: Path, out: Path, n_bytes: int) -> dict[str, Any]:
    """One run through the supervisor; its losses, recoveries and end."""
    from burnish.errors import UserError
    from burnish.recipe import load
    from burnish.runs.events import Finished, Interrupted, Noted, Recovered, Rehearsed, Stepped
    from burnish.training.orders import Orders
    from burnish.training.supervise import supervise

    overrides = [
        f"model={place / 'model'}", f"data.train={place / 'data.jsonl'}", f"backend={a.backend}",
        f"device={a.device}", f"train.max_length={a.length}", f"train.batch_size={a.rows}",
        f"train.max_steps={a.steps}", *a.override,
    ]  # fmt: skip
    recipe = load(str(place / "recipe.yaml"), overrides)
    losses: dict[int, float] = {}
    found: dict[str, Any] = {"ended": "?", "recovered": [], "notes": [], "peak": 0}
    by_cgroup = a.device == "cpu" and a.by == "cgroup"
    with cgroup(n_bytes, bool(n_bytes) and by_cgroup) as group:
        os.environ[HELD] = json.dumps({"bytes": n_bytes, "by": a.by, "cgroup": group})
        command = [sys.executable, str(Path(__file__).resolve()), "--child"]
        began = time.monotonic()
        try:
            orders = Orders(recipe, out, resume=False, skip_before=True)
            for event in supervise(orders, lambda: False, command, back_off=(0.5,)):
                if isinstance(event, Stepped):
                    losses[event.step] = event.loss
                    found["peak"] = max(found["peak"], event.peak_bytes)
                elif isinstance(event, Recovered):
                    found["recovered"].append(f"{event.cause}: {event.did}")
                elif isinstance(event, Noted):
                    found["notes"].append(event.message)
                elif isinstance(event, Rehearsed):
                    found["peak"] = max(found["peak"], event.peak_bytes)
                elif isinstance(event, Finished | Interrupted):
                    found["ended"] = type(event).__name__.lower()
        except UserError as e:
            found["ended"] = f"exit {e.exit_code}: {e}"
    return found | {"losses": losses, "seconds": time.monotonic() - began}


def prepared(a: argparse.Namespace, place: Path) -> None:
    """Model, tokenizer and rows of about as many tokens as are asked for."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny import tiny_tokenizer

    alone(random_folder, a.geometry, place / "model")
    tiny_tokenizer(place / "model")
    (place / "recipe.yaml").write_text(RECIPE)
    draw = random.Random(0)
    with (place / "data.jsonl").open("w") as f:
        for _ in range(a.rows * 4):
            text = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz0123456789", k=a.length - 8))
            f.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", choices=["torch", "mlx"])
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("shares", type=float, nargs="+")
    parser.add_argument("--geometry", default="1.5b")
    parser.add_argument("--by", choices=["cgroup", "rlimit"], default="cgroup", help="on a CPU")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--override", nargs="*", default=[], metavar="KEY=VALUE")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        prepared(a, place)
        roomy = run(a, place, place / "roomy", 0)
        first = roomy["losses"]
        peak_gib = roomy["peak"] / GIB
        print(f"roomy: {roomy['ended']}, peak {peak_gib:.2f} GiB, {roomy['seconds']:.0f} s", flush=True)
        if roomy["ended"] != "finished":
            raise SystemExit("\n".join(roomy["notes"]))
        for number, share in enumerate(a.shares):
            n_bytes = int(share * roomy["peak"])
            found = run(a, place, place / f"small{number}", n_bytes)
            same = found["losses"].keys() == first.keys()
            both = first.keys() & found["losses"].keys()
            apart = max((abs(found["losses"][k] / first[k] - 1) for k in both), default=1)
            print(
                f"{share:.2f} of it, {n_bytes / GIB:.2f} GiB: {found['ended']}, "
                f"{len(found['losses'])} steps{'' if same else ' (not all)'}, losses apart {apart:.1e}, "
                f"{found['seconds']:.0f} s"
            )
            for line in (*found["notes"], *found["recovered"]):
                print(f"    {line}")
            sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        code = child()
        sys.stderr.flush()
        os._exit(code)
    main()
