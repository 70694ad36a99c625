"""Stock templates × conversations: what becomes of each, and that whatever is not refused is right.

The letters of GOLDEN: p proven under the model's own template, q under it without thinking, P under the plain
training template, H under the model's own around hidden answers, x refused. A change of one wants a look.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest

from burnish.data.conversation import Conversation
from burnish.data.formats import read_conversations
from burnish.data.render import Renderer
from burnish.data.rows import read_rows
from burnish.data.training_template import choose
from burnish.models.tokenizer import Tokenizer
from burnish.recipe import Data
from tests.data import templates
from tests.data.templates import (
    CASES,
    HEADERS,
    MORE_CASES,
    SMOL,
    carrying,
    faults,
    outcome,
    runs,
    says,
    talk,
    user,
)
from tests.tiny import tiny_tokenizer

# Of CASES: single, multi, system, inline, reasoning, reasoning multi, tools, tools multi, tools reasoning.
# Of MORE_CASES: text and call; reason, text and call; two calls; a call after a call; ends with a call;
# ends with a reasoned call.
GOLDEN = {
    "cohere": "ppppPPxxx xxxxxx",
    "cohere2": "ppppPPxxx xxxxxx",
    "deepseek_r1_distill": "PPPPPPxxx xxxxxx",
    "deepseekv3": "PPPPPPxxx xxxxxx",
    "diffusion_gemma": "pppppPxxx xxxxpp",
    "gemma": "ppxpPPxxx xxxxxx",
    "gemma3": "ppppPPxxx xxxxxx",
    "gemma4": "ppppPPppx xxpppp",
    "gemma4_v2": "ppppPPppx xxpppx",
    "gemma4_v3": "ppppPPppx xxpppp",
    "gemma4_v4": "ppppPPppx xxpppp",
    "gemma4_v5": "pppppPppx xxpppp",
    "glm4moe": "qqqPpPqqH qpqqpp",
    "gptoss": "pxpppxpxx xxxppp",
    "idefics3": "xxxxxxxxx xxxxxx",
    "lfm2": "ppppPPxxx xxxxxx",
    "lfm2_2_5": "pppppPppH pppppp",
    "lfm2_2_5_v2": "pppppPppH pppppp",
    "lfm2_2_5_vl": "pppppPppH pppppp",
    "lfm2_v2": "ppppPPppH pHpppH",
    "llama3": "ppppPPxxx xxxxxx",
    "llama3_1": "ppppPPppx xxxppx",
    "llama3_2": "ppppPPppx xxxppx",
    "llava_next": "xxxxxxxxx xxxxxx",
    "muse_glimmer": "ppppppppp xxpppp",
    "nemotron_3_5_lightning": "qqqPpPqqx qpqqqp",
    "nemotron_3_nano": "qqqPpPqqx qpqqqp",
    "nemotron_3_super": "qqqPpPqqx qpqqqp",
    "nemotron_3_ultra": "qqqPpPqqx qpqqqp",
    "phi3": "ppppPPxxx xxxxxx",
    "phi3_5": "ppppPPxxx xxxxxx",
    "qwen2_5": "ppppPPppH pHpppH",
    "qwen2_5_vl": "ppppPPxxx xxxxxx",
    "qwen3": "qPqPpPHHH HpHHpp",
    "qwen3_5_nothink": "pPpPPPpxH pHpppH",
    "qwen3_5_think": "qPqPpPqxH qpqqpp",
    "qwen3_6": "qPqPpPqxH qpqqpp",
    "qwen3_8": "qqqPppqqp qpqqpp",
    "qwen3_instruct_2507": "ppppPPppH pHpppH",
    "qwen3_vl": "ppppPPppH pHpppH",
    "smolvlm": "xxxxxxxxx xxxxxx",
}
ALL_CASES = {**CASES, **MORE_CASES}
MEDICAL = Path(os.environ.get("BURNISH_DATA", SMOL.parents[2] / "shared" / "data")) / "medical-o1-zh"

STOCK = templates.stock_templates()
needs_trl = pytest.mark.skipif(not STOCK, reason=templates.NO_TRL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def r1(folder: Path) -> Tokenizer:
    return carrying(folder, STOCK["deepseek_r1_distill"], "deepseek_r1_distill")


@needs_trl
def test_all_stock_templates_are_in_the_golden() -> None:
    assert sorted(STOCK) == sorted(GOLDEN), "this trl carries other templates: render them and extend GOLDEN"


@pytest.fixture(scope="module")
def named(request: pytest.FixtureRequest, folder: Path) -> tuple[str, Tokenizer]:
    """A stock template's name, and a tokenizer that carries it."""
    return request.param, carrying(folder, STOCK[request.param], request.param)


