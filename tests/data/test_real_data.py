"""Real records (the folder BURNISH_DATA names, or `../shared/data`) through the real SmolLM2 tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from burnish.data.formats import read_conversations
from burnish.data.prepare import prepare
from burnish.data.render import Renderer
from burnish.data.rows import read_rows
from burnish.models.tokenizer import load_tokenizer
from burnish.recipe import Data, load

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("BURNISH_DATA", ROOT.parent / "shared" / "data"))
MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}: set BURNISH_DATA"),
    pytest.mark.skipif(not MODEL.is_dir(), reason=f"no {MODEL.name} in .cache: make model"),
]

MEDICAL = load("medical-r1-14b").data
ALPACA = Data(prompt="{instruction}\n{input}\n", completion="{output}")


@pytest.mark.parametrize(
    ("file", "settings", "format", "count"),
    [
        ("wikisql/train.jsonl", Data(answer_after="\nA:"), "text", 1000),
        ("wikisql/valid.jsonl", Data(), "text", 100),
        ("prompt-completion/valid.jsonl", Data(), "prompt/completion", 144),
        ("messages/train.jsonl", Data(), "messages", 140),
        ("medical-o1-en/train.json", MEDICAL, "template", 120),
        ("alpaca/train_en.json", ALPACA, "template", 685),
        ("code-alpaca/valid.json", ALPACA, "template", 100),
        ("alpaca/identity.json", ALPACA, "template", 46),
    ],
)
def test_every_row_trains_its_answer_and_only_that(
    file: str, settings: Data, format: str, count: int
) -> None:
    tokenizer = load_tokenizer(MODEL)
    rows = read_rows(DATA / file).rows
    read = read_conversations(rows, settings, tokenizer.has_chat_template)
    assert (read.format, len(read.conversations)) == (format, count)
    renderer = Renderer(tokenizer, "assistant")
    for conversation in read.conversations[::7]:
        example = renderer.example(conversation)
        trained = tokenizer.decode(example.tokens[example.weights > 0].tolist(), keep_special=True)
        answers = [t.content for t in conversation.turns if t.role == "assistant"]
        expected = "".join(f"{a}<|im_end|>" for a in answers)
        if (
            conversation.plain and not conversation.turns[0].content
        ):  # a whole text: nothing predicts its first token
            assert trained == expected.removeprefix(tokenizer.decode(example.tokens[:1].tolist()))
            continue
        assert trained == expected
        prompt = renderer.prompt(conversation.prompt)
        assert example.tokens[: len(prompt)].tolist() == prompt


def test_length_policies_count_what_they_do() -> None:
    overrides = ["data.answer_after=null", "data.valid=", "train.max_length=90"]
    overrides += [f"data.train={DATA / 'wikisql/train.jsonl'}", f"model={MODEL}"]
    tokenizer = load_tokenizer(MODEL)
    lengths = {}
    for policy in ("drop", "truncate"):
        part = prepare(load("mistral-7b-wikisql", [*overrides, f"data.too_long={policy}"]), tokenizer).train
        lengths[policy] = (len(part.examples), part.dropped, part.truncated, part.longest)
    kept, dropped, _, longest = lengths["drop"]
    assert kept + dropped == 1000 and dropped > 0 and longest <= 90
    assert lengths["truncate"] == (1000, 0, dropped, 90)
