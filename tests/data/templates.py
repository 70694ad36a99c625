"""Stock chat templates, conversations to render with them, and an oracle that trusts nothing of burnish.

    tokenizer = stock("qwen3", tmp_path)          # a tiny byte-level tokenizer that carries trl's copy of it
    kind, why, chosen = outcome(tokenizer, CASES["single"])
    faults(CASES["single"], Renderer(chosen, "assistant"))     # [] or sentences

The templates are read from an installed trl, and not kept here. The oracle decodes tokens and applies the
template as any server would, by transformers alone; of burnish it sees only tokens, weights and prompts.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, cast

from burnish.data.batches import Example
from burnish.data.conversation import Conversation, ToolCall, Turn
from burnish.data.render import Renderer
from burnish.data.template import Unproven
from burnish.data.training_template import choose
from burnish.models.tokenizer import Tokenizer

SMOL = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct"
NO_TRL = "trl is not installed, and its stock templates with it: pip install --no-deps trl"
# What a template writes between a prompt and an answer without reasoning; the model must learn to write it.
HEADERS = {"gptoss": "<|channel|>final<|message|>", "muse_glimmer": " to=user<|message|>", "glm4moe": "\n"}
# How the field writes a token that text is not meant to contain.
_CONTROL = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜\s]{1,40}｜>|<(?:start|end)_of_(?:turn|utterance)>|<\|[a-z\"_]+>|<[a-z_]+\|>"
    r"|</?think>|</?tool_call>|\[gMASK\]|<sop>|<bos>|<eos>|<s>|</s>"
)
_THINK = ("<think>", "</think>")
# What ends an answer, where it is not one of the usual tokens.
_EOS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>", "gptoss": "<|return|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>", "deepseekv3": "<｜end▁of▁sentence｜>",
    "glm4moe": "<|endoftext|>", "phi3": "<|endoftext|>", "phi3_5": "<|endoftext|>", "llava_next": "</s>",
    "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>",
}  # fmt: skip
_USUAL_EOS = ("<|im_end|>", "<end_of_turn>", "<turn|>", "<end_of_utterance>", "<|eot|>", "<|eom|>")
# Tokens that end an answer besides, as the models' generation settings say.
_STOPS = {
    "glm4moe": ("<|user|>", "<|observation|>"), "llama3_1": ("<|eom_id|>",), "llama3_2": ("<|eom_id|>",),
    "gptoss": ("<|call|>",), "gemma4": ("<|tool_response>",),
}  # fmt: skip
KINDS = {
    "the model's own": "p",
    "the model's own, without thinking": "q",
    "burnish's plain training template": "P",
    "the model's own around hidden answers": "H",
}

TOOL = json.dumps({"type": "function", "function": {
    "name": "get_weather", "description": "Weather of a place.", "parameters": {
        "type": "object", "properties": {"place": {"type": "string", "description": "a town"}},
        "required": ["place"]}}})  # fmt: skip
CALL = (ToolCall("get_weather", '{"place": "Gent", "days": 3}', "call00001"),)
RESULT = Turn("tool", '{"degrees": 12}', name="get_weather", id="call00001")


def user(text: str) -> Turn:
    return Turn("user", text)


def says(text: str, reasoning: str = "", calls: tuple[ToolCall, ...] = ()) -> Turn:
    return Turn("assistant", text, reasoning, calls)


def talk(*turns: Turn, tools: bool = False) -> Conversation:
    return Conversation(turns, False, "rows.jsonl:1", (TOOL,) if tools else ())


CASES = {
    "single": talk(user("Why?"), says("Because.")),
    "multi": talk(user("Why?"), says("Because."), user("And?"), says("So.")),
    "system": talk(Turn("system", "Be brief."), user("Why?"), says("Because.")),
    "inline": talk(user("Why?"), says("<think>Hm, why.</think>\nBecause.")),
    "reasoning": talk(user("Why?"), says("Because.", "Hm, why.")),
    "reasoning multi": talk(user("Why?"), says("Because.", "Hm, why."), user("And?"), says("So.", "Aha.")),
    "tools": talk(user("Weather?"), says("", "", CALL), RESULT, says("12 degrees."), tools=True),
    "tools multi": talk(
        Turn("system", "Be brief."), user("Weather?"), says("", "", CALL), RESULT, says("12 degrees."),
        user("Thanks"), says("Welcome."), tools=True),
    "tools reasoning": talk(
        user("Weather?"), says("", "Ask it.", CALL), RESULT, says("12 degrees.", "Cold."), user("Ok?"),
        says("Yes.", "Polite."), tools=True),
}  # fmt: skip
_TWO = (
    ToolCall(
        "get_weather", '{"place": "Löwen", "more": {"a": [1, "x\\"y"], "b": null, "c": true}}', CALL[0].id
    ),
    ToolCall("get_weather", '{"place": "鲁汶"}', "call00002"),
)
MORE_CASES = {
    "text and call": talk(user("Weather?"), says("I look.", "", CALL), RESULT, says("12."), tools=True),
    "reason, text and call": talk(
        user("Weather?"), says("I look.", "Ask it.", CALL), RESULT, says("12.", "Cold."), tools=True),
    "two calls": talk(user("Weather?"), says("", "", _TWO), RESULT, replace(RESULT, id="call00002"),
                      says("12."), tools=True),
    "a call after a call": talk(
        user("Weather?"), says("", "", CALL), RESULT, says("", "", CALL), RESULT, says("12."), tools=True),
    "ends with a call": talk(user("Weather?"), says("", "", CALL), tools=True),
    "ends with a reasoned call": talk(user("Weather?"), says("", "Ask it.", CALL), tools=True),
}  # fmt: skip


def stock_templates() -> dict[str, str]:
    """Name → Jinja text, of every model's own template that trl carries; none where it is not installed."""
    spec = importlib.util.find_spec("trl")
    if spec is None or not spec.submodule_search_locations:
        return {}
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    found = sorted(p for p in folder.glob("*.jinja") if "training" not in p.stem)
    return {p.stem: p.read_text(encoding="utf-8") for p in found}


