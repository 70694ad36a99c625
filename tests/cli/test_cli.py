"""The verbs as a person and a program use them: `--json` has the facts that the text has, `generate` takes
what there is, and nothing loads a framework before it is needed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish import __version__
from burnish.data.prepare import prepare
from burnish.errors import EXIT_FAILED
from burnish.inference.generate import Answer
from burnish.models.tokenizer import Tokenizer, load_tokenizer
from burnish.recipe import Recipe, known_keys, parse, shipped, shipped_text
from tests.world import Said, World

FRAMEWORKS = ("torch", "mlx", "transformers", "peft", "numpy", "safetensors", "tokenizers", "gguf")


def full(world: World) -> World:
    """A run that has everything in it: a question, a task, validation."""
    world.rows([{"prompt": f"question {i}", "completion": "the answer"} for i in range(12)])
    world.recipe(
        data={"valid_share": 0.25}, train={"max_steps": 20, "lr": 0.05, "eval_every": 10, "save_every": 10},
        ask=["question 1"], evaluate={"task": "exact-match", "max_new_tokens": 8},
        generation={"max_new_tokens": 8},
    )  # fmt: skip
    return world


@pytest.fixture
def learning(world: World) -> World:
    return full(world)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> World:
    """A world with a finished run in `out`, to be read only, which answers everything with `the answer`."""
    world = full(World(tmp_path_factory.mktemp("learnt"), tiny_folder))
    said = world.train()
    assert (said.code, said.err) == (0, "")
    (world.root / "said").write_text(said.out)
    return world


# --- train ---


def events(learnt: World) -> list[dict[str, Any]]:
    return Said(0, (learnt.root / "said").read_text(), "").events


def test_train_prints_every_event_as_json(learnt: World):
    said = events(learnt)
    kinds = [e["event"] for e in said]
    assert kinds[:4] == ["planned", "rehearsed", "answered", "scored"]
    assert kinds[-3:] == ["answered", "scored", "finished"]
    recorded = [json.loads(line) for line in (learnt.out / "events.jsonl").read_text().splitlines()]
    assert recorded == said
    metrics = [json.loads(line) for line in (learnt.out / "metrics.jsonl").read_text().splitlines()]
    assert metrics == [e for e in said if e["event"] in ("stepped", "validated")]


def test_train_tells_a_person_the_same_facts(learning: World, learnt: World):
    text = learning.burnish("train", "recipe.yaml", "--out", "b")
    assert (text.code, text.err) == (0, "")
    planned = events(learnt)[0]
    assert (
        f"{planned['examples']} examples ({planned['tokens']} tokens, {planned['trained']} of them"
        in text.out
    )
    for e in events(learnt):
        if e["event"] == "stepped":
            assert f"step {e['step']}/20  loss {e['loss']:.4f}  lr {e['lr']:.2e}" in text.out
        elif e["event"] == "validated":
            assert f"step {e['step']}: validation loss {e['loss']:.4f}" in text.out
        elif e["event"] == "scored":
            percent = 100 * e["correct"] / e["total"]
            assert (
                f"exact-match {e['when']} training: {percent:.1f} % ({e['correct']} of {e['total']})"
                in text.out
            )
        elif e["event"] == "answered":
            assert f"{e['when']} training, asked: question 1\n  answer: {e['answer'].strip()}" in text.out
        elif e["event"] == "rehearsed":  # its numbers are another run's
            assert re.search(
                r"^rehearsed the longest step: \d\.\d\d GiB measured, \d\.\d\d predicted \([+-]\d+\.\d %\), "
                r"\d+\.\d s$", text.out, re.M,
            )  # fmt: skip
        elif e["event"] == "saved":
            assert f"step {e['step']}: saved " in text.out
    assert text.out.splitlines()[-1] == "held-out exact match: before 0.0 %, after 100.0 %"
    assert not re.search(r"\x1b\[", text.out), "no colours where there is no terminal"


def test_skip_before(learning: World):
    said = learning.train("--skip-before")
    assert [e["when"] for e in said.events if "when" in e] == ["after", "after"]


def test_the_run_folder_is_as_designed(learnt: World):
    assert {p.name for p in learnt.out.iterdir()} == {
        "recipe.yaml", "plan.json", "environment.json", "events.jsonl", "metrics.jsonl", "checkpoints",
        "adapter", "best", "lock", "report.html",
    }  # fmt: skip
    assert {p.name for p in (learnt.out / "checkpoints" / "000020").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json",
    }  # fmt: skip
    adapter = {p.name for p in (learnt.out / "adapter").iterdir()}
    assert adapter >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "recipe.yaml"}
    assert "optimizer.safetensors" not in adapter
    assert json.loads((learnt.out / "environment.json").read_text())["burnish"] == __version__
    kept = parse((learnt.out / "recipe.yaml").read_text())
    assert kept == parse((learnt.root / "recipe.yaml").read_text())


# --- generate ---


def test_generate_from_all_that_can_answer(learnt: World):
    plain = learnt.root / "plain"  # an adapter as PEFT alone would save it
    plain.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (plain / name).write_bytes((learnt.out / "adapter" / name).read_bytes())
    greedy = ("--set", "generation.greedy=true", "--set", "generation.max_new_tokens=8", "--json")
    answers: dict[str, str] = {}
    for target in ("out", "out/adapter", "plain", str(learnt.model)):
        said = learnt.burnish("generate", target, "question 1", *greedy)
        assert (said.code, said.err) == (0, ""), said
        given = json.loads(said.out)
        assert given["prompt"] == "question 1"
        assert set(given) == {"prompt", "text", "tokens", "finish", "rung", "reason"}
        answers[target] = given["text"]
    assert answers["out"] == answers["out/adapter"] == answers["plain"] == "the answer"
    assert answers[str(learnt.model)] != "the answer"


def test_generate_to_a_person_is_the_text_alone(learnt: World):
    said = learnt.burnish("generate", "out", "question 1")
    assert (said.code, said.out, said.err) == (0, "the answer\n", "")


def test_generate_answers_many_prompts_in_order(learnt: World):
    said = learnt.burnish("generate", "out", "question 1", "question 7")
    assert said.out == "# question 1\nthe answer\n\n# question 7\nthe answer\n\n"
    lines = learnt.burnish("generate", "out", "question 1", "question 7", "--json").out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["question 1", "question 7"]


@pytest.mark.parametrize("args", [[], ["-"]])
def test_generate_reads_a_prompt_from_stdin(learnt: World, args: list[str]):
    said = learnt.burnish("generate", "out", *args, "--json", stdin="question 1\n")
    given = json.loads(said.out)
    assert (given["prompt"], given["text"]) == ("question 1", "the answer")


def test_generate_uses_the_prompt_it_was_trained_with(world: World, monkeypatch: pytest.MonkeyPatch):
    """Column templates are applied to a plain question, unless it is to stand as it is."""
    import burnish.cli.generate

    asked: list[str] = []

    def answered(_: object, tokenizer: Tokenizer, prompts: list[list[int]], *__: object) -> list[Answer]:
        asked.extend(tokenizer.decode(p, keep_special=True) for p in prompts)
        return [Answer("", 0, "stop", "", "")] * len(prompts)

    monkeypatch.setattr(burnish.cli.generate, "answer", answered)
    world.rows([{"Q": f"question {i}", "A": "the answer"} for i in range(8)])
    world.recipe(data={"prompt": "Q: {Q}\nA: ", "completion": "{A}"})
    assert world.train().code == 0
    for target, more in (
        ("out", []),
        ("out", ["--raw"]),
        (str(world.model), []),
        (str(world.model), ["--raw"]),
    ):
        assert world.burnish("generate", target, "question 1", *more).code == 0
    chat = "<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\n"
    assert asked == ["Q: question 1\nA: ", "question 1", chat, "question 1"]


# --- data ---


def test_data_counts_are_those_of_the_examples(learning: World):
    facts = json.loads(learning.burnish("data", "recipe.yaml", "--json").out)
    recipe = parse(
        (learning.root / "recipe.yaml").read_text(), overrides=[f"data.train={learning.root}/data.jsonl"]
    )
    found = prepare(recipe, load_tokenizer(learning.model))
    assert facts["train"]["rows"] == 9 and facts["valid"]["rows"] == 3 and facts["held_out"] is True
    assert facts["train"]["tokens"] == sum(len(e.tokens) for e in found.train.examples)
    assert facts["train"]["trained"] == sum(int((e.weights > 0).sum()) for e in found.train.examples)
    text = learning.burnish("data", "recipe.yaml").out
    for part in ("train", "valid"):
        f = facts[part]
        line = (
            f"{f['rows']} rows, {f['tokens']} tokens, {f['trained']} trained ({f['trained_percent']:.1f} %)"
        )
        assert line in text
        assert f"median {f['median']}, 95 % below {f['p95']}, longest {f['longest']}" in text
    assert facts["format"] == "prompt/completion" and facts["format"] in text


def test_data_says_what_is_left_out_and_cut(world: World):
    world.rows([{"prompt": "why? " * n, "completion": "the answer"} for n in (1, 60, 8)])
    dropped = ("data", "recipe.yaml", "data.too_long=drop")
    assert json.loads(world.burnish(*dropped, "--json").out)["train"]["dropped"] == 1
    assert "1 rows left out, 0 cut" in world.burnish(*dropped).out
    cut = ("data", "recipe.yaml", "data.too_long=truncate", "data.loss_on=all", "--json")
    assert json.loads(world.burnish(*cut).out)["train"]["truncated"] == 1


def shown(world: World, *overrides: str) -> list[tuple[str, bool]]:
    said = world.burnish("data", "recipe.yaml", *overrides, "--show", "1", "--json")
    (example,) = json.loads(said.out)["examples"]
    return [(piece["text"], piece["trained"]) for piece in example]


def test_data_show_marks_exactly_what_is_trained(world: World):
    world.rows([{"messages": [
        {"role": "user", "content": "question 1"}, {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "question 2"}, {"role": "assistant", "content": "answer 2"},
    ]}])  # fmt: skip
    expected = [
        ("<|im_start|>user\nquestion 1<|im_end|>\n<|im_start|>assistant\n", False),
        ("answer 1<|im_end|>", True),
        ("\n<|im_start|>user\nquestion 2<|im_end|>\n<|im_start|>assistant\n", False),
        ("answer 2<|im_end|>", True),
    ]
    assert shown(world) == expected
    text = world.burnish("data", "recipe.yaml", "--show", "1").out
    marked = "".join(f"⟦{piece}⟧" if trained else piece for piece, trained in expected)
    assert marked in text
    everything = shown(world, "data.loss_on=all")
    assert [on for _, on in everything] == [False, True], "but for the first token, which nothing predicts"


def test_data_show_of_plain_rows(world: World):
    world.rows([{"text": "question: 1 + 1 answer: 2"}])
    assert shown(world) == [("question", False), (": 1 + 1 answer: 2<|im_end|>", True)]
    cut = shown(world, "data.answer_after=answer:")
    assert cut == [("question: 1 + 1 answer:", False), (" 2<|im_end|>", True)]


# --- doctor, recipes ---


def test_doctor_tells_a_program_and_a_person_the_same(world: World):
    said = world.burnish("doctor", "--json")
    facts = json.loads(said.out)
    text = world.burnish("doctor")
    problems = any(c["status"] == "problem" for c in facts["checks"])
    assert said.code == text.code == (EXIT_FAILED if problems else 0)
    assert facts["machine"]["chip"] in text.out and f"{facts['machine']['cores']} cores" in text.out
    for check in facts["checks"]:
        assert check["status"] in ("ok", "warning", "problem")
        assert f" {check['name']}: " in text.out
        assert check["status"] == "ok" or check["advice"], "what is wrong has a remedy"


def test_recipes_schema_describes_a_recipe(world: World):
    found: dict[str, Any] = json.loads(world.burnish("recipes", "--schema").out)
    assert found["type"] == "object" and found["additionalProperties"] is False
    keys = set(found["properties"])
    for name, section in found["properties"].items():
        ref = section.get("$ref") or next((r["$ref"] for r in section.get("allOf", [])), "")
        if ref:
            keys |= {f"{name}.{key}" for key in found["$defs"][ref.rsplit("/", 1)[-1]]["properties"]}
    assert keys == set(known_keys())


def test_recipes_lists_and_prints_what_ships(world: World):
    listed = world.burnish("recipes").out
    assert [line.split()[0] for line in listed.splitlines()] == shipped()
    for name in shipped():
        printed = world.burnish("recipes", name).out
        assert printed == shipped_text(name)
        assert isinstance(parse(printed), Recipe)


# --- what loads what ---


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["generate", "--help"], ["--version"], []])
def test_help_loads_no_framework(args: list[str]):
    """`burnish --help` needs nothing of ours but the words; typer itself takes pydantic to parse a verb."""
    frameworks = FRAMEWORKS if args and args != ["--help"] else (*FRAMEWORKS, "pydantic", "yaml", "psutil")
    code = (
        f"import sys\nsys.argv = ['burnish', *{args!r}]\nimport burnish.cli\n"
        "try:\n    burnish.cli.main()\nexcept SystemExit as e:\n    code = e.code\n"
        f"print('LOADED', code, sorted({{m.partition('.')[0] for m in sys.modules}} & set({frameworks!r})))"
    )
    src = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": src}, capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] in ("LOADED 0 []", "LOADED None []", "LOADED 2 []"), done
    said = done.stdout if args else done.stderr
    assert said.startswith(f"burnish {__version__}" if "--version" in args else "Usage: "), done


def test_the_check_for_frameworks_can_fail():
    code = "import sys, numpy\nprint(sorted({m.partition('.')[0] for m in sys.modules} & {'numpy'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['numpy']\n"
