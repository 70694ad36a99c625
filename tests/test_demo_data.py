"""The demo's data is what its script writes, and its two halves share nothing by accident."""

from __future__ import annotations

import importlib.util
import json
import re
import string
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FACTS = ("names", "places", "items")
SENTENCES = ("open_by", "close_by", "ask", "send", "ask_send", "whole", "hello", "idle")
RECORD = re.compile(
    r"item: (?P<item>[a-z ]+) \| count: (?P<count>\d+) "
    r"\| to: (?P<to>[A-Z][A-Za-z ]+) \| by: (?P<by>[A-Z][a-z]+)"
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_data", EXAMPLES / "make_demo_data.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows(name: str) -> list[dict[str, str]]:
    return [
        json.loads(line)
        for line in (EXAMPLES / "demo" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


TRAIN, VALID = rows("train"), rows("valid")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def word_runs(row: dict[str, str], n: int) -> set[tuple[str, ...]]:
    found: set[tuple[str, ...]] = set()
    for text in row.values():
        said = words(text)
        found |= {tuple(said[i : i + n]) for i in range(len(said) - n + 1)}
    return found


def proper_words(row: dict[str, str]) -> set[str]:
    """Capitalised words that do not start a sentence, and all of the record's."""
    found = set(re.findall(r"\b[A-Z][a-z]+", row["completion"]))
    tokens = re.findall(r"[A-Za-z']+|[.!?:,;]", row["prompt"])
    for before, word in pairwise(tokens):
        if word[0].isupper() and before not in ".!?:," and not word.startswith("I'") and word != "I":
            found.add(word)
    return found


def test_the_script_writes_the_committed_files(script: ModuleType, tmp_path: Path):
    script.main(tmp_path)
    for name in ("train.jsonl", "valid.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "demo" / name).read_bytes()


def test_there_are_enough_rows_and_all_differ():
    assert len(TRAIN) >= 300
    assert len(VALID) >= 100
    assert len({row["prompt"] for row in TRAIN + VALID}) == len(TRAIN) + len(VALID)


def test_every_record_can_be_read_off_its_message(script: ModuleType):
    for row in TRAIN + VALID:
        assert set(row) == {"prompt", "completion"}
        record = RECORD.fullmatch(row["completion"])
        assert record is not None, row
        for fact in ("item", "to", "by"):
            assert row["prompt"].count(record[fact]) == 1, row
        spoken = {record["count"], *(word for word, n in script.WORDS.items() if n == int(record["count"]))}
        assert spoken & set(words(row["prompt"])), row
        assert "{" not in row["prompt"]


@pytest.mark.parametrize("kind", FACTS + SENTENCES)
def test_the_lists_are_apart(script: ModuleType, kind: str):
    train, valid = getattr(script.TRAIN, kind), getattr(script.VALID, kind)
    assert len(set(train)) == len(train) and len(set(valid)) == len(valid)
    assert not {t.lower() for t in train} & {v.lower() for v in valid}


def test_names_places_and_items_share_no_word(script: ModuleType):
    """Not 'oak shelves' here and 'oak doors' there; nor a name of one half as a place of the other."""

    def used(pool: object) -> set[str]:
        return {word for kind in FACTS for fact in getattr(pool, kind) for word in words(fact)}

    assert not used(script.TRAIN) & used(script.VALID)


def test_no_fact_of_one_half_is_said_in_a_sentence_of_the_other(script: ModuleType):
    for pool, other in ((script.TRAIN, script.VALID), (script.VALID, script.TRAIN)):
        said = {w for s in pool.sentences for w in words(s)}
        for kind in ("names", "places"):
            assert not {w for fact in getattr(other, kind) for w in words(fact)} & said


def test_sentences_share_no_wording(script: ModuleType):
    """Four words in a row, the facts left out, are common to no two sentences of the two halves."""

    def runs(pool: object) -> set[tuple[str, ...]]:
        found: set[tuple[str, ...]] = set()
        for sentence in pool.sentences:  # type: ignore[attr-defined]
            plain = re.findall(r"\{\w+\}|[a-z0-9']+", sentence.lower())
            found |= {tuple(plain[i : i + 4]) for i in range(len(plain) - 3)}
        return found

    assert sorted(runs(script.TRAIN) & runs(script.VALID)) == []


def test_rows_share_no_run_of_six_words_and_no_name():
    train_runs = set().union(*(word_runs(row, 6) for row in TRAIN))
    valid_runs = set().union(*(word_runs(row, 6) for row in VALID))
    assert sorted(train_runs & valid_runs) == []
    train_names = set().union(*(proper_words(row) for row in TRAIN))
    valid_names = set().union(*(proper_words(row) for row in VALID))
    assert sorted(train_names & valid_names) == []


def test_every_part_of_the_lists_is_used(script: ModuleType):
    for pool, made in ((script.TRAIN, TRAIN), (script.VALID, VALID)):
        records = [RECORD.fullmatch(row["completion"]) for row in made]
        for kind, fact in (("names", "by"), ("places", "to"), ("items", "item")):
            assert {r[fact] for r in records if r} == set(getattr(pool, kind))
        fields = {field for s in pool.sentences for _, field, _, _ in string.Formatter().parse(s) if field}
        assert fields == {"n", "item", "to", "by"}


def test_the_checks_would_see_a_leak(script: ModuleType):
    leaked = {"prompt": TRAIN[0]["prompt"], "completion": VALID[0]["completion"]}
    assert word_runs(leaked, 6) & set().union(*(word_runs(row, 6) for row in TRAIN))
    assert proper_words({"prompt": "We met Anna in Rome.", "completion": ""}) == {"Anna", "Rome"}
