"""`burnish selftest`: what it prints, what it refuses, and its exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import typer

from burnish.cli import selftest as command
from burnish.cli.selftest import selftest_command
from burnish.errors import EXIT_FAILED, UserError
from burnish.training.selftest.report import Line, Report, facts
from tests.tiny import MACHINE

GOOD = Line("packing", "torch on mps", "packed against unpacked", "passed", 1e-6, 1e-4)
BAD = Line("packing", "torch on mps", "packed against unpacked", "failed", 0.3, 1e-4)


def saying(*lines: Line) -> Callable[..., Report]:
    def selftest(backend: str, device: str, quick: bool, say: Callable[[str], None]) -> Report:
        report = Report(facts(MACHINE), "torch on cpu, float32", lines, 1.0, quick)
        for text in report.text.split("\n"):
            say(text)
        return report

    return selftest


def test_a_report_that_is_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "selftest", saying(GOOD))
    selftest_command("auto", "auto", quick=True, json=False)
    said = capsys.readouterr().out
    assert "✓ torch on mps: packed against unpacked: 1e-06 (limit 0.0001)" in said
    assert "all 1 checks passed" in said and "selftest, quick" in said


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("lines", [(GOOD, BAD), ()])
def test_a_report_that_is_not_exits_1(
    lines: tuple[Line, ...],
    as_json: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "selftest", saying(*lines))
    with pytest.raises(typer.Exit) as end:
        selftest_command("auto", "auto", quick=False, json=as_json)
    assert end.value.exit_code == EXIT_FAILED
    assert ("train.pack=false" if lines else "nothing was checked") in capsys.readouterr().out


def test_json_is_the_whole_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "selftest", saying(GOOD))
    selftest_command("auto", "auto", quick=False, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["right"] is True and told["closing"].startswith("all 1 checks passed")
    assert told["machine"]["chip"] == "CPU" and told["against"] == "torch on cpu, float32"
    (line,) = told["lines"]
    assert (line["check"], line["number"], line["limit"], line["status"]) == ("packing", 1e-6, 1e-4, "passed")


@pytest.mark.parametrize(
    ("backend", "device", "words"),
    [
        ("jax", "auto", "--backend: expected auto, torch, mlx, got jax"),
        ("auto", "tpu", "--device: expected auto, cpu, cuda, mps, metal, got tpu"),
    ],
)
def test_what_there_is_not_is_refused(backend: str, device: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        selftest_command(backend, device, quick=True, json=False)


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
def test_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    selftest_command("mlx", "cpu", quick=True, json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["right"] is True and told["quick"] is True
    assert {line["where"] for line in told["lines"]} == {"mlx on cpu"}
