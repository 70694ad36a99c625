"""A whole run on MLX: stopped or killed and resumed it leaves what the untouched run leaves, byte for byte.

With dropout, packed rows, validation, and two micro-batches a step. A killed run is a process of its own (MLX
has threads, so it is not forked): the command line, which kills itself at the n-th call of something.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed")
pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from burnish import backends
from burnish.backends import adapter_folder
from burnish.backends.base import Learner
from burnish.data.batches import Batch
from burnish.errors import Unsupported, UserError
from burnish.recipe import Recipe, load
from burnish.runs.events import Event, Finished, Planned, Stepped, Validated
from burnish.training.job import run_job
from tests.world import World

STEPS, SAVE, EVAL = 9, 3, 4
ROWS = [
    {"prompt": f"question {i}" + " why?" * (i % 5), "completion": "answer " * (1 + i % 4)} for i in range(30)
]


def recipe(world: World, *overrides: str) -> Recipe:
    world.rows(ROWS)
    world.recipe(
        backend="mlx", lora={"rank": 4, "dropout": 0.1},
        data={"train": str(world.root / "data.jsonl"), "valid_share": 0.1},
        train={"batch_size": 4, "micro_batch": 2, "max_steps": STEPS, "save_every": SAVE, "eval_every": EVAL,
               "lr": 0.05, "pack": True, "keep_layers": 1},
    )  # fmt: skip
    return load(str(world.root / "recipe.yaml"), overrides)


def run(asked: Recipe, out: Path, resume: bool = False, upto: int = 99) -> list[Event]:
    """Events until the step `upto`, as a person who interrupts sees them."""
    events: list[Event] = []

    def stop() -> bool:
        return any(isinstance(e, Stepped) and e.step >= upto for e in events)

    for event in run_job(asked, out, resume=resume, skip_before=True, stop=stop):
        events.append(event)
    return events


def numbers(events: list[Event]) -> list[tuple[Any, ...]]:
    """What must repeat, to the bit."""
    found: list[tuple[Any, ...]] = []
    for e in events:
        if isinstance(e, Stepped):
            found.append((e.step, e.loss, e.grad_norm, e.lr, e.tokens))
        elif isinstance(e, Validated):
            found.append((e.step, e.loss, e.accuracy, e.best))
    return found


def left(out: Path) -> dict[str, bytes]:
    """The adapter, the best one, and the last checkpoint with its optimizer."""
    places = ("adapter", "best", f"checkpoints/{STEPS:06d}")
    return {f"{d}/{p.name}": p.read_bytes() for d in places for p in (out / d).glob("*.safetensors")}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[World, list[Event]]:
    world = World(tmp_path_factory.mktemp("untouched"), tiny_folder)
    return world, run(recipe(world), world.out)


def test_the_run_to_compare_with_is_worth_it(untouched: tuple[World, list[Event]]) -> None:
    world, events = untouched
    steps = [e for e in events if isinstance(e, Stepped)]
    assert [s.step for s in steps] == list(range(1, STEPS + 1))
    assert steps[-1].loss < 0.9 * steps[0].loss, "nothing was learned"
    assert {f for f in left(world.out) if "checkpoints" in f} and len(left(world.out)) >= 4
    (planned,) = [e for e in events if isinstance(e, Planned)]
    choices = planned.summary["choices"]
    assert (choices["backend"]["value"], choices["device"]["value"]) == ("mlx", "cpu")
    assert choices["pack"]["value"] is True


def test_memory_stands_in_every_step(untouched: tuple[World, list[Event]]) -> None:
    events = untouched[1]
    steps = [e for e in events if isinstance(e, Stepped)]
    assert all(s.peak_bytes >= s.now_bytes > 0 for s in steps)
    (finished,) = [e for e in events if isinstance(e, Finished)]
    assert finished.peak_bytes >= max(s.peak_bytes for s in steps)


@pytest.mark.parametrize("upto", [1, 3, 5])
def test_stopped_and_resumed_it_is_the_same_run(
    untouched: tuple[World, list[Event]], upto: int, tmp_path: Path, tiny_folder: Path
) -> None:
    world = World(tmp_path, tiny_folder)
    asked = recipe(world)
    first = run(asked, world.out, upto=upto)
    rest = run(asked, world.out, resume=True)
    assert [e.step for e in first if isinstance(e, Stepped)][-1] == upto
    assert numbers(first) + numbers(rest) == numbers(untouched[1])
    assert left(world.out) == left(untouched[0].out)


def test_dropout_is_at_work(untouched: tuple[World, list[Event]], world: World) -> None:
    """Else that it is repeated would show nothing."""
    other = run(recipe(world, "lora.dropout=0"), world.out, upto=3)
    losses = [[e.loss for e in events if isinstance(e, Stepped)][:3] for events in (untouched[1], other)]
    assert abs(losses[0][0] - losses[1][0]) < 1e-5, "B is zero at first, so dropout cannot show yet"
    assert losses[0][2] != losses[1][2]


# --- killed ---


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after_update(n: int) -> None:
    """The n-th step has moved the weights, and no one has heard of it."""
    open_, calls = backends.open, 0

    def opened(plan: Any) -> Learner:
        learner = open_(plan)
        step = learner.step

        def counted(micros: Any, lr: float) -> Any:
            nonlocal calls
            stats, calls = step(micros, lr), calls + 1
            if calls == n:
                die()
            return stats

        learner.step = counted  # type: ignore[method-assign]
        return learner

    backends.open = opened


def kill_in_save(n: int) -> None:
    """The n-th file of adapters and optimizers is half written."""
    save, calls = adapter_folder.save_file, 0

    def half_written(arrays: Any, path: Path, metadata: Any) -> None:
        nonlocal calls
        save(arrays, path, metadata=metadata)
        calls += 1
        if calls == n:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            die()

    adapter_folder.save_file = half_written


def child(doing: str, n: str) -> None:
    """What the process does: `burnish train`, ending as `doing` says."""
    {"kill_after_update": kill_after_update, "kill_in_save": kill_in_save}[doing](int(n))
    import burnish.cli

    sys.argv = ["burnish", "train", "recipe.yaml", "--out", "out", "--json", "--in-process"]
    burnish.cli.main()


@pytest.mark.parametrize(
    ("doing", "n", "steps_done", "from_step"),
    [("kill_after_update", 6, 5, 3), ("kill_in_save", 6, 6, 3)],  # files 1, 2: step 3; 3, 4: best of step 4
)
def test_killed_and_resumed_it_is_the_same_run(
    untouched: tuple[World, list[Event]], doing: str, n: int, steps_done: int, from_step: int,
    tmp_path: Path, tiny_folder: Path,
) -> None:  # fmt: skip
    world = World(tmp_path, tiny_folder)
    asked = recipe(world)
    # This process has OpenBLAS (conftest.py); another BLAS would give other bits.
    blas = "from burnish.machine.blas import use_openblas; use_openblas()"
    code = f"{blas}; from tests.training.test_mlx_run import child; child({doing!r}, '{n}')"
    path = [str(Path(__file__).parents[2]), *(p for p in sys.path if p)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", code]
    dead = subprocess.run(command, cwd=world.root, env=env, capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    seen = [e["step"] for e in map(json.loads, dead.stdout.splitlines()) if e["event"] == "stepped"]
    assert seen == list(range(1, steps_done + 1))
    rest = run(asked, world.out, resume=True)
    (planned,) = [e for e in rest if isinstance(e, Planned)]
    assert planned.resumed_at == from_step
    assert numbers(rest) == [row for row in numbers(untouched[1]) if row[0] > from_step]
    assert left(world.out) == left(untouched[0].out)


# --- shapes, and other backends ---


def test_few_shapes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one example are padded to a few lengths, whatever the data's: each new shape compiles anew."""
    shapes: set[tuple[int, ...]] = set()
    open_: Callable[[Any], Learner] = backends.open

    def opened(plan: Any) -> Learner:
        learner = open_(plan)
        step = learner.step

        def spy(micros: list[Batch], lr: float) -> Any:
            shapes.update(m.tokens_BT.shape for m in micros)
            return step(micros, lr)

        learner.step = spy  # type: ignore[method-assign, assignment]
        return learner

    monkeypatch.setattr(backends, "open", opened)
    one_by_one = ("train.pack=false", "train.batch_size=1", "train.micro_batch=1", "train.max_steps=40")
    asked = recipe(world, *one_by_one)
    world.rows([{"prompt": "a " * (1 + i % 20), "completion": "b"} for i in range(60)])
    run(asked, world.out)
    assert len({length for _, length in shapes}) == len(shapes) <= 8


