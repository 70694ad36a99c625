"""A word in a file of the run folder: what another terminal wants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.recipe import Recipe
from burnish.runs.folder import RunFolder
from burnish.runs.wish import WISH, ask, wished


@pytest.mark.parametrize("wish", ["pause", "stop"])
def test_what_was_asked_is_what_is_wished(wish: Any, tmp_path: Path) -> None:
    assert wished(tmp_path) == ""
    ask(tmp_path, wish)
    assert wished(tmp_path) == wish
    ask(tmp_path, "")
    assert wished(tmp_path) == "" and list(tmp_path.iterdir()) == []
    ask(tmp_path, "")  # nothing to take back


def test_the_last_wish_counts(tmp_path: Path) -> None:
    ask(tmp_path, "pause")
    ask(tmp_path, "stop")
    assert wished(tmp_path) == "stop"


@pytest.mark.parametrize(
    "said", [b"", b"\xff\xfe", b"PAUSE", b"pausestop", b"pause\nstop", b"\x00", b"x" * 10_000]
)
def test_another_word_is_no_wish(said: bytes, tmp_path: Path) -> None:
    (tmp_path / WISH).write_bytes(said)
    assert wished(tmp_path) == ""


@pytest.mark.parametrize("said", [b"pause", b" pause \r\n", b"stop\n\n"])
def test_written_by_hand_it_counts_too(said: bytes, tmp_path: Path) -> None:
    (tmp_path / WISH).write_bytes(said)
    assert wished(tmp_path) in ("pause", "stop")


def test_a_folder_or_nothing_at_all_is_no_wish(tmp_path: Path) -> None:
    (tmp_path / WISH).mkdir()
    assert wished(tmp_path) == "" and wished(tmp_path / "gone") == ""


def test_one_that_may_not_be_read_is_none(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read anything")
    (tmp_path / WISH).write_text("stop")
    (tmp_path / WISH).chmod(0)
    assert wished(tmp_path) == ""


def test_a_run_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone"):
        ask(tmp_path / "gone", "stop")


@pytest.mark.parametrize("wish", ["pause", "stop"])
def test_who_goes_on_with_a_run_has_no_old_wishes(wish: Any, tmp_path: Path) -> None:
    RunFolder.begin(tmp_path, Recipe()).close()
    ask(tmp_path, wish)
    RunFolder.resume(tmp_path, Recipe()).close()
    assert wished(tmp_path) == ""


@pytest.mark.parametrize("wish", ["pause", "stop"])
def test_a_process_that_takes_a_dead_ones_place_heeds_them(wish: Any, tmp_path: Path) -> None:
    RunFolder.begin(tmp_path, Recipe()).close()
    ask(tmp_path, wish)
    RunFolder.resume(tmp_path, Recipe(), by_itself=True).close()
    assert wished(tmp_path) == wish


def test_who_begins_anew_has_none_either(tmp_path: Path) -> None:
    RunFolder.begin(tmp_path, Recipe()).close()
    ask(tmp_path, "stop")
    RunFolder.begin(tmp_path, Recipe()).close()
    assert wished(tmp_path) == ""
