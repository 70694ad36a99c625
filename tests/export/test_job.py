"""A whole export: each family by each road, what stands beside it, and what is left where one goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.errors import EXIT_FAILED, UserError
from burnish.export import job, live
from burnish.export.job import Exported, Request, export
from burnish.export.questions import ask_about
from burnish.export.source import open_source
from burnish.models import folder as folders
from tests.export.world import PROGRAMS, ROADS, Tuned, needs, roads, trained

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},  # biases
    "llama tied": {"family": "llama", "tied": True},
    "mistral": {"family": "mistral", "tied": False, "sizes": {"seed": 1}},
    "qwen3": {"family": "qwen3"},  # heads wider than hidden / heads, norms on them
    "llama bfloat16": {"family": "llama", "tied": False, "stored": "bfloat16"},
}
HERE = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Untied, grouped heads."""
    return Tuned(trained(tmp_path_factory.mktemp("llama"), "llama", tied=False))


@pytest.fixture(scope="module", params=list(FAMILIES))
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(trained(tmp_path_factory.mktemp("family"), **FAMILIES[request.param]))


@pytest.fixture(scope="module")
def asked(llama: Tuned, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Answers of the trained model, by a child."""
    questions = ask_about(llama.source)
    return live.ask_live(llama.source, questions, tmp_path_factory.mktemp("asked"))


def check_written(done: Exported, out: Path, to: str) -> None:
    """What the caller is told, what is in the folder and what the proof says are one."""
    proof = done.proof
    assert proof is not None and proof.passed and done.out == out
    assert proof.program.startswith(PROGRAMS[to] + " ") and proof.live.startswith("burnish ")
    assert proof.dtype == "float32"  # as the trained model, so that no arithmetic of 16 bits is between them
    assert proof.origin == "validation rows and training rows"
    assert proof.targets > 200 and proof.greedy_prompts == 8
    assert proof.effect > 0.1 and proof.survival is not None and proof.read_alike == 1
    told = json.loads((out / "proof.json").read_text())
    assert told == json.loads(json.dumps(proof.as_json())) and told["passed"] is True
    assert proof.paragraph.endswith("It passed.") and proof.paragraph in (out / "README.md").read_text()
    mark = json.loads((out / "export.json").read_text())
    assert (mark["to"], mark["type"], mark["proven"]) == (done.to, done.type, True)
    sums = {
        p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in out.rglob("*")
        if p.name != "export.json"
    }
    assert mark["sha256"] == sums and done.files.keys() == {*sums, "export.json"}
    assert done.n_bytes == sum(p.stat().st_size for p in out.iterdir())
    assert [p.name for p in out.parent.iterdir()] == [out.name]  # nothing temporary


# --- every road ---


@pytest.mark.parametrize(("to", "type", "alone"), roads(*ROADS))
def test_every_family(to: str, type: str, alone: bool, tuned: Tuned, tmp_path: Path):
    needs(to)
    check_written(tuned.export(tmp_path / "out", to, type, alone), tmp_path / "out", to)


@pytest.mark.parametrize(("to", "type", "alone"), roads(*ROADS))
def test_every_road_by_a_child(
    to: str, type: str, alone: bool, llama: Tuned, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needs(to)
    monkeypatch.setattr(job, "ask_live", lambda *_: asked)  # it is the same each time, and takes seconds
    told: list[str] = []
    done = export(llama.source, Request(to, type, tmp_path / "out", alone), told.append)
    check_written(done, tmp_path / "out", to)
    assert done.seconds.keys() == {"live", "write", "proof"} and len(told) == 3
    assert done.peak_bytes > 1 << 20


def test_a_child_answers_as_this_process_does(llama: Tuned, asked: Any):
    """So what is proven in this process elsewhere says something of children."""
    np.testing.assert_allclose(asked.nll, llama.live.nll, atol=1e-5)
    np.testing.assert_allclose(asked.base, llama.live.base, atol=1e-5)
    assert [a[:12] for a in asked.greedy] == [a[:12] for a in llama.live.greedy]
    assert np.abs(asked.nll - asked.base).mean() > 0.1


def test_without_a_proof_nothing_says_that_there_is_one(llama: Tuned, tmp_path: Path):
    done = llama.export(tmp_path / "out", "hf", "f32", prove=False)
    assert done.proof is None and done.seconds.keys() == {"write"}
    assert not (tmp_path / "out" / "proof.json").exists()
    assert json.loads((tmp_path / "out" / "export.json").read_text())["proven"] is False
    assert "It passed" not in (tmp_path / "out" / "README.md").read_text()


def test_training_rows_where_there_are_none_to_validate_on(tmp_path: Path):
    run = trained(tmp_path / "run", "llama", tied=False, data={"valid": ""})
    (tmp_path / "outs").mkdir()
    done = Tuned(run).export(tmp_path / "outs" / "out", "hf", "f32")
    assert done.proof is not None and done.proof.origin == "training rows"
    assert "of the training rows" in (tmp_path / "outs" / "out" / "README.md").read_text()


# --- what is in the way ---


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_replaced_unasked(llama: Tuned, tmp_path: Path):
    out = tmp_path / "out"
    llama.export(out, "hf", "f32", prove=False)
    before = tree(out)
    with pytest.raises(UserError, match="out exists") as e:
        llama.export(out, "hf", "f32", prove=False)
    assert "--force" in e.value.hint and tree(out) == before
    llama.export(out, "hf", "bf16", prove=False, force=True)
    assert json.loads((out / "export.json").read_text())["type"] == "bf16"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["home", "model", "run", "file"])
def test_force_replaces_nothing_but_an_export(kind: str, llama: Tuned, tmp_path: Path):
    out = tmp_path / "out"
    match kind:
        case "home":
            out.mkdir()
            (out / "letters.txt").write_text("dear")
        case "model":
            shutil.copytree(llama.source.base.folder, out)
        case "run":
            shutil.copytree(llama.folder, out)
        case "file":
            out.write_text("words")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"no export\.json"):
        llama.export(out, "hf", "f32", prove=False, force=True)
    assert tree(tmp_path) == before


def test_what_force_does_not_replace_is_called_what_it_is(llama: Tuned, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letters.txt").write_text("dear")
    with pytest.raises(UserError, match=r"is not an export"):
        llama.export(tmp_path / "out", "hf", "f32", prove=False, force=True)


def test_a_run_inside_the_folder_to_replace(llama: Tuned, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(llama.folder, out / "run")
    (out / "export.json").write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(UserError, match="lies inside"):
        llama.export(out, "hf", "f32", prove=False, force=True, source=open_source(out / "run", None, []))
    assert tree(tmp_path) == before


def test_an_export_that_fails_its_proof_leaves_the_one_before_it(llama: Tuned, tmp_path: Path):
    out = tmp_path / "out"
    llama.export(out, "hf", "f32", prove=False)
    before = tree(out)

    def bare(kind: Any, source: Any, place: Path, type: str) -> None:
        kind.write(source, place, type)
        shutil.copyfile(source.base.folder / "model.safetensors", place / "model.safetensors")

    with pytest.raises(UserError, match="was removed"):
        llama.export(out, "hf", "f32", force=True, write=bare)
    assert tree(out) == before and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("to", "type", "alone"), roads(*ROADS))
def test_the_disk_is_looked_at_before_any_work(
    to: str, type: str, alone: bool, llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needs(to)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage._replace(free=64 << 20))

    def never(*_: Any) -> None:
        raise AssertionError("work was begun")

    with pytest.raises(UserError, match="GiB free") as e:
        llama.export(tmp_path / "out", to, type, alone, write=never)
    assert e.value.exit_code == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("to", "type", "alone"), roads(*(r for r in ROADS if r[1] != "adapter")))
def test_the_disk_that_was_asked_for_is_enough(
    to: str, type: str, alone: bool, llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    needs(to)
    told: list[int] = []
    monkeypatch.setattr(job, "check_disk", lambda _, n, __: told.append(n))
    done = llama.export(tmp_path / "out", to, type, alone, prove=False)
    weights = sum(n for name, n in done.files.items() if name.endswith((".safetensors", ".gguf")))
    spare = folders.SPARE_DISK_BYTES  # and GGUF's own, for what is no tensor
    assert weights - 20_000 <= told[0] - spare < 3 * weights + spare


# --- interrupted ---


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("the disk is full"), SystemExit])
@pytest.mark.parametrize("where", ["write", "card", "rename"])
def test_stopped_half_way_nothing_is_left(
    where: str, error: Any, llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: Any) -> None:
        assert any(tmp_path.glob(".out.partial/*"))
        raise error

    def half(kind: Any, source: Any, place: Path, type: str) -> None:
        (place / "model.safetensors").write_bytes(b"half")
        stop()

    if where == "card":
        monkeypatch.setattr(job, "card", stop)
    if where == "rename":
        monkeypatch.setattr(folders, "_put_in_place", stop)
    with pytest.raises(error if isinstance(error, type) else UserError):
        llama.export(tmp_path / "out", "hf", "f32", prove=False, write=half if where == "write" else None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("half", ["live", "proof"])
def test_stopped_while_asking_nothing_is_left(
    half: str, llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    answers = llama.live

    def stop(*_: Any) -> None:
        assert (tmp_path / ".out.partial").exists() == (half == "proof")
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "ask_program", stop)
    monkeypatch.setattr(job, "ask_live", stop if half == "live" else lambda *_: answers)
    with pytest.raises(KeyboardInterrupt):
        export(llama.source, Request("hf", "f32", tmp_path / "out"), lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_dies_is_a_sentence(llama: Tuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By a child, as a file that llama.cpp asserts on ends it."""
    answers = llama.live
    monkeypatch.setattr(job, "ask_live", lambda *_: answers)

    def unreadable(source: Any, place: Path, type: str) -> list[str]:
        (place / "model.safetensors").write_bytes(b"not a model")
        (place / "config.json").write_text("{}")
        return []

    kind = job.target("hf", False)
    monkeypatch.setattr(job, "target", lambda *_: job.replace(kind, write=unreadable))
    with pytest.raises(UserError, match="transformers cannot load"):
        export(llama.source, Request("hf", "f32", tmp_path / "out"), lambda _: None)
    assert list(tmp_path.iterdir()) == []


KILLS_ITSELF = """
import os, sys
import burnish.cli
import {module} as module
do, calls = module.{name}, []
def counted(*args, **kwargs):
    calls.append(1)
    if len(calls) == {at}:
        os.kill(os.getpid(), {signal})
    return do(*args, **kwargs)
module.{name} = counted
sys.argv = ["burnish", *sys.argv[1:]]
burnish.cli.main()
"""


def killed(llama: Tuned, cwd: Path, number: int, module: str, name: str, at: int, *more: str) -> int:
    """How `burnish export` ends that gets a signal when a function is called the at-th time."""
    code = KILLS_ITSELF.format(module=module, name=name, at=at, signal=number)
    paths = os.pathsep.join([str(HERE / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code, "export", str(llama.folder), "out", "--type", "f32", *more],
        cwd=cwd, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_while_writing(number: int, llama: Tuned, tmp_path: Path):
    code = killed(llama, tmp_path, number, "burnish.export.hf", "_write_tensor", 9, "--no-proof")
    assert code not in (0, 2)
    assert not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    done = llama.export(tmp_path / "out", "hf", "f32", prove=False)  # the next one is not in its way
    assert done.files and not (tmp_path / ".out.partial").exists()


def test_sigterm_leaves_nothing_half_written_beside_it(llama: Tuned, tmp_path: Path):
    """A scheduler's way to stop a job; half of a large model may be on the disk by then."""
    assert killed(llama, tmp_path, signal.SIGTERM, "burnish.export.hf", "_write_tensor", 9, "--no-proof")
    assert list(tmp_path.iterdir()) == []


def test_the_next_export_removes_what_a_killed_one_left(llama: Tuned, tmp_path: Path):
    """The proof's own folder may hold the base as GGUF."""
    assert killed(llama, tmp_path, signal.SIGKILL, "burnish.export.job", "ask_about", 1)
    (left,) = tmp_path.iterdir()
    assert left.name == ".out.proof"
    llama.export(tmp_path / "out", "hf", "f32")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_export_that_was_there(number: int, llama: Tuned, tmp_path: Path):
    llama.export(tmp_path / "out", "hf", "bf16", prove=False)
    before = tree(tmp_path / "out")
    code = killed(llama, tmp_path, number, "burnish.export.job", "card", 1, "--no-proof", "--force")
    assert code not in (0, 2) and tree(tmp_path / "out") == before


def test_exit_code_of_a_failed_proof_is_1(llama: Tuned, tmp_path: Path):
    with pytest.raises(UserError) as e:
        llama.export(
            tmp_path / "out", "hf", "f32",
            write=lambda _, source, place, __: shutil.copytree(source.base.folder, place, dirs_exist_ok=True),
        )  # fmt: skip
    assert e.value.exit_code == EXIT_FAILED == 1 and list(tmp_path.iterdir()) == []
