"""`burnish pause`, `stop` and `resume`: what each says and does to a run in every state it may be in."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from burnish.cli import wishes
from burnish.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED
from burnish.machine.child import environment
from burnish.recipe import load
from burnish.runs.folder import RunFolder
from burnish.runs.wish import ask, wished
from tests.world import Said, World

LONG = {"max_steps": 100_000, "epochs": 100_000, "save_every": 100_000}


@pytest.fixture
def quick(world: World) -> World:
    world.recipe(backend="reference", train={"max_steps": 4, "save_every": 2}, care={"keep_awake": False})
    return world


@pytest.fixture
def running(quick: World) -> Iterator[World]:
    """This very process owns the run, as one that trains does."""
    with RunFolder.begin(quick.out, load(str(quick.root / "recipe.yaml"))):
        yield quick


def refused(said: Said, *parts: str) -> None:
    assert said.code == EXIT_BAD_INPUT and "Traceback" not in said.err, said
    for part in parts:
        assert part in said.err, said.err


# --- nothing trains


@pytest.mark.parametrize("verb", ["pause", "stop", "resume"])
@pytest.mark.parametrize("there", ["nothing", "a file", "an empty folder", "an adapter"])
def test_what_is_no_run_is_refused(verb: str, there: str, quick: World) -> None:
    match there:
        case "a file":
            quick.write("out", "")
        case "an empty folder":
            quick.out.mkdir()
        case "an adapter":
            quick.write("out/adapter_config.json", "{}")
            quick.write("out/recipe.yaml", "")
    before = quick.tree()
    refused(quick.burnish(verb, "out"), "out")
    assert quick.tree() == before


@pytest.mark.parametrize("verb", ["pause", "stop"])
def test_nothing_trains_now(verb: str, quick: World) -> None:
    assert quick.train().code == 0
    before = quick.tree()
    refused(quick.burnish(verb, "out"), "nothing trains in out now", "burnish report out")
    assert quick.tree() == before, "no wish is left for a later run"


def test_what_has_finished_is_not_gone_on_with(quick: World) -> None:
    assert quick.train().code == 0
    before = quick.tree()
    refused(quick.burnish("resume", "out"), "has finished", "burnish generate out")
    assert quick.tree() == before


# --- one runs


def test_pause_leaves_a_wish_and_says_how_it_goes_on(running: World) -> None:
    said = running.burnish("pause", "out")
    assert said.code == 0 and wished(running.out) == "pause"
    assert "burnish resume out" in said.out and "burnish stop out" in said.out


def test_resume_takes_it_back(running: World) -> None:
    ask(running.out, "pause")
    said = running.burnish("resume", "out")
    assert said.code == 0 and wished(running.out) == "" and "its own terminal" in said.out


@pytest.mark.parametrize("wish", ["", "stop"])
def test_one_that_does_not_wait_cannot_go_on(wish: str, running: World) -> None:
    ask(running.out, wish)  # type: ignore[arg-type]
    refused(running.burnish("resume", "out"), "out")
    assert wished(running.out) == wish


def test_stop_wins_over_pause(running: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wishes, "WAIT_S", 0)
    ask(running.out, "pause")
    said = running.burnish("stop", "out")
    assert said.code == 0 and wished(running.out) == "stop"
    assert "will end after the step in hand" in said.out


def test_stop_waits_until_it_has_ended(quick: World, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.begin(quick.out, load(str(quick.root / "recipe.yaml")))
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            run.close()

    monkeypatch.setattr(wishes.time, "sleep", sleep)
    said = quick.burnish("stop", "out")
    assert said.code == 0 and "burnish resume" in said.out and len(looks) == 3


# --- a real one, in a terminal of its own


def terminal(world: World) -> subprocess.Popen[str]:
    code = "import burnish.cli; burnish.cli.main()"
    command = [sys.executable, "-c", code, "train", "recipe.yaml", "--out", "out", "--json"]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=world.root, env=environment(), stdout=pipe, stderr=pipe, text=True)


def until(terminal: subprocess.Popen[str], kind: str) -> int:
    """Read what it prints until such an event; its step."""
    assert terminal.stdout is not None
    for line in terminal.stdout:
        event = json.loads(line)
        if event["event"] == kind:
            return event["step"]
    assert terminal.stderr is not None
    raise AssertionError(f"never {kind}: {terminal.stderr.read()}")


def saved(out: Path) -> list[int]:
    return sorted(int(p.name) for p in (out / "checkpoints").glob("[0-9]*"))


def test_paused_resumed_stopped_and_resumed(quick: World) -> None:
    quick.recipe(train=LONG)
    with terminal(quick) as run:
        try:
            until(run, "stepped")
            assert quick.burnish("pause", "out").code == 0
            at = until(run, "paused")
            assert saved(quick.out) == [at], "a checkpoint first"
            said = json.loads(quick.burnish("report", "out", "--json").out)
            assert said["state"]["kind"] == "paused"
            time.sleep(0.5)
            assert quick.burnish("resume", "out").code == 0
            assert until(run, "continued") == at
            assert until(run, "stepped") == at + 1, "not one while it was paused"
            assert quick.burnish("pause", "out").code == 0
            again = until(run, "paused")
            assert quick.burnish("stop", "out").code == 0
            assert until(run, "interrupted") == again
            assert run.wait(timeout=120) == EXIT_INTERRUPTED
        finally:
            run.kill()
    assert saved(quick.out)[-1] == again
    refused(quick.burnish("pause", "out"), "nothing trains")
    assert json.loads(quick.burnish("report", "out", "--json").out)["state"]["kind"] == "interrupted"


def test_a_stopped_run_is_gone_on_with_as_it_was_begun(quick: World) -> None:
    """With what was typed when it began, though this is not typed again."""
    quick.recipe(train={"max_steps": 9, "save_every": 9, "epochs": 9})
    straight = quick.train("train.lr=0.02", out="straight")
    wish, stepped = quick.out / "wish", []

    class Stops:
        """Asks from elsewhere, after the third step."""

        def hear(self, event: object) -> None:
            if type(event).__name__ == "Stepped":
                stepped.append(event)
                if len(stepped) == 3:
                    wish.write_text("stop")

        def __enter__(self) -> Stops:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    with pytest.MonkeyPatch.context() as m:
        m.setattr("burnish.cli.train.JsonView", Stops)
        assert quick.train("train.lr=0.02").code == EXIT_INTERRUPTED
    assert saved(quick.out) == [3] and straight.code == 0
    said = quick.burnish("resume", "out", "--json")
    assert said.code == 0, said.err
    assert said.event("planned")["resumed_at"] == 3
    losses = [[e["loss"] for e in s.events if e["event"] == "stepped"] for s in (straight, said)]
    assert losses[0][3:] == losses[1] and said.event("finished")["step"] == 9
    weights = [
        (quick.root / d / "adapter" / "adapter_model.safetensors").read_bytes() for d in ("out", "straight")
    ]
    assert weights[0] == weights[1]
    assert not wish.exists()
