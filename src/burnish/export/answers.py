"""What a model answered to the questions of a proof, on its way between two processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Tokens = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Answers:
    """Per-token losses are float32, in nats, of every target of every row end to end."""

    nll: np.ndarray
    drawn: np.ndarray  # the same for the tokens of the drawn answers
    greedy: Tokens  # the likeliest answer to each prompt
    draws: Tokens  # answers that the live model drew at temperature 1
    prompts: tuple[tuple[int, ...] | None, ...]  # as the program itself reads each prompt; None: it cannot
    base: np.ndarray  # losses without the adapter; empty where that was not asked
    dtype: str  # of the live model, held in; of an export, computed in
    device: str
    program: str  # name and version
    peak_bytes: int  # resident, of the process that answered
    goes_on: tuple[int, ...] = ()  # tokens that ended answers in training, and do not here


def save(answers: Answers, path: Path) -> None:
    words = {k: v for k, v in vars(answers).items() if not isinstance(v, np.ndarray)}
    numbers: dict[str, Any] = {k: v for k, v in vars(answers).items() if isinstance(v, np.ndarray)}
    text = np.frombuffer(json.dumps(words).encode(), np.uint8)
    with path.open("wb") as f:
        np.savez(f, words=text, **numbers)


def load(path: Path) -> Answers:
    with np.load(path) as stored:
        words = json.loads(stored["words"].tobytes())
        numbers = {k: stored[k] for k in stored.files if k != "words"}
    for key in ("greedy", "draws"):
        words[key] = tuple(map(tuple, words[key]))
    words["goes_on"] = tuple(words["goes_on"])
    words["prompts"] = tuple(None if p is None else tuple(p) for p in words["prompts"])
    return Answers(**numbers, **words)


def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)
