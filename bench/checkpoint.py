"""How long a checkpoint takes, and how large it is: adapter, optimizer, checksums, synced to the disk.

    python bench/checkpoint.py FOLDER --geometry 14b --rank 16 --device cpu|cuda

The base's weights take no part, so only the adapter of a model of that shape is made, of random numbers, on
the device that is named. FOLDER should be on the disk that runs are kept on.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from pathlib import Path

import numpy as np

from burnish.backends import adapter_folder
from burnish.backends.adapter_folder import State as Adapter
from burnish.recipe import parse
from burnish.runs.folder import RunFolder, State
from geometry import plan_for


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--geometry", default="14b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", type=int, default=5)
    a = parser.parse_args()
    overrides = [f"lora.rank={a.rank}", "quantize=4bit", "backend=torch"]
    plan = plan_for(a.geometry, 2048, overrides)
    import torch

    shapes = adapter_folder.shapes(plan)
    groups = [{k: torch.randn(s, device=a.device) for k, s in shapes.items()} for _ in range(3)]

    def write(folder: Path) -> None:
        arrays: list[dict[str, np.ndarray]] = [{k: t.cpu().numpy() for k, t in g.items()} for g in groups]
        weights, first, second = arrays
        adapter_folder.write(folder, plan, Adapter(weights, first, second, 100))

    out, seconds = a.folder / "checkpoint-bench", []
    try:
        with RunFolder.begin(out, parse("name: bench")) as run:
            for step in range(1, a.times + 1):
                began = time.perf_counter()
                saved = run.save_checkpoint(State(step), write, 2)
                seconds.append(time.perf_counter() - began)
            size = sum(p.stat().st_size for p in saved.iterdir())
    finally:
        shutil.rmtree(out, ignore_errors=True)
    print(
        f"{a.geometry} rank {a.rank} from {a.device}: {size / 2**20:.0f} MiB, median "
        f"{statistics.median(seconds):.2f} s, {min(seconds):.2f} to {max(seconds):.2f} of {a.times}"
    )


if __name__ == "__main__":
    main()
