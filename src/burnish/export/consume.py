"""An export asked by the program that will use it, in a process of its own.

    answers = ask_program(Reading("gguf", out / "model.gguf"), questions, draws, folder)

In a child, because a file that is wrong may end the process that reads it (llama.cpp asserts, MLX's allocator
on a CPU), and because that process's memory is then free again.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from burnish import backends
from burnish.backends.stock import Consumer
from burnish.errors import UserError
from burnish.export import answers as answers_
from burnish.export.answers import Answers, Tokens, joined
from burnish.export.questions import Asked, Questions
from burnish.machine.child import ask, tell

PROGRAMS = {"hf": "transformers", "mlx": "mlx-lm", "gguf": "llama-cpp-python"}


@dataclass(frozen=True)
class Reading:
    """What is opened, and how. program: a key of PROGRAMS."""

    program: str
    model: Path
    adapter: Path | None = None  # beside a model that is not merged
    dtype: str = "auto"  # computed in: 'auto', as stored, or 'float32'
    device: str = "cpu"


def ask_program(reading: Reading, questions: Questions, draws: Tokens, folder: Path) -> Answers:
    """folder: where the two processes leave files for each other. Raises UserError where the program does not
    take the export.
    """
    request, told = folder / "request.json", folder / "export.npz"
    said = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(reading).items()}
    request.write_text(json.dumps({"reading": said, "draws": draws}), encoding="utf-8")
    asked = folder / "questions.json"
    questions.save(asked)
    ask("burnish.export.consume", [str(request), str(asked), str(told)])
    return answers_.load(told)


def open_reading(reading: Reading) -> Consumer:
    if reading.program == "gguf":
        from burnish.export.llama import open_llama

        return open_llama(reading.model, reading.adapter)
    if reading.program == "mlx":
        return backends.mlx_part("stock").open_stock(reading.model, reading.adapter, reading.dtype)
    from burnish.backends.torch.stock import open_stock as open_torch

    return open_torch(reading.model, reading.adapter, reading.dtype, reading.device)


def _answer(arguments: Sequence[str]) -> dict[str, Any]:
    from burnish.machine.usage import peak_resident_bytes
    from burnish.training.environment import prepare_environment

    prepare_environment()
    request = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    questions = Questions.load(Path(arguments[1]))
    said = request["reading"]
    adapter = Path(said["adapter"]) if said["adapter"] else None
    reading = Reading(said["program"], Path(said["model"]), adapter, said["dtype"], said["device"])
    consumer = open_reading(reading)
    try:
        nll = _losses(consumer, questions.rows, questions.targets)
        prompts = [a.tokens for a in questions.asked]
        rows = [(*p, *d) for p, d in zip(prompts, request["draws"], strict=True)]
        places = [range(len(p), len(row)) for p, row in zip(prompts, rows, strict=True)]
        drawn = _losses(consumer, rows, places)
        greedy = tuple(
            tuple(consumer.greedy(p, questions.max_new_tokens, questions.stop_ids)) for p in prompts
        )
        own = tuple(_read(consumer, a) for a in questions.asked)
        goes_on = tuple(i for i in questions.ends if consumer.ends(i) is False)
    finally:
        consumer.close()
    name = PROGRAMS[reading.program]
    program = f"{name} {importlib.metadata.version(name)}"
    found = Answers(
        nll, drawn, greedy, (), own, joined([]), reading.dtype, reading.device, program,
        peak_resident_bytes(), goes_on,
    )  # fmt: skip
    answers_.save(found, Path(arguments[2]))
    return {"saved": arguments[2]}


def _losses(
    consumer: Consumer, rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]
) -> np.ndarray:
    pairs = zip(rows, targets, strict=True)
    return joined([-consumer.score(row)[np.asarray(places, np.int64) - 1] for row, places in pairs])


def _read(consumer: Consumer, asked: Asked) -> tuple[int, ...] | None:
    try:
        return tuple(consumer.prompt(asked.messages) if asked.messages else consumer.tokens(asked.text))
    except UserError:
        return None


if __name__ == "__main__":
    sys.exit(tell(lambda: _answer(sys.argv[1:])))
