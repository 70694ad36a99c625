"""The whole way from files to examples: what is counted and told, and what later questions will have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from burnish.data.prepare import Prepared, prepare
from burnish.errors import UserError
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from tests.tiny import CHATML, tiny_recipe

pytest.importorskip("torch", reason="tiny models are made with torch and transformers")


def prepared(
    folder: Path, tmp_path: Path, rows: Sequence[object], tokenizer: Any = None, **data: Any
) -> Prepared:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = tiny_recipe(folder, data={"train": str(path), **data}, train={"max_length": 200})
    return prepare(recipe, tokenizer or load_tokenizer(folder))


def pair(n: int, **more: str) -> dict[str, str]:
    return {"prompt": f"question {n}", "completion": f"answer {n}", **more}


def test_bad_rows_are_grouped_by_reason_and_in_order(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [pair(0), {"prompt": "q"}, pair(2), *[{"prompt": "q", "completion": " "}] * 5]
    with pytest.raises(UserError) as e:
        prepared(tiny_folder, tmp_path, rows)
    lines = str(e.value).splitlines()
    assert "6 of 8 rows cannot be used" in lines[0]
    assert "rows.jsonl:2:" in lines[1]
    assert "rows.jsonl:4: the completion is empty" in lines[2] and "4 more rows: 5, 6, 7, 8" in lines[2]


def test_skipped_rows_are_kept_with_their_reason(tiny_folder: Path, tmp_path: Path) -> None:
    found = prepared(tiny_folder, tmp_path, [pair(0), {"prompt": "q"}, pair(2)], on_bad_row="skip")
    assert [b.at.rpartition(":")[2] for b in found.bad] == ["2"]
    assert len(found.train.examples) == 2


def test_equal_rows_stay_on_one_side_of_the_split(tiny_folder: Path, tmp_path: Path) -> None:
    found = prepared(tiny_folder, tmp_path, [pair(i % 6) for i in range(24)], valid_share=0.25)
    train, valid = ({c.turns for c in part.conversations} for part in (found.train, found.valid))
    assert valid and train and not train & valid
    with pytest.raises(UserError, match="all the same"):
        prepared(tiny_folder, tmp_path, [pair(0)] * 8, valid_share=0.25)


def test_questions_get_the_system_prompt_that_the_rows_had(tiny_folder: Path, tmp_path: Path) -> None:
    plain, own = pair(1), {"messages": [{"role": "system", "content": "Mine."}, *_messages(2)]}
    chat = {"messages": _messages(1)}
    assert prepared(tiny_folder, tmp_path, [plain]).system is None
    assert prepared(tiny_folder, tmp_path, [own, own]).system == "Mine."
    assert prepared(tiny_folder, tmp_path, [chat, own], system="Be brief.").system == "Be brief."


def _messages(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}]


def test_a_normalising_tokenizer_takes_text_in_its_form_and_it_is_counted(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from tokenizers import normalizers

    tokenizer = load_tokenizer(tiny_folder)
    tokenizer._backend.normalizer = normalizers.NFC()  # type: ignore[misc]
    rows = [pair(0), {"prompt": "cafe\u0301", "completion": "e\u0301t\u00e9"}]
    found = prepared(tiny_folder, tmp_path, rows, tokenizer)
    assert found.normalized == 1
    assert found.train.conversations[1].turns[-1].content == "\u00e9t\u00e9"


def test_of_several_templates_the_one_for_tools_is_taken_with_tools(
    tiny_folder: Path, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(tiny_folder)
    tools = (
        "{% if tools %}You have {% for t in tools %}{{ t.function.name }} {% endfor %}\n{% endif %}" + CHATML
    )
    tokenizer._inner.chat_template = {"default": CHATML, "tool_use": tools}
    row = {"messages": _messages(1), "tools": [{"type": "function", "function": {"name": "look"}}]}
    found = prepared(tiny_folder, tmp_path, [row], tokenizer)
    assert "You have look" in found.tokenizer.decode(found.train.examples[0].tokens.tolist(), True)
    assert found.tokenizer.template == tools
    without = prepared(tiny_folder, tmp_path, [{"messages": _messages(1)}], tokenizer)
    assert "You have" not in without.tokenizer.decode(without.train.examples[0].tokens.tolist(), True)


def test_the_template_that_is_saved_writes_the_date_that_was_trained(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(tiny_folder).with_template("Today {{ strftime_now('%d %b %Y') }}\n" + CHATML)
    found = prepared(tiny_folder, tmp_path, [{"messages": _messages(1)}], tokenizer)
    found.tokenizer.save(tmp_path / "saved")
    served = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    text = served.apply_chat_template(_messages(1)[:1], tokenize=False, add_generation_prompt=True)
    trained = found.tokenizer.decode(found.train.examples[0].tokens.tolist(), True)
    assert "26 Jul 2024" in text and trained.startswith(text)


def test_words_of_a_template_typed_by_a_user_are_text_and_in_an_answer_tokens(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from tokenizers import AddedToken

    tokenizer = load_tokenizer(tiny_folder)
    added = [AddedToken(t, special=False, normalized=False) for t in ("<tool_call>", "<|fim|>")]
    tokenizer._backend.add_tokens(added)  # type: ignore[attr-defined]
    tokenizer = tokenizer.with_template(CHATML + "{# <tool_call> #}")
    ids = tokenizer.added
    row = {"prompt": "a <tool_call> b <|fim|>", "completion": "c <tool_call> d <|fim|>"}
    tokens = prepared(tiny_folder, tmp_path, [row], tokenizer).train.examples[0].tokens.tolist()
    assert tokens.count(ids["<tool_call>"]) == 1 and tokens.count(ids["<|fim|>"]) == 0
    assert tokenizer.decode(tokens, True).count("<tool_call>") == 2


def test_many_turns_give_the_same_tokens_as_their_prompts_one_by_one(
    tiny_folder: Path, tmp_path: Path
) -> None:
    from burnish.data.conversation import Conversation
    from burnish.data.render import Renderer

    messages = [m for n in range(20) for m in _messages(n)]
    found = prepared(tiny_folder, tmp_path, [{"messages": messages[:8]}])
    renderer, turns = Renderer(found.tokenizer, "assistant"), found.train.conversations[0].turns
    tokens = found.train.examples[0].tokens.tolist()
    for n in range(1, len(turns), 2):
        prompt = renderer.prompt(Conversation(turns[:n], False, "x"))
        assert tokens[: len(prompt)] == prompt


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_what_is_too_long_is_counted_on_both_sides(tiny_folder: Path, tmp_path: Path, policy: str) -> None:
    long = {"prompt": "q", "completion": "answer " * 300}
    valid = tmp_path / "valid.jsonl"
    valid.write_text(json.dumps(pair(9)) + "\n" + json.dumps(long) + "\n")
    found = prepared(tiny_folder, tmp_path, [pair(0), long, long], too_long=policy, valid=str(valid))
    lost = [(p.dropped, p.truncated) for p in (found.train, found.valid)]
    assert lost == ([(2, 0), (1, 0)] if policy == "drop" else [(0, 2), (0, 1)])


def test_a_validation_file_without_a_usable_row_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    valid = tmp_path / "valid.jsonl"
    valid.write_text('{"prompt": "q", "completion": ""}\n')
    with pytest.raises(UserError, match=r"valid\.jsonl"):
        prepared(tiny_folder, tmp_path, [pair(0)], valid=str(valid), on_bad_row="skip")


def test_tokenizers_are_not_changed_by_templates(tiny_folder: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(tiny_folder)
    other = tokenizer.with_template("{{ messages[0].content }}")
    assert tokenizer.template == CHATML and other.template != CHATML
    assert other.with_stop(5).stop_ids == (*tokenizer.stop_ids, 5) and 5 not in tokenizer.stop_ids
