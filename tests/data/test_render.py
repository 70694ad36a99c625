"""What is trained, how much it weighs, and what stands where: chats and plain text, through any tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest

from burnish.data.conversation import Conversation, Turn
from burnish.data.render import Renderer
from burnish.data.template import Unproven
from burnish.errors import UserError
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from tests.data.templates import faults, runs
from tests.tiny import CHATML, tiny_model, tiny_tokenizer

CHAT = Conversation(
    (Turn("system", "Be brief."), Turn("user", "One?"), Turn("assistant", "Yes. "), Turn("user", "Two?"),
     Turn("assistant", "<think>\nhm\n</think>\nNo.")), False, "x:1")  # fmt: skip


def plain(asked: str, answered: str, markup: bool = False) -> Conversation:
    return Conversation((Turn("user", asked), Turn("assistant", answered)), True, "x:1", markup=markup)


PLAIN = plain("Q: one\nA:", " yes")


def tokenizer_of(folder: Path, template: str = CHATML, bos: bool = False) -> Tokenizer:
    """The tiny tokenizer; `bos`: it begins every plain text with `<|endoftext|>`."""
    from transformers import AutoTokenizer

    inner: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    inner.chat_template = template
    if bos:
        inner.bos_token = "<|endoftext|>"
    return Tokenizer(cast(Any, inner), (), adds_bos=bos)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return tokenizer_of(folder)


def trained(tokenizer: Tokenizer, conversation: Conversation, loss_on: Any = "assistant") -> list[str]:
    """Each stretch of trained tokens, decoded."""
    example = Renderer(tokenizer, loss_on).example(conversation)
    return [tokenizer.decode(example.tokens[a:b].tolist(), True) for a, b in runs(example)]


def with_weights(conversation: Conversation, weights: Sequence[float]) -> Conversation:
    turns = tuple(replace(t, weight=w) for t, w in zip(conversation.turns, weights, strict=True))
    return replace(conversation, turns=turns)


# --- what is trained ---


def test_every_assistant_turn_and_its_end_are_trained(tokenizer: Tokenizer) -> None:
    assert trained(tokenizer, CHAT) == ["Yes. <|im_end|>", "<think>\nhm\n</think>\nNo.<|im_end|>"]
    assert faults(CHAT, Renderer(tokenizer, "assistant"), tokenizer) == []


def test_loss_on_last_trains_the_last_answer_alone(tokenizer: Tokenizer) -> None:
    assert trained(tokenizer, CHAT, "last") == ["<think>\nhm\n</think>\nNo.<|im_end|>"]


def test_loss_on_all_trains_every_token_but_the_first(tokenizer: Tokenizer) -> None:
    for conversation in (CHAT, PLAIN, with_weights(CHAT, (1, 1, 0, 1, 0.5))):
        weights = Renderer(tokenizer, "all").example(conversation).weights
        assert weights[0] == 0 and np.all(weights[1:] == 1)


@pytest.mark.parametrize("loss_on", ["assistant", "last"])
def test_the_tokens_are_the_same_whatever_is_trained(
    tokenizer: Tokenizer, loss_on: Literal["assistant", "last"]
) -> None:
    tokens = Renderer(tokenizer, loss_on).example(CHAT).tokens.tolist()
    assert tokens == Renderer(tokenizer, "all").example(CHAT).tokens.tolist()
    assert tokenizer.decode(tokens, True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
        "Yes. <|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nhm\n</think>\nNo.<|im_end|>"
    )


def test_each_answer_weighs_what_its_turn_says(tokenizer: Tokenizer) -> None:
    example = Renderer(tokenizer, "assistant").example(with_weights(CHAT, (9, 9, 0.5, 9, 2)))
    first, second = runs(example)
    assert set(example.weights[slice(*first)].tolist()) == {0.5}
    assert set(example.weights[slice(*second)].tolist()) == {2.0}
    assert float(example.weights.sum()) == 0.5 * (first[1] - first[0]) + 2 * (second[1] - second[0])


def test_an_answer_of_weight_zero_is_read_and_not_trained(tokenizer: Tokenizer) -> None:
    assert trained(tokenizer, with_weights(CHAT, (1, 1, 0, 1, 1))) == ["<think>\nhm\n</think>\nNo.<|im_end|>"]
    example = Renderer(tokenizer, "last").example(with_weights(CHAT, (1, 1, 1, 1, 0)))
    assert not example.weights.any(), "whoever prepares the data counts it as untrained"


# --- the prompt ---


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    "conversation", [CHAT, PLAIN, plain("A", "B"), plain("Sum: ", " 3"), plain("one two th", "ree four")]
)
def test_the_prompt_is_a_prefix_of_the_training_tokens(
    folder: Path, conversation: Conversation, bos: bool
) -> None:
    renderer = Renderer(tokenizer_of(folder, bos=bos), "last")
    example = renderer.example(conversation)
    prompt = renderer.prompt(conversation.prompt)
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert not example.weights[: len(prompt)].any() and example.weights[len(prompt) :].all()


def test_an_answer_that_merges_with_the_prompts_end_is_cut_there(tokenizer: Tokenizer) -> None:
    """'question' is one token of this tokenizer, which nobody who is asked 'questio' could ever see."""
    assert len(tokenizer.encode("question")) == 1 and len(tokenizer.encode("questio")) == 1
    conversation, renderer = plain("a questio", "n"), Renderer(tokenizer, "assistant")
    prompt, ids = renderer.prompt(conversation.prompt), renderer.example(conversation).tokens.tolist()
    assert prompt == tokenizer.encode("a questio") and ids[: len(prompt)] == prompt
    assert trained(tokenizer, conversation) == ["n<|im_end|>"]


def test_an_empty_prompt_begins_with_the_end_token(tokenizer: Tokenizer) -> None:
    assert Renderer(tokenizer, "assistant").prompt(plain("", "x").prompt) == [tokenizer.eos_id]


# --- plain text ---


def test_a_plain_completion_is_trained_with_an_end(tokenizer: Tokenizer) -> None:
    assert trained(tokenizer, PLAIN) == [" yes<|im_end|>"]


def test_a_plain_text_begins_once_where_the_tokenizer_begins_texts(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, bos=True)
    for conversation in (PLAIN, plain("", "a whole text")):
        ids = Renderer(tokenizer, "assistant").example(conversation).tokens.tolist()
        assert ids[0] == tokenizer.bos_id and ids.count(ids[0]) == 1
    assert trained(tokenizer, PLAIN) == [" yes<|im_end|>"]
    assert trained(tokenizer, plain("", "a whole text")) == ["a whole text<|im_end|>"]
    chat = Renderer(tokenizer, "assistant").example(CHAT).tokens.tolist()
    assert tokenizer.bos_id not in chat, "the chat template writes none, so neither do we"


def test_a_whole_text_without_a_beginning_gives_its_first_token(tokenizer: Tokenizer) -> None:
    example = Renderer(tokenizer, "assistant").example(plain("", "a whole text"))
    assert example.weights.tolist() == [0, *[1] * (len(example.tokens) - 1)]
    assert tokenizer.decode(example.tokens.tolist(), True) == "a whole text<|im_end|>"


def test_special_tokens_in_markup_are_meant(tokenizer: Tokenizer) -> None:
    asked, answered = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "So.<|im_end|>"
    ids = Renderer(tokenizer, "assistant").example(plain(asked, answered, markup=True)).tokens.tolist()
    assert ids == tokenizer.encode(asked + answered), "and no second end follows the one that is written"
    assert trained(tokenizer, plain(asked, answered, markup=True)) == ["So.<|im_end|>"]


def test_markup_without_its_end_gets_one(tokenizer: Tokenizer) -> None:
    asked = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    ids = Renderer(tokenizer, "assistant").example(plain(asked, "So.", markup=True)).tokens.tolist()
    assert ids == tokenizer.encode(asked + "So.<|im_end|>")
    assert trained(tokenizer, plain(asked, "So.", markup=True)) == ["So.<|im_end|>"]


def test_special_tokens_in_plain_text_are_only_written(tokenizer: Tokenizer) -> None:
    example = Renderer(tokenizer, "assistant").example(plain("What is <|im_start|>?", "So.<|im_end|>"))
    specials = [t for t in example.tokens.tolist() if t in tokenizer.special.values()]
    assert specials == [tokenizer.eos_id] and example.tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(example.tokens.tolist(), True) == "What is <|im_start|>?So.<|im_end|><|im_end|>"
    assert trained(tokenizer, plain("What?", "So.<|im_end|>")) == ["So.<|im_end|><|im_end|>"]


# --- tokenizers as SentencePiece makes them ---


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words begin with ▁, and a text gets one before its first word; what is unknown falls back to bytes."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = ["▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!<>|/_"]
    merges = [
        ("▁", "a"),
        ("▁", "s"),
        ("y", "e"),
        ("ye", "s"),
        ("▁", "yes"),
        ("n", "e"),
        ("o", "ne"),
        ("▁", "one"),
    ]
    vocab = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *words,
        *("".join(m) for m in merges),
    ]
    inner: Any = Backend(models.BPE(
        vocab={t: i for i, t in enumerate(vocab)}, merges=merges, unk_token="<unk>", byte_fallback=True,
        fuse_unk=True))  # fmt: skip
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])  # fmt: skip
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        clean_up_tokenization_spaces=False)  # fmt: skip
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
    )
    folder = tmp_path_factory.mktemp("metaspace")
    made.save_pretrained(str(folder))
    return Tokenizer(cast(Any, AutoTokenizer.from_pretrained(str(folder), local_files_only=True)), (2,), True)


def ascii_chat(*texts: str) -> Conversation:
    roles = ("user", "assistant")
    turns = tuple(Turn(cast(Any, roles[i % 2]), text) for i, text in enumerate(texts))
    return Conversation(turns, False, "x:1")


@pytest.mark.parametrize(
    "texts",
    [("One?", "yes"), ("One?", " yes one."), ("One?", "是的。\n\nyes 👍"), ("a", "one", "b", "yes one")],
)
def test_a_sentencepiece_chat_is_proven(metaspace: Tokenizer, texts: tuple[str, ...]) -> None:
    conversation = ascii_chat(*texts)
    example = Renderer(metaspace, "assistant").example(conversation)
    ids = example.tokens.tolist()
    assert ids.count(1) == 1 and ids[0] == 1
    assert [ids[b - 1] for _, b in runs(example)] == [2] * (len(texts) // 2)
    answers = [metaspace.decode(ids[a : b - 1]).strip(" ") for a, b in runs(example)]
    assert answers == [t.strip(" ") for t in texts[1::2]]


def test_a_sentencepiece_prompt_is_what_is_trained_after(metaspace: Tokenizer) -> None:
    conversation, renderer = ascii_chat("One?", "yes", "So?", "one"), Renderer(metaspace, "assistant")
    assert faults(conversation, renderer, metaspace) == []


@pytest.mark.parametrize(("asked", "answered"), [("Q: one A:", " yes"), ("Q", "yes"), ("", "yes one")])
def test_sentencepiece_plain_text_is_proven(metaspace: Tokenizer, asked: str, answered: str) -> None:
    conversation, renderer = plain(asked, answered), Renderer(metaspace, "assistant")
    example, prompt = renderer.example(conversation), renderer.prompt(conversation.prompt)
    ids = example.tokens.tolist()
    assert (ids[0], ids.count(1), ids[-1]) == (1, 1, 2)
    assert ids[: len(prompt)] == prompt and runs(example) == [(len(prompt), len(ids))]
    assert metaspace.decode(ids[1:-1]).strip() == (asked + answered).strip()


# --- errors ---


def test_a_tokenizer_without_a_template_is_told(folder: Path) -> None:
    renderer = Renderer(tokenizer_of(folder, template=""), "assistant")
    with pytest.raises(Unproven, match="the tokenizer has no chat template"):
        renderer.example(CHAT)
    with pytest.raises(UserError, match=r"x:1: the tokenizer has no chat template") as e:
        renderer.prompt(CHAT.prompt)
    assert "data.chat_template=never" in str(e.value.hint)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "the template changes the texts"),
        (CHATML.replace("m.content", "m.content + m.content"), "repeats the text of turn 1 (system)"),
        (CHATML.replace("messages", "messages[1:]"), "leaves out the text of turn 1 (system)"),
        (CHATML.replace("assistant\n", "assistant\n<think>"), "is no beginning of the conversation"),
        (CHATML.replace("{{ m.content }}", "{{ m.content }}!"), "writes '!' after the answer"),
        ("{{ raise_exception('Roles must alternate') }}", "template refuses it: Roles must alternate"),
        ("{{ messages.nothing.there }}", "template refuses it: 'list object' has no"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_keep_the_conversation_is_named(
    folder: Path, template: str, why: str
) -> None:
    with pytest.raises(Unproven) as e:
        Renderer(tokenizer_of(folder, template), "assistant").example(CHAT)
    assert why in str(e.value)


def test_a_change_of_text_is_shown_with_what_differs(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, CHATML.replace("m.content", "m.content | replace('Two', 'Three')"))
    with pytest.raises(Unproven, match=r"expected 'wo\?.*', got 'hree\?.*' after '.*T'"):
        Renderer(tokenizer, "assistant").example(CHAT)


def test_a_text_that_the_tokenizer_loses_is_refused(folder: Path) -> None:
    class Losing(Tokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.replace("T", "t"))

    losing = Losing(tokenizer_of(folder)._inner, (), False)
    with pytest.raises(Unproven, match=r"the tokens do not give the text back: expected 'Two.*', got 'two"):
        Renderer(losing, "assistant").example(CHAT)


def test_without_an_end_token_nothing_is_trained(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    cast(Any, tokenizer)._inner.eos_token = None
    bare = Tokenizer(tokenizer._inner, (), False)
    with pytest.raises(Unproven, match="nothing ends an answer: the tokenizer has no end-of-sequence token"):
        Renderer(bare, "assistant").example(PLAIN)
    with pytest.raises(UserError, match="an empty prompt gives the model nothing to start from"):
        Renderer(bare, "assistant").prompt(plain("", "x").prompt)


@pytest.mark.parametrize("turns", [CHAT.turns[:2], CHAT.turns[2:3]])
def test_a_conversation_needs_a_question_and_then_an_answer(
    tokenizer: Tokenizer, turns: tuple[Turn, ...]
) -> None:
    with pytest.raises(Unproven, match="expected a question and then an answer"):
        Renderer(tokenizer, "assistant").example(Conversation(turns, False, "x:1"))


def test_outer_white_space_that_the_template_takes_is_counted(folder: Path) -> None:
    renderer = Renderer(tokenizer_of(folder, CHATML.replace("m.content", "m.content | trim")), "assistant")
    example = renderer.example(CHAT)
    assert renderer.trimmed == 1
    assert [renderer._tokenizer.decode(example.tokens[a:b].tolist(), True) for a, b in runs(example)] == [
        "Yes.<|im_end|>", "<think>\nhm\n</think>\nNo.<|im_end|>"]  # fmt: skip


def test_prompts_after_an_answer_are_cut_as_the_row_was(tmp_path: Path) -> None:
    """With a token of three newlines, an answer that begins with two merges with the template's own."""
    from tokenizers import AddedToken

    merging = load_tokenizer(tiny_model(tmp_path / "model"))
    merging._backend.add_tokens([AddedToken("\n\n\n", special=False, normalized=False)])  # type: ignore
    renderer = Renderer(merging, "assistant")
    turns = (Turn("user", "q"), Turn("assistant", "\n\nfoo"), Turn("user", "r"), Turn("assistant", "\n\nbar"))
    tokens = renderer.example(Conversation(turns, False, "x")).tokens.tolist()
    assert tokens != merging.encode(renderer.layout(Conversation(turns, False, "x")).text)
    for n in (1, 3):
        prompt = renderer.prompt(Conversation(turns[:n], False, "x"))
        assert tokens[: len(prompt)] == prompt
