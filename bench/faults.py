"""Supervised runs that are killed, starved, stopped and lied to, and what comes of them.

    python bench/faults.py                               # 250 faults, torch and MLX
    python bench/faults.py --faults 60 --backend mlx --seed 3
    python bench/faults.py --model .cache/SmolLM2-135M-Instruct --faults 40 --steps 12
    python bench/faults.py --overhead --model .cache/SmolLM2-135M-Instruct

Each run is the command `burnish train` with its unchanged supervisor and worker; how faults come into it,
tests/training/faulty_worker.py says. The recipe has dropout, several micro-batches a step, validations, a
best adapter, answers and a score. Kinds, places and moments are drawn by the seed. What ends a run on purpose
(a full disk, Ctrl-C, a parent that is killed) is gone on with by `--resume` once its cause is gone.

Compared with the run of the same recipe that nobody touched, bit for bit: every line of metrics.jsonl without
clock and memory, the adapter, the best one, the last checkpoint's weights and optimizer. Where recovery cuts
a step in smaller parts, or leaves one out, the numbers cannot be the same bits: these kinds are rows of their
own (wanted: close, or left out). lost: a run that could not be finished, or said something else than it
should. Exit code 1 if a run is lost or differs.

seconds: mean of the wall time above the undisturbed run's, all processes of a case together, by its faults.
Two cases run side by side. Forks load no framework, which a person waits for after each crash: it is in the
kinds that begin with 'new processes'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from burnish.runs.lock import LOCK, in_use

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.training.faulty_worker import (  # noqa: E402
    FOR_EVER,
    Ended,
    Fault,
    Lane,
    Run,
    counted,
    events,
    fired,
    start_fresh,
)

NOT_COMPARED = ("seconds", "now_bytes", "peak_bytes")
LANES = 2
POLL_S = 0.002
FREE_S = 30.0  # in which a child whose parent is gone has saved and ended
AT_ONCE_S = 5.0
SILENCE_S = 3
CLOSE = 1e-3
WORDS = ("the", "model", "answers", "a", "question", "list", "of", "words", "user", "and", "1", "20")
RECIPE = """
name: faults
device: cpu
dtype: float32
data: {valid_share: 0.1, chat_template: never}
lora: {rank: 8, alpha: 16, dropout: 0.1}
train: {batch_size: 8, micro_batch: 3, lr: 5.0e-3, warmup_steps: 5, max_length: 128, eval_every: 7}
generation: {max_new_tokens: 6, greedy: true}
evaluate: {task: exact-match, rows: 3, max_new_tokens: 4}
ask: [the model answers]
"""
IN_STEP = ("_gradients", "forward", "layer", "loss", "backward", "optimizer", "step")
IN_SAVE = ("save", "file", "write", "sum", "sync", "rename", "remove", "publish", "checkpoint")
SHORT = ("rehearse", "forward", "layer", "loss", "backward", "optimizer", "file", "score", "generate")


class Lost(Exception):
    """The run could not be finished, or did not say what it should."""


@dataclass
class World:
    """What all cases of a backend share. expected: by the overrides that change numbers. counts: how often
    the undisturbed run came by each place.
    """

    backend: str
    scratch: Path
    args: list[str]  # recipe and overrides
    steps: int
    save_every: int
    expected: dict[tuple[str, ...], dict[str, Any]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    wall_s: float = 0.0  # of the undisturbed run
    fresh_s: float = 0.0  # … with new processes


class Case:
    """One run in a folder of its own, through however many commands it takes."""

    def __init__(self, world: World, lane: Lane, folder: Path, draw: random.Random) -> None:
        self.world, self.lane, self.folder, self.draw = world, lane, folder, draw
        self.more: tuple[str, ...] = ()  # overrides that leave the numbers as they are
        self.other: tuple[str, ...] = ()  # … that do not
        self.faults: list[Fault] = []
        self.fresh = False
        self.cured = False  # no fault is done any more
        self.child = 0  # its number when it was last looked for
        self.outside = 0  # faults done from here
        self.wall_s = 0.0
        self.notes: list[str] = []
        self._began, self._run = 0.0, None
        self.out = folder / "out"
        self.again()

    def again(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.outside, self.wall_s = 0, 0.0
        self.notes.clear()

    @property
    def n_faults(self) -> int:
        """What lasts counts as one."""
        done = fired(self.folder)
        return self.outside + sum(1 if self.faults[i].times == FOR_EVER else n for i, n in done.items())

    def start(self) -> Run:
        resume = ["--resume"] if (self.out / "recipe.yaml").is_file() else []
        args = ["train", *self.world.args, *self.other, *self.more, "--out", str(self.out), "--json", *resume]
        self._began = time.perf_counter()
        faults = [] if self.cured else self.faults
        run = start_fresh(self.folder, args) if self.fresh else self.lane.start(self.folder, args, faults)
        self._run = run
        return run

    def end(self, run: Run, *codes: int) -> Ended:
        ended = run.wait()
        self.wall_s += time.perf_counter() - self._began
        said = self.stderr[-1500:]
        if not ended.in_time:
            raise Lost(f"no end; the last it said: {said or self.last_event}")
        if codes and (ended.signal or ended.code not in codes):
            raise Lost(f"signal {ended.signal}, exit code {ended.code}, not {codes}: {said}")
        if "Traceback" in said and ended.code != 130:
            raise Lost(f"a traceback was shown: {said}")
        return ended

    def leave(self) -> None:
        """No process is left behind, whatever went wrong."""
        if self._run is not None and not self._run.ended():
            self._run.wait(0)

    def finish(self) -> None:
        self.end(self.start(), 0)

    def wait_free(self) -> float:
        """Until no process is left. A child whose parent is gone may not have taken the folder yet."""
        began = time.perf_counter()
        while in_use(self.out / LOCK) or _alive(self.child):
            if time.perf_counter() - began > FREE_S:
                raise Lost("the child still goes on without its parent")
            time.sleep(POLL_S)
        self.wall_s += time.perf_counter() - began
        return time.perf_counter() - began

    def wait_moment(self, run: Run, low: float = 0.02, high: float = 0.97) -> bool:
        """Some moment of the undisturbed run's time; False where this one has ended before."""
        whole = self.world.fresh_s if self.fresh else self.world.wall_s
        moment = self.draw.uniform(low, high) * whole
        if run.ended(moment):
            return False
        self.child = run.child()
        return True

    @property
    def stderr(self) -> str:
        path = self.folder / "stderr"
        return path.read_text("utf-8", errors="replace") if path.exists() else ""

    @property
    def last_event(self) -> str:
        return str(events(self.folder)[-1:])

    def heard(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in events(self.folder) if e["event"] == kind]

    def repeated(self) -> int:
        """Steps that were taken again, by all that the commands told."""
        total = last = 0
        for e in events(self.folder):
            if e["event"] == "planned":
                total, last = total + max(0, last - e["resumed_at"]), e["resumed_at"]
            elif e["event"] == "stepped":
                last = e["step"]
        return total

    def at(self, place: str, action: str, low: int = 1, **how: Any) -> Fault:
        most = self.world.counts.get(place, 0)
        return Fault(place, self.draw.randint(min(low, most), max(1, most)), action, **how)


