"""Does what the plan calls fitting run, and does what it refuses run out? On memory made small on purpose.

    python bench/memory_border.py torch 1.5b:none:1x2048:k0:r16 7b:none:1x1024:kall:r8 …
    python bench/memory_border.py mlx   …
    python bench/memory_border.py mlx --model FOLDER smol:none:1x128:k0:r8:f32 …      # on the CPU

Every case (as in memory_grid.py) runs on GPUs of several sizes: the plan is made for the size, and training
is tried whatever it says. torch is held to it by its memory fraction; for MLX, whose own limit is a soft one,
the rest of the card is taken away by another allocation. The sizes are where the plan's total is 90, 95 (it
fits), 105 and 110 % (it does not) of the memory. The plan keeps 4 % of it free, so 96 is its border.

On a CPU it keeps 10 % free, so the sizes are those of 85, 90, 105 and 110 %, and three steps run in a
process that is killed as soon as it has been larger than that (VmHWM, looked at every few milliseconds). A
cgroup would not do: of what is resident, it takes back the pages of files (torch's weights are such) before
it kills.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import time
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from alone import alone, say
from burnish.errors import OutOfMemory
from burnish.planning.engine import MARGIN
from burnish.planning.plan import Choice
from memory_grid import GIB, Case, in_use, plan_of, runtime
from memory_grid import _mlx_steps as mlx_steps
from memory_grid import _torch_steps as torch_steps

SHARES = {"cuda": (0.90, 0.95, 1.05, 1.10), "cpu": (0.85, 0.90, 1.05, 1.10)}


@dataclass
class Tried:
    case: str
    share: float  # the plan's total by the memory there is
    size_gib: float
    said_fits: bool
    ran: bool


def tried(backend: str, text: str, share: float) -> dict[str, Any]:
    from burnish.training.environment import prepare_environment

    prepare_environment()
    case = Case.of(text)
    plan = plan_of(backend, "cuda", replace(case, tight=True), None)
    size = round(plan.total_bytes / share)
    plan = replace(plan, budget=Choice(round(size * (1 - MARGIN["cuda"])), "a GPU made small"))
    steps = torch_steps if backend == "torch" else mlx_steps
    held = small_torch(size) if backend == "torch" else small_device(size)
    try:
        steps(plan, case, {})
        ran = True
    except Exception as e:  # drawing the weights may be too much already, and says so in its own words
        if not isinstance(e, OutOfMemory) and "out of memory" not in str(e):
            raise
        ran = False
    if backend == "torch":
        free_all()
    del held
    return vars(Tried(text, share, round(size / GIB, 3), plan.fits, ran))


def tried_on_cpu(backend: str, folder: Path, text: str, share: float) -> dict[str, Any]:
    from burnish.training.environment import prepare_environment

    prepare_environment()
    case = replace(Case.of(text), tight=True)
    total = plan_of(backend, "cpu", case, folder).total_bytes
    size = -(-total // round(share * 100)) * 100  # so that 90 % of it is never less than the total
    fits = total <= size * (1 - MARGIN["cpu"])
    child = get_context("spawn").Process(target=steps_on_cpu, args=(backend, folder, case, size))
    child.start()
    status = Path(f"/proc/{child.pid}/status")
    while child.is_alive():
        if _peak(status) > size:
            child.kill()
            child.join()
            return vars(Tried(text, share, round(size / GIB, 3), fits, False))
        time.sleep(0.003)
    assert child.exitcode == 0, f"the process ended by itself with {child.exitcode}"
    return vars(Tried(text, share, round(size / GIB, 3), fits, True))


def steps_on_cpu(backend: str, folder: Path, case: Case, size: int) -> None:
    from burnish import backends

    plan = plan_of(backend, "cpu", case, folder)
    plan = replace(plan, budget=Choice(round(size * (1 - MARGIN["cpu"])), "a machine made small"))
    learner = backends.open(plan)
    for n in range(3):
        learner.step(case.batches(plan.spec.vocab_size, n), 1e-4)


def _peak(status: Path) -> int:
    """0 where the process has just ended."""
    try:
        lines = status.read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def small_torch(size: int) -> None:
    """torch may hold what a card of this size has beside the context."""
    import torch

    torch.zeros(1, device="cuda")
    outside = in_use() - torch.cuda.memory_reserved()
    whole = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((size - outside) / whole)


def free_all() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def small_device(size: int) -> Any:
    """Take all of the card but `size`, by an allocation that MLX does not count."""
    import mlx.core as mx

    before = in_use()
    mx.eval(mx.zeros(8) + 1)
    cuda, pointer, whole, free = runtime(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(whole))
    context = in_use() - before  # MLX's own, part of what the plan counts
    taken = free.value - (size - context)
    assert cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(taken)) == 0, "the card was not free"
    return pointer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", choices=["torch", "mlx"])
    parser.add_argument("--model", type=Path, help="a model folder: on the CPU")
    parser.add_argument("--shares", type=float, nargs="+")
    parser.add_argument("cases", nargs="+")
    a = parser.parse_args()
    # torch is as good as new after it has run out; MLX is not.
    run = partial(tried if a.backend == "torch" else partial(alone, tried), a.backend)
    if a.model:
        run = partial(tried_on_cpu, a.backend, a.model)
    right = {True: 0, False: 0}
    count = {True: 0, False: 0}
    for text in a.cases:
        for share in a.shares or SHARES["cpu" if a.model else "cuda"]:
            try:
                row = run(text, share)
            except Exception as e:  # the other cases are still wanted
                print(f"{text} {share}: {type(e).__name__}: {str(e)[:300]}", flush=True)
                continue
            say(row)
            count[row["said_fits"]] += 1
            right[row["said_fits"]] += row["said_fits"] == row["ran"]
    print(f"fitting and ran: {right[True]} of {count[True]}")
    print(f"refused and ran out: {right[False]} of {count[False]}")


if __name__ == "__main__":
    main()
