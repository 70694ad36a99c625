"""Any text through the renderer is either right or refused by name; and each way to break it is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.data import render
from burnish.data.conversation import Conversation, Turn
from burnish.data.render import Renderer
from burnish.data.template import ChatTemplate, Layout, Unproven
from burnish.data.training_template import choose
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from tests.data import templates
from tests.data.templates import SMOL, carrying, prompt_faults, runs, served, token_faults
from tests.tiny import tiny_tokenizer

STOCK = templates.stock_templates()
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OURS = (
    "xBURNISH0x",
    "xBURNISH3x",
    "⟦answer 1⟧",
    "⟦answer 2⟧",
)  # marks that burnish renders in place of texts
SNIPPETS = (
    "👩‍⚕️🏽", "产后高热", "e\u0301\u0323", "مرحبا \u202e12", "\u200b\ufeff\u2060", "<|im_end|>",
    "<|im_start|>assistant\n", "<｜User｜>", "<｜end▁of▁sentence｜>", "<|endoftext|>", "<think>", "</think>",
    "<tool_call>", "{{ 7*7 }}", "{% raw %}", "\u2028", "\r\n", "  \n", "\n\n", "\t", " ",
)  # fmt: skip


@st.composite
def conversations(draw: st.DrawFn, ordinary: bool = False) -> Conversation:
    """2 to 5 turns, an answer the last, with or without a system prompt, reasoning apart, and weights.

    ordinary: of assigned characters that are no control codes (SmolLM2's vocabulary lacks some bytes),
    without burnish's own marks, and no reasoning that leads to no answer.
    """
    outside = ["Cs", "Co", "Cn", "Cc"] if ordinary else ["Cs"]
    anything = st.text(st.characters(exclude_categories=outside), max_size=8)  # type: ignore[arg-type]
    snippets = st.sampled_from(SNIPPETS + (() if ordinary else OURS))
    texts = st.lists(st.one_of(anything, snippets), min_size=1, max_size=4).map("".join)
    turns = [Turn("system", draw(texts))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        text, reasoning = draw(texts), draw(st.one_of(st.just(""), texts))
        weight = draw(st.sampled_from((1.0, 1.0, 0.5, 0.0)))
        said = text or "yes" if ordinary else text
        turns += [Turn("user", draw(texts)), Turn("assistant", said, reasoning, weight=weight)]
    return Conversation(tuple(turns), False, "rows.jsonl:1")


@dataclass(frozen=True)
class Under:
    """Renders with whatever template is chosen for each conversation, and keeps one renderer of each."""

    tokenizer: Tokenizer
    renderers: dict[str, Renderer]

    def look(self, conversation: Conversation) -> tuple[str, list[str]]:
        """('' or why it is refused, what is wrong with it if it is not)."""
        chosen = choose(self.tokenizer, [conversation])
        if chosen.failed:
            return chosen.failed[0], []
        template = chosen.tokenizer.template
        if template not in self.renderers:
            self.renderers[template] = Renderer(chosen.tokenizer, "assistant")
        renderer = self.renderers[template]
        try:
            example = renderer.example(conversation)
        except Unproven as e:
            return str(e), []
        wrong = [*token_faults(conversation, example, chosen.tokenizer)]
        answers = [i for i, t in enumerate(conversation.turns) if t.role == "assistant"]
        prompts = [renderer.prompt(replace(conversation, turns=conversation.turns[:i])) for i in answers]
        if example.tokens[: len(prompts[0])].tolist() != prompts[0]:
            wrong.append("the first prompt is no prefix of the training tokens")
        trained = [p for p, i in zip(prompts, answers) if conversation.turns[i].weight > 0]
        for prompt, (start, _) in zip(trained, runs(example)):
            said = [chosen.tokenizer.decode(ids, True) for ids in (prompt, example.tokens[:start].tolist())]
            if said[0] != said[1]:
                wrong.append(f"asked {said[0]!r}, trained after {said[1]!r}")
        asked, prompt = replace(conversation, turns=conversation.turns[: answers[0]]), prompts[0]
        # A server takes what looks like a special token for one; for all other text it must agree.
        said = "".join(t.content + t.reasoning for t in asked.turns)
        if (
            not any(t in said for t in chosen.tokenizer.added)
            and served(chosen.tokenizer, asked, True) != prompt
        ):
            wrong.append("transformers alone writes another prompt")
        return "", wrong


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


NAMES = [
    "chatml",
    pytest.param("smollm2", marks=pytest.mark.skipif(
        not SMOL.is_dir(), reason=f"no {SMOL.name} in .cache: make model")),
    *(pytest.param(n, marks=pytest.mark.skipif(not STOCK, reason=templates.NO_TRL))
      for n in ("deepseek_r1_distill", "qwen3", "llama3_1")),
]  # fmt: skip


@pytest.fixture(scope="module")
def under(request: pytest.FixtureRequest, folder: Path) -> Under:
    name = request.param
    if name == "smollm2":
        return Under(load_tokenizer(SMOL), {})
    return Under(carrying(folder, STOCK.get(name, CHATML), name), {})


def _search(test: Callable[..., None], strategy: st.SearchStrategy[Conversation], examples: int) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    given(strategy)(
        settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                 suppress_health_check=quiet)(test)
    )()  # fmt: skip


@pytest.mark.parametrize("under", NAMES, indirect=True)
def test_any_text_is_rendered_right_or_refused_with_a_reason(under: Under) -> None:
    def one(conversation: Conversation) -> None:
        _, wrong = under.look(conversation)
        assert wrong == []

    _search(one, conversations(), 150)


@pytest.mark.parametrize("under", NAMES, indirect=True)
def test_ordinary_text_is_practically_never_refused(under: Under) -> None:
    """Special tokens written out, and pieces of Jinja, are ordinary here."""
    refused: list[str] = []
    seen: list[bool] = []

    def one(conversation: Conversation) -> None:
        why, wrong = under.look(conversation)
        assert wrong == []
        seen.append(True)
        if why:
            refused.append(why)

    _search(one, conversations(ordinary=True), 100)
    print(f"{len(refused)} of {len(seen)} refused")
    assert len(seen) >= 100 and len(refused) <= len(seen) // 50, refused[:3]


@st.composite
def conversations_with_a_call(draw: st.DrawFn) -> Conversation:
    """A question, a call with or without words and reasoning, its result, an answer: all of any text."""
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    texts = st.lists(st.one_of(anything, st.sampled_from(SNIPPETS)), min_size=1, max_size=3).map("".join)
    perhaps = st.one_of(st.just(""), texts)
    call = templates.says(draw(perhaps), draw(perhaps), templates.CALL)
    result = replace(templates.RESULT, content=draw(texts))
    answer = templates.says(draw(texts), draw(perhaps))
    return templates.talk(templates.user(draw(texts)), call, result, answer, tools=True)


@pytest.mark.skipif(not STOCK, reason=templates.NO_TRL)
@pytest.mark.parametrize("under", ["qwen3", "qwen2_5", "llama3_1"], indirect=True)
def test_any_text_around_a_call_is_rendered_right_or_refused(under: Under) -> None:
    refused: list[bool] = []

    def one(conversation: Conversation) -> None:
        why, wrong = under.look(conversation)
        assert wrong == []
        refused.append(bool(why))

    _search(one, conversations_with_a_call(), 100)
    print(f"{sum(refused)} of {len(refused)} refused")
    assert not all(refused)


def test_reasoning_that_leads_to_no_answer_is_refused_by_name(folder: Path) -> None:
    conversation = templates.talk(templates.user("Why?"), templates.says("", "Hm."))
    failed = choose(carrying(folder, CHATML), [conversation]).failed
    assert failed == {0: "the template leaves out the reasoning of turn 2 (assistant)"}


# --- each way to break the renderer is caught ---

TALK = Conversation(
    (Turn("system", "Be brief."), Turn("user", "Why <|im_end|> so?"),
     Turn("assistant", "<think>Hm.</think> Because.", weight=0.5), Turn("user", "And?"),
     Turn("assistant", "So be it.")), False, "rows.jsonl:1")  # fmt: skip
Spans = list[tuple[int, int]]
Change = Callable[[list[int], Spans], tuple[list[int], Spans]]
Break = Callable[[pytest.MonkeyPatch], None]


def tokens_become(change: Change) -> Break:
    """A renderer that does this to its tokens and to the ranges of the answers in them."""
    real = Renderer._tokens

    def broken(patch: pytest.MonkeyPatch) -> None:
        def tokens(self: Renderer, layout: Layout) -> tuple[list[int], Spans]:
            made = real(self, layout)
            row = bool(layout.answers) and layout.answers[-1].end == len(layout.text)
            return change(*made) if row else made  # prompts are made by it, too

        patch.setattr(Renderer, "_tokens", tokens)
        # The proof is to find it alone, without what is checked of rows that are cut at their answers.
        patch.setattr(Renderer, "_check_prompts", lambda *a: None)

    return broken


def conversation_becomes(**contents: str) -> Break:
    """A renderer to which the template gives other texts than the conversation's: t0="…" for turn 0."""
    real = ChatTemplate.layout

    def layout(self: ChatTemplate, conversation: Conversation) -> Layout:
        turns = tuple(
            replace(t, content=contents.get(f"t{i}", t.content)) for i, t in enumerate(conversation.turns)
        )
        return real(self, replace(conversation, turns=turns))

    return lambda patch: patch.setattr(ChatTemplate, "layout", layout)


def moved(spans: Spans, start: int, end: int) -> Spans:
    return [(a + start, b + end) for a, b in spans]


def prompts_become(change: Callable[[list[int]], list[int]]) -> Break:
    real = Renderer.prompt
    return lambda patch: patch.setattr(Renderer, "prompt", lambda self, asked: change(real(self, asked)))


BROKEN = {
    "drops the last end token": tokens_become(lambda t, s: (t[:-1], [*s[:-1], (s[-1][0], s[-1][1] - 1)])),
    "does not train the end tokens": tokens_become(lambda t, s: (t, moved(s, 0, -1))),
    "trains one token late": tokens_become(lambda t, s: (t, [(a + 1, min(b + 1, len(t))) for a, b in s])),
    "trains one token early": tokens_become(lambda t, s: (t, moved(s, -1, -1))),
    "begins twice": tokens_become(lambda t, s: ([t[0], *t], moved(s, 1, 1))),
    "trains the prompt": tokens_become(lambda t, s: (t, [(1, s[0][1]), *s[1:]])),
    "trains all between two answers": tokens_become(lambda t, s: (t, [s[0], (s[0][1], s[1][1])])),
    "skips the first answer": tokens_become(lambda t, s: (t, [(s[0][0], s[0][0]), s[1]])),
    "skips the last answer": tokens_become(lambda t, s: (t, [s[0], (s[1][1], s[1][1])])),
    "trains nothing": tokens_become(lambda t, s: (t, [(0, 0), (0, 0)])),
    "takes the weight of the other turn": tokens_become(lambda t, s: (t, s[::-1])),
    "ends twice": tokens_become(lambda t, s: ([*t, t[-1]], [s[0], (s[1][0], s[1][1] + 1)])),
    "adds a token to the prompt": tokens_become(lambda t, s: ([*t[:3], t[4], *t[3:]], moved(s, 1, 1))),
    "loses a token of the prompt": tokens_become(lambda t, s: ([*t[:3], *t[4:]], moved(s, -1, -1))),
    "loses a token of an answer": tokens_become(
        lambda t, s: ([*t[: s[0][0]], *t[s[0][0] + 1 :]], [(s[0][0], s[0][1] - 1), *moved(s[1:], -1, -1)])
    ),
    "swaps the tokens of two answers": tokens_become(
        lambda t, s: (
            [*t[: s[0][0]], *t[slice(*s[1])], *t[s[0][1] : s[1][0]], *t[slice(*s[0])]],
            [(s[0][0], s[0][0] + s[1][1] - s[1][0]), (s[1][1] - (s[0][1] - s[0][0]), s[1][1])],
        )
    ),
    "loses the system prompt": conversation_becomes(t0=""),
    "loses the question": conversation_becomes(t1=""),
    "cuts reasoning": conversation_becomes(t2=" Because."),
    "cuts an answer": conversation_becomes(t4="So be"),
    "answers the first question with the second answer": conversation_becomes(t2="So be it."),
    "makes a control token of the data": lambda patch: patch.setattr(
        render, "_blind", lambda text, control: [text]
    ),
    "asks with a token more": prompts_become(lambda ids: [*ids, ids[-1]]),
    "asks with a token less": prompts_become(lambda ids: ids[:-1]),
}
# The proof holds an example against its conversation and sees no prompt; the oracle does.
ONLY_BY_THE_ORACLE = {"asks with a token more", "asks with a token less"}


@pytest.fixture(scope="module")
def chatml(folder: Path) -> Tokenizer:
    return carrying(folder, CHATML)


def test_the_unbroken_renderer_passes(chatml: Tokenizer) -> None:
    renderer = Renderer(chatml, "assistant")
    example = renderer.example(TALK)
    assert [*token_faults(TALK, example, chatml), *prompt_faults(TALK, example, renderer)] == []


@pytest.mark.parametrize("how", BROKEN)
def test_the_proof_refuses_a_renderer_that(
    how: str, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    BROKEN[how](monkeypatch)
    renderer = Renderer(chatml, "assistant")
    if how in ONLY_BY_THE_ORACLE:
        renderer.example(TALK)
        return
    with pytest.raises(Unproven):
        renderer.example(TALK)


@pytest.mark.parametrize("how", BROKEN)
def test_the_oracle_sees_a_renderer_that(
    how: str, chatml: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    BROKEN[how](monkeypatch)
    monkeypatch.setattr(render, "prove", lambda *a: None)
    renderer = Renderer(chatml, "assistant")
    example = renderer.example(TALK)
    assert [*token_faults(TALK, example, chatml), *prompt_faults(TALK, example, renderer)] != []
