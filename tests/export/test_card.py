"""The model card: true facts, YAML that reads back, and nothing of the machine it was made on."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from burnish.export.card import TARGETS, base_name, card, quoted, run_scores, without_paths
from burnish.export.source import Source
from burnish.models.spec import read_spec
from burnish.models.tokenizer import load_tokenizer
from burnish.recipe import parse
from burnish.runs.events import Finished, Planned, Scored, Stepped, Validated, as_json
from tests.export.test_merged import change_config
from tests.tiny import tiny_model, tiny_recipe

PLANNED = Planned("out", {}, 1000, 100, 94_315, 30_582, 3, 0, 0)
PROOF = "Loaded again by transformers 5: 1,024 tokens, largest difference 0.0001 nats."


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A run in a folder whose name must not be told, of a base with a Chinese name."""
    home = tmp_path / "home-of-someone"
    base = tiny_model(home / "models" / "小模型: v1")
    recipe = tiny_recipe(
        base,
        name="医学",
        data={"train": f"{home}/data/训练 集.jsonl", "valid": "~/secret/valid.jsonl"},
        lora={"rank": 4},
    )
    adapter = home / "run" / "adapter"
    adapter.mkdir(parents=True)
    spec = read_spec(base)
    return Source(
        home / "run", "医学", recipe, adapter, spec, load_tokenizer(base), "messages", True, "Be brief."
    )


def record(source: Source, *events: Any) -> None:
    lines = [json.dumps(as_json(e), ensure_ascii=False) + "\n" for e in events]
    (source.adapter.parent / "events.jsonl").write_text("".join(lines), encoding="utf-8")


def front(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n\n")[1].split("\n\n## ")[0].strip()


@pytest.mark.parametrize("what", TARGETS)
def test_the_front_matter_reads_back(what: str, source: Source):
    found = front(card(source, what, [], PROOF))
    kind = [made] if (made := what.removesuffix("-adapter")) in ("gguf", "mlx", "ollama") else []
    assert found == {
        "base_model": "小模型: v1",
        "library_name": {"hf": "transformers", "adapter": "peft", "mlx": "mlx", "mlx-adapter": "mlx"}.get(
            what, "gguf"
        ),
        "pipeline_tag": "text-generation",
        "tags": ["lora", "burnish", *kind],
    }


@pytest.mark.parametrize("what", TARGETS)
def test_nothing_tells_whose_machine_it_was(what: str, source: Source):
    text = card(source, what, [], PROOF)
    assert "someone" not in text and "secret" not in text and str(Path.home()) not in text
    assert "训练 集.jsonl" in text and "valid.jsonl" in text
    assert not re.search(r"(?m)^\s*\w+: *['\"]?[/~]", section(text, "Recipe"))


def test_the_facts_of_the_run(source: Source):
    record(source, replace(PLANNED, examples=1), Stepped(1, 2, 0.5, 1, 1, 1, 1, 1, 1, 1, 1), PLANNED)
    text = card(source, "hf", ["exact-match, before training: 1 of 3"], PROOF)
    assert text.split("---\n")[2].lstrip().startswith("# 医学\n")
    assert section(text, "Data").splitlines() == [
        "- trained on `训练 集.jsonl`, rows in the format `messages`",
        "- validated on `valid.jsonl`",
        "- 1,000 training rows and 100 validation rows; 94,315 tokens, 30,582 of them trained",
        "- 3 rows were left out and 0 cut: too long",
    ]
    assert section(text, "Scores") == "- exact-match, before training: 1 of 3"
    assert section(text, "Proof") == PROOF
    assert "Base model: `小模型: v1` (Qwen2ForCausalLM, 0.00 billion parameters)" in text


def test_what_was_not_recorded_is_said(source: Source):
    text = card(source, "hf", [], "")
    assert "the number of rows was not recorded" in section(text, "Data")
    assert section(text, "Scores") == "No score was recorded."
    assert "was not checked" in section(text, "Proof")
    assert "does not say its licence" in text


def test_the_recipe_reads_back_and_trains_the_same(source: Source):
    text = section(card(source, "hf", [], PROOF), "Recipe")
    found = parse(text.split("```yaml\n")[1].split("\n```")[0])
    assert found == without_paths(source.recipe)
    assert (found.model, found.data.train) == ("小模型: v1", "训练 集.jsonl")
    assert found.train == source.recipe.train and found.lora == source.recipe.lora


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("hf:openai/gsm8k", "hf:openai/gsm8k"), ("~/models/Qwen2.5-7B/", "Qwen2.5-7B"), ("", ""),
        ("C:\\Users\\someone\\model", "model"), ("rows.jsonl", "rows.jsonl"),
    ],
)  # fmt: skip
def test_of_paths_the_last_part_stays(path: str, name: str, source: Source):
    recipe = source.recipe.model_copy(update={"model": path})
    assert without_paths(recipe).model == name