def _sent(process: int, number: int) -> int:
    """1, or 0 where it was gone already."""
    if process > 1:
        with suppress(ProcessLookupError):
            os.kill(process, number)
            return 1
    return 0


def _alive(process: int) -> bool:
    """No zombie: who takes in orphans may be late."""
    if not process:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True)
    return bool(state.stdout.strip()) and not state.stdout.strip().startswith("Z")


# --- the kinds


def signals(name: str, aim: str) -> Callable[[Case], None]:
    """The child is ended by a signal, inside once to three times."""
    places = {"step": IN_STEP, "save": IN_SAVE}.get(aim, IN_STEP + IN_SAVE)

    def inside(case: Case) -> None:
        case.faults = _spread(case, places, name, either_side=True)
        if name == "SIGKILL":
            case.faults = [_half(f) if case.draw.random() < 0.5 else f for f in case.faults]
        case.finish()
        _rungs_noted(case)

    def outside(case: Case) -> None:
        while not case.outside:
            case.again()
            run = case.start()
            if case.wait_moment(run):
                case.outside = _sent(case.child, signal.Signals[name])
            case.end(run, 0)

    return outside if aim == "any" else inside


def _spread(case: Case, places: Sequence[str], action: str, either_side: bool = False) -> list[Fault]:
    """One to three. All but the first let a process save a checkpoint before: two deaths without one between
    them may be taken for want of memory, and then steps are cut smaller.
    """
    world, draw, found = case.world, case.draw, list[Fault]()
    for number in range(draw.randint(1, 3)):
        after = either_side and draw.random() < 0.5
        two_saves = {p: int(2 * world.counts[p] * (world.save_every + 1) / world.steps) + 1 for p in places}
        fit = [p for p in places if number == 0 or (two_saves[p] < world.counts[p] and world.counts[p] > 9)]
        place = draw.choice(fit)
        found.append(case.at(place, action, 1 if number == 0 else two_saves[place], after=after))
    return found


