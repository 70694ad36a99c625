"""failure.json: what of an error stands in it, and that writing it never makes anything worse."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import EXIT_FAILED, NonFinite, OutOfMemory, UserError
from burnish.recipe import Recipe
from burnish.runs.events import Event, Failed, Noted, Planned, Stepped, from_json
from burnish.runs.failure import LOG_LINES, failure_of, record_failure
from burnish.runs.folder import RunFolder
from burnish.training.post_mortem import with_post_mortem

FAILED = Failed(3, "what", "error", ("try this", "then that"), "some-id")
TRACE = "Traceback (most recent call last):\n x\nRuntimeError: CUDA out of memory. Tried to allocate 2 GiB"


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "failure.json").read_text("utf-8"))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text("utf-8").split("\n")[:-1]]


# --- what is said


def test_an_error_for_people_keeps_its_words() -> None:
    found = failure_of(UserError("the disk is full", "free some space", EXIT_FAILED), 7)
    assert found == Failed(7, "the disk is full", "the disk is full", ("free some space",), "")


def test_one_that_the_catalogue_knows_has_its_cause_and_its_remedies() -> None:
    found = failure_of(UserError(TRACE), 7)
    assert found.diagnosis == "cuda-out-of-memory" and found.error == TRACE
    assert found.what not in TRACE and found.try_


def test_its_own_hint_comes_first() -> None:
    alone, hinted = failure_of(UserError(TRACE), 7), failure_of(UserError(TRACE, "do this"), 7)
    assert hinted.try_ == ("do this", *alone.try_)


def test_the_log_is_asked_where_the_error_says_nothing() -> None:
    log = ["so far", "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", "more"]
    assert failure_of(UserError("ended with code 1 and no word"), 7, log).diagnosis == "cuda-out-of-memory"
    assert failure_of(UserError("ended with code 1 and no word"), 7).diagnosis == ""
    assert failure_of(UserError("x"), 7, ["nothing", "known"]).diagnosis == ""


@pytest.mark.parametrize("message", ["", "\n", "\n\nlate"])
def test_an_error_without_words(message: str) -> None:
    assert failure_of(UserError(message), 0).step == 0


# --- where it stands


def test_it_stands_in_its_file_and_ends_the_records(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"event": "stepped"}\n')
    record_failure(tmp_path, FAILED, [f"line {i}" for i in range(500)])
    told = written(tmp_path)
    assert told["try"] == ["try this", "then that"] and (told["step"], told["what"]) == (3, "what")
    assert told["log"] == [f"line {i}" for i in range(500 - LOG_LINES, 500)] and told["at"].startswith("2")
    assert from_json(lines(tmp_path)[-1]) == FAILED and len(lines(tmp_path)) == 2


@pytest.mark.parametrize("cut", [b'{"event": "step', b"x", '{"a": "ä'.encode()[:-1]])
def test_half_a_line_before_it_does_not_swallow_it(cut: bytes, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"event": "planned"}\n' + cut)
    record_failure(tmp_path, FAILED)
    *_, half, last = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert from_json(json.loads(last)) == FAILED and half == cut


@pytest.mark.parametrize("before", [None, b""])
def test_it_may_be_the_first_line(before: bytes | None, tmp_path: Path) -> None:
    if before is not None:
        (tmp_path / "events.jsonl").write_bytes(before)
    record_failure(tmp_path, FAILED)
    assert lines(tmp_path) == [json.loads(json.dumps({"event": "failed", **_fields()}))]


def _fields() -> dict[str, Any]:
    return {
        "step": 3,
        "what": "what",
        "error": "error",
        "try_": ["try this", "then that"],
        "diagnosis": "some-id",
    }


def test_another_failure_replaces_it(tmp_path: Path) -> None:
    record_failure(tmp_path, FAILED)
    record_failure(tmp_path, Failed(9, "other", "other", (), ""))
    assert written(tmp_path)["step"] == 9
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("text", ["Grüße 🙂", "\ud800", "\x00\x1b[31m", "a\u2028b", '"\\', "x" * 200_000])
def test_whatever_a_library_says_can_be_written(text: str, tmp_path: Path) -> None:
    record_failure(tmp_path, failure_of(UserError(f"{text}\n{text}", text), 1, [text]), [text])
    assert lines(tmp_path)[-1]["event"] == "failed" and written(tmp_path)["step"] == 1


def test_a_folder_that_is_gone_hides_no_error(tmp_path: Path) -> None:
    record_failure(tmp_path / "gone", FAILED)
    assert not (tmp_path / "gone").exists()


def test_nor_does_a_disk_without_room(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    record_failure(tmp_path, FAILED)
    assert written(tmp_path)["what"] == "what", "one of the two may have room"


# --- a run's events with its end


PLANNED = Planned("out", {}, 1, 0, 1, 1, 0, 0, 4)


def stepped(step: int) -> Stepped:
    return Stepped(step, 9, 0.1, 1.0, 0.1, 1.0, 1, 1.0, 0.1, 1, 1)


def events(*told: Event, error: BaseException | None = None) -> Iterator[Event]:
    yield from told
    if error is not None:
        raise error


def after(out: Path, told: Sequence[Event], error: BaseException) -> list[Event]:
    """What is heard until the error, which comes out as it was."""
    heard: list[Event] = []
    with pytest.raises(type(error)) as e:
        for event in with_post_mortem(events(*told, error=error), out):
            heard.append(event)
    assert e.value is error
    return heard


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (UserError("the disk is full", "free some"), "the disk is full"),
        (OutOfMemory("2 GiB\nmore"), "memory ran out: 2 GiB"),
        (NonFinite("loss nan; step 5, twice, of the rows a:1"), "a:1"),
        (KeyError("a defect of ours"), "KeyError"),
    ],
)
def test_what_ends_a_run_that_has_begun_is_written(error: Exception, what: str, tmp_path: Path) -> None:
    told = [PLANNED, stepped(5), Noted("x")]
    *heard, last = after(tmp_path, told, error)
    assert heard == told and isinstance(last, Failed) and what in last.error and last.step == 5
    found = written(tmp_path)
    assert what in found["error"] and found["step"] == 5
    assert "Traceback" not in found["what"]


def test_the_step_is_the_one_gone_on_from_where_none_was_done(tmp_path: Path) -> None:
    after(tmp_path, [PLANNED], UserError("x"))
    assert written(tmp_path)["step"] == 4


def test_the_log_of_the_process_comes_with_it(tmp_path: Path) -> None:
    after(tmp_path, [PLANNED], UserError("x", log=["a", "b"]))
    assert written(tmp_path)["log"] == ["a", "b"]


def test_input_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    after(tmp_path, [], UserError("no such file"))
    assert list(tmp_path.iterdir()) == []


def test_a_second_interrupt_is_no_failure(tmp_path: Path) -> None:
    after(tmp_path, [PLANNED], KeyboardInterrupt())
    assert list(tmp_path.iterdir()) == []


def test_what_ends_well_leaves_nothing(tmp_path: Path) -> None:
    assert list(with_post_mortem(events(PLANNED, stepped(5)), tmp_path)) == [PLANNED, stepped(5)]
    assert list(tmp_path.iterdir()) == []


def test_who_leaves_early_closes_what_is_within(tmp_path: Path) -> None:
    closed = []

    def within() -> Iterator[Event]:
        try:
            yield PLANNED
            yield stepped(5)
        finally:
            closed.append(1)

    heard = with_post_mortem(within(), tmp_path)
    next(heard)
    del heard
    assert closed and list(tmp_path.iterdir()) == []


def test_the_run_of_another_process_is_let_be(tmp_path: Path) -> None:
    """It was taken over while this one's had died."""
    with RunFolder.begin(tmp_path, Recipe()):
        before = {p: p.read_bytes() for p in tmp_path.iterdir()}
        after(tmp_path, [PLANNED], UserError("in use by process 7"))
        assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_a_run_of_this_very_process_that_has_let_go_is_ours(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number still stands in the lock, and it lives: that is this process."""
    RunFolder.begin(tmp_path, Recipe()).close()
    monkeypatch.setattr(sys, "platform", system)
    after(tmp_path, [PLANNED], UserError("the disk is full"))
    assert written(tmp_path)["what"] == "the disk is full"
