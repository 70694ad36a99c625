"""The shipped recipes parse, and carry the values of what they stand for (docs/DESIGN.md lists them)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.recipe import dump, load, parse, shipped, shipped_text

EXAMPLES = Path(__file__).parent.parent / "examples"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# The guide's `prompt_style` and what it adds for training, with its empty braces named.
GUIDE_PROMPT = """以下是描述任务的指令，以及提供更多上下文的输入。
  请写出恰当完成该请求的回答。
  在回答之前，请仔细思考问题，并创建一个逐步的思维链，以确保回答合乎逻辑且准确。
  ### Instruction:
  你是一位在临床推理、诊断和治疗计划方面具有专业知识的医学专家。
  请回答以下医学问题。
  ### Question:
  {Question}
  ### Response:
  <think>"""
GUIDE_COMPLETION = """{Complex_CoT}
  </think>
  {Response}"""
GUIDE_QUESTION = (
    "一名70岁的男性患者因胸痛伴呕吐16小时就医，心电图显示下壁导联和右胸导联ST段抬高0.1~0.3mV，经补液后血压降至80/60mmHg，"
    "患者出现呼吸困难和不能平卧的症状，体检发现双肺有大量水泡音。在这种情况下，最恰当的药物处理是什么？"
)


def test_five_ship():
    assert shipped() == [
        "deepseek-coder-7b",
        "demo",
        "medical-r1-14b",
        "medical-r1-32b-cuda",
        "mistral-7b-wikisql",
    ]


@pytest.mark.parametrize("name", shipped())
def test_each_parses_is_named_after_its_file_and_explains_itself(name: str):
    recipe = load(name)
    assert recipe.name == name
    assert recipe.model and recipe.data.train and recipe.ask
    assert parse(dump(recipe)) == recipe
    assert shipped_text(name).startswith("# ")
    assert name == "demo" or recipe.model.startswith("~/models/")
    assert name == "demo" or recipe.data.train.startswith("~/data/")


@pytest.mark.parametrize("name", ["medical-r1-14b", "medical-r1-32b-cuda"])
def test_the_guides_prompt_word_for_word(name: str):
    data = load(name).data
    assert data.prompt == GUIDE_PROMPT
    assert data.completion == GUIDE_COMPLETION
    assert load(name).ask == (GUIDE_QUESTION,)
    assert data.train.endswith("/medical-o1-reasoning-SFT/medical_o1_sft_Chinese.json")


def test_medical_14b_is_the_guides_run():
    recipe = load("medical-r1-14b")
    assert recipe.model.endswith("/DeepSeek-R1-Distill-Qwen-14B")
    assert (recipe.backend, recipe.device, recipe.dtype, recipe.quantize) == ("auto", "auto", "auto", "none")
    assert recipe.data.rows == 200
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (16, 16, 0)
    assert recipe.lora.targets == SEVEN
    assert not recipe.lora.rslora and recipe.lora.bias == "none" and recipe.lora.last_layers is None
    train = recipe.train
    assert (train.micro_batch, train.batch_size) == (1, 8)  # 1 × 8
    assert (train.lr, train.schedule, train.warmup_steps) == (2e-4, "linear", 5)
    assert (train.max_steps, train.save_every, train.log_every) == (20, 10, 1)
    assert (train.weight_decay, train.clip, train.seed, train.max_length) == (0.01, 1.0, 8137, 2048)
    assert (recipe.generation.max_new_tokens, recipe.generation.temperature) == (1200, 0.7)
    assert not recipe.generation.greedy


def test_medical_14b_has_the_guides_road():
    assert load("medical-r1-14b", ["backend=torch"]).backend == "torch"
    whole = load("medical-r1-14b", ["train.max_steps=null", "data.rows=null"])
    assert whole.train.max_steps is None and whole.data.rows is None and whole.train.epochs == 1


def test_medical_32b_is_the_original_articles_run():
    recipe = load("medical-r1-32b-cuda")
    assert recipe.model.endswith("/DeepSeek-R1-Distill-Qwen-32B")
    assert (recipe.device, recipe.quantize) == ("cuda", "4bit")
    assert recipe.data.rows is None
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout, recipe.lora.targets) == (
        32,
        16,
        0,
        SEVEN,
    )
    train = recipe.train
    assert (train.micro_batch, train.batch_size, train.max_length) == (2, 8, 4096)  # 2 × 4
    assert (train.lr, train.schedule, train.warmup_steps, train.max_steps) == (2e-4, "linear", 5, None)
    assert (train.weight_decay, train.seed, train.log_every) == (0.01, 8137, 10)
    assert recipe.generation.max_new_tokens == 1200


def test_deepseek_coder_is_the_articles_run():
    recipe = load("deepseek-coder-7b")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout) == (8, 32, 0.1)
    assert sorted(recipe.lora.targets) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    train = recipe.train
    assert (train.micro_batch, train.batch_size, train.epochs) == (1, 64, 3)  # 1 × 64
    assert (train.lr, train.clip, train.warmup_steps, train.schedule) == (5e-5, 0.3, 50, "linear")
    how = recipe.generation
    assert (how.temperature, how.top_p, how.top_k, how.repetition_penalty) == (0.7, 0.95, 50, 1.1)
    assert how.max_new_tokens == 2048 and not how.greedy
    assert recipe.data.prompt is not None and recipe.data.completion == "{output}"
    assert "{instruction}" in recipe.data.prompt and "{input}" in recipe.data.prompt
    assert [q["instruction"] for q in recipe.ask if isinstance(q, dict)] == [
        "实现一个二分查找算法",
        "编写一个快速排序函数",
    ]


def test_mistral_is_the_mlx_example():
    recipe = load("mistral-7b-wikisql")
    assert (recipe.train.batch_size, recipe.lora.last_layers, recipe.train.max_steps) == (1, 4, 800)
    assert recipe.generation.max_new_tokens == 50
    row = "table: t\ncolumns: Notes\nQ: which notes \nA: SELECT Notes FROM t"
    assert recipe.data.answer_after is not None
    assert row.rpartition(recipe.data.answer_after)[2] == " SELECT Notes FROM t"
    asked = recipe.ask[0]
    assert isinstance(asked, str)
    assert asked.startswith(
        "table: 1-10015132-16\ncolumns: Player, No., Nationality, Position, Years in Toronto, "
    )
    assert asked.endswith("\nQ: What is terrence ross' nationality\nA:")
    assert load("mistral-7b-wikisql", ["data.loss_on=all"]).data.loss_on == "all"


def test_the_demo_asks_three_held_out_questions():
    recipe = load("demo")
    assert (recipe.data.train, recipe.data.valid) == (
        "examples/demo/train.jsonl",
        "examples/demo/valid.jsonl",
    )
    assert recipe.model == ".cache/SmolLM2-135M-Instruct"
    assert recipe.evaluate.task == "exact-match" and recipe.evaluate.rows is None
    assert not recipe.train.best  # the rows that are scored do not choose the adapter
    held_out = [
        json.loads(line)["prompt"] for line in (EXAMPLES / "demo" / "valid.jsonl").read_text().splitlines()
    ]
    assert len(recipe.ask) == 3
    assert set(recipe.ask) <= set(held_out)
