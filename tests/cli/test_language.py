"""`--lang`, `burnish explain`, and what stands under an error, in the person's language."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.cli.failures import exit_code_of, language_asked
from burnish.errors import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OUT_OF_MEMORY, OutOfMemory, UserError
from tests.world import World, run

CUDA = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    ("arguments", "language", "left"),
    [
        (["plan", "demo"], "en", ["plan", "demo"]),
        (["plan", "demo", "--lang", "zh"], "zh", ["plan", "demo"]),
        (["--lang=zh", "plan", "demo"], "zh", ["plan", "demo"]),
        (["plan", "--lang", "en", "demo"], "en", ["plan", "demo"]),
        (["generate", "runs/a", "--", "--lang"], "en", ["generate", "runs/a", "--", "--lang"]),
    ],
)
def test_lang_may_stand_anywhere(arguments: list[str], language: str, left: list[str]) -> None:
    assert language_asked(arguments, "en") == (language, left)


@pytest.mark.parametrize("arguments", [["plan", "--lang"], ["--lang=de"], ["--lang", "fr", "plan"]])
def test_another_language_is_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError, match="expected en or zh"):
        language_asked(arguments, "en")


def test_an_error_is_followed_by_what_is_known_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(OutOfMemory(CUDA), "en") == EXIT_OUT_OF_MEMORY
    said = capsys.readouterr().err
    assert said.startswith("burnish: memory ran out: ") and "why: The NVIDIA GPU's memory is full" in said
    assert "try: compute one row at a time: train.micro_batch=1" in said
    exit_code_of(OutOfMemory(CUDA), "zh")
    assert "原因: NVIDIA 显存已满" in capsys.readouterr().err


def test_an_unknown_error_keeps_its_own_text(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise KeyError("a defect of ours")
    except KeyError as e:
        assert exit_code_of(e, "en") == EXIT_FAILED
    said = capsys.readouterr().err
    assert "Traceback" in said and "KeyError: 'a defect of ours'" in said and "why:" not in said


def test_the_log_is_asked_where_the_words_are_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("the training process was ended by SIGABRT", "", EXIT_FAILED, ["x", CUDA, "y"])
    exit_code_of(error, "en")
    assert "why: The NVIDIA GPU's memory is full" in capsys.readouterr().err


def test_a_hint_is_not_said_twice(capsys: pytest.CaptureFixture[str]) -> None:
    error = UserError("runs/x holds a run already", "add --resume to go on with it", EXIT_BAD_INPUT)
    exit_code_of(error, "en")
    assert capsys.readouterr().err.count("\n") == 2
    exit_code_of(error, "zh")
    assert "原因" in capsys.readouterr().err


def test_explain(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = world.write("log.txt", f"step 3\n{CUDA}\n")
    said = world.burnish("explain", str(log))
    assert said.code == 0 and said.out.startswith("cuda-out-of-memory\n") and "source: " in said.out
    told = json.loads(world.burnish("explain", "--json", "--lang", "zh", stdin=CUDA).out)
    assert told["id"] == "cuda-out-of-memory" and "显存" in told["cause"]
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.delenv("LC_MESSAGES", raising=False)
    assert "原因" in world.burnish("explain", "log.txt").out
    assert world.burnish("explain", "log.txt", "--lang", "en").out.count("why") == 1
    nothing = world.burnish("explain", stdin="all is well")
    assert nothing.code == EXIT_FAILED and "its own words say more" in nothing.err
    missing = world.burnish("explain", "no such file")
    assert missing.code == EXIT_BAD_INPUT and "cannot be read" in missing.err
    assert run(tmp_path, ["--lang", "de", "recipes"]).code == EXIT_BAD_INPUT
