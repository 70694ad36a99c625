"""`burnish data`: the terminal, --json and --html tell the same facts. Its counts: test_cli.py."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pytest

from tests.world import World

DATA = ("data", "recipe.yaml")


@pytest.fixture
def messy(world: World) -> World:
    """Twelve rows and four: one repeated, one of validation known, one with a key and one with an address."""
    rows = [{"prompt": f"q {i}", "completion": f"a {i % 5}"} for i in range(10)]
    rows += [rows[0], {"prompt": "key?", "completion": "AKIA" + "QX7RT2LMNB4CVZ5D"}]
    valid = [
        rows[3],
        {"prompt": "q 4", "completion": "new"},
        {"prompt": "who?", "completion": "ann@firm.org"},
    ]
    world.rows(rows)
    world.rows([*valid, {"prompt": "why? " * 60, "completion": "so"}], "valid.jsonl")
    world.recipe(data={"valid": "valid.jsonl", "too_long": "drop"})
    return world


def facts(world: World, *args: str) -> dict[str, Any]:
    said = world.burnish(*DATA, "--json", *args)
    assert said.code == 0, said.err
    return json.loads(said.out)


def test_the_verdict_comes_first_and_every_warning_is_said(messy: World):
    told, text = facts(messy), messy.burnish(*DATA).out
    assert text.startswith(told["verdict"] + "\n")
    kinds = [w["kind"] for w in told["warnings"]]
    assert kinds == ["secret", "overlap", "overlap", "too long", "duplicates", "emails"]
    for warning in told["warnings"]:
        assert f"warning: {warning['message']}\n" in text and f"→ {warning['hint']}\n" in text
        assert all(f"  {place}\n" in text for place in warning["places"])
    places = told["warnings"][0]["places"]
    assert [Path(p).name for p in places] == ["data.jsonl:12"]
    assert "QX7RT2LMNB4CVZ5D" not in text


def test_clean_data_has_no_warnings(world: World):
    told, text = facts(world), world.burnish(*DATA).out
    assert told["warnings"] == [] and "warning" not in text
    assert told["verdict"].startswith("12 rows to train on") and "nothing to warn of" in text


def test_the_terminal_says_how_the_data_is_read(world: World):
    told, text = facts(world), world.burnish(*DATA).out
    for part in (
        f"format: {told['format']} ({told['why']}), {told['container']}",
        f"template: {told['template']}",
        f"{100 * told['padding']['unpacked']:.1f} % of positions with one example a row",
        f"{100 * told['padding']['packed']:.1f} % packed into rows of {told['padding']['row_length']}",
    ):
        assert part in text, part


def test_the_terminal_draws_the_lengths(world: World):
    bins = facts(world)["train"]["histogram"]
    lines = [line for line in world.burnish(*DATA).out.splitlines() if "–" in line and "█" in line]
    filled = [b for b in bins if b["rows"]]
    assert len(lines) == len(filled) > 0
    most = max(b["rows"] for b in bins)
    for line, b in zip(lines, filled, strict=True):
        assert line.split()[-2] == str(b["rows"]) and f"{b['from']}–{b['to']}" in line.replace(" ", "")
        assert line.count("█") == -(-32 * b["rows"] // most)


def test_show_numbers_examples_with_their_places(world: World):
    text = world.burnish(*DATA, "--show", "2").out
    assert text.count("--- example") == 2 and "data.jsonl:2 ---" in text and "⟦answer 1<|im_end|>⟧" in text
    assert "--- example" not in world.burnish(*DATA).out
    assert facts(world)["examples"] == [] and len(facts(world, "--show", "3")["examples"]) == 3
    assert world.burnish(*DATA, "--show", "99").out.count("--- example") == 12


def test_a_page_with_twenty_examples_unless_show_says(world: World):
    world.rows([{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)])
    for args, n in (((), 20), (("--show", "4"), 4), (("--show", "0"), 0)):
        said = world.burnish(*DATA, "--html", "page.html", *args)
        assert said.code == 0, said.err
        assert f"page: {world.root / 'page.html'}\n" in said.out
        assert said.out.count("--- example") == (n if args else 0)
        page = (world.root / "page.html").read_text(encoding="utf-8")
        assert page.count("<pre>") == n
    assert "--- example" not in said.out


def test_the_page_tells_the_facts_of_json(messy: World):
    told = facts(messy, "--html", "page.html")
    page = html.unescape((messy.root / "page.html").read_text(encoding="utf-8"))
    assert told["verdict"] in page and len(told["examples"]) == 12
    for warning in told["warnings"]:
        assert warning["message"] in page and all(p in page for p in warning["places"])
    for number in (told["train"]["tokens"], told["train"]["p90"], told["valid"]["trained"]):
        assert f"<td class=n>{number:,}</td>" in page
    assert all(f"{n}. {at}" in page for n, at in enumerate(told["example_places"], 1))
    assert "<mark>a 0<b class=special><|im_end|></b></mark>" in page


def test_json_stays_one_line_with_a_page(world: World):
    said = world.burnish(*DATA, "--json", "--html", "page.html")
    assert len(said.out.splitlines()) == 1 and (world.root / "page.html").is_file()


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        ("nowhere/page.html", "there is no folder", "mkdir -p"),
        (".", "is a folder; expected a file", "--html"),
        ("recipe.yaml", "is no page of `burnish data`", "--html"),
        ("data.jsonl", "is no page of `burnish data`", "--html"),
    ],
)
def test_a_page_that_may_not_be_written_is_said_before_the_work(
    world: World, target: str, message: str, hint: str
):
    world.write("data.jsonl", "not JSON, which would be said if the data were read")
    before = world.tree()
    said = world.burnish(*DATA, "--html", target)
    assert said.code == 2 and message in said.err and hint in said.err and "Traceback" not in said.err
    assert world.tree() == before and said.out == ""


def test_show_takes_no_negative_number(world: World):
    said = world.burnish(*DATA, "--show", "-1")
    assert said.code == 2 and "Traceback" not in said.err


def test_bad_data_writes_no_page(world: World):
    world.write("data.jsonl", '{"prompt": "a"')
    said = world.burnish(*DATA, "--html", "page.html")
    assert said.code == 2 and "data.jsonl:1" in said.err and not (world.root / "page.html").exists()


def test_skipped_rows_are_counted_listed_and_warned_of(world: World):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c"}, {"prompt": "d", "completion": ""}]
    world.rows(rows)
    told = facts(world, "data.on_bad_row=skip", "--html", "page.html")
    bad = told["bad_rows"]
    assert told["train"]["rows"] == 1 and bad["count"] == 2
    assert [Path(b["at"]).name for b in bad["rows"]] == ["data.jsonl:2", "data.jsonl:3"]
    text = world.burnish(*DATA, "data.on_bad_row=skip").out
    page = html.unescape((world.root / "page.html").read_text(encoding="utf-8"))
    assert "warning: 2 rows skipped that cannot be used" in text
    assert all(f"{b['at']}: {b['why']}" in text and b["why"] in page for b in bad["rows"])
