"""What happens in a run, as values. The loop yields them; printing, recording and tracking only read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args


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
class Recovered:
    """What went wrong, and how the run went on with the same training."""

    step: int  # gone on from
    cause: str  # 'out of memory', 'SIGKILL', …
    did: str
    repeated: int  # steps that are done again
    seconds: float  # lost, without those of the repeated steps
    error: str = ""  # in its own words


@dataclass(frozen=True)
class Skipped:
    """A step left out, because its numbers left the finite range twice (care.non_finite: skip)."""

    step: int
    error: str
    rows: tuple[str, ...]  # file:line


@dataclass(frozen=True)
class Paused:
    step: int  # of the checkpoint
    why: str  # 'battery', 'heat', 'memory pressure', 'asked'
    words: str


@dataclass(frozen=True)
class Continued:
    step: int
    seconds: float  # of the pause


@dataclass(frozen=True)
class Failed:
    """The end of a run that did not end well; also in failure.json."""

    step: int  # the last one done
    what: str  # in a sentence
    error: str  # in the words of whatever failed
    try_: tuple[str, ...]  # what to do, in order
    diagnosis: str  # of the catalogue; '' where it is not in it


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


Event = (
    Planned | Rehearsed | Answered | Scored | Stepped | Validated | Saved | Noted
    | Recovered | Skipped | Paused | Continued | Failed | Interrupted | Finished
)  # fmt: skip
_KINDS = {kind.__name__.lower(): kind for kind in get_args(Event)}


def as_json(event: Event) -> dict[str, Any]:
    return {"event": type(event).__name__.lower(), **asdict(event)}


def from_json(told: Mapping[str, Any]) -> Event:
    """The event that `as_json` wrote. Raises KeyError or TypeError where it is none."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items() if k != "event"}
    return _KINDS[told["event"]](**fields)
