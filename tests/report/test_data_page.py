"""The page of the data: whole, escaped, in need of nothing, and never written over anything else."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.report.data_page import check_target, data_page, write_page

VOID = {"meta", "br"}
EVIL = "<script>alert('x')</script> & \"quoted\""


def a_part(rows: int, **changes: Any) -> dict[str, Any]:
    keys = (
        "conversations", "many_turns", "tokens", "trained", "shortest", "median", "p90", "p95", "p99",
        "longest", "answers", "reasoning", "tool_calls", "too_long", "untrained", "truncated", "dropped",
    )  # fmt: skip
    bins = [{"from": 1, "to": 50, "rows": rows}, {"from": 51, "to": 64, "rows": 1}] if rows else []
    counts: dict[str, Any] = {k: 100 + i if rows else 0 for i, k in enumerate(keys)}
    return {"rows": rows, "trained_percent": 12.5, "histogram": bins, **counts, **changes}


def told(**changes: Any) -> dict[str, Any]:
    """What facts tell, by hand: two examples, nothing wrong."""
    return {
        "recipe": "mine", "verdict": "4 rows to train on", "max_length": 64, "format": "messages",
        "why": "the column `messages`", "container": "JSON Lines", "template": "the model's own",
        "template_why": "", "trimmed": 0, "normalized": 0,
        "thoughts_dropped": 0, "held_out": False, "train": a_part(4), "valid": a_part(0),
        "bad_rows": {"count": 0, "rows": []}, "warnings": [],
        "padding": {"unpacked": 0.25, "packed": 0.015, "row_length": 128},
        "examples": [
            [{"text": "<s>why?\n", "trained": False, "special": [[0, 3]]},
             {"text": "so <end>", "trained": True, "special": [[3, 8]]}],
            [{"text": "whole", "trained": True, "special": []}],
        ],
        "example_places": ["d.jsonl:1", "d.jsonl:7"],
        **changes,
    }  # fmt: skip


class Reader(HTMLParser):
    """Every tag opened, with attributes; texts by the innermost tag. Tags must close as they were opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def all(self, tag: str) -> list[str]:
        return [text for t, text in self.texts if t == tag]

    @property
    def text(self) -> str:
        return " ".join(t for _, t in self.texts)


def read(facts: Mapping[str, Any]) -> Reader:
    return Reader(data_page(facts))


def test_the_page_says_what_the_facts_say():
    warning = {"kind": "cut", "message": "2 rows cut", "hint": "raise it", "places": ["d.jsonl:9"]}
    page = read(told(warnings=[warning], trimmed=3, held_out=True, template_why="it is proven"))
    assert page.all("h1") == ["Data of mine"] and page.all("title") == ["Data of mine"]
    assert page.all("strong") == ["2 rows cut"]
    for part in (
        "4 rows to train on", "raise it", "d.jsonl:9", "messages (the column `messages`)", "JSON Lines",
        "the model's own (it is proven)", "64 tokens (train.max_length)", "3 texts lose outer white space",
        "data.valid_share", "12.5 %", "25.0 % of positions", "1.5 % packed into rows of 128", "Longest 109",
    ):  # fmt: skip
        assert part in page.text, part


def test_every_count_is_in_the_table():
    page = read(told(valid=a_part(3, tokens=9_876_543)))
    cells = page.all("td")
    for number in (*range(100, 116), 4, 3):
        assert str(number) in cells, number
    assert "9,876,543" in cells
    assert {"training", "validation"} <= set(page.all("th"))
    assert "validation" not in read(told()).all("th"), "nothing to validate on, no column for it"


def test_histograms_have_a_bar_for_each_bin():
    page = read(told(valid=a_part(8)))
    bars = [a["style"] for _, a in page.tags if a.get("class") == "bar"]
    assert bars == ["width:100.0%", "width:25.0%", "width:100.0%", "width:12.5%"]
    assert page.all("span") == ["1–50", "4", "51–64", "1", "1–50", "8", "51–64", "1"]


