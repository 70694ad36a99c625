"""A run that is killed goes on from its last checkpoint, and what comes of it is what would have come of it.

Each test trains the tiny model through the command line, with dropout, two micro-batches a step and a smaller
last step in each epoch; it kills the process with SIGKILL at one place, goes on with `--resume`, and compares
with a run that was left alone: every step's numbers, bit for bit, and the adapter files.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import EXIT_INTERRUPTED
from tests.training.forks import Ended, Forks
from tests.world import World

ARGS = ("train", "recipe.yaml", "--out", "out", "--json", "--in-process")
STEPS, SAVE, EVAL = 14, 3, 4
EXACT = ("event", "step", "loss", "lr", "grad_norm", "tokens", "trained", "accuracy", "best")


def new_world(root: Path, model: Path) -> World:
    world = World(root, model)
    # 21 rows, 4 a step: the sixth step of an epoch has one row. Lengths differ, so the micro-batches do too.
    world.rows(
        [{"prompt": f"question {i}" + " why?" * (i % 4), "completion": f"answer {i % 5}"} for i in range(21)]
    )
    # Two of these cannot be learnt from the others, so that the loss turns: the best adapter is not the last.
    answers = ("answer 1", "answer 2", "words of a list", "answer 3", "the tokenizer")
    world.rows([{"prompt": f"question {i}?", "completion": a} for i, a in enumerate(answers)], "valid.jsonl")
    world.recipe(
        data={"valid": "valid.jsonl"}, lora={"rank": 4, "dropout": 0.1},
        train={"batch_size": 4, "micro_batch": 2, "max_steps": STEPS, "save_every": SAVE, "eval_every": EVAL,
               "lr": 0.12, "warmup_steps": 2, "schedule": "linear"},
    )  # fmt: skip
    return world


@pytest.fixture
def fresh(tmp_path: Path, tiny_folder: Path) -> World:
    return new_world(tmp_path, tiny_folder)


def metrics(world: World) -> list[dict[str, Any]]:
    lines = (world.out / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k in EXACT} for line in lines]


def adapters(world: World) -> dict[str, bytes]:
    """All that a run leaves: the adapter, the best one, and the last checkpoint with its optimizer."""
    places = ("adapter", "best", f"checkpoints/{STEPS:06d}")
    return {f"{d}/{p.name}": p.read_bytes() for d in places for p in (world.out / d).glob("*.safetensors")}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, forks: Forks) -> World:
    world = new_world(tmp_path_factory.mktemp("untouched"), tiny_folder)
    ended = forks.run(world.root, ARGS)
    assert (ended.signal, ended.code) == (0, 0), ended.err
    return world


def test_the_run_to_compare_with_is_worth_it(untouched: World):
    found = metrics(untouched)
    steps = [m["step"] for m in found if m["event"] == "stepped"]
    validated = [(m["step"], m["best"]) for m in found if m["event"] == "validated"]
    assert steps == list(range(1, STEPS + 1))
    assert [s for s, _ in validated] == [4, 8, 12, 14]
    best = [s for s, best in validated if best]
    assert best == [4, 8], "`best/` is replaced once, and is not the last, so that losing it would be seen"
    assert len({m["loss"] for m in found}) == len(found)
    found = adapters(untouched)
    assert len(found) == 4
    name = "adapter_model.safetensors"
    assert found[f"adapter/{name}"] == found[f"best/{name}"] != found[f"checkpoints/{STEPS:06d}/{name}"]
    assert Ended(0, 0, (untouched.root / "stdout").read_text(), "").events[-1]["from_step"] == 8


def test_the_last_adapter_is_the_result_where_the_best_is_not_asked_for(fresh: World, forks: Forks):
    ended = forks.run(fresh.root, [*ARGS, "train.best=false"])
    name = "adapter_model.safetensors"
    assert adapters(fresh)[f"adapter/{name}"] == adapters(fresh)[f"checkpoints/{STEPS:06d}/{name}"]
    assert ended.events[-1]["from_step"] == STEPS


def test_dropout_is_at_work(untouched: World, fresh: World, forks: Forks):
    """Else that it is repeated would show nothing."""
    forks.run(fresh.root, [*ARGS, "lora.dropout=0"])
    differ = [a["loss"] != b["loss"] for a, b in zip(metrics(untouched), metrics(fresh), strict=True)]
    assert not differ[0], "B is zero at first, so the first loss knows nothing of dropout"
    assert all(differ[1:])


def resumed(world: World, forks: Forks, untouched: World) -> Ended:
    """Go on, and compare everything."""
    ended = forks.run(world.root, [*ARGS, "--resume"])
    assert (ended.signal, ended.code) == (0, 0), ended.err
    assert metrics(world) == metrics(untouched)
    assert adapters(world) == adapters(untouched)
    assert not list(world.out.rglob(".tmp-*"))
    events = [json.loads(line) for line in (world.out / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "stepped"] == list(range(1, STEPS + 1))
    return ended


@pytest.mark.parametrize(
    ("doing", "n", "steps_done", "from_step"),
    [
        ("kill_between_steps", 2, 1, 0),  # before anything was saved
        ("kill_between_steps", 6, 5, 3),
        ("kill_between_steps", 7, 6, 6),  # just after a checkpoint
        ("kill_after_gradients", 0, 0, 0),  # in the rehearsal
        ("kill_after_gradients", 9, 8, 6),  # in step 9
        ("kill_after_update", 12, 11, 9),
        ("kill_in_save", 3, 4, 3),  # best of step 4: its adapter (files 1, 2 are of checkpoint 3)
        ("kill_in_save", 6, 6, 3),  # the optimizer of checkpoint 6
        ("kill_before_state", 1, 3, 0),
        ("kill_before_state", 3, 9, 6),
        ("kill_between_renames", 1, 8, 6),  # `best/` of step 4 aside, that of step 8 not yet there
        ("kill_after_renames", 1, 8, 6),
        ("kill_in_removal", 1, 9, 9),  # checkpoint 9 is whole, 3 is going
        ("kill_in_record", 7, 4, 3),  # events: planned, rehearsed, 1, 2, 3, saved, 4
        ("kill_in_publish", 1, 4, 3),  # `best/`, for the first time
    ],
)
def test_killed_and_resumed_is_not_killed(
    fresh: World, forks: Forks, untouched: World, doing: str, n: int, steps_done: int, from_step: int
):
    killed = forks.run(fresh.root, ARGS, doing, n)
    assert killed.signal == signal.SIGKILL, killed.err
    seen = [e["step"] for e in killed.events if e["event"] == "stepped"]
    assert len(seen) == steps_done - (doing == "kill_in_record")  # recorded in part, so no one heard of it
    ended = resumed(fresh, forks, untouched)
    (planned,) = [e for e in ended.events if e["event"] == "planned"]
    assert planned["resumed_at"] == from_step


def test_killed_while_the_final_adapter_is_written(fresh: World, forks: Forks, untouched: World):
    n = 1 + sum(m.get("best", False) for m in metrics(untouched))  # one for each best, then the last
    killed = forks.run(fresh.root, ARGS, "kill_in_publish", n)
    assert killed.signal == signal.SIGKILL
    assert not (fresh.out / "adapter").exists() and (fresh.out / ".tmp-adapter").is_dir()
    ended = resumed(fresh, forks, untouched)
    assert not [e for e in ended.events if e["event"] == "stepped"]


def test_killed_again_while_it_was_resuming(fresh: World, forks: Forks, untouched: World):
    assert forks.run(fresh.root, ARGS, "kill_between_steps", 6).signal == signal.SIGKILL
    for n in (1, 2, 3):  # plan.json, environment.json, then one of the two records
        assert forks.run(fresh.root, [*ARGS, "--resume"], "kill_in_take_back", n).signal == signal.SIGKILL
    assert forks.run(fresh.root, [*ARGS, "--resume"], "kill_after_update", 2).signal == signal.SIGKILL
    resumed(fresh, forks, untouched)


def test_a_finished_run_resumed_is_the_same_run(fresh: World, forks: Forks, untouched: World):
    assert forks.run(fresh.root, ARGS).code == 0
    ended = resumed(fresh, forks, untouched)
    assert [e["event"] for e in ended.events] == ["planned", "finished"]


@pytest.mark.parametrize(("doing", "n"), [("terminate_in_step", 5), ("interrupt_in_step", 8)])
def test_a_signal_saves_and_exits_130(fresh: World, forks: Forks, untouched: World, doing: str, n: int):
    ended = forks.run(fresh.root, ARGS, doing, n)
    assert (ended.signal, ended.code) == (0, EXIT_INTERRUPTED), ended.err
    assert ended.err == ""
    assert [e["event"] for e in ended.events][-2:] == ["saved", "interrupted"]
    assert ended.events[-1]["step"] == n, "the step in hand is finished"
    assert (fresh.out / "checkpoints" / f"{n:06d}" / "state.json").is_file()
    assert not (fresh.out / "adapter").exists()
    again = resumed(fresh, forks, untouched)
    (planned,) = [e for e in again.events if e["event"] == "planned"]
    assert planned["resumed_at"] == n


def test_a_signal_before_the_first_step_ends_without_a_checkpoint(
    fresh: World, forks: Forks, untouched: World
):
    fresh.recipe(ask=["question 1"])
    ended = forks.run(fresh.root, ARGS, "interrupt_in_answer", 1)
    assert (ended.signal, ended.code) == (0, EXIT_INTERRUPTED), ended.err
    assert [e["event"] for e in ended.events] == ["planned", "rehearsed", "answered", "interrupted"]
    assert not (fresh.out / "checkpoints").exists()
    assert forks.run(fresh.root, [*ARGS, "--resume"]).code == 0
    assert metrics(fresh) == metrics(untouched)


def test_a_signal_in_the_rehearsal_ends_before_a_question_is_asked(
    fresh: World, forks: Forks, untouched: World
):
    fresh.recipe(ask=["question 1"])
    ended = forks.run(fresh.root, ARGS, "interrupt_in_step", 0)
    assert (ended.signal, ended.code) == (0, EXIT_INTERRUPTED), ended.err
    assert [e["event"] for e in ended.events] == ["planned", "rehearsed", "interrupted"]
    assert forks.run(fresh.root, [*ARGS, "--resume"]).code == 0
    assert metrics(fresh) == metrics(untouched)


def test_a_second_signal_ends_it_at_once(fresh: World, forks: Forks, untouched: World):
    ended = forks.run(fresh.root, ARGS, "interrupt_twice_in_step", 5)
    assert (ended.signal, ended.code) == (0, EXIT_INTERRUPTED), ended.err
    assert "Traceback" not in ended.err
    assert [e["step"] for e in ended.events if e["event"] == "stepped"] == [1, 2, 3, 4]
    resumed(fresh, forks, untouched)


def test_killed_from_outside_at_a_moment_no_one_chose(fresh: World, forks: Forks, untouched: World):
    """A process of its own, killed by another as soon as it has told of a step: it is anywhere by then."""
    code = "import burnish.cli; burnish.cli.main()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", code, *ARGS], cwd=fresh.root, env=env, text=True,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line).get("step", 0) >= 4:
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    resumed(fresh, forks, untouched)