def _half(fault: Fault) -> Fault:
    """Of a file that is saved, only a half gets there."""
    return replace(fault, action="half", after=True) if fault.place == "file" else fault


def _rungs_noted(case: Case) -> None:
    if any("→" in e["did"] for e in case.heard("recovered")):
        case.notes.append("A RUNG WAS TAKEN")


def parent_killed(case: Case) -> None:
    """The child saves and ends by itself."""
    while not case.outside:
        case.again()
        run = case.start()
        if case.wait_moment(run):
            case.outside = _sent(run.group, signal.SIGKILL)
        case.end(run)
    case.notes.append(f"free after {case.wait_free():.2f} s")
    case.finish()


def all_killed(case: Case) -> None:
    while not case.outside:
        case.again()
        run = case.start()
        if case.wait_moment(run):
            run.signal(signal.SIGKILL)
            case.outside = 1
        case.end(run)
    case.wait_free()
    case.finish()


def hangs(action: str) -> Callable[[Case], None]:
    def kind(case: Case) -> None:
        case.more = (f"care.silence_s={SILENCE_S}",)
        case.faults = [case.at(case.draw.choice((*IN_STEP, "file", "score")), action)]
        case.finish()

    return kind


def short(action: str) -> Callable[[Case], None]:
    """Memory runs out once, at one to three places."""

    def kind(case: Case) -> None:
        case.faults = _spread(case, SHORT, action)
        case.finish()
        _rungs_noted(case)

    return kind


def framework_short(case: Case) -> None:
    """In the framework's own words, where it would say them: within what is computed."""
    case.faults = _spread(case, ("layer", "loss", "backward"), "framework")
    case.finish()
    _rungs_noted(case)


def stays_short(choice: str, action: str) -> Callable[[Case], None]:
    """From some step on, whenever more than the least is asked for."""

    def kind(case: Case) -> None:
        # With dropout, rows a pass come last of all rungs, and other rows draw other masks.
        case.other = ("lora.dropout=0",) if choice == "micro_batch" else ()
        over = {"micro_batch": 1, "keep_layers": 0}[choice]
        case.faults = [
            case.at("_gradients", action, times=FOR_EVER, only_over=choice, over=over, after=True)
        ]
        case.finish()
        rungs = [e["did"] for e in case.heard("recovered")]
        if not any("→" in did for did in rungs):
            raise Lost(f"no rung was taken: {rungs}")
        case.notes.append("; ".join(did for did in rungs if "→" in did))

    return kind


def always_short(case: Case) -> None:
    """No rung helps: the run ends, and goes on when there is memory again."""
    case.other = ("lora.dropout=0",)
    case.faults = [case.at("_gradients", "oom", low=case.world.save_every + 2, times=FOR_EVER)]
    case.end(case.start(), 75, 3)
    case.cured = True
    case.finish()


def disk(action: str) -> Callable[[Case], None]:
    def kind(case: Case) -> None:
        place = case.draw.choice(("file", "write", "sync", "rename"))
        most = case.world.counts[place]
        # From the first save on: a folder that cannot even be begun is another sentence, told before.
        case.faults = [Fault(place, case.draw.randint(min(4, most), most), action)]
        case.end(case.start(), 1)
        _one_sentence(case, "disk is full" if action == "ENOSPC" else "written")
        case.finish()

    return kind


def limited(case: Case) -> None:
    """The kernel itself refuses to let files grow: checkpoints at times, records at others."""
    place = case.draw.choice(("checkpoint", "record", "publish"))
    most = case.world.counts[place]
    limit = 3_500 if place == "record" else 9_000
    case.faults = [Fault(place, case.draw.randint(1, most), "limit", limit_bytes=limit)]
    case.end(case.start(), 1)
    _one_sentence(case, "")
    case.finish()


