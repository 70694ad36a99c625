"""The process that trains, as its parent has it: real ones, and ones whose job is a script."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import EXIT_FAILED, EXIT_OUT_OF_MEMORY, UserError
from burnish.machine.child import environment
from burnish.recipe import Recipe, load, parse
from burnish.runs.events import Event, Finished, Interrupted, Noted, Planned, Recovered, Saved, Stepped
from burnish.runs.folder import RunFolder
from burnish.training.orders import Orders, Told
from burnish.training.process import End, Process
from burnish.training.supervise import supervise
from burnish.training.worker import told_of
from tests.world import World

# A worker whose job is `job(out, stop, pulse)`, a generator of events; it has all else of a real one.
SCRIPTED = """
import os, subprocess, sys, threading, time
import burnish.training.job
from burnish import errors
from burnish.runs.events import Finished, Interrupted, Noted
from burnish.training import worker

FINISHED = Finished(1, "a", 1, 1.0, 1, 1)

{job}

def run_job(recipe, out, *, stop, pulse, **_):
    yield from job(out, stop, pulse)

burnish.training.job.run_job = run_job
code = worker.main()
sys.stderr.flush()
os._exit(code)
"""


def command(job: str) -> list[str]:
    return [sys.executable, "-c", SCRIPTED.format(job=textwrap.dedent(job))]


def run(
    tmp_path: Path, job: str, stop: Callable[[], bool] = lambda: False
) -> tuple[list[dict[str, Any]], End]:
    """Its events, and its end."""
    orders = Orders(parse(""), tmp_path / "out", False, False)
    with Process(orders, command(job)) as child:
        told = list(child.lines(stop))
        return told, child.end()


# --- what it says where


def test_what_is_printed_is_no_event(tmp_path: Path) -> None:
    """By Python, by a C library, by a program that it starts: all of it is for the log."""
    told, end = run(tmp_path, """
        def job(out, stop, pulse):
            print("by print")
            sys.stdout.write('{"event": "noted", "message": "not mine"}\\n'); sys.stdout.flush()
            os.write(1, b"by a library\\n")
            subprocess.run(["echo", "by a program"], check=True)
            yield Noted("mine")
            print("by print, later", flush=True)
            yield FINISHED
    """)  # fmt: skip
    assert [e.get("message", e["event"]) for e in told] == ["mine", "finished"]
    assert (end.code, end.signal, end.told) == (0, "", None)
    for words in ("by print", "by a library", "by a program", "by print, later"):
        assert words in end.log


def test_many_threads_may_speak_at_once(tmp_path: Path) -> None:
    """Beats and pulses come from others than events do: no line is torn."""
    told, end = run(tmp_path, """
        worker.BEAT_S, worker.PULSE_S = 0.0001, 0.0
        def job(out, stop, pulse):
            for i in range(3000):
                pulse()
                yield Noted("x" * (i % 50))
            yield FINISHED
    """)  # fmt: skip
    assert [len(e["message"]) for e in told[:-1]] == [i % 50 for i in range(3000)]
    assert told[-1]["event"] == "finished" and end.code == 0


def test_it_beats_while_it_computes(tmp_path: Path) -> None:
    orders = Orders(parse("care: {silence_s: 60}"), tmp_path / "out", False, False)
    job = """
        worker.BEAT_S = 0.01
        def job(out, stop, pulse):
            time.sleep(0.5)
            yield FINISHED
    """
    process = subprocess.run(
        command(job), input=orders.line(), capture_output=True, text=True, env=environment(), check=True
    )
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    beats = [line["beat"] for line in lines if "beat" in line]
    assert len(beats) > 3 and beats == list(range(1, len(beats) + 1))
    assert lines[-1]["event"] == "finished"


# --- how it ends


@pytest.mark.parametrize(
    ("error", "told", "code"),
    [
        ("raise errors.UserError('what', 'hint', 2)", Told("what", "hint", 2, True), 2),
        ("raise errors.OutOfMemory('2 GiB')", None, EXIT_OUT_OF_MEMORY),
        ("raise MemoryError", None, EXIT_OUT_OF_MEMORY),
        ("raise KeyboardInterrupt", None, EXIT_FAILED),
        ("raise ValueError('a defect')", None, EXIT_FAILED),
        ("sys.exit(0)", None, EXIT_FAILED),
        ("sys.exit(3)", None, EXIT_FAILED),
        ("sys.exit('with words')", None, EXIT_FAILED),
    ],
)  # fmt: skip
def test_every_error_is_told_and_none_ends_it_well(
    error: str, told: Told | None, code: int, tmp_path: Path
) -> None:
    events, end = run(tmp_path, f"""
        def job(out, stop, pulse):
            yield Noted("begun")
            {error}
    """)  # fmt: skip
    assert [e["event"] for e in events] == ["noted"]
    assert (end.code, end.signal) == (code, "") and end.told is not None and end.told.exit_code == code
    if told is not None:
        assert end.told == told
    else:
        assert end.told.meant == ("OutOfMemory" in error)
        assert end.told.meant or "Traceback" in end.told.message


def test_what_is_told_of_an_error() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as e:
            raise RuntimeError("while it was handled") from e
    except RuntimeError as e:
        told = told_of(e)
    assert "MemoryError" in told.message and told.message.endswith("while it was handled")
    assert (told.exit_code, told.meant, told.hint) == (EXIT_FAILED, False, "")
    assert told_of(UserError("a", "b", 3)) == Told("a", "b", 3, True)


def test_threads_that_never_end_do_not_keep_it(tmp_path: Path) -> None:
    _, end = run(tmp_path, """
        def job(out, stop, pulse):
            threading.Thread(target=time.sleep, args=(600,)).start()
            yield FINISHED
            raise ValueError("x")
    """)  # fmt: skip
    assert end.code == EXIT_FAILED


def test_an_event_that_cannot_be_said_is_an_error_not_silence(tmp_path: Path) -> None:
    _, end = run(tmp_path, """
        def job(out, stop, pulse):
            yield Noted(object())
            yield FINISHED
    """)  # fmt: skip
    assert end.told is not None and "not JSON serializable" in end.told.message


# --- to stop


WAITS = """
    def job(out, stop, pulse):
        yield Noted("begun")
        while not stop():
            time.sleep(0.01)
        yield Interrupted(3, str(out))
