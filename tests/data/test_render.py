"""What is trained is the assistant's text and its end; the inference prompt is a prefix of the training
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from burnish.data.conversation import Conversation, Turn
from burnish.data.formats import fields, fill, question, read_conversations
from burnish.data.render import Renderer
from burnish.data.rows import Row
from burnish.errors import UserError
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from burnish.recipe import Data
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_model(tmp_path_factory.mktemp("model"), "qwen2"))


def trained_text(tokenizer: Tokenizer, conversation: Conversation) -> str:
    example = Renderer(tokenizer, "assistant").example(conversation)
    return tokenizer.decode(example.tokens[example.weights > 0].tolist(), keep_special=True)


CHAT = Conversation(
    (Turn("system", "Be brief."), Turn("user", "One?"), Turn("assistant", "Yes. "), Turn("user", "Two?"),
     Turn("assistant", "<think>\nhm\n</think>\nNo.")), False, "x:1")  # fmt: skip
PLAIN = Conversation((Turn("user", "Q: one\nA:"), Turn("assistant", " yes")), True, "x:1")


def test_every_assistant_turn_and_its_end_are_trained(tokenizer: Tokenizer) -> None:
    assert trained_text(tokenizer, CHAT) == "Yes. <|im_end|><think>\nhm\n</think>\nNo.<|im_end|>"


def test_a_plain_completion_is_trained_with_an_end(tokenizer: Tokenizer) -> None:
    text = trained_text(tokenizer, PLAIN)
    assert text.startswith(" yes") and text.removeprefix(" yes") == tokenizer.decode(
        [tokenizer.eos_id or 0], True
    )


@pytest.mark.parametrize("conversation", [CHAT, PLAIN])
def test_the_prompt_is_a_prefix_of_the_training_tokens(
    tokenizer: Tokenizer, conversation: Conversation
) -> None:
    renderer = Renderer(tokenizer, "assistant")
    example = renderer.example(conversation)
    prompt = renderer.prompt(conversation.prompt)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.weights[len(prompt) - 1] and example.weights[len(prompt)]


def test_loss_on_all_trains_every_token_but_the_first(tokenizer: Tokenizer) -> None:
    weights = Renderer(tokenizer, "all").example(CHAT).weights
    assert weights[0] == 0 and np.all(weights[1:] == 1)


def test_a_template_that_drops_reasoning_is_refused(tokenizer: Tokenizer) -> None:
    """Seen in peers: the stock DeepSeek-R1-Distill template cuts all before </think>."""

    class Cutting(Tokenizer):
        def chat(self, messages: object, ask: bool) -> str:
            cut = [{**m, "content": m["content"].split("</think>")[-1]} for m in messages]  # type: ignore[attr-defined]
            return super().chat(cut, ask)

    cutting = Cutting(tokenizer._inner, tokenizer.stop_ids, False)
    with pytest.raises(UserError, match="does not keep the assistant's answer"):
        Renderer(cutting, "assistant").example(CHAT)


def rows(*values: Mapping[str, object]) -> list[Row]:
    return [Row(dict(v), "f.jsonl", i) for i, v in enumerate(values, 1)]


def test_the_guides_medical_prompt() -> None:
    settings = Data(
        prompt="### Question:\n  {Question}\n  <think>", completion="{Complex_CoT}\n  </think>\n  {Response}"
    )
    row = {"Question": "为什么？", "Complex_CoT": "想 {x}", "Response": "答", "question": "no"}
    read = read_conversations(rows(row), settings, chat_template=True)
    assert read.format == "template"
    assert [t.content for t in read.conversations[0].turns] == [
        "### Question:\n  为什么？\n  <think>", "想 {x}\n  </think>\n  答"]  # fmt: skip
    assert (
        question("怎么？", settings, "template", True).turns[0].content
        == "### Question:\n  怎么？\n  <think>"
    )


def test_braces_and_fields() -> None:
    assert fill('{{"a": {x}}} {y}', {"x": 1, "y": "{z}"}) == '{"a": 1} {z}'
    assert fields("{{a}} {b} {c d}") == ["b", "c d"]


def test_text_rows_are_cut_after_the_last_separator() -> None:
    settings = Data(answer_after="\nA:")
    read = read_conversations(rows({"text": "Q: a\nA: b\nQ: c\nA: SELECT d"}), settings, True)
    prompt, answer = (t.content for t in read.conversations[0].turns)
    assert (prompt, answer) == ("Q: a\nA: b\nQ: c\nA:", " SELECT d")
    read = read_conversations(rows({"text": "A:  x"}), Data(answer_after="A: "), True)
    assert [t.content for t in read.conversations[0].turns] == ["A:", "  x"]


def test_every_bad_row_is_listed_with_its_line() -> None:
    bad = rows(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}]},
        {"messages": [{"role": "robot", "content": "a"}]},
        {"messages": "text"},
        {},
    )
    with pytest.raises(UserError) as e:
        read_conversations(bad, Data(), True)
    text = str(e.value)
    assert "4 of 5 rows" in text
    assert all(f"f.jsonl:{line}:" in text for line in (2, 3, 4, 5)) and "f.jsonl:1:" not in text


def test_prompt_and_completion_take_the_chat_template_where_there_is_one() -> None:
    row = {"prompt": "p", "completion": "c"}
    assert not read_conversations(rows(row), Data(), True).conversations[0].plain
    assert read_conversations(rows(row), Data(), False).conversations[0].plain
    assert read_conversations(rows(row), Data(chat_template="never"), True).conversations[0].plain
    with_system = read_conversations(rows(row), Data(system="s"), True).conversations[0]
    assert [t.role for t in with_system.turns] == ["system", "user", "assistant"]
