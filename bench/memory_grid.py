"""The measured peak of training steps over a grid of configurations, one JSON line each, for `memory_fit.py`.

    python bench/memory_grid.py torch cuda FILE.jsonl 7b:none:1x2048:k0:r16 14b:4bit:2x1024:kall:r8 …
    python bench/memory_grid.py mlx cpu FILE.jsonl --model FOLDER smol:none:4x512:khalf:r16 …

A case is GEOMETRY:QUANTIZE:ROWSxLENGTH:kKEPT:rRANK, then in any order `:pN` micro-batches a step (1), `:sN`
percent of tokens that are targets (100), `:f32` in float32, `:tight` where the plan is told of hardly more
memory than it needs, `:free` where MLX is told of no limit at all (to see what its limit does). On a GPU the
weights are random and the peak is the framework's own counter, from before the weights are there; on a CPU it
is the resident peak of a process of its own (VmHWM), the model read from a folder as a run reads it. Cases of
one GPU call share a process, so that libraries are loaded once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from alone import alone, peak_bytes
from burnish.data.batches import Example, collate
from burnish.planning.memory import total
from burnish.planning.plan import Choice, DataStats, Plan, make_plan, parts_of
from geometry import random_model, random_nf4

GIB = 2**30
STEPS = 4


@dataclass(frozen=True)
class Case:
    text: str
    geometry: str
    quantize: str
    rows: int
    length: int
    kept: str
    rank: int
    passes: int = 1
    share: float = 1.0
    dtype: str = "auto"
    tight: bool = False
    free: bool = False

    @classmethod
    def of(cls, text: str) -> Case:
        geometry, quantize, shape, kept, rank, *rest = text.split(":")
        rows, length = (int(n) for n in shape.split("x"))
        more: dict[str, Any] = {"tight": "tight" in rest, "free": "free" in rest}
        more |= {"dtype": "float32"} if "f32" in rest else {"dtype": "bfloat16"} if "bf16" in rest else {}
        for word in rest:
            if word[0] == "p":
                more["passes"] = int(word[1:])
            elif word[0] == "s":
                more["share"] = int(word[1:]) / 100
        return cls(text, geometry, quantize, rows, length, kept[1:], int(rank[1:]), **more)

    def overrides(self, backend: str, device: str, n_layers: int) -> list[str]:
        kept = {"all": n_layers, "half": n_layers // 2}.get(self.kept) or self.kept.replace("all", "auto")
        return [
            f"backend={backend}", f"device={device}", f"quantize={self.quantize}", f"lora.rank={self.rank}",
            f"dtype={self.dtype}", f"train.batch_size={self.rows * self.passes}", "train.pack=false",
            f"train.micro_batch={self.rows}", f"train.keep_layers={kept}",
            f"train.max_length={self.length + 1}",
        ]  # fmt: skip

    def batches(self, words: int, step: int) -> list[Any]:
        draw = np.random.default_rng(step)
        weights = np.zeros(self.length + 1, np.float32)
        weights[-max(1, round(self.share * self.length)) :] = 1
        tokens = draw.integers(3, words, (self.passes, self.rows, self.length + 1), dtype=np.int32)
        return [collate([Example(row, weights) for row in micro]) for micro in tokens]


@dataclass
class Measured:
    backend: str
    device: str
    model: str
    case: str
    dtype: str
    loss_slice: int
    keep_layers: int
    ahead: int
    base_bytes: int  # before the first step
    peak_bytes: int  # by the framework's counter; resident on a CPU
    reserved_bytes: int  # what its allocator holds at the most
    outside_bytes: int  # of the device, in use beyond the allocator
    predicted_bytes: int  # what the plan said at the time, the framework's part left out on a GPU
    budget_bytes: int
    step_s: float
    tokens_per_s: float


def plan_of(backend: str, device: str, case: Case, folder: Path | None) -> Plan:
    from burnish.machine.probe import probe
    from burnish.models.spec import read_spec
    from burnish.recipe import parse
    from geometry import spec

    found = read_spec(folder) if folder else spec(case.geometry)
    overrides = case.overrides(backend, device, found.n_layers)
    tokens = case.rows * case.passes * case.length
    stats = DataStats(case.rows * case.passes, case.length + 1, tokens, max(1, round(case.share * tokens)))
    recipe = parse("{train: {clip: null}}", "bench", overrides)
    machine = probe(Path.cwd())
    plan = make_plan(recipe, found, machine, stats)
    if not case.tight:
        return plan
    without = replace(plan.shape, ahead=0)
    parts = parts_of(backend, found)(without)
    budget = Choice(total(parts) * 101 // 100, "hardly more than is needed")
    return replace(plan, ahead=Choice(0, "as asked"), shape=without, estimate=parts, budget=budget)


def on_gpu(backend: str, device: str, case: Case) -> Measured:
    plan = plan_of(backend, device, case, None)
    framework = next(p.n_bytes for p in plan.estimate if p.name == "framework")
    counters: dict[str, int] = {}
    steps = _torch_steps if backend == "torch" else _mlx_steps
    seconds = steps(plan, case, counters)
    step_s = sorted(seconds[1:])[len(seconds[1:]) // 2]
    return Measured(
        backend, device, case.geometry, case.text, plan.compute.value, plan.loss_slice.value,
        plan.keep_layers.value, plan.ahead.value, counters["base"], counters["peak"],
        counters["reserved"], counters["outside"],
        plan.total_bytes - framework, plan.budget.value, round(step_s, 4),
        round(case.rows * case.passes * case.length / step_s, 1),
    )  # fmt: skip


def _run(learner: Any, case: Case, words: int, sync: Any) -> list[float]:
    seconds = []
    for n in range(STEPS):
        micros = case.batches(words, n)
        began = time.perf_counter()
        learner.step(micros, 1e-4)
        sync()
        seconds.append(time.perf_counter() - began)
    return seconds


def _torch_steps(plan: Plan, case: Case, counters: dict[str, int]) -> list[float]:
    import torch

    from burnish.backends.torch import attention
    from burnish.backends.torch.load import DTYPES, adapt

    attention.install()
    cuda = plan.device.value == "cuda"
    held = DTYPES[plan.weights.value]
    make = random_nf4 if case.quantize == "4bit" else random_model
    model = make(case.geometry, plan.device.value, held, attention.NAME)
    learner = adapt(model, plan)
    del model
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        counters["base"] = torch.cuda.memory_allocated()
    seconds = _run(learner, case, plan.spec.vocab_size, torch.cuda.synchronize if cuda else lambda: None)
    if cuda:
        free, total = torch.cuda.mem_get_info()
        counters |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        counters["outside"] = total - free - torch.cuda.memory_reserved()
    learner.close()
    del learner
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return seconds


def _mlx_steps(plan: Plan, case: Case, counters: dict[str, int]) -> list[float]:
    import mlx.core as mx

    from burnish.backends.mlx import learner as module
    from burnish.backends.mlx.load import DTYPES, adapt, device_of, prepare
    from mlx_gpu import random_model as random_mlx

    if case.free:
        paced, module._pace = module._pace, lambda plan: (0, 1 << 40)
    try:
        with mx.stream(mx.default_stream(device_of(plan.device.value))):
            model = random_mlx(case.geometry, DTYPES[plan.weights.value])
            prepare(model, plan)
            learner = adapt(model, plan)
    finally:
        if case.free:
            module._pace = paced
    del model
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    counters["base"] = mx.get_active_memory()
    seconds = _run(learner, case, plan.spec.vocab_size, mx.synchronize)
    counters |= {"peak": mx.get_peak_memory(), "reserved": mx.get_active_memory() + mx.get_cache_memory()}
    counters["outside"] = in_use() - counters["reserved"]
    learner.close()
    del learner
    gc.collect()
    mx.clear_cache()
    return seconds


def runtime() -> Any:
    """CUDA's runtime library; None where there is none."""
    for number in (13, 12):
        with suppress(OSError):
            return ctypes.CDLL(f"libcudart.so.{number}")
    return None


