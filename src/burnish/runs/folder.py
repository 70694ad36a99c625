"""The run folder: recipe, plan, events, checkpoints and the adapter, owned by one process at a time.

    with RunFolder.begin(out, recipe) as run:        # or RunFolder.resume(out, recipe)
        run.save_checkpoint(state, learner.save)

A checkpoint is whole or not there. `resume` finds the newest whose checksums hold, and takes the records back
to it, so that what stands in metrics.jsonl is one unbroken run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from burnish.data.batches import Cursor
from burnish.errors import EXIT_FAILED, UserError, all_problems
from burnish.recipe import Recipe, differences, dump, load
from burnish.runs.atomic import checksum, clean, sync, write_folder, write_text
from burnish.runs.events import Event, Stepped, Validated, as_json
from burnish.runs.failure import FAILURE, LOG
from burnish.runs.lock import LOCK, locked, release
from burnish.runs.wish import WISH

ADAPTER, BEST = "adapter", "best"
RECORDS = ("events.jsonl", "metrics.jsonl")


@dataclass(frozen=True)
class State:
    """All that a run needs beside the learner's own files to go on exactly where it was."""

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    best_loss: float | None = None
    best_step: int | None = None
    stale: int = 0  # validations since the best one
    skipped: bool = False  # the step before was left out: its numbers were not finite
    data: str = ""  # checksum of the examples