def full_tmpfs(case: Case) -> None:
    """A file system of its own that is full, and then larger."""
    place = case.folder / "small"
    place.mkdir()
    case.out = place / "out"
    size = case.draw.uniform(0.3, 0.9)
    whole = case.world.expected[()]["bytes"]
    _mount(place, int(size * whole))
    try:
        case.outside = 1
        ended = case.end(case.start(), 0, 1)
        if ended.code == 0:
            raise Lost("the disk was not full")
        _one_sentence(case, "")
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)
        case.finish()
        kept = case.folder / "kept"
        shutil.copytree(case.out, kept)
        case.out = kept
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def _mount(place: Path, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)


def _one_sentence(case: Case, words: str) -> None:
    """What is wrong is one line, though advice may follow it."""
    said = [line for line in case.stderr.splitlines() if line.startswith("burnish: ")]
    if len(said) != 1 or words not in case.stderr:
        raise Lost(f"not the sentence that was wanted ({words}): {case.stderr[-800:]}")


def damaged(how: str, only: bool = False, state: bool = False) -> Callable[[Case], None]:
    """All processes are killed, the newest checkpoint is damaged, the run resumed."""

    def kind(case: Case) -> None:
        every, steps = case.world.save_every, case.world.steps
        first, last = (every + 2, 2 * every) if only else (2 * every + 2, steps + 1)
        n = case.draw.randint(first, last)  # the rehearsal is the first
        case.faults = [Fault("_gradients", n, "SIGKILL", whom="both")]
        case.end(case.start())
        case.wait_free()
        newest = sorted((case.out / "checkpoints").glob("[0-9]*"))[-1]
        names = sorted(p.name for p in newest.iterdir() if (p.name == "state.json") == state)
        path = newest / case.draw.choice(names)
        case.notes.append(_damage(path, how, case.draw))
        case.outside += 1
        if only:
            case.end(case.start(), 2)
            _one_sentence(case, "no whole checkpoint")
            case.out = case.folder / "anew"
            case.finish()
            return
        case.finish()
        if not any("damaged" in e["message"] for e in case.heard("noted")):
            raise Lost(f"the damage was not seen: {case.notes[-1]}")

    return kind


def _damage(path: Path, how: str, draw: random.Random) -> str:
    raw = bytearray(path.read_bytes())
    at = draw.randrange(len(raw))
    if how == "truncated":
        path.write_bytes(raw[:at])
        return f"{path.name} cut at {at} of {len(raw)}"
    before = bytes(raw[max(0, at - 12) : at + 12])
    bit = draw.randrange(8)
    raw[at] ^= 1 << bit
    path.write_bytes(raw)
    return f"{path.name} bit {bit} of byte {at}" + (f" in {before!r}" if path.suffix == ".json" else "")


def nan(times: int, then: str) -> Callable[[Case], None]:
    def kind(case: Case) -> None:
        step = case.draw.randint(1, case.world.steps)
        case.faults = [Fault("_gradients", step + 1, "nan", times=times)]
        if then == "skip":
            case.more = ("care.non_finite=skip",)
        if then == "stop":
            case.end(case.start(), 1)
            if "rows.jsonl:" not in case.stderr:
                raise Lost(f"no rows are named: {case.stderr[-800:]}")
        case.finish()
        if then == "skip" and [e["step"] for e in case.heard("skipped")] != [step]:
            raise Lost(f"step {step} was not left out: {case.heard('skipped')}")
        case.notes.append(f"step {step}")

    return kind


def interrupted(twice: bool) -> Callable[[Case], None]:
    def kind(case: Case) -> None:
        code = 0
        while not case.outside:
            case.again()
            run = case.start()
            if case.wait_moment(run):
                run.signal(signal.SIGINT)
                case.outside = 1
                began = time.perf_counter()
                if twice:
                    time.sleep(case.draw.uniform(0, 0.1))
                    run.signal(signal.SIGINT)
            ended = case.end(run)
            code = ended.code
            if case.outside and twice and time.perf_counter() - began > AT_ONCE_S:
                raise Lost(f"a second Ctrl-C took {time.perf_counter() - began:.1f} s")
        # A run that had just finished may say so; one that had not yet begun is ended by Python itself.
        if ended.signal not in (0, signal.SIGINT) or (not ended.signal and code not in (130, 0)):
            raise Lost(f"signal {ended.signal}, exit code {code}: {case.stderr[-800:]}")
        case.notes.append(f"exit code {code}, {sum(1 for _ in case.heard('interrupted'))} interrupted")
        case.wait_free()
        if twice is False and code == 0:
            case.notes.append("ended before")
        case.finish()

    return kind


