"""The processes of `burnish plan`: what goes wrong in one that it asks comes out as everywhere else, and its
own loads no framework and takes no time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import burnish.cli.plan
from burnish.errors import EXIT_OUT_OF_MEMORY, EXIT_WILL_NOT_FIT, UserError
from burnish.machine import rate
from burnish.machine.child import ask
from tests.world import World

FRAMEWORKS = {"torch", "mlx", "mlx_lm", "transformers", "peft", "numpy", "safetensors", "tokenizers"}

# --- what goes wrong in the process that reads the data


def broken_row(w: World) -> list[str]:
    w.write("dätä.jsonl", '{"prompt": "ä", "completion": "ö"}\n{"prompt": "ü"\n')
    return ["data.train=dätä.jsonl"]


def rows_too_long(w: World) -> list[str]:
    w.rows([{"prompt": "why? " * 200, "completion": f"answer {i}"} for i in range(3)])
    return []


def unknown_column(w: World) -> list[str]:
    w.recipe(data={"prompt": "{question}", "completion": "{completion}"})
    return []


def tokenizer_gone(w: World) -> list[str]:
    (w.copied_model() / "tokenizer.json").unlink()
    return []


@pytest.mark.parametrize("spoil", [broken_row, rows_too_long, unknown_column, tokenizer_gone])
def test_faulty_data_is_told_as_burnish_data_tells_it(world: World, spoil: Any):
    more = spoil(world)
    expected = world.burnish("data", "recipe.yaml", *more)
    assert expected.code != 0 and "\n  → " in expected.err, "the case is none"
    assert world.burnish("plan", "recipe.yaml", *more, "--json") == expected


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules a child process can run."""
    folder = tmp_path / "modules"
    folder.mkdir()
    known = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *([known] if known else [])]))
    return folder