# --- how to use it ---


def python_of(text: str) -> str:
    return section(text, "How to use it").split("```python\n")[1].split("\n```")[0]


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("what", ["hf", "adapter"])
def test_the_python_runs_as_it_stands(
    what: str, chat: bool, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from tests.export.test_merged import peft_adapter

    folder = source.base.folder
    if what == "adapter":
        peft_adapter(folder, tmp_path / "peft")
        load_tokenizer(folder).save(tmp_path / "peft")
        folder = tmp_path / "peft"
    code = python_of(card(replace(source, chat=chat), what, [], PROOF))
    code = code.replace('"FOLDER"', repr(str(folder))).replace('"小模型: v1"', repr(str(source.base.folder)))
    exec(compile(code.replace("max_new_tokens=256", "max_new_tokens=3"), "card", "exec"), {})
    assert capsys.readouterr().out.strip("\n")
    assert ("apply_chat_template" in code) == chat == ("Be brief." in code)


def test_other_targets_name_their_program(source: Source):
    said = {w: section(card(source, w, [], PROOF), "How to use it") for w in ("gguf", "mlx", "ollama")}
    assert "llama-cli -m FILE.gguf" in said["gguf"]
    assert "mlx_lm.generate --model FOLDER --prompt" in said["mlx"]
    assert "ollama create 医学 -f Modelfile" in said["ollama"]
    assert all("Be brief." in text and "chat template that is stored" in text for text in said.values())
    plain = replace(source, chat=False, system=None)
    said = {w: section(card(plain, w, [], PROOF), "How to use it") for w in ("gguf", "mlx")}
    assert "llama-completion -no-cnv" in said["gguf"] and "--ignore-chat-template" in said["mlx"]
    assert all("without a chat template" in text and "Be brief." not in text for text in said.values())


def test_a_prompt_with_backticks_stays_in_its_fence(source: Source):
    data = source.recipe.data.model_copy(update={"prompt": "```sql\n{q}\n```", "completion": "{a}"})
    told = replace(source, recipe=source.recipe.model_copy(update={"data": data}))
    assert "````text\n```sql\n{q}\n```\n````" in section(card(told, "hf", [], PROOF), "How to use it")


# --- licence and base ---


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"README.md": "---\nlanguage: zh\nlicense: apache-2.0\n---\n# x"}, {"license": "apache-2.0"}),
        ({"README.md": "---\nlicense:\n- mit\ntags: [x]\n---\n"}, {"license": "mit"}),
        ({"README.md": "---\r\nlicense: \"mit\"\r\n---\r\n"}, {"license": "mit"}),
        (
            {"README.md": "---\nlicense: other\nlicense_name: qwen\nlicense_link: https://x.y/LICENSE\n---\n"},
            {"license": "other", "license_name": "qwen", "license_link": "https://x.y/LICENSE"},
        ),
        (
            {"README.md": "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n"},
            {"license": "other", "license_name": "qwen"},
        ),
        ({"README.md": "no front matter\nlicense: mit"}, {}),
        ({"LICENSE": "\n   Apache License\n   Version 2.0, January 2004\n"}, {"license": "apache-2.0"}),
        ({"LICENSE.txt": "The MIT LICENSE\n\nCopyright"}, {"license": "mit"}),
        ({"LICENSE": "LLAMA 3.1 COMMUNITY LICENSE AGREEMENT"}, {"license": "llama3.1"}),
        ({"LICENSE": "Do what you want"}, {}),
    ],
)  # fmt: skip
def test_the_licence_is_the_bases(files: dict[str, str], expected: dict[str, str], source: Source):
    for name, text in files.items():
        (source.base.folder / name).write_text(text, encoding="utf-8", newline="")
    text = card(source, "hf", [], PROOF)
    assert {k: v for k, v in front(text).items() if k.startswith("license")} == expected
    assert ("does not say its licence" in text) == (not expected)