def new_processes(kind: Callable[[Case], None]) -> Callable[[Case], None]:
    def fresh(case: Case) -> None:
        case.fresh = True
        kind(case)

    return fresh


@dataclass(frozen=True)
class Kind:
    name: str
    weight: float  # of the faults, in the whole
    per_case: float  # faults of a case, about
    do: Callable[[Case], None]
    wanted: str = "same"  # 'same' bits, 'close', 'left out'


KINDS = (
    Kind("SIGKILL of the child, any moment", 8, 1, signals("SIGKILL", "any")),
    Kind("SIGKILL in a save", 10, 2, signals("SIGKILL", "save")),
    Kind("SIGKILL in a step", 8, 2, signals("SIGKILL", "step")),
    Kind("SIGSEGV, any moment", 3, 1, signals("SIGSEGV", "any")),
    Kind("SIGSEGV in a save or step", 8, 2, signals("SIGSEGV", "")),
    Kind("SIGABRT in a save or step", 8, 2, signals("SIGABRT", "")),
    Kind("SIGKILL of the parent", 8, 1, parent_killed),
    Kind("SIGKILL of both", 4, 1, all_killed),
    Kind("hang", 3, 1, hangs("hang")),
    Kind("SIGSTOP", 3, 1, hangs("SIGSTOP")),
    Kind("OutOfMemory once", 12, 2, short("oom")),
    Kind("MemoryError once", 10, 2, short("memory")),
    Kind("the framework's own error once", 6, 2, framework_short),
    Kind("OutOfMemory while micro-batch > 1", 2, 1, stays_short("micro_batch", "oom"), "close"),
    Kind("OutOfMemory while layers are kept", 2, 1, stays_short("keep_layers", "oom"), "close"),
    Kind("SIGKILL while micro-batch > 1", 2, 1, stays_short("micro_batch", "SIGKILL"), "close"),
    Kind("OutOfMemory always, then not", 2, 1, always_short, "close"),
    Kind("disk full (ENOSPC)", 4, 1, disk("ENOSPC")),
    Kind("disk read-only (EROFS)", 3, 1, disk("EROFS")),
    Kind("disk broken (EIO)", 2, 1, disk("EIO")),
    Kind("files may not grow (RLIMIT_FSIZE)", 4, 1, limited),
    Kind("a full tmpfs", 2, 1, full_tmpfs),
    Kind("checkpoint truncated", 4, 2, damaged("truncated")),
    Kind("checkpoint with a flipped bit", 6, 2, damaged("flipped")),
    Kind("state.json with a flipped bit", 6, 2, damaged("flipped", state=True)),
    Kind("the only checkpoint damaged", 2, 2, damaged("flipped", only=True)),
    Kind("NaN once", 4, 1, nan(1, "")),
    Kind("NaN twice, stop, resume", 4, 2, nan(2, "stop")),
    Kind("NaN twice, skip", 4, 2, nan(2, "skip"), "left out"),
    Kind("Ctrl-C", 5, 1, interrupted(False)),
    Kind("Ctrl-C twice", 5, 1, interrupted(True)),
    Kind("new processes: SIGKILL of the child", 2, 1, new_processes(signals("SIGKILL", "any"))),
    Kind("new processes: SIGKILL of the parent", 1, 1, new_processes(parent_killed)),
    Kind("new processes: Ctrl-C", 1, 1, new_processes(interrupted(False))),
    Kind("new processes: Ctrl-C twice", 1, 1, new_processes(interrupted(True))),
)  # fmt: skip


# --- what is compared


def result(out: Path) -> dict[str, Any]:
    """All that must be equal: the record without clock and memory, and the bytes of what was trained."""
    record = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    newest = sorted((out / "checkpoints").glob("[0-9]*"))[-1]
    folders = (out / "adapter", out / "best", newest)
    return {
        "metrics": [{k: v for k, v in r.items() if k not in NOT_COMPARED} for r in record],
        **{f"{f.name}/{p.name}": p.read_bytes() for f in folders for p in sorted(f.glob("*.safetensors"))},
    }