def in_use() -> int:
    """Bytes of the GPU that are in use, by whomever; 0 where there is no CUDA."""
    cuda, free, whole = runtime(), ctypes.c_size_t(), ctypes.c_size_t()
    if cuda is None or cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(whole)):
        return 0
    return whole.value - free.value


def on_cpu(backend: str, case: Case, folder: Path) -> Measured:
    from burnish.training.environment import prepare_environment

    prepare_environment()
    from burnish import backends
    from burnish.machine.usage import resident_bytes

    plan = plan_of(backend, "cpu", case, folder)
    learner = backends.open(plan)
    base = resident_bytes()
    seconds = _run(learner, case, plan.spec.vocab_size, lambda: None)
    step_s = sorted(seconds[1:])[len(seconds[1:]) // 2]
    return Measured(
        backend, "cpu", folder.name, case.text, plan.compute.value, plan.loss_slice.value,
        plan.keep_layers.value, plan.ahead.value, base, peak_bytes(), 0, 0, plan.total_bytes,
        plan.budget.value, round(step_s, 4),
        round(case.rows * case.passes * case.length / step_s, 1),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backend", choices=["torch", "mlx"])
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="a model folder, for the CPU")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after so long")
    parser.add_argument("cases", nargs="+")
    a = parser.parse_args()
    from burnish.training.environment import prepare_environment

    prepare_environment()
    began = time.monotonic()
    for text in a.cases:
        if time.monotonic() - began > a.seconds:
            print(f"no time for {text}", file=sys.stderr)
            continue
        case = Case.of(text)
        try:
            row = (
                alone(on_cpu, a.backend, case, a.model)
                if a.device == "cpu"
                else on_gpu(a.backend, a.device, case)
            )
        except Exception as e:  # the other cases are still wanted
            print(f"{text}: {type(e).__name__}: {str(e)[:300]}", file=sys.stderr, flush=True)
            continue
        with a.out.open("a", encoding="utf-8") as f:
            f.write(json.dumps(asdict(row)) + os.linesep)
        said = (row.base_bytes / GIB, row.peak_bytes / GIB, row.predicted_bytes / GIB)
        error, at = said[2] / said[1] - 1, time.monotonic() - began
        print(
            f"{text}: base {said[0]:.2f}, peak {said[1]:.2f}, predicted {said[2]:.2f} GiB ({error:+.1%}), "
            f"{row.tokens_per_s:.0f} tokens/s, at {at:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
