"""`burnish report`: page, terminal and --json tell the same; what stands in the way is one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.cli.report import report_command
from burnish.errors import UserError
from burnish.report.run_facts import run_facts
from tests.report.test_data_page import Reader
from tests.report.test_run_facts import PLANNED, folder_of, steps
from tests.world import World

FAILED = {"event": "failed", "step": 5, "error": "E: reset", "what": "the GPU was reset", "try_": "reboot"}


def test_a_real_run(world: World, capsys: pytest.CaptureFixture[str]):
    world.recipe(ask=["why?"])
    assert world.train().code == 0
    (world.out / "report.html").unlink()  # the run's own, written at its end
    before = world.tree()
    report_command(str(world.out), None, False)
    said, told = capsys.readouterr().out, run_facts(world.out)
    assert said.startswith(f"{told['name']}: {told['verdict']}\n")
    for step in told["next"]:
        assert step["command"] in said
    assert said.endswith(f"page: {world.out / 'report.html'}\n")
    page = Reader((world.out / "report.html").read_text(encoding="utf-8"))
    assert told["verdict"] in page.text and "why?" in page.text
    after = world.tree()
    assert {k: v for k, v in after.items() if k != "out/report.html"} == before, "nothing else was touched"
    report_command(str(world.out), None, False)  # its own page may be replaced


def test_json_is_the_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = folder_of(tmp_path / "r", PLANNED, *steps(1, 12))
    report_command(str(run), tmp_path / "page.html", True)
    told = json.loads(capsys.readouterr().out)
    assert told.pop("page") == str(tmp_path / "page.html") and (tmp_path / "page.html").is_file()
    assert told == json.loads(json.dumps(run_facts(run)))
    assert not (run / "report.html").exists()


def test_a_failure_has_its_post_mortem(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = folder_of(tmp_path / "r", PLANNED, *steps(1, 5), FAILED, checkpoints=(4,))
    report_command(str(run), None, False)
    said = capsys.readouterr().out
    for part in ("the GPU was reset", "E: reset", "reboot", "Go on from step 4", f"burnish resume {run}"):
        assert part in said


def test_a_terminal_is_not_commanded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    evil = {**FAILED, "what": "\x1b[2J [bold]half \ud800", "try_": "\x07ring"}
    report_command(str(folder_of(tmp_path / "r", PLANNED, evil)), None, False)
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "[bold]half" in said


def test_what_stands_in_the_way_is_one_sentence(tmp_path: Path):
    run = folder_of(tmp_path / "r", PLANNED)
    (tmp_path / "file").touch()
    (run / "report.html").write_text("my notes")
    for place, out, words in (
        ("none", None, "is not there"),
        ("file", None, "is a file"),
        ("", None, "holds no run"),
        ("r", None, "is there already and is no page of `burnish report`"),
        ("r", tmp_path, "is a folder"),
        ("r", tmp_path / "no" / "page.html", "there is no folder"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            report_command(str(tmp_path / place), out, False)
        assert caught.value.hint
    assert (run / "report.html").read_text() == "my notes"


def test_a_disk_that_is_full_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = folder_of(tmp_path / "r", PLANNED)
    before = sorted(run.iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        report_command(str(run), None, False)
    assert "--out" in caught.value.hint and caught.value.exit_code == 1
    assert sorted(run.iterdir()) == before