def differences(expected: dict[str, Any], got: dict[str, Any], wanted: str) -> str:
    names = sorted(k for k in expected | got if k != "bytes" and expected.get(k) != got.get(k))
    if wanted == "same" or not names:
        return ", ".join(names)
    if wanted == "left out":
        return _left_out(expected["metrics"], got["metrics"])
    apart = [
        abs(a["loss"] - b["loss"]) for a, b in zip(expected["metrics"], got["metrics"], strict=False)
    ]
    if len(expected["metrics"]) != len(got["metrics"]) or max(apart) > CLOSE:
        return f"losses up to {max(apart):.1e} apart"
    weights = _adapter_apart(expected, got)
    return f"weights up to {weights:.1e} apart" if weights > 10 * CLOSE else ""


def _adapter_apart(expected: dict[str, Any], got: dict[str, Any]) -> float:
    from safetensors.numpy import load

    a, b = (load(r["adapter/adapter_model.safetensors"]) for r in (expected, got))
    return max(float(np.abs(a[k] - b[k]).max()) for k in a)


def _left_out(expected: list[dict[str, Any]], got: list[dict[str, Any]]) -> str:
    """The same up to the step that is missing; all the later ones there."""
    steps, left = ([r["step"] for r in some if "lr" in r] for some in (expected, got))
    missing = sorted(set(steps) - set(left))
    if len(missing) != 1:
        return f"steps {missing} are missing"
    before = [[r for r in some if r["step"] < missing[0]] for some in (expected, got)]
    return "" if before[0] == before[1] else "the steps before differ"


# --- the whole


@dataclass
class Row:
    cases: int = 0
    faults: int = 0
    lost: int = 0
    differ: int = 0
    extra_s: float = 0.0
    repeated: int = 0

    def add(self, other: Row) -> None:
        self.cases, self.faults = self.cases + other.cases, self.faults + other.faults
        self.lost, self.differ = self.lost + other.lost, self.differ + other.differ
        self.extra_s, self.repeated = self.extra_s + other.extra_s, self.repeated + other.repeated


def deal(n_faults: int, seed: int, kinds: Sequence[Kind]) -> list[Kind]:
    """Cases of every kind, in a drawn order; at least one of each where there are enough faults."""
    share = n_faults / sum(k.weight for k in kinds)
    dealt = [k for k in kinds for _ in range(max(1, round(share * k.weight / k.per_case)))]
    random.Random(seed).shuffle(dealt)
    return dealt


def play(kind: Kind, number: int, world: World, lane: Lane, seed: int, keep: bool) -> tuple[Row, str]:
    draw = random.Random(f"{seed}/{world.backend}/{number}")
    case = Case(world, lane, world.scratch / f"case{number}", draw)
    row, verdict = Row(cases=1), "same"
    try:
        kind.do(case)
        wrong = differences(world.expected[case.other], result(case.out), kind.wanted)
        row.differ = bool(wrong)
        verdict = f"DIFFERS in {wrong}" if wrong else kind.wanted
    except (Lost, OSError, ValueError) as e:  # a record that is missing or half a line is lost, too
        row.lost, verdict = 1, f"LOST: {e!r}"
    finally:
        case.leave()
    row.faults, row.repeated = case.n_faults, case.repeated()
    row.extra_s = case.wall_s - (world.fresh_s if case.fresh else world.wall_s)
    places = [f"{f.action} at {f.place} {f.n}" for i, f in enumerate(case.faults) if fired(case.folder)[i]]
    if not keep and not row.lost and not row.differ:
        shutil.rmtree(case.folder)
    return row, f"{verdict}; {row.faults} faults: {'; '.join([*places, *case.notes])}"