def carrying(folder: Path, template: str, name: str = "") -> Tokenizer:
    """The tokenizer of `folder` with a template, and the tokens that its text names as added tokens."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    inner: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    tokens = list(dict.fromkeys(_CONTROL.findall(template)))
    words = [t for t in tokens if "think" in t or "tool" in t]  # as Qwen3 and R1 have them
    eos = _EOS.get(name) or next((t for t in _USUAL_EOS if t in template), "<|endoftext|>")
    bos = "<｜begin▁of▁sentence｜>" if "deepseek" in name else "<s>"
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in words])
    inner.add_special_tokens({"additional_special_tokens": [t for t in tokens if t not in words]})
    inner.add_special_tokens({"bos_token": bos, "eos_token": eos})
    inner.chat_template = template
    stops = [inner.convert_tokens_to_ids(t) for t in _STOPS.get(name.split("_v")[0], ())]
    return Tokenizer(cast(Any, inner), stops, adds_bos=True)


def outcome(tokenizer: Tokenizer, conversation: Conversation) -> tuple[str, str, Tokenizer]:
    """One letter (p proven, q quiet, P plain, H hidden, x refused), why, and the tokenizer to render with.

    A conversation that the template renders and the tokenizer does not give back is "!".
    """
    chosen = choose(tokenizer, [conversation])
    if chosen.failed:
        return "x", chosen.failed[0], chosen.tokenizer
    try:
        Renderer(chosen.tokenizer, "assistant").example(conversation)
    except Unproven as e:
        return "!", str(e), chosen.tokenizer
    return KINDS[chosen.name], chosen.why, chosen.tokenizer


# --- the oracle ---


def faults(
    conversation: Conversation, renderer: Renderer, tokenizer: Tokenizer, header: str = ""
) -> list[str]:
    """What is wrong with what a renderer of loss_on=assistant made of a chat; for texts free of look-alikes.

    header: what the template may write, and train, before an answer without reasoning.
    """
    example = renderer.example(conversation)
    found = [*token_faults(conversation, example, tokenizer, header)]
    found += prompt_faults(conversation, example, renderer)
    ids, prompts = example.tokens.tolist(), _prompts(conversation, renderer)
    if not any(_served(conversation, tokenizer, ids, prompts, shape) for shape in SHAPES):
        found.append("transformers alone writes another prompt or another conversation")
    return found


def prompt_faults(conversation: Conversation, example: Example, renderer: Renderer) -> list[str]:
    """What is wrong between the inference prompts and the training tokens."""
    found, prompts, ids = [], _prompts(conversation, renderer), example.tokens.tolist()
    for i, prompt in prompts.items():
        if ids[: len(prompt)] != prompt:
            found.append(f"the prompt of turn {i + 1} is no prefix of the training tokens")
    starts = [start for start, _ in runs(example)]
    if starts != [len(p) for i, p in prompts.items() if conversation.turns[i].weight > 0]:
        found.append("training does not begin where a prompt ends")
    return found


def _prompts(conversation: Conversation, renderer: Renderer) -> dict[int, list[int]]:
    turns = conversation.turns
    asked = [i for i, t in enumerate(turns) if t.role == "assistant"]
    return {i: renderer.prompt(replace(conversation, turns=turns[:i])) for i in asked}


def token_faults(
    conversation: Conversation, example: Example, tokenizer: Tokenizer, header: str = ""
) -> Iterator[str]:
    """What tokens and weights alone show to be wrong."""
    ids, stretches = example.tokens.tolist(), runs(example)
    turns = conversation.turns
    trained = [t for t in turns if t.role == "assistant" and t.weight > 0]
    if len(stretches) != len(trained):
        yield f"{len(stretches)} stretches are trained, of {len(trained)} answers"
        return
    special = tokenizer.special
    for turn, (start, end) in zip(trained, stretches):
        text, closing = (tokenizer.decode(i, True) for i in (ids[start:end], ids[end - 1 : end]))
        if closing not in special:
            yield f"{text!r} does not end with a special token"
        inner = text.removesuffix(closing)
        if not turn.reasoning and not turn.calls:
            if inner not in {h + c for h in ("", header) for c in (turn.content, turn.content.strip())}:
                yield f"trained {inner!r}, not {turn.content!r}"
        elif why := _missing(turn, inner):
            yield f"{why!r} is not trained, in its order, in {inner!r}"
        if {float(w) for w in example.weights[start:end]} != {turn.weight}:
            yield f"weights of {text!r} are not {turn.weight}"
    before = tokenizer.decode(ids[: stretches[0][0]], True) if stretches else tokenizer.decode(ids, True)
    at = 0
    for turn in turns[: turns.index(trained[0]) if trained else len(turns)]:
        if turn.role in ("system", "user"):
            at = before.find(turn.content.strip(), at)
            if at < 0:
                yield f"the {turn.role}'s {turn.content!r} does not stand before the first answer"
                return
    bos = cast(Any, tokenizer)._inner.bos_token_id
    neutral = _neutral_ids(conversation, tokenizer)
    if bos is not None and ids.count(bos) > max(1, neutral.count(bos)):  # SmolLM2's opens every turn
        yield "the beginning-of-sequence token stands twice"
    known = {i for t, i in special.items() if t not in _THINK}
    got, expected = ([i for i in some if i in known] for some in (ids, neutral))
    # The last may be an end that the template leaves out, and it may write more after it.
    if not got or got[:-1] != expected[: len(got) - 1]:
        wrong = [tokenizer.decode(some, True) for some in (got, expected)]
        yield f"special tokens {wrong[0]}, of the same conversation in neutral words {wrong[1]}"


def runs(example: Example) -> list[tuple[int, int]]:
    """The stretches of trained tokens, as [start, end)."""
    groups = [(w, len(list(g))) for w, g in groupby((example.weights > 0).tolist())]
    ends = [sum(n for _, n in groups[: k + 1]) for k in range(len(groups))]
    return [(end - n, end) for (w, n), end in zip(groups, ends) if w]


# How a client may write a conversation; a server hands it to the template in one of these.
SHAPES = tuple(product((True, False), ("reasoning_content", "thinking", "reasoning"), ("", None)))


def served(tokenizer: Tokenizer, conversation: Conversation, ask: bool, shape: Any = SHAPES[0]) -> list[int]:
    """Tokens as transformers alone makes them, on the day that burnish renders."""
    as_object, key, nothing = shape
    messages = []
    for turn in conversation.turns:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content or nothing}
        if turn.reasoning:
            message[key] = turn.reasoning
        if turn.calls:
            message["tool_calls"] = [
                {"type": "function", "id": c.id, "function": {
                    "name": c.name, "arguments": json.loads(c.arguments) if as_object else c.arguments}}
                for c in turn.calls
            ]  # fmt: skip
        if turn.role == "tool":
            message |= {"name": turn.name, "tool_call_id": turn.id}
        messages.append(message)
    tools = [json.loads(t) for t in conversation.tools] or None
    with _fixed_day():
        return cast(Any, tokenizer)._inner.apply_chat_template(
            messages, tools=tools, tokenize=True, add_generation_prompt=ask, return_dict=False
        )


def _served(
    conversation: Conversation,
    tokenizer: Tokenizer,
    ids: list[int],
    prompts: dict[int, list[int]],
    shape: Any,
) -> bool:
    turns = conversation.turns
    try:
        for i, prompt in prompts.items():
            if served(tokenizer, replace(conversation, turns=turns[:i]), True, shape) != prompt:
                return False
        whole = served(tokenizer, conversation, False, shape)
    except Exception:  # a template is a program, and may raise anything at a message that it does not expect
        return False
    return whole[: len(ids)] == ids or whole == ids[:-1] or whole[: len(ids) - 1] == ids[:-1]


@contextmanager
def _fixed_day() -> Iterator[None]:
    from transformers.utils import chat_template_utils as utils

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Day:
            return cls(2024, 7, 26)

    real, utils.datetime = utils.datetime, Day  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.datetime = real  # type: ignore[attr-defined]


def _neutral_ids(conversation: Conversation, tokenizer: Tokenizer) -> list[int]:
    """The same conversation with other words for every text, as transformers alone renders it."""
    words = [
        replace(t, content="some words" * bool(t.content), reasoning="a thought" * bool(t.reasoning))
        for t in conversation.turns
    ]
    for shape in SHAPES:
        try:
            return served(tokenizer, replace(conversation, turns=tuple(words)), False, shape)
        except Exception:  # as above
            continue
    raise AssertionError("transformers renders the conversation in no way")


def _missing(turn: Turn, text: str) -> str:
    """The first part of an answer that does not stand in `text` after the one before it; else nothing."""
    at = 0
    for part in (turn.reasoning.strip(), turn.content.strip()):
        if text.find(part, at) < 0:
            return part
        at = text.find(part, at) + len(part)
    for call in turn.calls:
        if text.find(call.name, at) < 0:
            return call.name
        for leaf in _leaves(json.loads(call.arguments)):
            if all(form not in text[at:] for form in _forms(leaf)):
                return str(leaf)
        at = text.find(call.name, at) + len(call.name)
    return ""


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _forms(leaf: Any) -> set[str]:
    """How a value may be written: as JSON, with and without escapes, and as Python writes it."""
    if not isinstance(leaf, str):
        return {str(leaf), json.dumps(leaf)}
    return {leaf, json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1]}
