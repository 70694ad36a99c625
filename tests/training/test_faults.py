"""One fault of every kind that matters, in a supervised run, and what comes of it: the bits of the run that
nobody touched. bench/faults.py does hundreds, at drawn places and moments, with both backends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import EXIT_FAILED, EXIT_INTERRUPTED
from burnish.runs.lock import LOCK, in_use
from tests.training.faulty_worker import Ended, Fault, Lane, events, fired
from tests.training.test_resume import STEPS, adapters, metrics, new_world
from tests.world import World

pytestmark = pytest.mark.slow
pytest.importorskip("torch")

ONE_RUN = [
    Fault("file", 4, "half", after=True),  # SIGKILL with half of a checkpoint's file written
    Fault("optimizer", 8, "SIGSEGV", after=True),  # the weights have moved, and no one has heard of it
    Fault("backward", 13, "oom"),
    Fault("file", 3, "memory"),  # an error of Python's that no backend translates
    Fault("_gradients", 6, "nan"),
]
Result = tuple[list[dict[str, Any]], dict[str, bytes]]


@pytest.fixture(scope="module")
def lane() -> Iterator[Lane]:
    with Lane("torch") as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(lane: Lane, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    world = new_world(tmp_path_factory.mktemp("undisturbed"), tiny_folder)
    assert burnish(lane, world).code == 0
    return result(world)


@pytest.fixture
def fresh(tmp_path: Path, tiny_folder: Path) -> World:
    return new_world(tmp_path, tiny_folder)


def burnish(lane: Lane, world: World, *faults: Fault, more: tuple[str, ...] = ()) -> Ended:
    ended = lane.start(world.root, ["train", "recipe.yaml", "--out", "out", "--json", *more], faults).wait()
    assert ended.in_time
    return ended


def result(world: World) -> Result:
    return metrics(world), adapters(world)


def stderr(world: World) -> str:
    return (world.root / "stderr").read_text()


def wait_free(world: World) -> None:
    """A child whose parent was killed saves, and ends by itself."""
    end = time.monotonic() + 60
    while in_use(world.out / LOCK):
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("fault", ONE_RUN, ids=lambda f: f"{f.action}-{f.place}")
def test_the_run_goes_on_by_itself(lane: Lane, fresh: World, undisturbed: Result, fault: Fault) -> None:
    assert burnish(lane, fresh, fault).code == 0
    assert fired(fresh.root) == {0: 1}
    assert result(fresh) == undisturbed


def test_a_child_that_hangs_is_replaced(lane: Lane, fresh: World, undisturbed: Result) -> None:
    assert burnish(lane, fresh, Fault("_gradients", 6, "hang"), more=("care.silence_s=3",)).code == 0
    assert [e["cause"] for e in events(fresh.root) if e["event"] == "recovered"] == ["no answer"]
    assert result(fresh) == undisturbed


def test_a_full_disk_is_one_sentence_and_resume_goes_on(
    lane: Lane, fresh: World, undisturbed: Result
) -> None:
    assert burnish(lane, fresh, Fault("file", 5, "ENOSPC")).code == EXIT_FAILED
    assert "the disk is full" in stderr(fresh) and "Traceback" not in stderr(fresh)
    assert json.loads((fresh.out / "failure.json").read_text())["diagnosis"]
    assert burnish(lane, fresh, more=("--resume",)).code == 0
    assert result(fresh) == undisturbed


def test_a_damaged_checkpoint_is_passed_over(lane: Lane, fresh: World, undisturbed: Result) -> None:
    burnish(lane, fresh, Fault("_gradients", STEPS - 2, "SIGKILL", whom="both"))
    wait_free(fresh)
    newest = sorted((fresh.out / "checkpoints").glob("[0-9]*"))[-1] / "optimizer.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-7] ^= 16
    newest.write_bytes(raw)
    assert burnish(lane, fresh, more=("--resume",)).code == 0
    assert any("is damaged" in e["message"] for e in events(fresh.root) if e["event"] == "noted")
    assert result(fresh) == undisturbed


def test_a_child_without_its_parent_saves_and_ends(lane: Lane, fresh: World, undisturbed: Result) -> None:
    burnish(lane, fresh, Fault("_gradients", 6, "SIGKILL", whom="parent"))
    wait_free(fresh)
    assert int(sorted((fresh.out / "checkpoints").iterdir())[-1].name) >= 5
    assert burnish(lane, fresh, more=("--resume",)).code == 0
    assert result(fresh) == undisturbed


def test_ctrl_c_reaches_both_and_one_checkpoint_is_saved(
    lane: Lane, fresh: World, undisturbed: Result
) -> None:
    assert burnish(lane, fresh, Fault("_gradients", 6, "SIGINT", whom="both")).code == EXIT_INTERRUPTED
    assert events(fresh.root)[-1]["event"] == "interrupted"
    assert burnish(lane, fresh, more=("--resume",)).code == 0
    assert result(fresh) == undisturbed
