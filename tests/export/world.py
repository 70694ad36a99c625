"""Tiny runs that were really trained, and their exports, proven by the real programs: in this process where
that says as much and costs a tenth, in children as a user has it elsewhere.

    tuned = Tuned(trained(tmp_path, "llama", tied=False))
    tuned.export(tmp_path / "out", "gguf", "q8_0").proof
"""

from __future__ import annotations

import gc
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml

from burnish.errors import EXIT_FAILED, UserError
from burnish.export import consume, job, live, questions
from burnish.export.answers import Answers
from burnish.export.job import Exported, Request
from burnish.export.source import Source, open_source
from burnish.export.targets import Target, target
from tests.tiny import tiny_model
from tests.world import run as burnish

# (to, type, alone): every road but those that round to fewer than 8 bits, which are for wider matrices.
ROADS = (
    ("hf", "f32", False), ("hf", "bf16", False), ("hf", "f16", False), ("gguf", "f32", False),
    ("gguf", "f16", False), ("gguf", "q8_0", False), ("ollama", "q8_0", False), ("mlx", "16bit", False),
    ("mlx", "8bit", False), ("hf", "adapter", True), ("mlx", "adapter", True), ("gguf", "adapter", True),
)  # fmt: skip
PROGRAMS = {"hf": "transformers", "mlx": "mlx-lm", "gguf": "llama-cpp-python", "ollama": "llama-cpp-python"}
_MODULES = {"burnish.export.live": live, "burnish.export.consume": consume}
_LLAMA = ("gguf", "ollama")
# Widths that 4 and 8 bits can be packed in: 64 numbers share a scale in MLX, 32 in GGUF.
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
WORDS = ("the model", "a list", "of words", "user", "the tokenizer", "1 2 3", "10 20 30", "question", "merge")


def rows(n: int, first: int = 0) -> list[dict[str, str]]:
    found = []
    for i in range(first, first + n):
        a, b, c = (WORDS[(i * k + k) % len(WORDS)] for k in (1, 2, 5))
        found.append({"prompt": f"question {i}: {a} and {b}?", "completion": f"{b}, {c} and {a}: {100 - i}"})
    return found


def trained(place: Path, family: str = "llama", tied: bool | None = None, **changes: Any) -> Path:
    """A run folder: `burnish train` in this process, at a rate at which a few steps move the model far.

    changes: of the recipe, section by section; `sizes` are tiny_model's, `quiet` and `stored` of `_quieten`.
    """
    pytest.importorskip("peft", reason="runs are trained with torch, transformers and peft")
    place.mkdir(parents=True, exist_ok=True)
    tiny_model(place / "base", family, tied=tied, **{**SIZES, **changes.pop("sizes", {})})
    _quieten(place / "base", changes.pop("quiet", 4), changes.pop("stored", "float32"))
    for name, part in (("train", rows(24)), ("valid", rows(12, 50))):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe: dict[str, Any] = {
        "model": str(place / "base"), "device": "cpu", "dtype": "float32", "name": "tiny",
        "data": {"train": str(place / "train.jsonl"), "valid": str(place / "valid.jsonl")},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"batch_size": 8, "max_length": 128, "max_steps": 12, "lr": 0.02, "epochs": 9,
                  "keep_layers": 0, "eval_every": 12},
    }  # fmt: skip
    for section, values in changes.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said = burnish(place, ["train", "recipe.yaml", "--out", "run", "--json"])
    assert said.code == 0, said.err
    return place / "run"


def needs(to: str) -> None:
    """Skips the test where the program that reads such an export is not installed."""
    name = {"mlx": "mlx_lm", "gguf": "llama_cpp", "ollama": "llama_cpp"}.get(to, "peft")
    pytest.importorskip(name, reason=f"needs {name}, which reads exports to {to}")


def roads(*wanted: tuple[Any, ...]) -> list[Any]:
    """As pytest's parameters, marked where they take llama.cpp."""
    return [
        pytest.param(*r, id=" ".join(map(str, r[:2])), marks=pytest.mark.llama if r[0] in _LLAMA else ())
        for r in wanted
    ]


@dataclass(frozen=True)
class Tuned:
    """A finished run, and what its trained model answers: asked once."""

    folder: Path

    @cached_property
    def source(self) -> Source:
        return open_source(self.folder, None, [])

    @cached_property
    def live(self) -> Answers:
        with in_this_process(), tempfile.TemporaryDirectory() as place:
            return live.ask_live(self.source, questions.ask_about(self.source), Path(place))

    def export(
        self, out: Path, to: str, type: str | None = None, alone: bool = False, *,
        write: Callable[[Target, Source, Path, str], Any] | None = None, source: Source | None = None,
        **asked: Any,
    ) -> Exported:  # fmt: skip
        """In this process. write: stands for the target's own writer, which it is given."""
        live = self.live

        def found(to: str, alone: bool) -> Target:
            kind = target(to, alone)
            own = write
            return kind if own is None else replace(kind, write=lambda s, f, t: own(kind, s, f, t) or [])

        with in_this_process(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(job, "ask_live", lambda *_: live)
            patch.setattr(job, "target", found)
            return job.export(source or self.source, Request(to, type, out, alone, **asked), lambda _: None)


# --- broken ones ---


def refused(tuned: Tuned, place: Path, *road: Any, **how: Any) -> str:
    """What the proof says of it. It is gone."""
    with pytest.raises(UserError, match="not the model that was trained, and was removed") as e:
        tuned.export(place / "out", *road, **how)
    assert e.value.exit_code == EXIT_FAILED and list(place.iterdir()) == []
    return e.value.message.partition("It failed: ")[2]


def left(said: str) -> float:
    """The share of the adapter that a failed proof names."""
    found = re.search(r"(-?\d+\.\d)% of the adapter's effect is left; expected \d+% to 1\d\d%", said)
    assert found, said
    return float(found[1]) / 100


def changed(change: Callable[[Path], object]) -> Callable[..., None]:
    """The export as it should be, then spoilt."""

    def write(kind: Any, source: Source, folder: Path, type: str) -> None:
        kind.write(source, folder, type)
        change(folder)

    return write


def edited(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- how it is done ---


@contextmanager
def in_this_process() -> Iterator[None]:
    """Who answers is called and not started: a child imports torch for seconds. And of fewer tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (live, consume):
            patch.setattr(module, "ask", lambda name, arguments: _MODULES[name]._answer(arguments))
        patch.setattr(questions, "NEW_TOKENS", 12)
        patch.setattr(questions, "DRAWN_TOKENS", 48)
        gc.freeze()  # else each answer ends with a walk through all that the tests have loaded
        try:
            yield
        finally:
            gc.unfreeze()


def _quieten(base: Path, to: float, stored: str) -> None:
    """A smaller last norm. Logits of random weights lie so far apart that 8 bits move them by more than they
    move any trained model's, whose limits these are. stored: torch's name of the dtype in the file.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    norm = tensors["model.norm.weight"]
    tensors["model.norm.weight"] = norm * (to / len(norm) ** 0.5)
    narrow = {name: value.to(getattr(torch, stored)) for name, value in tensors.items()}
    save_file(narrow, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"dtype": stored}))
