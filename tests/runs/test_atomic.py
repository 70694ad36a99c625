"""Whole or not at all: what stands at the end when the writing fails at any place."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from burnish.errors import EXIT_FAILED, UserError
from burnish.runs import atomic
from burnish.runs.atomic import checksum, clean, write_folder, write_text


def put(text: str, name: str = "file") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_is_written_and_replaced(tmp_path: Path):
    final = tmp_path / "deep" / "a"
    write_folder(final, put("one"))
    assert (final / "file").read_text() == "one"
    write_folder(final, put("two", "other"))
    assert names(final) == ["other"], "nothing of the old one stays"
    assert names(final.parent) == ["a"]


def test_no_one_sees_it_before_it_is_whole(tmp_path: Path):
    def looking(folder: Path) -> None:
        put("new")(folder)
        assert (tmp_path / "a" / "file").read_text() == "old"

    write_folder(tmp_path / "a", put("old"))
    write_folder(tmp_path / "a", looking)
    assert (tmp_path / "a" / "file").read_text() == "new"


def test_what_is_written_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[tuple[str, bool]] = []
    monkeypatch.setattr(atomic, "sync", lambda p: seen.append((p.name, (tmp_path / "a").exists())))

    def deep(folder: Path) -> None:
        put("one")(folder)
        (folder / "inner").mkdir()
        put("two")(folder / "inner")

    write_folder(tmp_path / "a", deep)
    before = [name for name, there in seen if not there]
    assert sorted(before) == ["file", "file", "inner"]
    assert seen[-1] == (tmp_path.name, True), "the parent, so that the rename itself lasts"


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (OSError(errno.EFBIG, "File too large"), "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EACCES, "Permission denied"), "may not be written"),
        (OSError(errno.EROFS, "Read-only file system"), "may not be written"),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "may not be written"),
        (OSError(errno.EIO, "Input/output error"), "could not be written: [Errno 5] Input/output error"),
    ],
)
def test_a_failure_is_a_sentence_and_leaves_what_was(tmp_path: Path, error: Exception, says: str, old: bool):
    def half(folder: Path) -> None:
        put("half")(folder)
        raise error

    if old:
        write_folder(tmp_path / "a", put("old"))
    with pytest.raises(UserError, match=says.replace("[", r"\[")) as caught:
        write_folder(tmp_path / "a", half)
    assert str(tmp_path / "a") in caught.value.message
    assert caught.value.exit_code == EXIT_FAILED and caught.value.hint
    assert names(tmp_path) == (["a"] if old else [])
    assert not old or (tmp_path / "a" / "file").read_text() == "old"


def test_errors_of_our_own_pass_and_leave_nothing(tmp_path: Path):
    def refusing(folder: Path) -> None:
        put("half")(folder)
        raise ValueError("a defect")

    with pytest.raises(ValueError, match="a defect"):
        write_folder(tmp_path / "a", refusing)
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path: Path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(UserError, match="could not be written"):
        write_folder(tmp_path / "taken" / "a", put("one"))
    assert (tmp_path / "taken").read_text() == "mine"


def test_leftovers_of_a_killed_process_do_not_get_in(tmp_path: Path):
    for name in (".tmp-a", ".tmp-old-a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("stale")
    write_folder(tmp_path / "a", put("one"))
    write_folder(tmp_path / "a", put("two"))
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["file"]


def test_clean_removes_leftovers_and_nothing_else(tmp_path: Path):
    (tmp_path / ".tmp-a").mkdir()
    (tmp_path / ".tmp-b.json").write_text("{")
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "tmp-c").mkdir()
    clean(tmp_path)
    assert names(tmp_path) == ["b.json", "tmp-c"]


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.json"
    write_text(path, "eins — 一")
    assert path.read_bytes().decode("utf-8") == "eins — 一"

    def no_room(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "sync", no_room)
    with pytest.raises(UserError, match="the disk is full"):
        write_text(path, "two")
    assert path.read_text(encoding="utf-8") == "eins — 一"
    assert names(tmp_path) == ["a.json"]


def test_sync_excuses_volumes_that_cannot_and_no_other_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing(number: int) -> Callable[[int], None]:
        def fsync(_: int) -> None:
            raise OSError(number, os.strerror(number))

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    atomic.sync(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError):
        atomic.sync(tmp_path)


def test_checksum_is_sha256(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"abc")
    assert checksum(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
