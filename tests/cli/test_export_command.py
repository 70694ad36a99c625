"""`burnish export`: what it says, what it refuses before any work, and what it leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import burnish
from burnish.errors import EXIT_BAD_INPUT, EXIT_FAILED
from burnish.export import targets
from burnish.export.adapter import read_adapter
from burnish.export.merged import Merged
from tests.export.world import Tuned, in_this_process, needs, trained
from tests.world import Said, run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    return Tuned(trained(tmp_path_factory.mktemp("tuned"), "llama", tied=False))


@pytest.fixture
def place(tuned: Tuned, tmp_path: Path) -> Path:
    """A copy, to be spoilt: base, train.jsonl, valid.jsonl and run, which names them where they were."""
    for name in ("run", "base"):
        shutil.copytree(tuned.folder.parent / name, tmp_path / name)
    return tmp_path


def exported(place: Path, *more: str) -> Said:
    with in_this_process():
        return run(place, ["export", "run", "out", *more])


def recipe_of(place: Path, was: str, now: str) -> None:
    path = place / "run" / "adapter" / "recipe.yaml"
    text = path.read_text()
    assert was in text
    path.write_text(text.replace(was, now))


# --- what it says ---


def test_what_a_person_is_told(place: Path):
    said = exported(place, "--type", "bf16")
    assert said.code == 0, said.err
    assert f"{place / 'out'}: hf bf16, 0.00 GiB" in said.out or "hf bf16" in said.out
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md", "proof.json"):
        assert f"  {name}" in said.out
    assert "loaded by transformers" in said.out and said.out.rstrip().endswith("It passed.")
    for step in ("asking the trained model", "writing hf bf16", "asking the export, loaded by transformers"):
        assert f"burnish: {step}" in said.err
    assert "Traceback" not in said.err


def test_as_json(place: Path):
    said = exported(place, "--type", "f32", "--json")
    assert said.code == 0, said.err
    facts: dict[str, Any] = json.loads(said.out)
    assert (facts["out"], facts["to"], facts["type"]) == (str(place / "out"), "hf", "f32")
    sizes = {p.name: p.stat().st_size for p in (place / "out").iterdir()}
    assert facts["files"] == sizes and facts["notes"] == []
    assert facts["seconds"].keys() == {"live", "write", "proof"} and facts["peak_bytes"] > 1 << 20
    assert facts["proof"] == json.loads((place / "out" / "proof.json").read_text())
    assert facts["proof"]["passed"] is True and facts["proof"]["survival"] == pytest.approx(1, abs=1e-3)
    assert "burnish: " not in said.err


def test_the_first_type_where_none_is_named(place: Path):
    said = exported(place, "--no-proof", "--json")
    assert json.loads(said.out)["type"] == "auto"
    with in_this_process():
        alone = run(place, ["export", "run", "alone", "--lora-only", "--no-proof", "--json"])
    assert json.loads(alone.out)["type"] == "adapter"
    assert "adapter_model.safetensors" in json.loads(alone.out)["files"]


@pytest.mark.llama
def test_gguf_and_ollama(place: Path):
    needs("gguf")
    facts = json.loads(exported(place, "--to", "gguf", "--json").out)
    assert facts["type"] == "q8_0" and facts["proof"]["program"].startswith("llama-cpp-python")
    assert [n for n in facts["files"] if n.endswith(".gguf")] == ["tiny-q8_0.gguf"]
    facts = json.loads(exported(place, "--to", "ollama", "--type", "F16", "--force", "--json").out)
    assert facts["type"] == "f16" and {"Modelfile", "tiny-f16.gguf"} <= facts["files"].keys()


def test_mlx(place: Path):
    needs("mlx")
    facts = json.loads(exported(place, "--to", "mlx", "--type", "8bit", "--json").out)
    assert facts["proof"]["program"].startswith("mlx-lm") and facts["proof"]["passed"]


def test_not_proven_is_said(place: Path):
    said = exported(place, "--no-proof")
    assert said.code == 0 and said.out.rstrip().endswith("It was not proven: --no-proof.")
    assert "asking" not in said.err
    assert json.loads((place / "out" / "export.json").read_text())["proven"] is False
    card = (place / "out" / "README.md").read_text()
    assert "not checked" in card and "It passed" not in card
    assert not (place / "out" / "proof.json").exists()
    facts = json.loads(exported(place, "--no-proof", "--force", "--json").out)
    assert facts["proof"] is None and facts["seconds"].keys() == {"write"}


def test_a_failed_proof_is_exit_code_1(place: Path, monkeypatch: pytest.MonkeyPatch):
    bare = lambda base, folder: Merged(base, read_adapter(folder).scaled(0.0))  # noqa: E731
    monkeypatch.setattr(targets, "Merged", bare)
    said = exported(place, "--type", "f32", "--json")
    assert said.code == EXIT_FAILED == 1 and said.out == ""
    assert "burnish: the export is not the model that was trained, and was removed." in said.err
    assert "of the adapter's effect is left; expected 99% to 101%" in said.err and "  → " in said.err
    assert not (place / "out").exists()


def test_as_a_user_runs_it(place: Path):
    """The console script and its children, nothing replaced; training rows join three of validation."""
    rows = read_base(place).parent.joinpath("valid.jsonl").read_text().splitlines(keepends=True)
    (place / "valid.jsonl").write_text("".join(rows[:3]))
    code = "import sys; sys.argv[0] = 'burnish'; from burnish.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(Path(burnish.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, "export", "run", "out", "--json", "data.valid=valid.jsonl"],
        cwd=place, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["proof"]["passed"] and facts["proof"]["greedy_prompts"] == 8
    assert facts["proof"]["survival"] == pytest.approx(1, abs=1e-3)
    assert sorted(p.name for p in place.iterdir()) == ["base", "out", "run", "valid.jsonl"]


def test_an_adapter_folder_and_a_base_that_moved(place: Path):
    recipe_of(place, str(read_base(place)), str(place / "gone"))
    said = exported(place, "--base", "base", "--type", "f32", "--json")
    assert said.code == 0, said.err
    with in_this_process():
        again = run(place, ["export", "run/adapter", "again", "--base", "base", "--type", "f32", "--json"])
    assert again.code == 0, again.err
    one, two = ((place / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == two


def read_base(place: Path) -> Path:
    import yaml

    return Path(yaml.safe_load((place / "run" / "adapter" / "recipe.yaml").read_text())["model"])


def test_data_that_moved_can_be_named(place: Path, tuned: Tuned):
    shutil.copyfile(tuned.folder.parent / "valid.jsonl", place / "here.jsonl")
    recipe_of(place, str(tuned.folder.parent / "valid.jsonl"), str(place / "gone.jsonl"))
    said = exported(place, "--type", "f32", "--json", "data.valid=here.jsonl")
    assert said.code == 0, said.err
    assert json.loads(said.out)["proof"]["origin"].startswith("validation rows")


def test_help_loads_no_framework():
    code = (
        "import sys; sys.argv = ['burnish', 'export', '--help']\nfrom burnish.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'mlx', 'llama_cpp', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]") and "--no-proof" in done.stdout


# --- what is refused ---


@dataclass(frozen=True)
class Case:
    name: str
    spoil: Callable[[Path], list[str]]
    says: tuple[str, ...]
    code: int


CASES: list[Case] = []


def bad(*says: str, code: int = EXIT_BAD_INPUT) -> Callable[..., Any]:
    """The case below: what it must say, the last from the next step, and its exit code."""

    def add(spoil: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
        CASES.append(Case(spoil.__name__, spoil, says, code))
        return spoil

    return add


@bad("--to: expected one of hf, gguf, mlx, ollama, got onnx", "→ burnish export RUN OUT --to")
def target_unknown(_: Path) -> list[str]:
    return ["--to", "onnx"]


@bad("--type: hf has auto, bf16, f16, f32; got q8_0", "→ --type auto")
def type_of_another_target(_: Path) -> list[str]:
    return ["--type", "q8_0"]


@bad("--type: gguf has q8_0, f16, bf16, f32, q6_k, q5_k_m, q4_k_m; got q2_k", "→ --type q8_0")
def type_unknown(_: Path) -> list[str]:
    return ["--to", "gguf", "--type", "q2_k"]


@bad("--type: mlx has 16bit, 8bit, 4bit; got 3bit", "→ --type 16bit")
def bits_unknown(_: Path) -> list[str]:
    return ["--to", "mlx", "--type", "3bit"]


@bad("--type: hf has adapter; got f16", "→ --type adapter")
def type_of_an_adapter(_: Path) -> list[str]:
    return ["--lora-only", "--type", "f16"]


@bad("--to ollama --lora-only", "→ leave --lora-only out")
def adapter_for_ollama(_: Path) -> list[str]:
    return ["--to", "ollama", "--lora-only"]


@bad("run is a run without a finished adapter", "→ burnish train … --resume")
def run_without_adapter(place: Path) -> list[str]:
    shutil.copyfile(place / "run" / "adapter" / "recipe.yaml", place / "run" / "recipe.yaml")
    shutil.rmtree(place / "run" / "adapter")
    return []


@bad("run is a model folder that nothing was trained in", "→ burnish convert")
def model_folder(place: Path) -> list[str]:
    shutil.rmtree(place / "run")
    (place / "base").rename(place / "run")
    return []


@bad("run is no run, no adapter and no model folder", "→ name a folder that a run has written")
def empty_folder(place: Path) -> list[str]:
    shutil.rmtree(place / "run")
    (place / "run").mkdir()
    return []


@bad("gone does not exist", "→")
def base_gone(place: Path) -> list[str]:
    recipe_of(place, str(read_base(place)), str(place / "gone"))
    return []


@bad("gone does not exist", "→")
def base_named_is_gone(_: Path) -> list[str]:
    return ["--base", "gone"]


@bad("is not an adapter of", "expected (out, in)", "→ use the model that the adapter was trained on")
def another_base(place: Path) -> list[str]:
    from tests.tiny import tiny_model

    tiny_model(place / "other", "llama", hidden_size=32)
    return ["--base", "other"]


@bad("the data that the export is to be compared", "gone.jsonl does not exist", "data.valid=", "--no-proof")
def validation_rows_gone(place: Path) -> list[str]:
    path = place / "run" / "adapter" / "recipe.yaml"
    path.write_text(path.read_text().replace("valid.jsonl", "gone.jsonl"))
    return []


@bad("the data that the export is to be compared", "gone.jsonl does not exist", "data.train=", "--no-proof")
def training_rows_gone(place: Path) -> list[str]:
    path = place / "run" / "adapter" / "recipe.yaml"
    path.write_text(path.read_text().replace("train.jsonl", "gone.jsonl"))
    return []


@bad("missing does not exist", "→ mkdir -p")
def no_folder_for_out(_: Path) -> list[str]:
    return ["OUT=missing/out"]


@bad("out exists", "--force")
def out_exists(place: Path) -> list[str]:
    (place / "out").mkdir()
    return []


@bad("no export.json", "--force does not replace it", "→ choose another name")
def out_is_no_export(place: Path) -> list[str]:
    (place / "out").mkdir()
    (place / "out" / "letters.txt").write_text("dear")
    return ["--force"]


@bad("adapter_model.safetensors is not a whole safetensors file", "→ copy the adapter folder again")
def adapter_cut_short(place: Path) -> list[str]:
    path = place / "run" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    return []


@bad("that cannot be merged", "use_dora", "→ plain LoRA")
def adapter_of_another_kind(place: Path) -> list[str]:
    path = place / "run" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    return []


@pytest.mark.parametrize("more", [[], ["--no-proof"]], ids=["proven", "unproven"])
@pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
def test_what_is_refused(case: Case, more: list[str], place: Path):
    if more and case.name.endswith("rows_gone"):
        pytest.skip("without a proof no data is read")
    args = case.spoil(place)
    out = next((a.removeprefix("OUT=") for a in args if a.startswith("OUT=")), "out")
    args = [a for a in args if not a.startswith("OUT=")]
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    with in_this_process():
        said = run(place, ["export", "run", out, *args, *more])
    assert said.code == case.code, said.err
    for words in case.says:
        assert words in said.err, said.err
    assert said.err.rindex(case.says[-1]) >= said.err.index("→")
    assert "Traceback" not in said.err and said.out == ""
    assert "asking" not in said.err  # nor any other work
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("missing", ["train", "valid"])
def test_without_a_proof_the_data_may_be_gone(missing: str, place: Path):
    path = place / "run" / "adapter" / "recipe.yaml"
    path.write_text(path.read_text().replace(f"{missing}.jsonl", "gone.jsonl"))
    assert exported(place, "--no-proof").code == 0


@pytest.mark.parametrize("to", ["hf", "mlx"])
def test_a_base_that_is_packed(to: str, place: Path):
    needs("mlx")
    from burnish.backends.mlx.quantize import quantize_folder

    quantize_folder(read_base(place), place / "four", 4)
    said = exported(place, "--to", to, "--base", "four")
    assert said.code == EXIT_BAD_INPUT and "packed" in said.err
    assert "→ name the folder of the original 16-bit weights with --base FOLDER" in said.err
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("args", "package", "install"),
    [
        (["--to", "gguf"], "llama_cpp", "pip install 'burnish[gguf]'"),
        (["--to", "ollama"], "llama_cpp", "pip install 'burnish[gguf]'"),
        (["--to", "gguf", "--lora-only"], "llama_cpp", "pip install 'burnish[gguf]'"),
        (["--to", "mlx", "--lora-only"], "mlx_lm", "pip install 'burnish[mlx]'"),
    ],
    ids=" ".join,
)
def test_a_program_that_is_not_installed(
    args: list[str], package: str, install: str, place: Path, monkeypatch: pytest.MonkeyPatch
):
    """Said before anything is asked or written; without a proof it is not needed."""
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else there(n, *a))
    said = exported(place, *args)
    assert said.code == EXIT_BAD_INPUT
    assert f"loads the export with {package}, which is not installed" in said.err
    assert f"→ {install}, or leave the proof out with --no-proof" in said.err
    assert "asking" not in said.err and "writing" not in said.err and not (place / "out").exists()
    assert exported(place, *args, "--no-proof").code == 0 and (place / "out" / "export.json").is_file()