@needs_trl
@pytest.mark.parametrize("named", GOLDEN, indirect=True)
def test_outcomes_are_as_known_and_no_refusal_is_silent(named: tuple[str, Tokenizer]) -> None:
    name, tokenizer = named
    found = {case: outcome(tokenizer, c) for case, c in ALL_CASES.items()}
    kinds = "".join(kind for kind, _, _ in found.values())
    assert f"{kinds[: len(CASES)]} {kinds[len(CASES) :]}" == GOLDEN[name]
    assert all(why.strip() for _, why, _ in found.values())


def _not_refused() -> list[Any]:
    """(template, case) of all that is not refused."""
    found = []
    for name, kinds in GOLDEN.items():
        for case, kind in zip(ALL_CASES, kinds.replace(" ", "")):
            if kind != "x":
                found.append(pytest.param(name, case, id=f"{name}-{case}"))
    return found


@needs_trl
@pytest.mark.parametrize(("named", "case"), _not_refused(), indirect=["named"])
def test_what_is_not_refused_is_right(named: tuple[str, Tokenizer], case: str) -> None:
    name, tokenizer = named
    _, _, chosen = outcome(tokenizer, ALL_CASES[case])
    assert faults(ALL_CASES[case], Renderer(chosen, "assistant"), chosen, HEADERS.get(name, "")) == []


# --- reasoning under a template that cuts it ---

THOUGHT = "产妇发热，嗯。\n\n 不过，等一下 <b>38.5 °C</b>…"
SICK = talk(user("产后高热寒战？"), says("这是产后发热。", THOUGHT))


@needs_trl
def test_the_stock_r1_template_is_seen_to_cut_reasoning(r1: Tokenizer) -> None:
    inline = talk(user("为什么？"), says(f"<think>{THOUGHT}</think>\n答。"))
    chosen = choose(r1, [inline])
    assert chosen.name == "burnish's plain training template"
    assert "changes the texts" in chosen.why or "leaves out" in chosen.why


@needs_trl
@pytest.mark.parametrize("inline", [True, False])
def test_r1_supervises_every_character_of_reasoning(r1: Tokenizer, inline: bool) -> None:
    row = talk(user("产后高热寒战？"), says(f"<think>{THOUGHT}</think>\n这是产后发热。")) if inline else SICK
    chosen = choose(r1, [row]).tokenizer
    text = _trained(chosen, row)
    end = "<｜end▁of▁sentence｜>"
    given = row.turns[1].content + end if inline else f"<think>\n{THOUGHT}\n</think>\n\n这是产后发热。{end}"
    assert text == [given]


@needs_trl
def test_what_is_saved_serves_the_same_prompts(r1: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chosen = choose(r1, [SICK]).tokenizer
    assert chosen.template != r1.template
    chosen.save(tmp_path)
    read: Any = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    asked = [{"role": "user", "content": "产后高热寒战？"}]
    again = read.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert again == Renderer(chosen, "assistant").prompt(SICK.prompt)
    assert read.decode(again) == "<｜begin▁of▁sentence｜><｜User｜>产后高热寒战？<｜Assistant｜>"
    stock = cast(Any, r1)._inner.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert stock != again, "the stock template opens the reasoning, so the saved one must be what is read"


@needs_trl
@pytest.mark.skipif(not MEDICAL.is_dir(), reason=f"no real data at {MEDICAL}: set BURNISH_DATA")
@pytest.mark.parametrize("name", ["deepseek_r1_distill", "qwen3"])
def test_all_that_the_assistant_says_in_medical_rows_is_supervised(folder: Path, name: str) -> None:
    rows = read_rows(MEDICAL / "train.jsonl", first=50)
    conversations = read_conversations(rows.rows, Data(), chat_template=True).conversations
    assert len(conversations) == 50
    chosen = choose(carrying(folder, STOCK[name], name), conversations)
    assert chosen.failed == {}
    end = "<｜end▁of▁sentence｜>" if name == "deepseek_r1_distill" else "<|im_end|>"
    renderer, characters = Renderer(chosen.tokenizer, "assistant"), 0
    for conversation, row in zip(conversations, rows.rows):
        example = renderer.example(conversation)
        trained = [chosen.tokenizer.decode(example.tokens[a:b].tolist(), True) for a, b in runs(example)]
        assert trained == [row.values["output"] + end]
        characters += len(row.values["output"])
    assert characters > 50 * 500, "these rows hold long reasoning"


def _trained(tokenizer: Tokenizer, conversation: Conversation) -> list[str]:
    example = Renderer(tokenizer, "assistant").example(conversation)
    return [tokenizer.decode(example.tokens[a:b].tolist(), True) for a, b in runs(example)]