def measure(world: World, lanes: Sequence[Lane]) -> None:
    """The undisturbed runs, as busy as the machine will be: one in each lane at a time."""

    def one(lane: Lane, name: str, other: tuple[str, ...], fresh: bool = False) -> Case:
        case = Case(world, lane, world.scratch / name, random.Random(0))
        case.other, case.fresh = other, fresh
        case.finish()
        return case

    with ThreadPoolExecutor(LANES) as pool:
        list(pool.map(lambda n: one(lanes[n], f"warm{n}", ()), range(LANES)))
        wholes = [
            case
            for turn in range(2)
            for case in pool.map(lambda n, t=turn: one(lanes[n], f"whole{t}{n}", ()), range(LANES))
        ]
        plain, new = pool.map(lambda f: f(), (
            lambda: one(lanes[0], "plain", ("lora.dropout=0",)), lambda: one(lanes[1], "new", (), True)
        ))  # fmt: skip
    first, second = wholes[0], wholes[-1]
    world.counts = counted(first.folder)
    world.wall_s, world.fresh_s = statistics.mean(w.wall_s for w in wholes), new.wall_s
    expected = result(first.out)
    for name, again in (("a second fork", second), ("new processes", new)):
        if wrong := differences(expected, result(again.out), "same"):
            raise SystemExit(f"{world.backend}: {name} and a fork differ by themselves in {wrong}")
    expected["bytes"] = sum(p.stat().st_size for p in first.out.rglob("*") if p.is_file())
    world.expected = {(): expected, plain.other: result(plain.out)}
    print(
        f"{world.backend}: undisturbed {world.wall_s:.1f} s in forks, {world.fresh_s:.1f} s in new ones: "
        "the same bits",
        flush=True,
    )


@contextmanager
def lanes_of(backend: str) -> Iterator[list[Lane]]:
    lanes = [Lane(backend) for _ in range(LANES)]
    try:
        yield lanes
    finally:
        for lane in lanes:
            lane.__exit__()


def of_backend(backend: str, a: argparse.Namespace, n_faults: int, scratch: Path) -> dict[str, Row]:
    world = World(backend, scratch, prepare(a, scratch, backend), a.steps, a.save_every)
    rows: dict[str, Row] = {}
    kinds = [k for k in KINDS if a.only in k.name and (k.do is not full_tmpfs or _may_mount(scratch))]
    dealt = deal(n_faults, a.seed, kinds)
    free: SimpleQueue[Lane] = SimpleQueue()
    one_at_a_time = threading.Lock()
    with lanes_of(backend) as lanes, ThreadPoolExecutor(LANES) as pool:
        measure(world, lanes)
        for lane in lanes:
            free.put(lane)

        def case(number: int) -> None:
            kind, lane = dealt[number], free.get()
            try:
                row, words = play(kind, number, world, lane, a.seed, a.keep is not None)
            finally:
                free.put(lane)
            with one_at_a_time:
                print(f"{backend} {number + 1:>3}/{len(dealt)} {kind.name}: {words}", flush=True)
                rows.setdefault(kind.name, Row()).add(row)

        list(pool.map(case, range(len(dealt))))
    return rows


def _may_mount(scratch: Path) -> bool:
    if platform.system() != "Linux" or os.geteuid() != 0:
        return False
    place = scratch / "may-mount"
    place.mkdir(parents=True, exist_ok=True)
    try:
        _mount(place, 1 << 20)
    except (OSError, subprocess.CalledProcessError):
        return False
    subprocess.run(["umount", str(place)], check=True)
    return True


