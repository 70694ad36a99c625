"""What a parent makes of the ways in which a training process ends. The processes here are scripts of a few
lines that speak the protocol of orders.py; no framework is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OUT_OF_MEMORY, EXIT_WILL_NOT_FIT, UserError
from burnish.recipe import Recipe, load, parse
from burnish.runs.events import Event, Finished, Interrupted, Noted, Planned, Saved, Stepped
from burnish.runs.folder import RunFolder
from burnish.runs.lock import adopted, free, locked
from burnish.training import process, supervise
from burnish.training.orders import Aftermath, Orders

# What every script begins with. `n` is which process of the run it is, from 1.
PRELUDE = """
import json, os, signal, subprocess, sys, time
orders = json.loads(sys.stdin.readline())
out = orders["out"]
with open(out + ".heard", "a") as f:
    f.write(json.dumps({**orders, "pid": os.getpid()}) + "\\n")
n = len(open(out + ".heard").readlines())

def tell(value):
    sys.stdout.write(json.dumps(value) + "\\n")
    sys.stdout.flush()

def say(event, **fields):
    tell({"event": event, **fields})

def planned(at=0, backend="torch"):
    summary = {"choices": {"backend": {"value": backend}}}
    say("planned", out=out, summary=summary, examples=1, valid_examples=0, tokens=1, trained=1, dropped=0,
        truncated=0, resumed_at=at)

def stepped(step):
    say("stepped", step=step, steps=9, epoch=0.5, loss=1.0, lr=0.1, grad_norm=1.0, tokens=1, trained=1.0,
        seconds=0.1, now_bytes=1, peak_bytes=1)

def saved(step):
    say("saved", step=step, folder=out)

def finished():
    say("finished", step=9, adapter="a", from_step=9, seconds=1.0, estimated_bytes=1, peak_bytes=1)

def interrupted(step):
    say("interrupted", step=step, out=out)

def failed(message, code=1, hint="", meant=True):
    tell({"failed": {"message": message, "hint": hint, "exit_code": code, "meant": meant}})
    sys.stdout.flush()
    os._exit(code)

def die(number=signal.SIGKILL):
    sys.stderr.flush()
    os.kill(os.getpid(), number)
    time.sleep(60)
"""
DIES = "planned(); die()"
ENDS = "planned(); finished()"


@dataclass
class Run:
    """A run whose n-th process does what the n-th of `bodies` says; the last is for all that follow."""

    out: Path
    bodies: Sequence[str]
    care: str = ""
    resume: bool = False
    stop: Callable[[], bool] = lambda: False
    back_off: Sequence[float] = (0.0,)
    events: list[Event] = field(default_factory=list)

    def listen(self) -> Iterator[Event]:
        orders = Orders(parse(f"care: {{{self.care}}}"), self.out, self.resume, skip_before=True)
        code = f"{PRELUDE}\nbodies = {list(self.bodies)!r}\nexec(bodies[min(n, len(bodies)) - 1])"
        command = [sys.executable, "-S", "-c", code]
        for event in supervise.supervise(orders, self.stop, command, self.back_off):
            self.events.append(event)
            assert len(self.notes) < 20, "it is begun again for ever"
            yield event

    def ends_well(self) -> list[str]:
        """The kinds of its events."""
        return [type(e).__name__.lower() for e in self.listen()]

    def ends_badly(self) -> UserError:
        with pytest.raises(UserError) as e:
            for _ in self.listen():
                pass
        return e.value

    @property
    def heard(self) -> list[dict[str, Any]]:
        """The orders that each process was given, and its number."""
        path = Path(f"{self.out}.heard")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def aftermaths(self) -> list[Aftermath | None]:
        return [None if o["aftermath"] is None else Aftermath(**o["aftermath"]) for o in self.heard]

    @property
    def lighter(self) -> list[bool]:
        """Whether each process that follows another was to take a rung down."""
        return [a.lighter for a in self.aftermaths if a is not None]

    @property
    def notes(self) -> list[str]:
        return [e.message for e in self.events if isinstance(e, Noted)]


Runs = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path) -> Runs:
    return lambda *bodies, **settings: Run(tmp_path / "out", bodies, **settings)


def gone(number: int) -> bool:
    """No process of that number is left, not even one that nobody has collected."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