"""


def test_a_wish_to_stop_reaches_the_job(tmp_path: Path) -> None:
    told, end = run(tmp_path, WAITS, stop=lambda: True)
    assert [e["event"] for e in told] == ["noted", "interrupted"] and end.code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_terminals_signals_are_not_for_it(number: signal.Signals, tmp_path: Path) -> None:
    told, end = run(tmp_path, f"""
        def job(out, stop, pulse):
            for _ in range(3):
                os.kill(os.getpid(), {int(number)})
                time.sleep(0.05)
            assert not stop()
            yield FINISHED
    """)  # fmt: skip
    assert [e["event"] for e in told] == ["finished"], end.told


def test_sigterm_is_a_wish(tmp_path: Path) -> None:
    told, end = run(tmp_path, f"""
        def job(out, stop, pulse):
            os.kill(os.getpid(), {int(signal.SIGTERM)})
            while not stop():
                time.sleep(0.01)
            yield Interrupted(1, str(out))
    """)  # fmt: skip
    assert [e["event"] for e in told] == ["interrupted"] and end.code == 0


def test_a_parent_that_is_gone_breaks_nothing_that_is_said(tmp_path: Path) -> None:
    """Events, beats and what libraries print go nowhere: the job is finished as if somebody listened."""
    orders = Orders(parse(""), tmp_path / "out", False, False)
    job = f"""
        worker.BEAT_S = 0.01
        def job(out, stop, pulse):
            while not stop():
                time.sleep(0.01)
            for i in range(100):
                os.write(1, b"x") if i < 0 else None
                pulse()
                yield Noted("x" * 1000)
                time.sleep(0.001)
            open({str(tmp_path / "saved")!r}, "w").close()
            yield Interrupted(3, str(out))
    """
    pipe = subprocess.PIPE
    child = subprocess.Popen(command(job), stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment())
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    child.stdin.write(orders.line())
    child.stdin.flush()
    for end in (child.stdout, child.stderr, child.stdin):
        end.close()
    assert child.wait(timeout=120) == 0
    assert (tmp_path / "saved").exists()


# --- a real one


@pytest.fixture
def asked(world: World) -> Recipe:
    """A run that does not end for hours, and saves only when it is to stop."""
    world.recipe(
        backend="reference",
        data={"train": str(world.root / "data.jsonl")},
        train={"max_steps": 100_000, "epochs": 100_000, "save_every": 100_000},
        care={"keep_awake": False},
    )
    return load(str(world.root / "recipe.yaml"))


def saved(out: Path) -> list[int]:
    return sorted(int(p.name) for p in (out / "checkpoints").glob("[0-9]*"))


def recorded(out: Path) -> list[str]:
    return [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]


PARENT = """
import sys
from pathlib import Path
from burnish.recipe import load
from burnish.training.orders import Orders
from burnish.training.supervise import supervise
for event in supervise(Orders(load(sys.argv[1]), Path(sys.argv[2]), False, False), lambda: False):
    print(type(event).__name__, flush=True)
