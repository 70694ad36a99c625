"""Training templates: what takes over where a model's own chat template loses, cuts or inserts text.

    choose(tokenizer, conversations)     # the first template under which every conversation is proven

Each is Jinja text, stored with the adapter, so that whatever serves it (transformers, mlx-lm, vLLM) writes
the prompts that were trained. In order:

1. the model's own;
2. its own with `enable_thinking` set to false, for models that mark an answer without reasoning by a prompt
   of its own (Qwen3), where the data has no reasoning;
3. a plain one: the model's own texts around system, user and assistant, found by rendering marks
   (template.py), and nothing done to the answers;
4. its own with the answers hidden from it: it renders marks, and the answers are put in afterwards. So it
   shows tools and their results as ever, and cannot cut an answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from burnish.data.conversation import Conversation, Turn
from burnish.data.template import PROBE, ChatTemplate, Layout, Unproven
from burnish.models.tokenizer import Refused, Tokenizer

# How R1, Qwen3 and their like write reasoning; used where a template knows no reasoning of its own.
_THINK = ("<think>\n", "\n</think>\n\n")
OWN, NO_TEMPLATE = "the model's own", "none"


@dataclass(frozen=True)
class Chosen:
    """The tokenizer with the template that was chosen, its name, and why the ones before it were not."""

    tokenizer: Tokenizer
    name: str
    why: str
    layouts: Mapping[int, Layout]  # of the conversations that it renders; none of plain ones
    failed: Mapping[int, str]  # conversations that it does not render either → why


def choose(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> Chosen:
    """The first template that renders every chat conversation; else the one that fails the fewest of them."""
    chats = {i: c for i, c in enumerate(conversations) if not c.plain}
    if not chats:
        return Chosen(tokenizer, NO_TEMPLATE, "the rows are plain text, tokenised as it stands", {}, {})
    if not tokenizer.has_chat_template:
        return Chosen(
            tokenizer, NO_TEMPLATE, "", {}, dict.fromkeys(chats, "the tokenizer has no chat template")
        )
    if any(c.tools for c in chats.values()):
        tokenizer = tokenizer.for_tools()
    why: list[str] = []
    best: Chosen | None = None
    for name, candidate in _candidates(tokenizer, any(map(_thinks, chats.values()))):
        layouts, failed = _lay_out(candidate, chats, len(best.failed) if best else len(chats))
        told = "; ".join(why) or "every conversation is proven under it"
        if best is None or len(failed) < len(best.failed):
            best = Chosen(ending(candidate), name, told, layouts, failed)
        if not failed:
            return best
        first = min(failed)
        why.append(f"{name} fails {conversations[first].at}: {failed[first]}")
    assert best is not None, "the model's own template is always tried"
    return replace(best, why="; ".join(why))


def _lay_out(
    tokenizer: Tokenizer, chats: Mapping[int, Conversation], most: int
) -> tuple[dict[int, Layout], dict[int, str]]:
    """Tried no further where `most` have failed: another template is no worse."""
    template, layouts, failed = ChatTemplate(tokenizer), {}, {}
    for i, conversation in chats.items():
        try:
            layouts[i] = template.layout(conversation)
        except Unproven as e:
            failed[i] = str(e)
            if len(failed) >= most and len(failed) < len(chats):
                break
    return layouts, failed


def ending(tokenizer: Tokenizer) -> Tokenizer:
    """The same, and what its chat template closes an answer with ends one, whatever its settings say."""
    if not tokenizer.has_chat_template:
        return tokenizer
    end = ChatTemplate(tokenizer).end
    return tokenizer.with_stop(tokenizer.special[end]) if end else tokenizer


def _thinks(conversation: Conversation) -> bool:
    return any(t.reasoning or "</think>" in t.content for t in conversation.turns if t.role == "assistant")


def _candidates(tokenizer: Tokenizer, thinks: bool) -> Iterator[tuple[str, Tokenizer]]:
    own = tokenizer.template
    yield OWN, tokenizer
    if not thinks and "enable_thinking" in own:
        quiet = "{%- set enable_thinking = false -%}" + own
        yield "the model's own, without thinking", tokenizer.with_template(quiet)
    probes = _probe(ChatTemplate(tokenizer))
    if probes is None:
        return
    yield "burnish's plain training template", tokenizer.with_template(_plain(probes))
    yield "the model's own around hidden answers", tokenizer.with_template(_hidden(own, probes))


@dataclass(frozen=True)
class _Probes:
    """The template's own texts between those of the data."""

    first_user: str  # before the first question of a conversation without a system prompt
    system: tuple[str, str] | None  # before a system prompt, and between it and the first question
    ask: str  # between a question and the answer's place
    header: str  # opens an answer without reasoning, by a special token
    think: tuple[str, str]  # before and after reasoning
    again: str  # between an answer and the next question
    end: str  # after the last answer
    ask_too_far: str  # what the prompt writes beyond `ask`: the beginning of reasoning, which is trained
    inserted: str  # what is written before a last answer only (an empty block of reasoning)