# --- no death


def test_a_run_that_ends_well_is_its_events(run: Runs) -> None:
    r = run("planned(); stepped(1); saved(1); finished()")
    assert r.ends_well() == ["planned", "stepped", "saved", "finished"]
    (orders,) = r.heard
    assert (orders["resume"], orders["skip_before"], orders["aftermath"]) == (False, True, None)
    assert isinstance(r.events[1], Stepped) and r.events[1].loss == 1.0
    assert gone(orders["pid"])


def test_beats_and_pulses_are_no_events(run: Runs) -> None:
    assert run("tell({'beat': 1}); tell({'pulse': 3}); planned(); finished()").ends_well() == [
        "planned", "finished"
    ]  # fmt: skip


def test_orders_come_as_they_were_given(tmp_path: Path) -> None:
    """Whatever a person wrote: what YAML takes for something else, breaks of lines, any character."""
    odd = [
        "yes",
        "1e3",
        "null",
        "~",
        "",
        " x ",
        "a\nb",
        "\u2028",
        "\x85",
        "\x7f",
        "\x00",
        "🙂",
        "#",
        "0x1f",
        "'\"",
    ]
    asked = {"ask": odd, "generation": {"stop": odd}, "care": {"mps_limit": "none"}}
    aftermath = Aftermath("SIGKILL", "line\nline", True, 3, 1.5)
    for orders in (Orders(Recipe.model_validate(asked), tmp_path / "ä b", True, False, aftermath),
                   Orders(load("demo"), tmp_path, False, True)):  # fmt: skip
        line = orders.line()
        assert line.isascii() and line.count("\n") == 1 and line.endswith("\n")
        assert Orders.of(line) == orders


# --- what the next process is told


def test_the_one_that_follows_goes_on_with_what_the_first_died_of(run: Runs) -> None:
    before = time.monotonic()
    r = run("planned(); stepped(1); saved(1); stepped(2); stepped(3); die()", "planned(1); finished()")
    assert r.ends_well() == [
        "planned",
        "stepped",
        "saved",
        "stepped",
        "stepped",
        "noted",
        "planned",
        "finished",
    ]
    first, second = r.heard
    assert (first["resume"], second["resume"]) == (False, True)
    assert first["recipe"] == second["recipe"] and second["skip_before"]
    aftermath = r.aftermaths[1]
    assert aftermath is not None
    assert (aftermath.cause, aftermath.step, aftermath.lighter) == ("SIGKILL", 3, False)
    assert before < aftermath.since < time.monotonic()
    (note,) = r.notes
    assert "SIGKILL" in note and "step 3" in note and "from step 1" in note


def test_who_dies_before_its_run_has_begun_is_followed_by_a_new_beginning(run: Runs) -> None:
    """There is no folder to go on with yet; where it was to go on, so is the next."""
    r = run("die()", ENDS)
    r.ends_well()
    assert [o["resume"] for o in r.heard] == [False, False]
    assert "from the beginning" in r.notes[0]


def test_what_was_to_go_on_stays_so(run: Runs) -> None:
    r = run("die()", ENDS, resume=True)
    r.ends_well()
    assert [o["resume"] for o in r.heard] == [True, True]


