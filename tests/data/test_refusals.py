"""Files that hold something else than answers to learn are refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.data.formats import read_conversations
from burnish.data.rows import Row
from burnish.errors import UserError
from burnish.recipe import Data
from tests.data.reading import ANSWER, PQ, USER, read, said

PART = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}


@pytest.mark.parametrize(
    ("row", "said_"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "preference pairs (chosen, rejected)"),
        ({"Prompt": "p", "Chosen": "a", "Rejected": "b"}, "preference pairs (Chosen, Rejected)"),
        ({"Text": "t", "Label": "1"}, "texts to classify (`Text`, `Label`)"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "data.columns='{messages: chosen}'"),
        ({"messages": [USER], "chosen": ANSWER, "rejected": ANSWER}, "preference pairs"),
        ({**PQ, "label": True}, "as KTO wants"),
        ({"messages": [USER, ANSWER], "label": False}, "as KTO wants"),
        ({"text": "t", "label": 1}, "texts to classify (`text`, `label`)"),
        ({"sentence": "t", "label": "pos"}, "texts to classify (`sentence`, `label`)"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}, "several scored answers"),
        ({"instruction": "p", "completions": [{"response": "a", "overall_score": 3}]}, "several scored"),
        ({"prompt": "p", "response_0": "a", "response_1": "b"}, "several answers to each question (`resp"),
        ({**PQ, "image": "x.png"}, "hold images (the column `image`)"),
        ({**PQ, "images": ["x.png"]}, "hold images"),
        ({"pixel_values": [1], "input_ids": [1]}, "hold images (the column `pixel_values`)"),
        ({"messages": [PART, ANSWER]}, "hold images (parts of type image_url)"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ANSWER]}, "hold audios"),
        ({"audio": {"path": "x"}, "text": "t"}, "hold audios (the column `audio`)"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2]}, "are tokens already"),
        ({"sentence1": "a", "sentence2": "b", "label": 1}, "sentence embeddings or comparison"),
        ({"anchor": "a", "positive": "b"}, "sentence embeddings"),
        ({"embedding": [0.1], "text": "t"}, "sentence embeddings"),
    ],
)  # fmt: skip
def test_refused_by_name(row: dict[str, Any], said_: str) -> None:
    with pytest.raises(UserError) as e:
        read(row)
    assert str(e.value).startswith("f.jsonl: ") and said_ in str(e.value) and e.value.hint


def test_who_names_the_columns_is_not_refused() -> None:
    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert said(read(row, data=Data(columns={"completion": "chosen"})))[1] == ("assistant", "a")
    assert said(read(row, data=Data(prompt="{prompt}", completion="{chosen}")))[1] == ("assistant", "a")
    beside = {"messages": [USER, ANSWER], "chosen": [USER], "rejected": [USER]}
    assert said(read(beside, data=Data(columns={"messages": "messages"})))[1] == ("assistant", "b")
    nested = {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}
    assert said(read(nested, data=Data(columns={"messages": "chosen"})))[1] == ("assistant", "b")


@pytest.mark.parametrize(
    "row", [{**PQ, "label": "easy"}, {**PQ, "score": 3}, {"question": "q", "answer": "a", "sentence1": "s"}]
)
def test_a_column_beside_is_no_reason_to_refuse(row: dict[str, Any]) -> None:
    assert len(read(row).conversations) == 1


def test_a_lone_preference_pair_is_a_bad_row_and_a_file_of_them_is_refused() -> None:
    good = {"prompt": "p", "completion": "c"}
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    read = read_conversations([Row(v, "f", i) for i, v in enumerate([good, pair, good], 1)], Data(), True)
    assert [b.at for b in read.bad] == ["f:2"] and "preference pair" in read.bad[0].why
    assert len(read.conversations) == 2
    with pytest.raises(UserError, match="these are preference pairs"):
        read_conversations([Row(v, "f", i) for i, v in enumerate([pair, pair, good], 1)], Data(), True)
