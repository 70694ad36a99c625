"""Runs killed with SIGKILL at random moments, resumed, and compared with the run that nobody touched.

    python bench/kill_resume.py --runs 30
    python bench/kill_resume.py --runs 30 --model .cache/SmolLM2-135M-Instruct --steps 12 --save-every 2

A third of the kills is aimed inside a checkpoint's save (its temporary folder has just appeared), the others
fall anywhere between planning and the end; every third run is killed a second time while it goes on. The
recipe has dropout, several micro-batches a step, validations and a best adapter. Compared bit for bit: every
line of metrics.jsonl (losses, gradient norms, rates, validations; not the clock and the memory), the adapter,
and the last checkpoint's weights and optimizer. A line per run says where the kill fell; exit code 1 if any
run differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NOT_COMPARED = ("seconds", "now_bytes", "peak_bytes")
POLL_S = 0.0005
RECIPE = """
name: killed
device: cpu
dtype: float32
data: {valid_share: 0.2, chat_template: never}
lora: {rank: 8, alpha: 16, dropout: 0.1}
train: {batch_size: 8, micro_batch: 3, lr: 1.0e-3, warmup_steps: 5, max_length: 128, eval_every: 7}
"""
WORDS = (
    "the",
    "model",
    "answers",
    "a",
    "question",
    "list",
    "of",
    "words",
    "user",
    "and",
    "system",
    "1",
    "20",
)


@dataclass(frozen=True)
class Timing:
    """Of the uninterrupted run, in seconds since its process began."""

    planned: float
    end: float
    saves: int
    save: float  # how long one takes, median


@dataclass
class Job:
    """One training command and its run folder."""

    recipe: Path
    out: Path
    overrides: Sequence[str]

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    @property
    def saving(self) -> bool:
        return any(self.checkpoints.glob(".tmp-[0-9]*"))

    def start(self) -> subprocess.Popen[bytes]:
        resume = ["--resume"] if (self.out / "recipe.yaml").is_file() else []
        code = "from burnish.cli import main; main()"
        command = [sys.executable, "-c", code, "train", str(self.recipe), *self.overrides]
        command += ["--out", str(self.out), "--skip-before", "--in-process", "--json", *resume]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )

    @property
    def log(self) -> Path:
        return self.out.with_suffix(".log")

    def finish(self) -> None:
        code = self.start().wait()
        if code:
            raise SystemExit(f"exit code {code}:\n" + self.log.read_text("utf-8")[-2000:])


def uninterrupted(job: Job) -> Timing:
    began, planned, save_began, saves = time.perf_counter(), 0.0, 0.0, []
    process = job.start()
    while process.poll() is None:
        now = time.perf_counter()
        if not planned and (job.out / "plan.json").exists():
            planned = now - began
        saving = job.saving
        if saving and not save_began:
            save_began = now
        elif save_began and not saving:
            saves.append(now - save_began)
            save_began = 0.0
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}:\n" + job.log.read_text("utf-8")[-2000:])
    if not saves:
        raise SystemExit("no save was seen: train.save_every is larger than the run")
    return Timing(planned, time.perf_counter() - began, len(saves), sorted(saves)[len(saves) // 2])


def anywhere(timing: Timing, draw: random.Random) -> Callable[[Job, float], bool]:
    """Whether it is time, `passed` seconds after the start: some moment from the planning to the end."""
    moment = draw.uniform(0.95 * timing.planned, timing.end)
    return lambda job, passed: passed >= moment


def inside_a_save(timing: Timing, draw: random.Random) -> Callable[[Job, float], bool]:
    """… a random part of a save's time after the beginning of one, whichever."""
    which, part = draw.randrange(1, max(2, timing.saves * 3 // 4)), draw.uniform(0, timing.save)
    seen, before, due = 0, False, 0.0

    def now(job: Job, passed: float) -> bool:
        nonlocal seen, before, due
        if due:
            return passed >= due
        saving = job.saving
        seen, before = seen + (saving and not before), saving
        if saving and seen >= which:
            due = passed + part
        return False

    return now


def kill(job: Job, time_has_come: Callable[[Job, float], bool]) -> str:
    """Start or resume the job and kill it. Says where it fell; '' where the job ended before."""
    began = time.perf_counter()
    process = job.start()
    while not time_has_come(job, time.perf_counter() - began):
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(f"exit code {process.returncode}:\n" + job.log.read_text("utf-8")[-2000:])
            return ""
        time.sleep(POLL_S)
    process.kill()
    passed = time.perf_counter() - began
    if process.wait() == 0:
        return ""
    return f"{passed:5.1f} s, {_place(job)}"


def _place(job: Job) -> str:
    """Where the run stood when it was killed, from what it left."""
    left = [str(p.relative_to(job.out)) for p in job.out.rglob(".tmp-*")]
    if (job.out / "adapter").is_dir():
        return "after the adapter was written"
    if left:
        return f"in a save ({left[0]})"
    metrics = job.out / "metrics.jsonl"
    steps = [m["step"] for m in (_whole(line) for line in _lines(metrics)) if m is not None]
    if not steps:
        return "before step 1"
    newest = max((int(p.name) for p in job.checkpoints.glob("[0-9]*")), default=0)
    return f"after step {max(steps)}, checkpoint {newest}"


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines() if path.is_file() else []


def _whole(line: str) -> dict[str, float] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # killed in the middle of it
        return None


def result(job: Job) -> dict[str, object]:
    """All that must be equal: the record without clock and memory, and the bytes of what was trained."""
    record = [json.loads(line) for line in _lines(job.out / "metrics.jsonl")]
    newest = sorted(job.checkpoints.glob("[0-9]*"))[-1]
    files = [job.out / "adapter" / "adapter_model.safetensors", *sorted(newest.glob("*.safetensors"))]
    return {
        "metrics": [{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in record],
        **{f"{p.parent.name}/{p.name}": p.read_bytes() for p in files},
    }


def prepare(a: argparse.Namespace, scratch: Path) -> tuple[Path, list[str]]:
    """The recipe and the overrides that point it to a model and to rows made here."""
    model = a.model
    if model is None:
        from burnish.training.environment import prepare_environment

        prepare_environment()
        sys.path.insert(0, str(ROOT))
        from tests.tiny import tiny_model

        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6}
        model = str(tiny_model(scratch / "model", "qwen2", None, 0, **sizes))
    draw = np.random.default_rng(0)
    lines = []
    for _ in range(100):
        words = [WORDS[i] for i in draw.integers(0, len(WORDS), int(draw.integers(6, 20)))]
        lines.append(json.dumps({"prompt": " ".join(words[:3]), "completion": " " + " ".join(words[3:])}))
    (scratch / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe = scratch / "recipe.yaml"
    recipe.write_text(RECIPE, encoding="utf-8")
    overrides = [f"model={model}", f"data.train={scratch / 'rows.jsonl'}", f"train.max_steps={a.steps}"]
    return recipe, [*overrides, f"train.save_every={a.save_every}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--model", help="a model folder; a tiny random Qwen2 where left out")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        recipe, overrides = prepare(a, scratch)
        whole = Job(recipe, scratch / "whole", overrides)
        timing = uninterrupted(whole)
        expected = result(whole)
        print(
            f"uninterrupted: {a.steps} steps in {timing.end:.1f} s, planned after {timing.planned:.1f} s, "
            f"{timing.saves} saves of {1000 * timing.save:.0f} ms",
            flush=True,
        )
        draw, identical, kills, in_saves = random.Random(a.seed), 0, 0, 0
        for number in range(1, a.runs + 1):
            aim = inside_a_save if number % 3 == 0 else anywhere
            fell = ""
            while not fell:  # a job that ended before its moment was not killed: again, at another
                job = Job(recipe, scratch / f"run{number}", overrides)
                shutil.rmtree(job.out, ignore_errors=True)
                fell = kill(job, aim(timing, draw))
            falls = [fell]
            if number % 3 == 1:
                again = kill(job, anywhere(timing, draw))
                falls += [again] if again else []
            job.finish()
            got = result(job)
            wrong = sorted(k for k in expected | got if expected.get(k) != got.get(k))
            identical += not wrong
            kills += len(falls)
            in_saves += sum("in a save" in f for f in falls)
            verdict = "identical" if not wrong else "DIFFERS in " + ", ".join(wrong)
            print(f"run {number:>2}: {verdict}; killed at " + "; then at ".join(falls), flush=True)
            shutil.rmtree(job.out)
    print(f"{identical} of {a.runs} runs identical; {kills} kills, {in_saves} of them in a save")
    sys.exit(identical != a.runs)


if __name__ == "__main__":
    main()
