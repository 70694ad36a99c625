"""A model whose chat template cuts reasoning out: what is trained, stored, asked and gone on with."""

from __future__ import annotations

import json

from transformers import AutoTokenizer

from burnish.data.conversation import Conversation, Turn
from burnish.data.render import Renderer
from burnish.models.tokenizer import load_tokenizer
from tests.world import World

# As DeepSeek-R1-Distill's: answers lose all before </think>, and the prompt opens it.
CUTTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
ROWS = [
    {"prompt": f"question {i}", "completion": f"<think>the {i} words</think>\nanswer {i}"} for i in range(6)
]


def test_reasoning_is_trained_and_asked_for_as_trained(world: World) -> None:
    (world.copied_model() / "chat_template.jinja").write_text(CUTTING)
    world.rows(ROWS)
    told = json.loads(world.burnish("data", "recipe.yaml", "--show", "1", "--json").out)
    assert told["template"] == "burnish's plain training template"
    trained = "".join(p["text"] for p in told["examples"][0] if p["trained"])
    assert trained == "<think>the 0 words</think>\nanswer 0<|im_end|>"

    said = world.train("ask=[question 1]", "train.max_steps=2", "train.save_every=1")
    assert said.code == 0, said.err
    notes = [e["message"] for e in said.events if e["event"] == "noted"]
    assert any("training template" in n for n in notes), notes
    adapter = world.out / "adapter"
    asked = [{"role": "user", "content": "question 1"}]
    served = AutoTokenizer.from_pretrained(str(adapter))
    prompt = served.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\n"
    ours = load_tokenizer(adapter, model=world.model)
    tokens = Renderer(ours, "assistant").prompt(Conversation((Turn("user", "question 1"),), False, "x"))
    assert ours.decode(tokens, True) == prompt

    after = next(e["answer"] for e in said.events if e["event"] == "answered" and e["when"] == "after")
    given = world.burnish("generate", "out", "question 1", "--json")
    assert json.loads(given.out)["text"] == after, "generate asks as the run did"


def test_a_run_under_a_training_template_goes_on(world: World) -> None:
    (world.copied_model() / "chat_template.jinja").write_text(CUTTING)
    world.rows(ROWS)
    assert world.train("train.max_steps=2", "train.save_every=1").code == 0
    again = world.burnish(
        "train",
        "recipe.yaml",
        "--out",
        "out",
        "--resume",
        "--json",
        "train.max_steps=2",
        "train.save_every=1",
    )
    assert again.code == 0, again.err
