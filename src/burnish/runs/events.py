"""What happens in a run, as values. The loop yields them; printing, recording and tracking only read them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Planned:
    """The run is about to load its model. summary: `Plan.summary()`; examples and trained tokens of the data.
    """

    out: str
    summary: dict[str, Any]
    examples: int
    valid_examples: int
    tokens: int
    trained: int
    dropped: int
    truncated: int
    resumed_at: int  # optimizer steps already done


@dataclass(frozen=True)
class Rehearsed:
    """The step that needs most memory was run once, and nothing of it kept, before the first one."""

    seconds: float  # with what is set up or compiled at first use
    peak_bytes: int  # since the model was opened
    predicted_bytes: int  # of what the device's counters see
    error_percent: float  # of the prediction, by what was measured: positive where too much was predicted
    tokens: int  # of the step, padding not counted


@dataclass(frozen=True)
class Answered:
    when: str  # 'before' or 'after' training
    question: str
    answer: str
    finish: str  # 'stop', 'length'
    rung: str  # '' as asked; else the step of the fallback ladder that gave the answer
    reason: str


@dataclass(frozen=True)
class Scored:
    when: str
    task: str
    correct: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.total


@dataclass(frozen=True)
class Stepped:
    step: int  # counted from 1
    steps: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    trained: float
    seconds: float
    now_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Validated:
    step: int
    loss: float  # Σ w·nll / Σ w over the whole validation set
    accuracy: float  # share of target tokens that were the most likely one
    trained: float
    best: bool


@dataclass(frozen=True)
class Saved:
    step: int
    folder: str


@dataclass(frozen=True)
class Noted:
    """Something a person should know: an early stop, a broken checkpoint that was passed over."""

    message: str


@dataclass(frozen=True)
class Interrupted:
    step: int
    out: str


@dataclass(frozen=True)
class Finished:
    step: int
    adapter: str
    from_step: int  # the step whose adapter it is
    seconds: float
    estimated_bytes: int
    peak_bytes: int


Event = Planned | Rehearsed | Answered | Scored | Stepped | Validated | Saved | Noted | Interrupted | Finished


def as_json(event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__.lower(), **asdict(event)}