def table(backend: str, rows: dict[str, Row]) -> tuple[str, Row]:
    lines = [
        f"| {backend} | wanted | runs | faults | lost | differ | seconds | steps again |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    whole = Row()
    for kind in KINDS:
        if (row := rows.get(kind.name)) is None:
            continue
        whole.add(row)
        lines.append(f"| {kind.name} | {kind.wanted} {_cells(row)}")
    lines.append(f"| all | {_cells(whole)}")
    return "\n".join(lines), whole


def _cells(row: Row) -> str:
    extra, again = (x / max(1, row.faults) for x in (row.extra_s, row.repeated))
    return f"| {row.cases} | {row.faults} | {row.lost} | {row.differ} | {extra:.1f} | {again:.1f} |"


def prepare(a: argparse.Namespace, scratch: Path, backend: str) -> list[str]:
    """The recipe and the overrides that point it to a model and to rows made here."""
    scratch.mkdir(parents=True, exist_ok=True)
    model = a.model
    if model is None:
        from burnish.training.environment import prepare_environment

        prepare_environment()
        from tests.tiny import tiny_model

        model = tiny_model(scratch / "model", hidden_size=32, intermediate_size=48, num_hidden_layers=3)
    draw, lines = np.random.default_rng(0), []
    for _ in range(100):
        words = [WORDS[i] for i in draw.integers(0, len(WORDS), int(draw.integers(6, 20)))]
        lines.append(json.dumps({"prompt": " ".join(words[:3]), "completion": " " + " ".join(words[3:])}))
    rows, recipe = scratch / "rows.jsonl", scratch / "recipe.yaml"
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    recipe.write_text(RECIPE, encoding="utf-8")
    return [
        str(recipe), f"backend={backend}", f"model={Path(model).resolve()}", f"data.train={rows}",
        f"train.max_steps={a.steps}", f"train.save_every={a.save_every}",
    ]  # fmt: skip


# --- what supervision costs a run that nothing happens to


def overhead(a: argparse.Namespace, scratch: Path, backend: str) -> None:
    """The same run in one process and supervised, in turn. From step to step as the command prints them, so
    that telling, piping and printing are in it; and what of that is not the step itself, which a busy machine
    disturbs less.
    """
    args = prepare(a, scratch, backend)
    periods: dict[str, list[float]] = {"in-process": [], "supervised": []}
    gaps: dict[str, list[float]] = {"in-process": [], "supervised": []}
    for turn in range(a.turns):
        for name in periods:
            out = scratch / f"{name}{turn}"
            some = _periods([*args, "evaluate.task=none", "ask=[]"], out, name == "in-process")
            periods[name] += [period for period, _ in some]
            gaps[name] += [period - within for period, within in some]
            shutil.rmtree(out)
    step, supervised = (1000 * statistics.median(periods[n]) for n in ("in-process", "supervised"))
    before, after = (1000 * statistics.median(gaps[n]) for n in ("in-process", "supervised"))
    print(
        f"{backend}: {step:.1f} ms a step in-process, {supervised:.1f} supervised "
        f"({100 * (supervised / step - 1):+.1f} %); outside of the step {before:.2f} and {after:.2f} ms "
        f"({100 * (after - before) / step:+.3f} % of a step); {len(gaps['supervised'])} steps each",
        flush=True,
    )


def _periods(args: list[str], out: Path, in_process: bool) -> list[tuple[float, float]]:
    """Seconds from a step's line to the next one's, and within that step; where nothing came between them."""
    code = "from burnish.cli import main; main()"
    command = [sys.executable, "-c", code, "train", *args, "--out", str(out), "--json", "--skip-before"]
    command += ["--in-process"] if in_process else []
    heard: list[tuple[float, dict[str, Any]]] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        heard.extend((time.perf_counter(), json.loads(line)) for line in process.stdout)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}")
    pairs = [(x, y) for x, y in pairwise(heard) if x[1]["event"] == y[1]["event"] == "stepped"]
    return [(y[0] - x[0], y[1]["seconds"]) for x, y in pairs][2:]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=250, help="in all, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("torch", "mlx", "both"), default="both")
    parser.add_argument("--model", help="a model folder; a tiny random Qwen2 where left out")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--save-every", type=int, default=4)
    parser.add_argument("--only", default="", help="kinds whose name holds this")
    parser.add_argument("--keep", type=Path, help="a folder to work in, and to leave as it is")
    parser.add_argument("--overhead", action="store_true", help="measure only what supervision costs a step")
    parser.add_argument("--turns", type=int, default=2, help="of --overhead")
    a = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
    backends = ("torch", "mlx") if a.backend == "both" else (a.backend,)
    print(
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        + ", ".join(f"{p} {version(p)}" for p in ("torch", "mlx")),
        flush=True,
    )
    began, bad, faults, tables = time.perf_counter(), 0, 0, []
    with tempfile.TemporaryDirectory() as place:
        for backend in backends:
            scratch = (a.keep or Path(place)) / backend
            if a.overhead:
                overhead(a, scratch, backend)
                continue
            rows = of_backend(backend, a, -(-a.faults // len(backends)), scratch)
            text, whole = table(backend, rows)
            tables.append(text)
            bad, faults = bad + whole.lost + whole.differ, faults + whole.faults
    print("", *tables, sep="\n\n")
    if not a.overhead:
        minutes = (time.perf_counter() - began) / 60
        print(f"\n{faults} faults, {bad} runs lost or different, {minutes:.1f} minutes")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