def test_examples_mark_what_is_trained_and_show_special_tokens_as_badges():
    page = data_page(told())
    first, second = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    badge = "<b class=special>{}</b>".format
    assert first == f"{badge('&lt;s&gt;')}why?\n<mark>so {badge('&lt;end&gt;')}</mark>"
    assert second == "<mark>whole</mark>"
    assert Reader(page).all("summary") == ["1. d.jsonl:1", "2. d.jsonl:7"]


def test_the_first_examples_are_unfolded():
    pieces = [{"text": "a", "trained": True, "special": []}]
    page = read(told(examples=[pieces] * 20, example_places=[f"d:{n}" for n in range(20)]))
    unfolded = ["open" in a for t, a in page.tags if t == "details"]
    assert unfolded == [True] * 3 + [False] * 17


def test_text_of_the_data_and_of_names_is_escaped():
    part = [{"text": f"{EVIL}<s>{EVIL}", "trained": True, "special": [[len(EVIL), len(EVIL) + 3]]}]
    page = data_page(told(
        recipe=EVIL, verdict=EVIL, format=EVIL, why=EVIL, container=EVIL, template=EVIL, template_why=EVIL,
        warnings=[{"kind": "bad rows", "message": EVIL, "hint": EVIL, "places": [EVIL]}],
        bad_rows={"count": 1, "rows": [{"at": EVIL, "why": EVIL}]}, examples=[part], example_places=[EVIL],
    ))  # fmt: skip
    assert "<script" not in page
    assert Reader(page).text.count(EVIL) >= 14


def test_the_page_needs_nothing_else():
    page = data_page(told(warnings=[{"kind": "cut", "message": "m", "hint": "h", "places": []}]))
    assert not {"script", "link", "img", "iframe"} & {t for t, _ in Reader(page).tags}
    assert not any({"src", "href"} & set(a) for _, a in Reader(page).tags)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page and 'charset="utf-8"' in page


def test_skipped_rows_are_listed_in_full():
    bad = {"count": 30, "rows": [{"at": f"d:{n}", "why": f"reason {n}"} for n in range(30)]}
    text = read(told(bad_rows=bad)).text
    assert all(f"reason {n}" in text for n in range(30)) and "30 rows" in text


def test_nothing_wrong_and_no_examples_leave_no_empty_section():
    page = read(told(examples=[], example_places=[]))
    assert not {"Warnings", "Skipped rows", "Examples", "Tokens a validation row"} & set(page.all("h2"))


def test_a_page_is_written_and_written_again(tmp_path: Path):
    path = tmp_path / "page.html"
    for verdict in ("first", "second"):
        check_target(path)
        write_page(path, told(verdict=verdict))
        assert f">{verdict}<" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_an_empty_file_may_be_replaced(tmp_path: Path):
    (tmp_path / "page.html").touch()
    check_target(tmp_path / "page.html")


@pytest.mark.parametrize("content", ["my notes", "<!doctype html><title>mine</title>", " "])
def test_another_file_is_not_replaced(tmp_path: Path, content: str):
    path = tmp_path / "page.html"
    path.write_text(content)
    with pytest.raises(UserError, match="is no page of `burnish data`"):
        check_target(path)


def test_a_folder_and_no_folder(tmp_path: Path):
    with pytest.raises(UserError, match="is a folder; expected a file"):
        check_target(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        check_target(tmp_path / "nowhere" / "page.html")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"there is no folder .*file"):
        check_target(tmp_path / "file" / "page.html")


def test_a_disk_that_is_full_is_one_sentence_and_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "page.html"
    write_page(path, told(verdict="old"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match="the disk is full") as caught:
        write_page(path, told(verdict="new"))
    assert "--html" in caught.value.hint and caught.value.exit_code == 1
    assert ">old<" in path.read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
