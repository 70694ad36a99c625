"""`find_spec`: a folder, a hub, or the table, in that order, and what is said where none of them knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.errors import UserError
from burnish.models import source
from burnish.models.geometry import spec_of_geometry
from burnish.models.source import find_spec
from burnish.models.spec import ModelSpec, read_spec, spec_of
from burnish.recipe import Recipe, load, parse

KNOWN = "Qwen/Qwen2.5-7B-Instruct"


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """What hubs are asked for; each has the model o/n, and refuses every other one."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # whose models are not ours
    found: list[tuple[str, str]] = []

    def remote_facts(name: str, hub: str) -> tuple[ModelSpec, str]:
        found.append((hub, name))
        if name != "o/n":
            raise UserError(f"{hub}:{name} is not there", "compare the name", 1)
        return spec_of_geometry("smollm2-135m"), "the hub's headers"

    monkeypatch.setattr(source, "remote_facts", remote_facts)
    return found


def of(model: str) -> tuple[ModelSpec, str]:
    return find_spec(Recipe(model=model))


def test_a_local_folder(tiny_folder: Path, tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch):
    assert of(str(tiny_folder)) == (read_spec(tiny_folder), "")
    # a folder that looks like an id, or like a known model, is the folder all the same
    (tmp_path / "Qwen").mkdir()
    (tmp_path / KNOWN).symlink_to(tiny_folder)
    spec, said = of(KNOWN)
    assert (spec.folder, spec.n_layers, said) == (tmp_path / KNOWN, 3, "")
    assert asked == []


def test_a_local_folder_that_is_no_model_is_not_looked_for_elsewhere(tmp_path: Path, asked: list):
    (tmp_path / KNOWN).mkdir(parents=True)
    with pytest.raises(UserError, match=r"has no config.json"):
        of(KNOWN)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"is a file, not a folder") as e:
        of(str(tmp_path / "m.gguf"))
    assert "burnish convert" in e.value.hint and asked == []


@pytest.mark.parametrize(("model", "hub"), [("o/n", "hf"), ("hf:o/n", "hf"), ("ms:o/n", "ms")])
def test_a_hub_id(model: str, hub: str, asked: list):
    spec, said = of(model)
    assert spec.n_layers == 30 and said == "the hub's headers" and asked == [(hub, "o/n")]


def test_a_known_model_whose_hub_does_not_answer(asked: list):
    for model, hub in ((KNOWN, "hf"), (f"hf:{KNOWN}", "hf"), (f"ms:{KNOWN}", "ms")):
        spec, said = of(model)
        assert spec.folder == Path(KNOWN) and spec.eos_ids == (151645, 151643)
        assert said == f"the published config of {KNOWN}; {hub}:{KNOWN} could not be read"
    assert len(asked) == 3


@pytest.mark.parametrize("setting", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_the_table_is_asked(setting: str, asked: list, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(setting, "1")
    spec, said = of(f"hf:{KNOWN}")
    assert spec.parameters == 7_615_616_512 and said.startswith(f"the published config of {KNOWN}; ")
    assert "HF_HUB_OFFLINE is set" in said
    with pytest.raises(UserError, match=r"hf:o/n is not on this machine, .* does not know its") as e:
        of("hf:o/n")
    assert "hf download o/n --local-dir ~/models/n, then model=~/models/n" in e.value.hint
    with pytest.raises(UserError, match=r"ms:o/n is not on this machine") as e:
        of("ms:o/n")
    assert "modelscope download --model o/n" in e.value.hint and asked == []


@pytest.mark.parametrize("model", [
    "~/models/DeepSeek-R1-Distill-Qwen-14B", "/models/DeepSeek-R1-Distill-Qwen-14B/",
    "./DeepSeek-R1-Distill-Qwen-14B", "models/DeepSeek-R1-Distill-Qwen-14B", "r1-distill-qwen-14b",
    "some/where/deepseek-r1-distill-qwen-14b",
])
def test_a_folder_that_is_not_there_and_has_a_known_name(model: str):
    spec, said = of(model)
    assert spec.parameters == 14_770_033_664 and spec.folder.name.lower().endswith("r1-distill-qwen-14b")
    assert said.startswith("the published config of deepseek-ai/DeepSeek-R1-Distill-Qwen-14B; ")


@pytest.mark.parametrize("recipe", [
    "deepseek-coder-7b", "demo", "medical-r1-14b", "medical-r1-32b-cuda", "mistral-7b-wikisql",
])
def test_our_recipes_can_be_planned_on_a_bare_machine(recipe: str, asked: list):
    spec, said = find_spec(load(recipe, []))
    assert spec.attention_linears and "is not there" in said and asked == []


def test_another_owners_model_is_not_taken_for_the_known_one():
    with pytest.raises(UserError, match=r"^hf:someone/Qwen2.5-7B is not there\n"):
        of("hf:someone/Qwen2.5-7B")


def test_what_is_nowhere(tmp_path: Path):
    with pytest.raises(UserError, match=r"hf:mine/thing is not there \(.*/mine/thing is not there e") as e:
        of("mine/thing")
    assert e.value.exit_code == 1 and e.value.hint == "compare the name"
    with pytest.raises(UserError, match=r"nowhere/it does not exist, and it is not a model") as e:
        of("/nowhere/it")
    assert "hf download OWNER/NAME --local-dir /nowhere/it" in e.value.hint
    with pytest.raises(UserError, match=r"did you mean qwen2.5-7b"):
        of("~/models/qwen2.5-7")


@pytest.mark.parametrize("model", ["hf:", "hf:gpt2", "ms:a/b/c", "hf:~/models/x"])
def test_what_is_no_id(model: str):
    with pytest.raises(UserError, match=f"is no model id: expected {model[:3]}OWNER/NAME"):
        of(model)


def test_a_recipe_without_a_model():
    with pytest.raises(UserError, match="names no model"):
        of("")


@pytest.mark.parametrize(
    ("model", "command"),
    [
        ("hf:Qwen/Qwen2.5-7B", "hf download Qwen/Qwen2.5-7B --local-dir ~/models/Qwen2.5-7B"),
        ("ms:Qwen/Qwen2.5-7B", "modelscope download --model Qwen/Qwen2.5-7B --local_dir ~/models/Qwen2.5-7B"),
    ],
)
def test_training_from_a_hub_id_is_told_how_to_get_the_folder(model: str, command: str) -> None:
    with pytest.raises(UserError, match="training reads a folder") as caught:
        spec_of(parse(f"model: {model}"))
    assert command in caught.value.hint and "then model=~/models/Qwen2.5-7B" in caught.value.hint