"""


def test_a_parent_that_is_killed_leaves_a_checkpoint_and_a_free_folder(asked: Recipe, world: World) -> None:
    recipe = str(world.root / "recipe.yaml")
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, recipe, str(world.out)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert parent.stdout is not None
    assert any(line.strip() == "Stepped" for line in parent.stdout)
    parent.kill()
    parent.communicate()
    end = time.monotonic() + 120
    while "interrupted" not in recorded(world.out) and time.monotonic() < end:
        time.sleep(0.05)
    assert recorded(world.out)[-2:] == ["saved", "interrupted"]
    (step,) = saved(world.out)
    while time.monotonic() < end:
        try:
            with RunFolder.resume(world.out, asked) as run:
                found = run.newest_checkpoint()
            break
        except UserError:  # it has said so, and is about to end
            time.sleep(0.05)
    assert found is not None and found[1].step == step


def listen(asked: Recipe, out: Path, on: Callable[[Event], object], resume: bool = False) -> list[Event]:
    events = []
    for event in supervise(Orders(asked, out, resume, False), lambda: False, back_off=(0.0,)):
        events.append(event)
        on(event)
    return events


def owner(out: Path) -> int:
    return int((out / "lock").read_text())


def test_terminated_by_others_it_saves_and_is_not_begun_again(asked: Recipe, world: World) -> None:
    def on(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            os.kill(owner(world.out), signal.SIGTERM)

    events = listen(asked, world.out, on)
    assert isinstance(events[-1], Interrupted) and isinstance(events[-2], Saved)
    assert len([e for e in events if isinstance(e, Planned)]) == 1
    assert saved(world.out) == [events[-1].step]


def test_killed_it_goes_on_and_its_numbers_are_what_they_would_have_been(
    world: World, tmp_path: Path
) -> None:
    world.recipe(
        backend="reference",
        data={"train": str(world.root / "data.jsonl"), "valid_share": 0.25},
        train={"max_steps": 60, "epochs": 99, "save_every": 4, "eval_every": 20},
        care={"keep_awake": False},
    )
    asked = load(str(world.root / "recipe.yaml"))
    killed: list[int] = []

    def on(event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 6 and not killed:
            killed.append(owner(world.out))
            os.kill(killed[0], signal.SIGKILL)

    events = listen(asked, world.out, on)
    assert any(isinstance(e, Noted) and "SIGKILL" in e.message for e in events), "it was too fast for that"
    (recovered,) = [e for e in events if isinstance(e, Recovered)]
    assert recovered.cause == "SIGKILL" and recovered.step >= 4 and recovered.step % 4 == 0
    kinds = recorded(world.out)
    assert kinds.count("stepped") == 60 and "recovered" in kinds, "the records are one run"
    straight = listen(asked, tmp_path / "straight", lambda _: None)
    steps = {e.step: (e.loss, e.grad_norm) for e in events if isinstance(e, Stepped)}
    assert steps == {e.step: (e.loss, e.grad_norm) for e in straight if isinstance(e, Stepped)}
    weights = [
        (out / "adapter" / "adapter_model.safetensors").read_bytes()
        for out in (world.out, tmp_path / "straight")
    ]
    assert weights[0] == weights[1]
    assert isinstance(events[-1], Finished)
