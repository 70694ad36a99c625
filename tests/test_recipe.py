"""What was asked: overrides, defaults, the nearest key, the line of a mistake, to disk and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from burnish.errors import EXIT_BAD_INPUT, UserError
from burnish.recipe import (
    Recipe,
    differences,
    dump,
    expand,
    known_keys,
    load,
    parse,
    schema,
    shipped,
    shipped_text,
)


def refused(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(text, "my.yaml", overrides)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return str(caught.value)


def test_nothing_asked_is_the_defaults():
    assert parse("") == parse("# only a comment\n") == Recipe()


def test_a_section_whose_lines_are_commented_out_is_its_defaults():
    assert parse("lora:\n#  rank: 4\ntrain:\n") == Recipe()
    assert parse("lora:\n", overrides=["lora.rank=4"]).lora.rank == 4


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError):
        Recipe().train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.lr=1e-4", "train.lr", 1e-4),
        ("train.lr=3", "train.lr", 3.0),
        ("train.max_steps=7", "train.max_steps", 7),
        ("train.clip=null", "train.clip", None),
        ("train.micro_batch=auto", "train.micro_batch", "auto"),
        ("train.micro_batch=2", "train.micro_batch", 2),
        ("train.best=false", "train.best", False),
        ("lora.targets=attention", "lora.targets", "attention"),
        ("lora.targets=[q_proj, v_proj]", "lora.targets", ("q_proj", "v_proj")),
        ("quantize=4bit", "quantize", "4bit"),
        ("trackers=[wandb, mlflow]", "trackers", ("wandb", "mlflow")),
        ("ask=[]", "ask", ()),
        ("ask=['a: b', {Q: c}]", "ask", ("a: b", {"Q": "c"})),
        ("generation.stop=['\\n']", "generation.stop", ("\\n",)),
        ("evaluate.task=exact-match", "evaluate.task", "exact-match"),
        # text stands as it is written: no mapping, number, boolean or comment is seen in it
        ("name=2024", "name", "2024"),
        ("name=on", "name", "on"),
        ("model=~/models/a b", "model", "~/models/a b"),
        ("data.valid=", "data.valid", ""),
        ("data.system=Be brief # and kind", "data.system", "Be brief # and kind"),
        ("data.system=a=b", "data.system", "a=b"),
        # but quotes are YAML's, for a newline, and null where a key may be left out
        ('data.answer_after="\\nA:"', "data.answer_after", "\nA:"),
        ("data.system=null", "data.system", None),
    ],
)
def test_an_override_is_what_a_person_means(override: str, key: str, value: object):
    got: object = parse("data: {system: x}\nask: [y]", overrides=[override])
    for part in key.split("."):
        got = getattr(got, part)
    assert got == value
    assert type(got) is type(value)


def test_templates_can_be_given_on_the_command_line():
    data = parse("", overrides=["data.prompt=Q: {Question}", "data.completion={Response}"]).data
    assert (data.prompt, data.completion) == ("Q: {Question}", "{Response}")


def test_later_overrides_win_and_win_over_the_file():
    assert parse("train:\n  lr: 1\n", overrides=["train.lr=2", "train.lr=3"]).train.lr == 3


@pytest.mark.parametrize("number", ["2e-4", "2.0e-4", "0.0002"])
def test_numbers_as_people_write_them(number: str):
    assert parse(f"train:\n  lr: {number}\n").train.lr == 2e-4


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.lrr", "train.lr"), ("lr", "train.lr"), ("rank", "lora.rank"),
        ("modle", "model"), ("learning_rate", "train.lr"), ("num_train_epochs", "train.epochs"),
        ("train.learning_rate", "train.lr"), ("max_seq_length", "train.max_length"),
        ("per_device_train_batch_size", "train.micro_batch"), ("max_grad_norm", "train.clip"),
        ("lora.r", "lora.rank"), ("lora_alpha", "lora.alpha"), ("target_modules", "lora.targets"),
        ("load_in_4bit", "quantize"), ("report_to", "trackers"),
        ("generation.max_tokens", "generation.max_new_tokens"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_with_the_nearest(wrong: str, right: str):
    expected = f"{wrong} is not a recipe key; did you mean {right}?"
    assert expected in refused("", f"{wrong}=1")
    section, _, key = wrong.rpartition(".")
    assert expected in refused(f"{section}:\n  {key}: 1\n" if section else f"{key}: 1\n")


def test_an_unknown_section_is_answered_with_the_nearest():
    assert "my.yaml:1: trian is not a recipe key; did you mean train?" in refused("trian:\n  lr: 1\n")


def test_each_of_our_names_for_another_tools_key_exists():
    from burnish.recipe import _ELSEWHERE

    assert set(_ELSEWHERE.values()) <= set(known_keys())
    assert not set(_ELSEWHERE) & set(known_keys())


def test_every_mistake_is_said_at_once_with_its_line():
    said = refused("name: ok\ntrain:\n  lr: fast\n  epochs: 0\n\nlora:\n  rnak: 8\n", "train.seed=-1")
    assert "4 problems" in said
    assert (
        "my.yaml:3: train.lr: expected a valid number, unable to parse string as a number; got 'fast'" in said
    )
    assert "my.yaml:4: train.epochs: expected greater than or equal to 1; got 0" in said
    assert "my.yaml:7: lora.rnak is not a recipe key; did you mean lora.rank?" in said
    assert "override train.seed=-1: train.seed: expected greater than or equal to 0; got -1" in said
    assert "burnish recipes --schema" in said


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train:\n  lr: 0\n", "my.yaml:2: train.lr: expected greater than 0; got 0"),
        ("train:\n  lr: .nan\n", "my.yaml:2: train.lr: expected a finite number; got nan"),
        ("train:\n  epochs: 1.5\n", "my.yaml:2: train.epochs: expected a valid integer"),
        (
            "train:\n  schedule: cosin\n",
            "my.yaml:2: train.schedule: expected 'linear', 'cosine' or 'constant'; got 'cosin'",
        ),
        (
            "train:\n  micro_batch: 0\n",
            "my.yaml:2: train.micro_batch: expected greater than or equal to 1 or 'auto'; got 0",
        ),
        ("train:\n  micro_batch: 9\n", "my.yaml:1: train: micro_batch 9 is larger than batch_size 8"),
        ("train:\n  warmup_steps: 1\n  warmup_ratio: 0.1\n", "give warmup_steps or warmup_ratio, not both"),
        (
            "lora:\n  targets: foo\n",
            "my.yaml:2: lora.targets: expected 'attention', 'attention+mlp' or 'all-linear' or a list",
        ),
        (
            "lora:\n  targets: []\n",
            "name at least one projection, or a group: attention, attention+mlp, all-linear",
        ),
        ("lora:\n  bias: all\n", "my.yaml:2: lora.bias: expected 'none'; got 'all'"),
        ("data:\n  prompt: '{a}'\n", "my.yaml:1: data: prompt and completion templates go together"),
        ("data:\n  prompt: a\n  completion: b\n  answer_after: c\n", "answer_after is for `text` rows"),
        ("data:\n  train: [a]\n", "my.yaml:2: data.train: expected text (put quotes around it); got ['a']"),
        ("train: 3\n", "my.yaml:1: train: expected a section with keys of its own; got 3"),
        ("trackers: wandb\n", "my.yaml:1: trackers: expected a list, such as [a, b]; got 'wandb'"),
        (
            "trackers: [tensorbord]\n",
            "my.yaml:1: trackers: expected 'tensorboard', 'wandb', 'swanlab', 'mlflow' or 'trackio'",
        ),
        ("ask: What?\n", "my.yaml:1: ask: expected a list"),
        ("name: a b\n", "my.yaml:1: name: "),
        ("train:\n  lr: 1\n  lr: 2\n", "my.yaml:3: train.lr is given twice; first at my.yaml:2"),
        ("lora: {}\nlora: {}\n", "my.yaml:2: lora is given twice; first at my.yaml:1"),
        ("- a\n", "my.yaml:1: expected sections such as `model:` and `train:`, got list"),
        ("just words", "my.yaml:1: expected sections"),
        ("train:\n  lr: [1\n", "my.yaml:3: this is not YAML"),
        ("a: !!python/object:os.system x\n", "my.yaml:1: this is not YAML"),
    ],
)
def test_a_mistake_is_a_sentence(text: str, part: str):
    assert part in refused(text)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.lr", "expected section.key=value, such as train.lr=1e-4"),
        ("=3", "expected section.key=value"),
        ("train..lr=3", "expected section.key=value"),
        ("train=3", "override train=3: train: expected a section"),
        ("train.lr.x=3", "override train.lr.x=3: train.lr: "),
        ("name.x=3", "override name.x=3: name: "),
        ("foo.bar=3", "override foo.bar=3: foo is not a recipe key"),
        ("ask.0=hello", "ask is a value, not a section"),
        ("train.lr=abc", "override train.lr=abc: train.lr: expected a valid number"),
        ("train.max_steps=", "override train.max_steps=: train.max_steps: expected a valid integer"),
        ("lora.targets=[q_proj", "override lora.targets=[q_proj: lora.targets: "),
    ],
)
def test_a_wrong_override_is_named(override: str, part: str):
    assert part in refused("ask: [x]", override)


def test_dump_reads_back():
    asked = parse(
        "name: n\nask: ['a: b', {Q: '多行\\n文本'}]\nlora: {targets: [q_proj], last_layers: 2}\n"
        "train: {lr: 1e-5, clip: null, warmup_ratio: 0.1, micro_batch: 4}\n"
        "data: {prompt: \"以下\\n  {Q}\\n  <think>\", completion: '{A} '}\ntrackers: [wandb]\n"
    )
    assert parse(dump(asked)) == asked
    assert "以下" in dump(asked)  # readable, not escaped


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"], include_characters="\n"), max_size=40
)


# A busy machine is no failure, and CI sees the same examples every time.
STEADY = settings(
    deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


@STEADY
@given(prompt=TEXT, stop=st.lists(TEXT, max_size=2), lr=st.floats(1e-30, 1e30), rank=st.integers(1, 10**6))
def test_any_text_and_number_reads_back(prompt: str, stop: list[str], lr: float, rank: int):
    asked = Recipe.model_validate(
        {
            "data": {"prompt": prompt, "completion": prompt},
            "generation": {"stop": stop},
            "train": {"lr": lr},
            "lora": {"rank": rank},
            "ask": [prompt, {"Q": prompt}],
        }
    )
    assert parse(dump(asked)) == asked


@STEADY
@given(TEXT)
def test_no_text_makes_a_traceback(text: str):
    for overrides in ([], [text], [f"train.lr={text}"], [f"data.system={text}"], [f"ask={text}"]):
        try:
            parse(text, "my.yaml", overrides)
        except UserError as e:
            assert str(e)


def test_differences_name_what_changed():
    a = parse("")
    b = parse("", overrides=["train.lr=1e-3", "lora.targets=[q_proj]", "name=other"])
    assert differences(a, a) == []
    assert sorted(differences(a, b)) == [
        "lora.targets: 'attention+mlp' → ['q_proj']",
        "name: 'run' → 'other'",
        "train.lr: 0.0002 → 0.001",
    ]


def test_the_schema_knows_every_key():
    described = json.loads(schema())
    for key in known_keys():
        section, _, last = key.rpartition(".")
        owner = described["$defs"][section.capitalize()] if section else described
        assert last in owner["properties"], key
        assert section == "" or owner["additionalProperties"] is False


def test_a_file_is_read_by_path_and_a_shipped_recipe_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\n", encoding="utf-8")
    assert load(str(file), ["lora.rank=4"]).lora.rank == 4
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/mine.yaml").name == "mine"
    assert load("demo").name == "demo"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of that name is not in the way
    assert load("demo").name == "demo"


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("no/such.yaml", "there is no recipe file no/such.yaml"),
        ("medical-r1-14", "burnish recipes medical-r1-14b"),
        ("~no-such-user-here/x.yaml", "there is no such user"),
    ],
)
def test_a_recipe_that_is_not_there(asked: str, part: str):
    with pytest.raises(UserError, match=part):
        load(asked)


def test_a_recipe_that_is_not_text(tmp_path: Path):
    file = tmp_path / "bad.yaml"
    file.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        load(str(file))


def test_a_mistake_in_a_shipped_recipes_override_names_it():
    with pytest.raises(UserError, match=r"demo \(shipped\): the recipe has 1 problem"):
        load("demo", ["train.lr=-1"])
    with pytest.raises(UserError, match="there is no recipe 'nope'; shipped: deepseek"):
        shipped_text("nope")
    assert "demo" in shipped()


def test_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert expand("~/x") == tmp_path / "x"
    assert expand("x") == tmp_path / "x"