@pytest.mark.parametrize(
    ("body", "cause", "lighter"),
    [
        ("die()", "SIGKILL", True),
        ("die(signal.SIGSEGV)", "SIGSEGV", False),
        ("die(signal.SIGABRT)", "SIGABRT", False),
        ("die(signal.SIGBUS)", "SIGBUS", False),
        ("die(signal.SIGTRAP)", "SIGTRAP", False),
        ("planned(backend='mlx'); die(signal.SIGSEGV)", "SIGSEGV", True),
        ("planned(backend='mlx'); die(signal.SIGBUS)", "SIGBUS", True),
        ("planned(backend='mlx'); die(signal.SIGTRAP)", "SIGTRAP", False),
        ("sys.stderr.write('terminate called: std::bad_alloc\\n'); die(signal.SIGABRT)", "SIGABRT", True),
        ("os._exit(1)", "exit code 1", False),
        ("os._exit(75)", "out of memory", True),
        ("failed('memory ran out: 2 GiB', 75)", "out of memory", True),
        ("failed('Traceback\\nMemoryError', 75, meant=False)", "out of memory", True),
        ("failed('RuntimeError: CUDA out of memory. Tried to allocate 2 GiB', meant=False)",
         "cuda-out-of-memory", True),
        ("raise SystemExit(4)", "exit code 4", False),
    ],
)  # fmt: skip
def test_a_rung_is_taken_where_it_ends_twice_and_memory_may_be_why(
    body: str, cause: str, lighter: bool, run: Runs
) -> None:
    r = run(f"planned(); {body}", f"planned(); {body}", ENDS)
    r.ends_well()
    assert r.lighter == [False, lighter]
    assert [a.cause for a in r.aftermaths if a is not None] == [cause, cause]
    assert [o["resume"] for o in r.heard] == [False, True, True]


def test_its_last_words_are_handed_on(run: Runs) -> None:
    long = "x" * 5000
    r = run(
        "sys.stderr.write('one\\ntwo\\n\\n'); planned(); die()", f"planned(); failed('a\\n{long}', 75)", ENDS
    )
    r.ends_well()
    assert [a.error for a in r.aftermaths if a is not None] == ["two", long[:300]]


def test_a_fault_handlers_first_line_is_its_word(run: Runs) -> None:
    r = run(
        "import faulthandler; faulthandler.enable(); planned(); sys.stderr.write('so far\\n'); "
        "faulthandler._sigsegv()",
        ENDS,
    )
    r.ends_well()
    (aftermath,) = [a for a in r.aftermaths if a is not None]
    assert aftermath.error == "Fatal Python error: Segmentation fault"


# --- how often


def test_after_so_many_in_a_row_it_is_given_up(run: Runs) -> None:
    r = run("planned(); stepped(1); saved(1); die()", "planned(1); sys.stderr.write('ouch\\n'); die()",
            care="restarts: 3")  # fmt: skip
    error = r.ends_badly()
    assert len(r.heard) == 4, "one and three restarts"
    assert error.exit_code == EXIT_OUT_OF_MEMORY and "SIGKILL" in error.message
    assert "4 times" in error.message and "checkpoint of step 1" in error.message and "ouch" in error.message
    assert "--resume" in error.hint and error.log[-1] == "ouch"
    assert all(isinstance(line, str) for line in error.log)
    assert all(gone(o["pid"]) for o in r.heard)


def test_none_is_restarted_where_the_recipe_says_so(run: Runs) -> None:
    r = run("planned(); die(signal.SIGSEGV)", care="restarts: 0")
    error = r.ends_badly()
    assert len(r.heard) == 1 and error.exit_code == EXIT_FAILED and "SIGSEGV" in error.message
    assert "times" not in error.message


def test_a_new_checkpoint_begins_the_count_anew(run: Runs) -> None:
    bodies = [f"planned({k}); stepped({k + 1}); saved({k + 1}); die()" for k in range(5)]
    r = run(*bodies, "planned(5); finished()", care="restarts: 1")
    r.ends_well()
    assert len(r.heard) == 6 and r.lighter == [False] * 5


def test_the_same_checkpoint_again_does_not(run: Runs) -> None:
    """Nor one before it, after a damaged one was passed over."""
    again = "planned(2); stepped(3); saved(4); die()"
    r = run("planned(); saved(4); die()", again, "planned(); saved(2); die()", care="restarts: 2")
    r.ends_badly()
    assert len(r.heard) == 3