class RunFolder:
    """Owns the lock and the open record files."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self._lock = lock
        self._events = self._metrics = None
        try:
            self._events = _appended(path / "events.jsonl")
            self._metrics = _appended(path / "metrics.jsonl")
        except OSError as e:
            self.close()
            raise UserError(
                f"{path} may not be written: {e}", "choose another place with --out DIR", EXIT_FAILED
            ) from e

    @classmethod
    def begin(cls, path: Path, recipe: Recipe) -> RunFolder:
        """A new run. Raises UserError where the folder holds one already, or cannot be made.

        A run that ended before it saved anything is begun anew: correcting a recipe that failed at its first
        step shall not need another folder.
        """
        old = (path / "recipe.yaml").exists()
        if old and not (path / LOCK).exists():
            raise UserError(
                f"{path} holds a recipe.yaml that no run has written, and a run would write its own there",
                "choose another place with --out DIR",
            )
        if old and ((path / ADAPTER).exists() or any((path / "checkpoints").glob("[0-9]*"))):
            raise UserError(
                f"{path} holds a run already",
                "add --resume to go on with it, or choose another place with --out DIR",
            )
        if path.exists() and not path.is_dir():
            raise UserError(
                f"{path} is a file; a run needs a folder of its own", "choose another place with --out DIR"
            )
        lock = locked(path)
        if old:
            clean(path)
            shutil.rmtree(path / BEST, ignore_errors=True)
            for name in (*RECORDS, FAILURE, WISH, LOG):
                (path / name).unlink(missing_ok=True)
        write_text(path / "recipe.yaml", dump(recipe))
        return cls(path, lock)

    @classmethod
    def resume(
        cls, path: Path, recipe: Recipe, by_itself: bool = False, lock: IO[str] | None = None
    ) -> RunFolder:
        """An existing run. Raises UserError where there is none, it is in use, or its recipe was another.

        by_itself: nobody asked for it, a new process takes a dead one's place; what somebody wished for
        meanwhile still holds. lock: that of a parent which has held it since then.
        """
        if not (path / "recipe.yaml").is_file():
            raise UserError(f"{path} holds no run to resume", "leave --resume out to begin one")
        lock = lock or locked(path)
        began = load(str(path / "recipe.yaml"))
        changed = differences(began, recipe)
        if changed:
            release(lock)
            raise all_problems(
                f"{path} was begun with another recipe:",
                changed,
                "resume with the old values, or begin a new run with --out DIR",
            )
        clean(path)
        clean(path / "checkpoints")
        if not by_itself:
            (path / WISH).unlink(missing_ok=True)
        if began != recipe:  # in `care` alone
            write_text(path / "recipe.yaml", dump(recipe))
        return cls(path, lock)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for f in (self._events, self._metrics):
            if f is not None:
                with suppress(OSError):  # a full disk was said when the record was written
                    f.close()
        release(self._lock)

    # --- records ---

    def forget_failure(self) -> None:
        """The run goes on: an earlier end is no longer how it ended."""
        (self.path / FAILURE).unlink(missing_ok=True)

    def record(self, event: Event) -> None:
        """Append to events.jsonl, and a step or a validation also to metrics.jsonl."""
        line = json.dumps(as_json(event), ensure_ascii=False) + "\n"
        files = (self._events, self._metrics) if isinstance(event, Stepped | Validated) else (self._events,)
        try:
            for f in files:
                assert f is not None
                f.write(line)
                f.flush()
        except OSError as e:
            raise UserError(
                f"{self.path}: the records could not be written: {e}",
                "free some space, then the same command with --resume",
                EXIT_FAILED,
            ) from e

    def take_back(self, step: int) -> None:
        """Drop every record and checkpoint of a later step than `step`: the steps to come write them again.

        A checkpoint of a later step is a damaged one; it must not outlive whole ones when old ones go.
        """
        for folder in (self.path / "checkpoints").glob("[0-9]*"):
            if int(folder.name) > step:
                shutil.rmtree(folder, ignore_errors=True)
        for name in RECORDS:
            path = self.path / name
            # At newlines only: an answer may hold U+2028 and its like; a killed process, half a character.
            lines = path.read_bytes().split(b"\n")[:-1]
            write_text(path, "".join(f"{line.decode()}\n" for line in lines if _upto(line, step)))
        assert self._events is not None and self._metrics is not None
        self._events.close()
        self._metrics.close()
        self._events = _appended(self.path / "events.jsonl")
        self._metrics = _appended(self.path / "metrics.jsonl")

    def write_json(self, name: str, value: Any) -> None:
        write_text(self.path / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")

    def update_json(self, name: str, value: Mapping[str, Any]) -> None:
        """What stands there already stays, but for the keys of `value`."""
        self.write_json(name, {**(self.read_json(name) or {}), **value})

    def read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    # --- checkpoints ---

    def save_checkpoint(self, state: State, write: Callable[[Path], object], keep: int) -> Path:
        """Write `checkpoints/STEP`, then remove all but the newest `keep`."""
        final = self.path / "checkpoints" / f"{state.step:06d}"

        def fill(folder: Path) -> None:
            for name in RECORDS:  # no checkpoint shall be on the disk before its records are
                sync(self.path / name)
            write(folder)
            sums = {p.name: checksum(p) for p in sorted(folder.iterdir())}
            told = {**asdict(state), "checksums": sums}
            told["checksum"] = _sum_of(told)
            (folder / "state.json").write_text(json.dumps(told, indent=1) + "\n")

        write_folder(final, fill)
        for old in sorted(final.parent.glob("[0-9]*"))[:-keep]:
            shutil.rmtree(old)
        return final

    def newest_checkpoint(self) -> tuple[Path, State, list[str]] | None:
        """The newest checkpoint whose checksums hold, and what was wrong with newer ones. None: begin at step
        0.
        """
        wrong: list[str] = []
        for folder in sorted((self.path / "checkpoints").glob("[0-9]*"), reverse=True):
            try:
                state = _read_state(folder)
            except (OSError, ValueError, KeyError, TypeError) as e:
                wrong.append(f"checkpoint {folder.name} is damaged ({e}) and was passed over")
                continue
            return folder, state, wrong
        if wrong:
            raise all_problems(
                f"{self.path} has no whole checkpoint:", wrong, "begin a new run with --out DIR"
            )
        return None

    def publish(self, name: str, write: Callable[[Path], object]) -> Path:
        """Write `best/` or `adapter/`, replacing an older one whole."""
        write_folder(self.path / name, write)
        return self.path / name


def _appended(path: Path) -> IO[str]:
    # A path of bytes that are no UTF-8 comes with lone surrogates, which JSON can spell and UTF-8 cannot.
    return path.open("a", encoding="utf-8", errors="backslashreplace")


def _read_state(folder: Path) -> State:
    raw = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    own = raw.pop("checksum", None)  # None: of an older version
    if own is not None and own != _sum_of(raw):
        raise ValueError("state.json does not match its checksum")
    for name, expected in raw.pop("checksums").items():
        if checksum(folder / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
    return State(**{**raw, "cursor": Cursor(**raw["cursor"])})


def _sum_of(told: Mapping[str, Any]) -> str:
    """Of the state itself, in whatever way it is laid out."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _upto(line: bytes, step: int) -> bool:
    try:
        return json.loads(line).get("step", 0) <= step
    except ValueError:  # the process was killed, or the disk was full, in the middle of this line
        return False
