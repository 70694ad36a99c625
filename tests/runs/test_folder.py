"""The run folder: one owner, checkpoints that are whole, records that are one unbroken run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from burnish.data.batches import Cursor
from burnish.errors import UserError
from burnish.recipe import Recipe, load
from burnish.runs.events import Answered, Noted, Stepped, Validated
from burnish.runs.folder import RunFolder, State

RECIPE = Recipe(name="r")


def stepped(step: int, loss: float = 1.5) -> Stepped:
    return Stepped(step, 9, 0.5, loss, 0.1, 2.0, 30, 20.0, 0.25, 100, 200)


def validated(step: int) -> Validated:
    return Validated(step, 1.25, 0.5, 20.0, True)


def files(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "weights").write_text(text)


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_begin_writes_the_recipe_and_takes_the_folder(tmp_path: Path):
    with RunFolder.begin(tmp_path / "deep" / "run", RECIPE) as run:
        assert load(str(run.path / "recipe.yaml")) == RECIPE
        with pytest.raises(UserError, match="in use by process"):
            RunFolder.resume(run.path, RECIPE)
        with pytest.raises(UserError, match="in use by process"):
            RunFolder.begin(run.path, RECIPE)
    RunFolder.resume(run.path, RECIPE).close()


def test_begin_does_not_touch_a_run_that_has_saved(tmp_path: Path):
    with RunFolder.begin(tmp_path, RECIPE) as run:
        run.record(stepped(1))
        run.save_checkpoint(State(1), files("a"), 2)
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.begin(tmp_path, Recipe(name="other"))
    assert load(str(tmp_path / "recipe.yaml")) == RECIPE
    assert steps_of(tmp_path / "metrics.jsonl") == [1]


def test_begin_starts_anew_where_nothing_was_saved(tmp_path: Path):
    with RunFolder.begin(tmp_path, RECIPE) as run:
        run.record(stepped(1))
        run.publish("best", files("a"))
    (tmp_path / "checkpoints" / ".tmp-000001").mkdir(parents=True)
    with RunFolder.begin(tmp_path, Recipe(name="other")) as run:
        run.record(stepped(1, loss=9.0))
        assert not (tmp_path / "best").exists()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["loss"] == 9.0
    assert load(str(tmp_path / "recipe.yaml")).name == "other"


def test_begin_leaves_a_persons_own_files(tmp_path: Path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "photo").write_text("mine")
    RunFolder.begin(tmp_path, RECIPE).close()
    assert (tmp_path / "best" / "photo").read_text() == "mine"


def test_resume_of_another_recipe_names_each_difference_and_lets_go(tmp_path: Path):
    RunFolder.begin(tmp_path, RECIPE).close()
    other = Recipe.model_validate({"name": "s", "train": {"lr": 0.5}})
    with pytest.raises(UserError, match=r"name: 'r' → 's'\n  train.lr: 0\.0002 → 0\.5"):
        RunFolder.resume(tmp_path, other)
    RunFolder.resume(tmp_path, RECIPE).close()  # the refusal kept no lock


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    state = State(12, Cursor(3, 7), 0.1 + 0.2, 8, 2, data="abc")
    with RunFolder.begin(tmp_path, RECIPE) as run:
        folder = run.save_checkpoint(state, files("a"), 2)
        assert folder == tmp_path / "checkpoints" / "000012"
        assert run.newest_checkpoint() == (folder, state, [])


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path):
    with RunFolder.begin(tmp_path, RECIPE) as run:
        assert run.newest_checkpoint() is None
        for step in (2, 4, 6):
            run.save_checkpoint(State(step), files(str(step)), 3)
        (tmp_path / "checkpoints" / "000006" / "weights").write_text("7")
        found = run.newest_checkpoint()
        assert found is not None
        folder, state, notes = found
        assert (folder.name, state.step) == ("000004", 4)
        assert notes == [
            "checkpoint 000006 is damaged (weights does not match its checksum) and was passed over"
        ]


@pytest.mark.parametrize("keep", [1, 2, 9])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int):
    with RunFolder.begin(tmp_path, RECIPE) as run:
        for step in range(1, 5):
            run.save_checkpoint(State(step), files("a"), keep)
    left = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert left == [1, 2, 3, 4][-keep:]


def test_records(tmp_path: Path):
    with RunFolder.begin(tmp_path, RECIPE) as run:
        run.record(Noted("二\u2028—"))
        run.record(stepped(1))
        run.record(validated(1))
        # Whoever looks on reads them at once.
        assert len((tmp_path / "events.jsonl").read_bytes().splitlines()) == 3
    assert [json.loads(x)["event"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        "stepped", "validated",
    ]  # fmt: skip


def test_records_are_taken_back_to_a_step(tmp_path: Path):
    answer = Answered("before", "q", "a line\u2028another\x85and\x1cmore", "stop", "", "")
    with RunFolder.begin(tmp_path, RECIPE) as run:
        run.record(answer)
        for step in (1, 2, 3, 4):
            run.record(stepped(step))
        run.record(validated(4))
        run.take_back(3)
        assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3]
        run.record(stepped(4))  # the files are open again, at their end
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    lines = (tmp_path / "events.jsonl").read_bytes().split(b"\n")[:-1]
    first = json.loads(lines[0])
    assert first["answer"] == answer.answer, "what stands in an answer ends no line"
    assert len(lines) == 5


@pytest.mark.parametrize(
    "rest", [b'{"event": "stepped", "st', '{"event": "noted", "message": "一'.encode()[:-1]]
)
def test_half_a_line_of_a_killed_process_is_taken_back(tmp_path: Path, rest: bytes):
    with RunFolder.begin(tmp_path, RECIPE) as run:
        run.record(stepped(1))
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(rest)
    with RunFolder.resume(tmp_path, RECIPE) as run:
        run.take_back(1)
        run.record(stepped(2))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2]


def test_leftovers_are_cleaned_when_a_run_goes_on(tmp_path: Path):
    RunFolder.begin(tmp_path, RECIPE).close()
    for name in (".tmp-adapter", ".tmp-old-best", "checkpoints/.tmp-000004"):
        (tmp_path / name).mkdir(parents=True)
    RunFolder.resume(tmp_path, RECIPE).close()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_publish_replaces_and_json_is_read_back(tmp_path: Path):
    with RunFolder.begin(tmp_path, RECIPE) as run:
        run.publish("best", files("a"))
        assert (run.publish("best", files("b")) / "weights").read_text() == "b"
        assert run.read_json("plan.json") is None
        run.write_json("plan.json", {"a": "一"})
        assert run.read_json("plan.json") == {"a": "一"}


def test_a_recipe_that_no_run_wrote_is_not_overwritten(tmp_path: Path):
    """`burnish train recipe.yaml --out .`"""
    mine = "# my comments\nname: mine\n"
    (tmp_path / "recipe.yaml").write_text(mine)
    with pytest.raises(UserError, match="no run has written"):
        RunFolder.begin(tmp_path, RECIPE)
    assert (tmp_path / "recipe.yaml").read_text() == mine
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