def test_another_backend_does_not_go_on_with_it(untouched: tuple[World, list[Event]], world: World) -> None:
    """Its numbers would be others from there on."""
    shutil.copytree(untouched[0].out, world.out)
    with pytest.raises(UserError, match="backend"):
        run(recipe(world, "backend=torch"), world.out, resume=True)


def test_the_adapter_scores_alike_on_torch(untouched: tuple[World, list[Event]], world: World) -> None:
    """The run's last validation, on MLX, is what torch makes of the adapter that was left."""
    asked = recipe(world, "backend=torch", "train.max_steps=1", "train.lr=1e-12", "train.eval_every=1")
    done = [e for e in untouched[1] if isinstance(e, Validated)]
    best = min(done, key=lambda e: e.loss)
    open_ = backends.open

    def opened(plan: Any) -> Learner:
        learner = open_(plan)
        learner.load_adapter(untouched[0].out / "adapter")
        return learner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "open", opened)
        (there,) = [e for e in run(asked, world.out) if isinstance(e, Validated)]
    assert there.loss == pytest.approx(best.loss, abs=1e-5)
    assert there.accuracy == best.accuracy


@pytest.mark.parametrize("fault", ["unknown", "stray"])
def test_a_model_that_is_refused_leaves_no_run(tmp_path: Path, tiny_folder: Path, fault: str) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    if fault == "stray":
        shutil.copy(folder / "model.safetensors", folder / "model-old.safetensors")
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "newllm"}))
    world = World(tmp_path / "world", folder)
    with pytest.raises((Unsupported, UserError), match="newllm" if fault == "unknown" else "model-old"):
        run(recipe(world), world.out)
    assert not world.out.exists()
