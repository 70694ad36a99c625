"""What the parent of a run and its child tell each other, as lines of JSON.

To the child, on its stdin: one `Orders`, then `stop` when the run is to end; the end of the file means that
the parent is gone. From the child: its events as `runs.events` has them; `{"beat": n}` while its interpreter
runs; `{"pulse": s}` when something was done that is no event; one `{"failed": …}` where it ends with an
error.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from burnish.recipe import Recipe


@dataclass(frozen=True)
class Aftermath:
    """What a run's last process died of, told to the one that goes on. lighter: take a rung down first."""

    cause: str
    error: str
    lighter: bool
    step: int  # the last one that was heard of
    since: float  # time.monotonic() when it was last heard of


@dataclass(frozen=True)
class Orders:
    recipe: Recipe
    out: Path
    resume: bool
    skip_before: bool
    aftermath: Aftermath | None = None
    renewable: bool = True  # another process may follow this one
    command: tuple[str, ...] = ()  # as it was typed
    lock: int | None = None  # descriptor of the run's lock, which the parent holds since a process died

    def line(self) -> str:
        aftermath = None if self.aftermath is None else asdict(self.aftermath)
        told = {
            "recipe": self.recipe.model_dump(mode="json"), "out": str(self.out), "resume": self.resume,
            "skip_before": self.skip_before, "aftermath": aftermath, "renewable": self.renewable,
            "command": self.command, "lock": self.lock,
        }  # fmt: skip
        return json.dumps(told) + "\n"

    @classmethod
    def of(cls, line: str) -> Orders:
        told = json.loads(line)
        aftermath = None if told["aftermath"] is None else Aftermath(**told["aftermath"])
        recipe = Recipe.model_validate(told["recipe"])
        flags = told["resume"], told["skip_before"]
        command = tuple(told["command"])
        lock = told["lock"]
        return cls(recipe, Path(told["out"]), *flags, aftermath, told["renewable"], command, lock)


@dataclass(frozen=True)
class Told:
    """An error, as the child tells it. meant: raised on purpose, so that its words are all there is to say;
    else they are a traceback's.
    """

    message: str
    hint: str
    exit_code: int
    meant: bool