def test_the_config_may_say_the_licence(source: Source):
    change_config(source.base.folder, "config.json", license="cc-by-4.0")
    assert front(card(source, "hf", [], PROOF))["license"] == "cc-by-4.0"


def test_the_base_is_named_by_its_hub_id_where_it_is_sure(source: Source, tmp_path: Path):
    kept = replace(source.base, folder=Path("/x/models--Qwen--Qwen2.5-7B/snapshots/a09a"))
    assert base_name(kept) == "Qwen/Qwen2.5-7B"
    folder = Path("/x/Qwen2.5-14B")
    assert (
        base_name(replace(source.base, folder=folder)) == "Qwen2.5-14B"
    )  # another shape: named so by chance
    shape = {"hidden_size": 5120, "n_layers": 48, "intermediate_size": 13824, "vocab_size": 152064}
    assert base_name(replace(source.base, folder=folder, **shape)) == "Qwen/Qwen2.5-14B"


@pytest.mark.parametrize(
    "text",
    ["plain-1.0", "Qwen/Qwen2.5-7B", "a: b", "no", "NULL", "1e3", "2024-01-01", "模型", '"', "\\", "# x",
     "- x", "a #b", " a ", "", "a\nb", "a\u2028b", "a\x7fb", "\ufeffa", "x" * 300, "'", "{a}", "%x", "@x",
     "a:", "😀"],
)  # fmt: skip
def test_every_text_is_quoted_so_that_it_reads_back(text: str):
    assert yaml.safe_load(f"key: {quoted(text)}\nnext: 1") == {"key": text, "next": 1}


# --- scores ---


def test_scores_before_and_after(source: Source):
    record(
        source,
        Scored("before", "exact-match", 12, 100), Validated(50, 0.5, 0.8, 10.0, True),
        Scored("after", "exact-match", 1, 100), Validated(100, 0.25, 0.9358, 10.0, True),
        Validated(125, 0.3, 0.92, 10.0, False), Scored("after", "exact-match", 71, 100),
        Finished(125, "adapter", 100, 1.0, 1, 1),
    )  # fmt: skip
    assert run_scores(source.adapter.parent) == [
        "exact-match, before training: 12 of 100 (12.0 %) right, of the validation rows",
        "exact-match, after training: 71 of 100 (71.0 %) right, of the validation rows",
        "validation loss at step 100, which this is: 0.2500; 93.6 % of the tokens were the likeliest",
    ]


def test_no_scores_without_a_run_and_a_cut_line_is_passed_over(source: Source):
    assert run_scores(source.adapter) == []
    record(source, Scored("before", "exact-match", 1, 4))
    path = source.adapter.parent / "events.jsonl"
    path.write_text(path.read_text() + '{"event": "scor')
    assert run_scores(source.adapter.parent) == [
        "exact-match, before training: 1 of 4 (25.0 %) right, of the validation rows"
    ]


def test_control_the_events_here_are_those_of_a_run():
    assert as_json(PLANNED) == {"event": "planned", **asdict(PLANNED)}


@pytest.mark.parametrize(
    ("what", "says"),
    [("gguf-adapter", "-m BASE.gguf --lora FILE.gguf"), ("mlx-adapter", "--adapter-path FOLDER")],
)
def test_an_adapter_of_another_kind_is_not_loaded_by_peft(what: str, says: str, source: Source):
    text = card(source, what, [], PROOF)
    assert says in text and "PeftModel" not in text and "stored with it" not in text


def test_lines_that_are_no_events_are_passed_over(source: Source):
    record(source)
    path = source.adapter.parent / "events.jsonl"
    path.write_text(path.read_text() + '"words"\n[1]\n{"no": "event"}\n')
    assert run_scores(source.adapter.parent) == [] and card(source, "hf", [], PROOF)
