"""Facts of small parts built by hand, whose numbers are known; the command's tests use real files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from burnish.data.batches import Example
from burnish.data.conversation import Conversation, ToolCall, Turn
from burnish.data.facts import facts
from burnish.data.prepare import Part, Prepared
from burnish.data.rows import Bad
from burnish.models.tokenizer import Tokenizer
from burnish.recipe import Recipe

WORDS = {0: "<s>", 1: "<end>", 2: "the", 3: " answer", 4: "<end>"}  # 4: as written in a row, not special


class Words:
    """A tokenizer of five words, as far as facts look at one."""

    @property
    def special(self) -> dict[str, int]:
        return {"<s>": 0, "<end>": 1}

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return "".join(WORDS[i] for i in ids if keep_special or i > 1)


def example(length: int, trained: int = 1) -> Example:
    tokens, weights = np.full(length, 2, np.int32), np.zeros(length, np.float32)
    weights[length - trained :] = 0.5
    return Example(tokens, weights)


def chat(question: str, answer: str, at: str = "d:1", **more: Any) -> Conversation:
    return Conversation((Turn("user", question), Turn("assistant", answer, **more)), False, at)


def part(
    lengths: Sequence[int] = (),
    conversations: Sequence[Conversation] | None = None,
    file: str = "t",
    dropped: int = 0,
    truncated: int = 0,
    untrained: int = 0,
    trained: int = 1,
) -> Part:
    made = [chat(f"{file}{n}", "a", f"{file}:{n}") for n, _ in enumerate(lengths, 1)]
    return Part(
        examples=tuple(example(n, trained) for n in lengths),
        conversations=tuple(made if conversations is None else conversations),
        dropped=dropped,
        truncated=truncated,
        untrained=untrained,
    )


def said(*conversations: Conversation) -> Part:
    return part([10] * len(conversations), conversations)


def prepared(
    train: Part, valid: Part | None = None, bad: Sequence[Bad] = (), trimmed: int = 0, held_out: bool = False
) -> Prepared:
    return Prepared(
        format="messages",
        why="the column `messages`",
        train=train,
        valid=valid or part(),
        held_out=held_out,
        container="JSON Lines",
        bad=tuple(bad),
        template="the model's own",
        template_why="it keeps every answer",
        trimmed=trimmed,
        tokenizer=cast(Tokenizer, Words()),
    )


def tell(train: Part, valid: Part | None = None, max_length: int = 100, show: int = 0) -> dict[str, Any]:
    recipe = Recipe.model_validate({"name": "mine", "train": {"max_length": max_length}})
    return facts(prepared(train, valid), recipe, show)


def kinds(told: dict[str, Any]) -> list[str]:
    return [w["kind"] for w in told["warnings"]]


def test_what_was_decided_is_handed_on():
    recipe = Recipe.model_validate({"name": "mine"})
    told = facts(prepared(part([4]), trimmed=3, held_out=True), recipe)
    expected = {
        "recipe": "mine", "format": "messages", "why": "the column `messages`", "container": "JSON Lines",
        "template": "the model's own", "template_why": "it keeps every answer", "trimmed": 3,
        "held_out": True, "max_length": recipe.train.max_length,
    }  # fmt: skip
    assert {k: told[k] for k in expected} == expected


def test_facts_are_json():
    told = tell(part([4, 9]), part([3], file="v"), show=2)
    assert json.loads(json.dumps(told)) == told


def test_lengths():
    found = tell(part(range(1, 101)), part([7], file="v"))
    train = found["train"]
    assert train["rows"] == 100 and train["tokens"] == 5050
    assert [train[k] for k in ("shortest", "median", "p90", "p95", "p99", "longest")] == [
        1,
        51,
        91,
        96,
        100,
        100,
    ]
    assert found["valid"]["shortest"] == found["valid"]["p99"] == 7


def test_trained_tokens_and_their_share():
    train = tell(part([10, 30], trained=4))["train"]
    assert (train["trained"], train["trained_percent"]) == (8, 20.0)


def test_no_validation_rows_are_zeros():
    valid = tell(part([4]))["valid"]
    assert valid["rows"] == valid["median"] == valid["longest"] == valid["trained_percent"] == 0
    assert valid["histogram"] == []


@pytest.mark.parametrize(
    ("lengths", "max_length"),
    [
        ((2,), 2),
        ((5, 5), 100),
        ((12, 13), 100),
        (range(1, 2049), 2048),
        ((3, 512), 512),
        ((90, 131072), 131072),
    ],
)
def test_histogram_holds_every_row_in_its_bin(lengths: Sequence[int], max_length: int):
    bins = tell(part(lengths), max_length=max_length)["train"]["histogram"]
    assert len(bins) <= 12
    assert [b["from"] for b in bins] == [1, *(b["to"] + 1 for b in bins[:-1])]
    assert bins[-1]["from"] <= max(lengths) <= bins[-1]["to"] <= max_length
    assert [b["rows"] for b in bins] == [sum(b["from"] <= n <= b["to"] for n in lengths) for b in bins]


def test_histogram_has_round_bins_and_ends_at_the_limit():
    bins = tell(part([3, 500]), max_length=510)["train"]["histogram"]
    assert (bins[0]["from"], bins[0]["to"], bins[-1]["from"], bins[-1]["to"]) == (1, 50, 451, 500)
    bins = tell(part([3, 505]), max_length=510)["train"]["histogram"]
    assert (bins[-1]["from"], bins[-1]["to"]) == (501, 510)


def test_left_out_is_split_by_reason():
    told = tell(part([4], dropped=5, untrained=2, truncated=1), part([4], file="v", dropped=1))
    train = told["train"]
    assert [train[k] for k in ("dropped", "too_long", "untrained", "truncated")] == [5, 3, 2, 1]
    assert kinds(told) == ["too long", "untrained", "cut", "too long"]
    assert [w["message"].partition(" left")[0].partition(" cut")[0] for w in told["warnings"]] == [
        "3 training rows", "2 training rows", "1 training row", "1 validation row"
    ]  # fmt: skip


def test_bad_rows_are_counted_and_listed():
    bad = [Bad(f"d:{n}", "no text") for n in range(9)]
    told = facts(prepared(part([4]), bad=bad), Recipe())
    assert told["bad_rows"]["count"] == 9 and told["bad_rows"]["rows"][8] == {"at": "d:8", "why": "no text"}
    (warning,) = told["warnings"]
    assert warning["message"].startswith("9 rows skipped") and warning["places"][0] == "d:0: no text"


def test_turns_reasoning_and_tools():
    turns = (
        Turn("user", "q"), Turn("assistant", "", "let me see", (ToolCall("f", "{}"), ToolCall("g", "{}"))),
        Turn("tool", "4"), Turn("assistant", "<think>so</think>4"), Turn("user", "?"), Turn("assistant", "4"),
    )  # fmt: skip
    plain = Conversation((Turn("user", ""), Turn("assistant", "text")), True, "t:2")
    told = tell(said(Conversation(turns, False, "t:1"), plain))
    expected = {
        "conversations": 1, "many_turns": 1, "answers": 4, "reasoning": 2, "tool_calls": 2, "with_tools": 1,
    }  # fmt: skip
    assert {k: told["train"][k] for k in expected} == expected
    assert kinds(told) == ["reasoning"]


@pytest.mark.parametrize("reasoning", ["", "hm"])
def test_reasoning_everywhere_or_nowhere_is_no_warning(reasoning: str):
    assert kinds(tell(said(chat("a", "b", reasoning=reasoning), chat("c", "d", reasoning=reasoning)))) == []


def test_repeats_overlap_secrets_and_addresses():
    key = "hf_" + "aB3dE5gH1jK7mN9pQ2sT4vW6yZ8xC0vB2n"
    train = said(chat("a", "b", "t:1"), chat("a", "b", "t:2"), chat("c", key, "t:3"))
    told = tell(train, said(chat("a", "b", "v:1"), chat("c", "ann@firm.org", "v:2")))
    assert told["duplicates"] == {"count": 1, "first": [{"at": "t:2", "same_as": "t:1"}]}
    assert told["overlap"]["whole"] == {"count": 1, "first": [{"at": "v:1", "same_as": "t:1"}]}
    assert told["overlap"]["question_only"] == {"count": 1, "first": [{"at": "v:2", "same_as": "t:3"}]}
    assert told["secrets"] == [{"kind": "Hugging Face token", "count": 1, "rows": 1, "first": ["t:3"]}]
    assert told["emails"]["count"] == 1 and told["emails"]["first"] == ["v:2"]
    assert kinds(told) == ["secret", "overlap", "overlap", "duplicates", "emails"]
    assert told["warnings"][1]["places"] == ["v:1 (as t:1)"]
    assert key not in json.dumps(told)


def test_padding_with_one_example_a_row_and_packed():
    recipe = Recipe.model_validate({"train": {"batch_size": 2, "max_length": 400}})
    found = facts(prepared(part([101, 301] * 8)), recipe)["padding"]
    assert 0 < found["unpacked"] <= 1 / 3, "a pair is padded to its longer one, and some pairs are mixed"
    same = facts(prepared(part([101] * 8)), recipe)["padding"]
    assert same["unpacked"] == 0
    assert same["packed"] == pytest.approx(1 - 8 * 100 / (same["row_length"] * 4))


def test_few_trained_tokens_are_said():
    assert kinds(tell(part([100], trained=1))) == ["few trained"]
    assert kinds(tell(part([100], trained=2))) == []


def test_verdict():
    assert tell(part([10, 10]))["verdict"] == "2 rows to train on, 2 of 20 tokens trained; nothing to warn of"
    told = tell(part([10], dropped=1))
    assert told["verdict"] == "1 row to train on, 1 of 10 tokens trained; 1 warning to look at first"


def test_examples_are_pieces_with_their_special_tokens():
    tokens = np.array([0, 2, 4, 1, 3, 1, 1], np.int32)
    weights = np.array([0, 0, 0, 0, 0.5, 1, 0], np.float32)
    train = Part((Example(tokens, weights), example(3)), (chat("q", "a", "t:4"), chat("r", "a")), 0, 0, 0)
    told = tell(train, show=1)
    assert told["example_places"] == ["t:4"]
    assert told["examples"] == [[
        {"text": "<s>the<end><end>", "trained": False, "special": [[0, 3], [11, 16]]},
        {"text": " answer<end>", "trained": True, "special": [[7, 12]]},
        {"text": "<end>", "trained": False, "special": [[0, 5]]},
    ]]  # fmt: skip


def test_no_more_examples_than_there_are():
    assert (
        len(tell(part([3, 3]), show=9)["examples"]) == len(tell(part([3, 3]), show=9)["example_places"]) == 2
    )
    assert tell(part([3]))["examples"] == []
