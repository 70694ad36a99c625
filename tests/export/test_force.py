"""What an export may replace, and what it may not touch while it is made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from burnish.errors import UserError
from burnish.export.source import open_source
from tests.export.test_job import tree
from tests.export.world import Tuned, trained


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(trained(tmp_path_factory.mktemp("llama"), "llama", tied=False))


def made(tuned: Tuned, out: Path) -> dict[str, bytes]:
    tuned.export(out, "hf", "f32", prove=False)
    return tree(out)


def test_an_export_that_is_the_base_of_this_run(llama: Tuned, tmp_path: Path):
    """A second round of training on what the first one made: its base is an export, and would be gone."""
    before = made(llama, tmp_path / "round-1")
    second = open_source(llama.folder, tmp_path / "round-1", [])
    with pytest.raises(UserError, match=r"round-1 lies inside .*round-1, which would be replaced"):
        llama.export(tmp_path / "round-1", "hf", "bf16", source=second, prove=False, force=True)
    assert tree(tmp_path / "round-1") == before


@pytest.mark.parametrize("what", ["train", "valid"])
def test_an_export_in_which_the_data_lies(what: str, llama: Tuned, tmp_path: Path):
    made(llama, tmp_path / "out")
    rows = shutil.copy(llama.folder.parent / f"{what}.jsonl", tmp_path / "out")
    before = tree(tmp_path / "out")
    source = open_source(llama.folder, None, [f"data.{what}={rows}"])
    with pytest.raises(UserError, match=rf"{what}.jsonl lies inside"):
        llama.export(tmp_path / "out", "hf", "bf16", source=source, prove=False, force=True)
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["notes.txt", "runs/next/recipe.yaml", "model-q4.gguf"])
def test_an_export_that_someone_put_something_into(name: str, llama: Tuned, tmp_path: Path):
    made(llama, tmp_path / "out")
    mine = tmp_path / "out" / name
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=rf"holds {name}, which the export did not write") as e:
        llama.export(tmp_path / "out", "hf", "bf16", prove=False, force=True)
    assert "move it away" in e.value.hint and tree(tmp_path / "out") == before
    mine.unlink()
    llama.export(tmp_path / "out", "hf", "bf16", prove=False, force=True)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["type"] == "bf16"


def test_an_export_whose_list_of_files_is_damaged(llama: Tuned, tmp_path: Path):
    made(llama, tmp_path / "out")
    (tmp_path / "out" / "export.json").write_text("[]")
    before = tree(tmp_path / "out")
    with pytest.raises(UserError, match=r"export.json is damaged"):
        llama.export(tmp_path / "out", "hf", "bf16", prove=False, force=True)
    assert tree(tmp_path / "out") == before


def test_two_exports_to_one_place(llama: Tuned, tmp_path: Path):
    """The second is told of the first, and takes nothing away from it."""

    def write(kind: object, source: object, folder: Path, type: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half of the first")
        with pytest.raises(UserError, match=r"another export to .*out is running"):
            llama.export(tmp_path / "out", "hf", "bf16", prove=False)
        assert (folder / "model.safetensors").read_bytes() == b"half of the first"

    llama.export(tmp_path / "out", "hf", "f32", prove=False, write=write)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_one_left_is_taken_away(llama: Tuned, tmp_path: Path):
    for name in (".out.proof/base", ".out.partial/.packing-x"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "old.gguf").write_bytes(b"old")
    made(llama, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_links_that_lead_in_a_circle(llama: Tuned, tmp_path: Path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match=r"cannot be used|does not exist"):
        llama.export(tmp_path / "a" / "out", "hf", "f32", prove=False)