DEATHS = {
    "not_there": (None, "not_there"),
    "raises": ("raise RuntimeError('the disk is on fire')", "RuntimeError: the disk is on fire"),
    "silent": ("raise SystemExit(7)", "ended with code 7: it said nothing"),
    "aborted": ("import os\nprint('{', flush=True)\nos.abort()", "code -6"),
    "half": ("print('{\"lengths\": [1, 2')", "ended with code 0"),
    "chatty": ("print('loading')\nimport sys\nsys.exit('no more memory')", "no more memory"),
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_child_that_dies_is_one_clear_error(
    name: str, world: World, modules: Path, monkeypatch: pytest.MonkeyPatch
):
    script, says = DEATHS[name]
    if script is not None:
        (modules / f"{name}.py").write_text(script, encoding="utf-8")
    monkeypatch.setattr(burnish.cli.plan, "lengths", lambda recipe, more: ask(name, [recipe, *more]))
    said = world.burnish("plan", "recipe.yaml", "train.max_length=60", "--json")
    assert said.code in (1, 2) and said.out == ""
    first, hint = said.err.splitlines()
    assert first.startswith(f"burnish: {name} ended with code ") and says in first
    assert hint.startswith("  → ") and f"-m {name} recipe.yaml train.max_length=60 " in hint


def test_a_child_that_the_system_ends_ran_out_of_memory(modules: Path):
    (modules / "killed.py").write_text("import os\nprint('{', flush=True)\nos.kill(os.getpid(), 9)", "utf-8")
    with pytest.raises(UserError, match="memory ran out") as raised:
        ask("killed", [])
    assert raised.value.exit_code == EXIT_OUT_OF_MEMORY and "train.max_length" in raised.value.hint


@pytest.mark.parametrize("key", ["data.train", "data.valid"])
def test_data_of_a_hub_is_not_asked_for(world: World, key: str):
    said = world.burnish("plan", "recipe.yaml", f"{key}=hf:someone/rows", "--json")
    assert said.code == 0 and json.loads(said.out)["data"].startswith("hf:someone/rows is on a hub")


@pytest.mark.parametrize("model", ["hf:Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"])
def test_a_model_that_is_not_here_cannot_be_measured(world: World, model: str):
    said = world.burnish("plan", "recipe.yaml", f"model={model}", "--measure")
    assert said.code == 2 and "--measure needs the model itself" in said.err
    assert "set model=FOLDER" in said.err


def test_ask_keeps_what_a_person_must_see(modules: Path):
    """All lines of an error, its hint and its code, whatever else was printed; arguments as they were."""
    (modules / "fails.py").write_text(
        "import json, sys\nprint('Loading ██████ 100%')\nprint('a warning', file=sys.stderr)\n"
        "message = '\\n'.join(['two problems:', *sys.argv[1:]])\n"
        "print(json.dumps({'error': {'message': message, 'hint': 'burnish data → all', 'exit_code': 3}}))\n"
        "sys.exit(3)\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError) as raised:
        ask("fails", ["  a b.yaml", "data.prompt=„{q}“ = $HOME *"])
    error = raised.value
    assert error.message == "two problems:\n  a b.yaml\ndata.prompt=„{q}“ = $HOME *"
    assert (error.hint, error.exit_code) == ("burnish data → all", 3)
    (modules / "works.py").write_text("print('a line before')\nprint('{\"n\": [1, 2]}')\n", encoding="utf-8")
    assert ask("works", []) == {"n": [1, 2]}


def test_files_of_the_folder_are_not_taken_for_modules(world: World):
    for name in ("numpy.py", "json.py", "yaml.py"):
        world.write(name, "raise SystemExit('a stranger')\n")
    said = world.burnish("plan", "recipe.yaml", "--json")
    assert (said.code, said.err) == (0, "") and json.loads(said.out)["data"] == "read"


# --- what it costs


def alone(world: World, *args: str) -> tuple[dict[str, Any], float, set[str]]:
    """`burnish plan --json` in a fresh process: what it told, its own CPU seconds, and what it imported."""
    code = (
        "import json, resource, sys\nimport burnish.cli\ncode = 0\n"
        "try:\n    burnish.cli.main()\nexcept SystemExit as e:\n    code = e.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "loaded = sorted({name.partition('.')[0] for name in sys.modules})\n"
        "print(json.dumps([code, used.ru_utime + used.ru_stime, loaded]))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(burnish.cli.__file__).parents[2])}
    command = [sys.executable, "-c", code, "plan", "recipe.yaml", *args, "--json"]
    done = subprocess.run(command, cwd=world.root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done
    summary, (exit_code, seconds, loaded) = map(json.loads, done.stdout.splitlines())
    assert exit_code in (0, None, EXIT_WILL_NOT_FIT)
    return summary, seconds, set(loaded)


def test_this_machine_is_measured_in_no_time_of_its_own(world: World):
    """The only test here that measures this machine's rate, in a process of its own as a person would."""
    summary, seconds, loaded = alone(world)
    assert summary["data"] == "read" and summary["rate"]["measured"] is True
    assert summary["rate"]["source"].startswith("measured on ")
    assert summary["rate"]["flops"] > 1e8 and summary["rate"]["bytes_per_s"] > 1e7
    print(f"burnish plan: {seconds:.2f} s of CPU time in its own process")
    assert loaded & FRAMEWORKS == set() and "burnish" in loaded
    assert seconds < 1.0


def test_a_large_plan_for_another_machine_is_cheap_too(world: World):
    """With everything that `levers` tries."""
    mac = ("--machine", "m2-pro-32gb", "--model-geometry", "qwen2.5-14b")
    summary, seconds, loaded = alone(world, *mac, "device=auto", "dtype=auto", "train.max_length=2048")
    assert summary["levers"] and summary["fits"] is False
    print(f"burnish plan, 14B that does not fit: {seconds:.2f} s of CPU time in its own process")
    assert loaded & FRAMEWORKS == set()
    assert seconds < 1.0


def test_the_tests_leave_the_users_cache_alone(caches: Path):
    """And measure no rate but above."""
    assert rate.cache_folder().is_relative_to(caches)
    assert burnish.cli.plan.measured_rate is not rate.measured_rate