def test_it_waits_longer_each_time(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(supervise, "_stopped_while", lambda s, *_: bool(waited.append(s)))
    saved = "planned(); saved(1); die()"
    run("die()", "die()", saved, "die()", "die()", "die()", ENDS, back_off=(1, 5, 20)).ends_well()
    assert waited == [1, 5, 1, 5, 20, 20], "and as at first after a checkpoint"


# --- errors that a new process would only meet again


def test_an_error_meant_for_people_passes_through(run: Runs) -> None:
    r = run("failed('no such file', 2, 'look there')")
    error = r.ends_badly()
    assert (error.message, error.hint, error.exit_code) == ("no such file", "look there", EXIT_BAD_INPUT)
    assert len(r.heard) == 1


def test_what_does_not_fit_is_said_at_once(run: Runs) -> None:
    r = run("failed('this needs 9 GiB', 3, 'set train.micro_batch=1')")
    error = r.ends_badly()
    assert (error.exit_code, error.hint, len(r.heard)) == (EXIT_WILL_NOT_FIT, "set train.micro_batch=1", 1)


def test_after_a_death_what_does_not_fit_is_tried_again(run: Runs) -> None:
    """The process before may have held its memory still."""
    r = run(DIES, "failed('this needs 9 GiB', 3)", ENDS)
    r.ends_well()
    assert [a.cause for a in r.aftermaths if a is not None] == ["SIGKILL", "no room"]


def test_what_does_not_fit_even_then_keeps_its_own_words(run: Runs) -> None:
    r = run(DIES, "failed('cannot be cut any smaller', 3, 'set lora.rank=4')", care="restarts: 2")
    error = r.ends_badly()
    assert len(r.heard) == 3 and "cannot be cut any smaller" in error.message
    assert "lora.rank=4" in error.hint and error.exit_code == EXIT_WILL_NOT_FIT


def test_an_unknown_error_keeps_its_own_text(run: Runs) -> None:
    trace = "Traceback (most recent call last):\\n  File x\\nValueError: never heard of"
    r = run(f"sys.stderr.write('said before\\n'); planned(); failed('{trace}', meant=False)")
    error = r.ends_badly()
    assert error.message.startswith("Traceback") and error.message.endswith("never heard of")
    assert (error.exit_code, error.log, len(r.heard)) == (EXIT_FAILED, ("said before",), 1)


def test_one_that_the_catalogue_knows_comes_with_its_remedy(run: Runs) -> None:
    message = "ModuleNotFoundError: No module named ''bitsandbytes''".replace("''", '"')
    r = run(f"planned(); failed({message!r}, meant=False)")
    known, unknown = r.ends_badly(), run("failed('x: y', meant=False)").ends_badly()
    assert unknown.hint == ""
    assert known.message == message


# --- silence


QUIET = "silence_s: 1"


def test_one_that_hangs_is_ended(run: Runs) -> None:
    r = run("planned(); stepped(1)\nwhile True:\n  tell({'beat': 1}); time.sleep(.1)", ENDS, care=QUIET)
    r.ends_well()
    assert r.aftermaths[1] is not None and r.aftermaths[1].cause == "no answer"
    assert gone(r.heard[0]["pid"]), "beats say that it lives, not that it does anything"
    assert "no answer for 1 s" in r.notes[0]


def test_one_that_hangs_each_time_is_given_up_and_takes_no_rung(run: Runs) -> None:
    r = run("planned(); time.sleep(60)", care=f"{QUIET}, restarts: 1")
    error = r.ends_badly()
    assert error.exit_code == EXIT_FAILED and "no answer" in error.message
    assert r.lighter == [False] and all(gone(o["pid"]) for o in r.heard)


def test_pulses_keep_it_alive(run: Runs) -> None:
    r = run("planned()\nfor _ in range(20):\n  tell({'pulse': 1}); time.sleep(.1)\nfinished()", care=QUIET)
    assert r.ends_well() == ["planned", "finished"]


def test_so_does_a_pause_but_only_with_beats(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = "planned(); say('paused', step=1, why='asked', words='')\n"
    beats = "for _ in range(20):\n  tell({'beat': 1}); time.sleep(.1)\nfinished()"
    assert run(pause + beats, care=QUIET).ends_well() == ["planned", "paused", "finished"]
    monkeypatch.setattr(process, "DEAD_S", 0.7)
    r = run(f"{pause}time.sleep(60)", care=f"{QUIET}, restarts: 0")
    assert "no answer" in r.ends_badly().message


# --- a wish to stop


class Wish:
    """True once it was asked so often, or told."""

    def __init__(self) -> None:
        self.told = False

    def __call__(self) -> bool:
        return self.told


STOPS = "stepped(3)\nfor line in sys.stdin:\n  if line == 'stop\\n': break\nsaved(3); interrupted(3)"


def test_a_wish_to_stop_is_handed_on_once(run: Runs) -> None:
    wish = Wish()
    rest = "open(out + '.rest', 'w').write(sys.stdin.read())"
    r = run(f"planned(); {STOPS}; {rest}", stop=wish, care="silence_s: 20, restarts: 0")
    events, seen = r.listen(), []
    for event in events:
        seen.append(type(event).__name__)
        wish.told = wish.told or isinstance(event, Stepped)
        if isinstance(event, Interrupted):
            break
    events.close()  # type: ignore[attr-defined]
    assert seen == ["Planned", "Stepped", "Saved", "Interrupted"]
    assert Path(f"{r.out}.rest").read_text() == "" and len(r.heard) == 1


def test_who_dies_when_it_was_to_stop_is_not_followed(run: Runs) -> None:
    wish = Wish()
    r = run("planned(); saved(2); stepped(3); sys.stdin.readline(); die()", stop=wish)
    for event in r.listen():
        wish.told = wish.told or isinstance(event, Stepped)
    assert r.events[-1] == Interrupted(2, str(r.out)) and len(r.heard) == 1


def test_a_wish_to_stop_is_heeded_while_it_waits(run: Runs) -> None:
    wish = Wish()
    r = run("planned(); saved(2); die()", stop=wish, back_off=(3600.0,))
    for event in r.listen():
        wish.told = wish.told or isinstance(event, Noted)
    assert r.events[-1] == Interrupted(2, str(r.out)) and len(r.heard) == 1


def test_another_terminals_wish_is_heeded_while_it_waits(run: Runs) -> None:
    """`burnish stop`: no process is there to look at its file."""
    r = run("planned(); saved(2); os.makedirs(out); open(out + '/wish', 'w').write('stop\\n'); die()", ENDS)
    assert r.ends_well()[-1] == "interrupted" and len(r.heard) == 1


# --- the end, whatever comes after it


@pytest.mark.parametrize("then", ["die(signal.SIGSEGV)", "os._exit(1)", "time.sleep(60)"])
@pytest.mark.parametrize("end", ["finished()", "interrupted(2)"])
def test_a_run_that_has_ended_has_ended(end: str, then: str, run: Runs) -> None:
    """However its process goes: a framework may crash, or hang, while it is put away."""
    r = run(f"planned(); {end}; {then}", "planned(); failed('begun again', 2)", care=QUIET)
    last = Finished if end == "finished()" else Interrupted
    assert isinstance(list(r.listen())[1], last)
    assert len(r.heard) == 1 and gone(r.heard[0]["pid"])


@pytest.mark.parametrize("how", ["sys.exit(0)", "os._exit(0)", ""])
def test_one_that_ends_without_an_end_has_not_ended_its_run(how: str, run: Runs) -> None:
    r = run(f"planned(); stepped(1); {how}", ENDS)
    assert r.ends_well() == ["planned", "stepped", "noted", "planned", "finished"]


# --- what it says is not what was agreed


@pytest.mark.parametrize(
    "line",
    [
        b"Loading checkpoint shards: 100%", b'{"event": "step', b"\xff\xfe\x00\n\x80", b"\n\n", b"5", b"[]",
        b"null", b'"beat"', b"NaN", b'{"event": "unheard of"}', b'{"event": "saved"}', b'{"event": null}',
        b'{"event": ["saved"]}', b'{"a": 1}',
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_passed_over(line: bytes, run: Runs) -> None:
    r = run(f"planned(); sys.stdout.buffer.write({line!r} + b'\\n'); sys.stdout.flush(); finished()")
    assert r.ends_well() == ["planned", "finished"]


def test_half_a_line_at_the_end_is_a_death_like_any(run: Runs) -> None:
    r = run('planned(); sys.stdout.write(\'{"event": "saved", "st\'); sys.stdout.flush(); die()', ENDS)
    assert r.ends_well() == ["planned", "noted", "planned", "finished"]


def test_much_is_said_and_nothing_waits_for_anything(run: Runs) -> None:
    """More than any pipe holds, on both at once, without an end of line."""
    r = run(
        "planned(); sys.stderr.write('e' * 3_000_000); say('noted', message='n' * 3_000_000); "
        "sys.stderr.buffer.write(b'\\xff\\n' * 50_000); stepped(1); sys.stderr.flush(); die()",
        ENDS,
    )
    kinds = r.ends_well()
    assert kinds == ["planned", "noted", "stepped", "noted", "planned", "finished"]
    assert len(r.notes[0]) == 3_000_000 and len(r.notes[1]) < 1000


def test_events_said_at_once_all_come_in_order(run: Runs) -> None:
    r = run("planned()\nfor i in range(1, 5001): stepped(i)\nfinished()")
    assert r.ends_well() == ["planned", *["stepped"] * 5000, "finished"]
    assert [e.step for e in r.events if isinstance(e, Stepped)] == list(range(1, 5001))


# --- pipes


def test_one_that_closes_its_mouth_and_lives_is_silent(run: Runs) -> None:
    r = run("planned(); open(out + '.pid', 'w').write(str(os.getpid())); os.close(1); time.sleep(20); "
            "open(out + '.lived', 'w')", care=f"{QUIET}, restarts: 0")  # fmt: skip
    error = r.ends_badly()
    assert not Path(f"{r.out}.lived").exists(), "it was waited for"
    assert "no answer" in error.message


GRANDCHILD = """
code = "import sys, time; time.sleep(20); open(sys.argv[1], 'w')"
subprocess.Popen([sys.executable, "-S", "-c", code, out + ".ended"], stdin=subprocess.DEVNULL,
                 stdout={stdout}, stderr={stderr})
"""


@pytest.mark.parametrize(
    "held",
    [{"stdout": "subprocess.DEVNULL", "stderr": "None"}, {"stdout": "None", "stderr": "subprocess.DEVNULL"}],
)
def test_a_grandchild_that_holds_a_pipe_is_not_waited_for(held: dict[str, str], run: Runs) -> None:
    """A tracker's own process, a compiler's: they live on for a while, and have our stderr."""
    r = run(f"planned()\nif n == 1:\n{indented(GRANDCHILD.format(**held))}\n  die()\nfinished()")
    assert r.ends_well() == ["planned", "noted", "planned", "finished"]
    assert not Path(f"{r.out}.ended").exists(), "it was waited for"


def indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines())


def test_one_that_never_reads_its_orders_may_die_all_the_same(tmp_path: Path) -> None:
    """The orders are more than the pipe holds."""
    orders = Orders(parse(json.dumps({"ask": ["x" * 1000] * 300})), tmp_path, False, False)
    command = [sys.executable, "-S", "-c", "import os; os._exit(9)"]
    with pytest.raises(UserError, match="code 9"):
        list(supervise.supervise(orders, lambda: False, command, (0.0,)))


# --- who leaves early


def test_who_leaves_early_leaves_no_process(run: Runs) -> None:
    r = run("planned(); stepped(1); sys.stdin.read()")
    events = r.listen()
    assert isinstance(next(events), Planned) and isinstance(next(events), Stepped)
    events.close()  # type: ignore[attr-defined]
    assert gone(r.heard[0]["pid"])


def test_a_screen_that_is_gone_does_not_cost_the_steps_since_the_last_checkpoint(run: Runs) -> None:
    """The terminal was closed, and the parent's own print has failed: the child is to stop, and saves."""
    save = "for line in sys.stdin: pass\ntime.sleep(.3); open(out + '.saved', 'w')"
    r = run(f"planned(); stepped(1)\n{save}")
    with pytest.raises(OSError, match="gone"):
        for event in r.listen():
            if isinstance(event, Stepped):
                raise OSError("the screen is gone")
    assert Path(f"{r.out}.saved").exists()
    assert gone(r.heard[0]["pid"])


TERMINAL = """
import sys
from pathlib import Path
from burnish.recipe import parse
from burnish.training.interrupt import interruptible
from burnish.training.orders import Orders
from burnish.training.supervise import supervise
with interruptible() as stop:
    orders = Orders(parse(""), Path({out!r}), False, False)
    command = [sys.executable, "-S", "-c", {script!r}]
    for event in supervise(orders, stop, command, insisted=stop.insisted):
        print(type(event).__name__, flush=True)
print("over", flush=True)
"""


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A parent of its own, whose process does what `body` says, and that hears signals."""
    begun: list[subprocess.Popen[str]] = []

    def begin(body: str) -> subprocess.Popen[str]:
        script = f"{PRELUDE}\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{body}"
        code = TERMINAL.format(out=str(tmp_path / "out"), script=script)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        pipe = subprocess.PIPE
        begun.append(
            subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True, env=env,
                             start_new_session=True)
        )  # fmt: skip
        return begun[-1]

    yield begin
    for process_ in begun:
        process_.kill()
        process_.communicate()


def child_of(tmp_path: Path) -> int:
    return json.loads((tmp_path / "out.heard").read_text().splitlines()[-1])["pid"]


def said(parent: subprocess.Popen[str], word: str) -> None:
    """Wait until it has said so."""
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"never said {word}")


DEAF = (
    "planned(); stepped(1)\nwhile True:\n  tell({'beat': 1}); sys.stdin.readline(); saved(1); time.sleep(.2)"
)


def test_a_second_interrupt_leaves_no_process(
    terminal: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """The first one is handed on as a wish; a child that does not heed it is ended by the second."""
    parent = terminal(DEAF)
    said(parent, "Stepped")
    os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    said(parent, "Saved")  # it has heard of it, and goes on
    assert parent.poll() is None and not gone(child_of(tmp_path))
    os.killpg(parent.pid, signal.SIGINT)
    _, err = parent.communicate(timeout=60)
    assert parent.returncode not in (0, None) and "KeyboardInterrupt" in err
    assert gone(child_of(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_any_signal_to_the_parent_is_a_wish(
    number: signal.Signals, terminal: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    parent = terminal(f"planned(); {STOPS}")
    said(parent, "Stepped")
    parent.send_signal(number)
    out, err = parent.communicate(timeout=60)
    assert out.split() == ["Saved", "Interrupted", "over"], err
    assert gone(child_of(tmp_path))


def test_a_terminal_that_hangs_up_twice_is_one_wish(
    terminal: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    """When its window is closed, the shell passes it on to its jobs, and the system tells them as well."""
    parent = terminal(
        "planned(); stepped(1)\nfor line in sys.stdin:\n  if line == 'stop\\n': break\n"
        "stepped(2); time.sleep(1); open(out + '.saved', 'w'); saved(2); interrupted(2)"
    )
    said(parent, "Stepped")
    parent.send_signal(signal.SIGHUP)
    said(parent, "Stepped")  # it has heard of it, and saves
    parent.send_signal(signal.SIGHUP)
    out, err = parent.communicate(timeout=60)
    assert out.split() == ["Saved", "Interrupted", "over"], err
    assert (tmp_path / "out.saved").exists() and gone(child_of(tmp_path))


def test_a_parent_that_is_killed_is_noticed_by_its_child(
    terminal: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    parent = terminal("planned(); stepped(1); sys.stdin.read(); open(out + '.noticed', 'w')")
    said(parent, "Stepped")
    parent.kill()
    parent.wait()
    noticed, end = tmp_path / "out.noticed", time.monotonic() + 60
    while not noticed.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert noticed.exists()


def test_a_process_that_cannot_be_started_is_a_sentence(tmp_path: Path) -> None:
    orders = Orders(parse(""), tmp_path, False, False)
    with pytest.raises((UserError, OSError)):
        list(supervise.supervise(orders, lambda: False, [str(tmp_path / "nothing")]))


def test_events_are_what_they_were(run: Runs) -> None:
    """Saved is Saved with its fields, though it went through a pipe."""
    r = run("planned(); saved(7); say('skipped', step=1, error='e', rows=['a:1', 'b:2']); finished()")
    r.ends_well()
    assert r.events[1] == Saved(7, str(r.out))
    assert r.events[2].rows == ("a:1", "b:2")  # type: ignore[union-attr]


# --- nobody else, from the first end of a process on


def test_between_two_processes_the_run_is_nobody_elses(run: Runs) -> None:
    """Somebody who begins there would wipe its records; `burnish stop` would find nothing that trains."""
    takes_its_time = "os.fstat(orders['lock']); planned(); stepped(1); finished()"
    r = run(DIES, takes_its_time)
    seen = [(type(e).__name__, free(r.out)) for e in r.listen()]
    assert seen == [("Planned", True), ("Noted", False), ("Planned", False), ("Stepped", False),
                    ("Finished", False)]  # fmt: skip
    assert free(r.out), "it is let go of at the end"
    assert [o["lock"] is None for o in r.heard] == [True, False]


def test_the_lock_that_is_handed_on_is_the_runs(tmp_path: Path) -> None:
    """The process that follows takes it up, and holds it when its parent is gone."""
    recipe = Recipe(name="r")
    RunFolder.begin(tmp_path, recipe).close()
    lock = locked(tmp_path)
    with RunFolder.resume(tmp_path, recipe, by_itself=True, lock=adopted(os.dup(lock.fileno()))):
        lock.close()
        assert not free(tmp_path)
    assert free(tmp_path)


def test_a_stop_between_two_processes_is_in_the_records(run: Runs) -> None:
    wishes = iter([False] * 4)
    r = run(DIES, back_off=(60.0,), stop=lambda: next(wishes, True))
    assert r.ends_well()[-1] == "interrupted"
    last = (r.out / "events.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "interrupted"


def test_what_libraries_print_is_in_the_runs_log(run: Runs) -> None:
    """And in that of no other run: where the folder is not ours nothing is written."""
    r = run(
        "sys.stderr.write('early\\n'); sys.stderr.flush(); planned(); time.sleep(.3)\n"
        "sys.stderr.write('see https://tracker\\n'); sys.stderr.flush(); time.sleep(.3); finished()"
    )
    r.out.mkdir()
    assert r.ends_well() == ["planned", "finished"]
    assert (r.out / "log.txt").read_text() == "early\nsee https://tracker\n"
    (r.out / "log.txt").unlink()
    refused = run("sys.stderr.write('not mine\\n'); failed('is in use by process 1', 2)")
    refused.ends_badly()
    assert not (r.out / "log.txt").exists()