def _probe(template: ChatTemplate) -> _Probes | None:
    """None where the template does not take even a plain conversation."""
    try:
        four = template.frame((*PROBE, *PROBE))
        ask = template.frame(PROBE[:1], ask=True)
    except (Refused, Unproven):
        return None
    if [s[0] for s in four.slots] != [0, 1, 2, 3]:
        return None
    first, history, again, last, end = four.texts
    asked, too_far = ask.texts[1], ""
    if asked.startswith(history):  # R1: the prompt opens the reasoning that answers of the past do not have
        asked, too_far = history, asked[len(history) :]
    header = history[len(asked) :] if history.startswith(asked) else ""
    if header.strip() and not template.special_in(header):
        header = ""
    inserted = last[len(history) :] if last.startswith(history) else ""
    think = _reasoning(template, asked)
    return _Probes(first, _system(template), asked, header, think, again, end, too_far, inserted)


def _system(template: ChatTemplate) -> tuple[str, str] | None:
    try:
        frame = template.frame((Turn("system", "s"), *PROBE))
    except (Refused, Unproven):
        return None
    if [s[0] for s in frame.slots] != [0, 1, 2]:
        return None
    return frame.texts[0], frame.texts[1]


def _reasoning(template: ChatTemplate, asked: str) -> tuple[str, str]:
    for key in ("reasoning_content", "thinking", "reasoning"):
        try:
            frame = template.frame((PROBE[0], Turn("assistant", "a", "r")), reasoning=key)
        except (Refused, Unproven):
            continue
        if frame.texts[1].startswith(asked):
            return frame.texts[1][len(asked) :], frame.texts[2]
    return _THINK


def _plain(p: _Probes) -> str:
    system = (
        "{{- raise_exception('This template takes no system prompt') }}"
        if p.system is None
        else f"{{{{- {_quoted(p.system[0])} + message.content }}}}"
    )
    texts = {
        "again": p.again,
        "after_system": p.first_user if p.system is None else p.system[1],
        "first_user": p.first_user,
        "ask": p.ask,
        "header": p.header,
        "think_open": p.think[0],
        "think_close": p.think[1],
        "end": p.end,
    }
    return _filled("plain", {"system": system, **{k: _quoted(t) for k, t in texts.items()}})


def _hidden(own: str, p: _Probes) -> str:
    texts = {
        "think_open": p.think[0],
        "think_close": p.think[1],
        "ask_too_far": p.ask_too_far,
        "inserted": p.inserted,
    }
    return _filled("hidden", {"own": own, **{k: _quoted(t) for k, t in texts.items()}})


def _filled(name: str, texts: Mapping[str, str]) -> str:
    template = (files("burnish.data") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda m: texts[m[1]], template)


def _quoted(text: str) -> str:
    """A Jinja string literal."""
    return json.dumps(text, ensure_ascii=False)
