"""A whole export: checked, written under a temporary name, proven by its own program, then put in place.

    exported = export(source, Request("gguf", "q8_0", Path("wiki-gguf")), print)

Nothing of the final name exists before the proof is passed; an interruption leaves nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from burnish import __version__
from burnish.errors import EXIT_FAILED, UserError
from burnish.export.answers import Answers
from burnish.export.card import base_name, card, run_scores
from burnish.export.consume import Reading, ask_program
from burnish.export.go_template import ollama_prompt, parse
from burnish.export.limits import limits_of
from burnish.export.live import ask_live, live_plan
from burnish.export.merged import Merged, check_unpacked
from burnish.export.modelfile import parse_modelfile
from burnish.export.proof import Proof, judge
from burnish.export.questions import Questions, ask_about
from burnish.export.source import Source
from burnish.export.targets import Target, check_reader, target
from burnish.machine.usage import peak_resident_bytes
from burnish.models.folder import SPARE_DISK_BYTES, check_disk, check_out, replacing, write_json
from burnish.recipe import expand, is_hub_id
from burnish.runs.atomic import checksum

MARK = "export.json"  # what tells an export from other folders: --force replaces no others
PROOF, CARD = "proof.json", "README.md"


@dataclass(frozen=True)
class Request:
    to: str  # 'hf', 'gguf', 'mlx' or 'ollama'
    type: str | None  # of that target's; None: its first
    out: Path
    lora_only: bool = False
    force: bool = False
    prove: bool = True


@dataclass(frozen=True)
class Exported:
    out: Path
    to: str
    type: str
    files: dict[str, int]  # bytes
    notes: tuple[str, ...]
    seconds: dict[str, float]  # of writing and of the two halves of the proof
    peak_bytes: int  # resident, of this process: writing
    proof: Proof | None

    @property
    def n_bytes(self) -> int:
        return sum(self.files.values())


def export(source: Source, request: Request, say: Callable[[str], object]) -> Exported:
    """say: is told what is being done. Raises UserError for whatever stands in the way, as far as it can be
    known before any work; and, exit code 1, where the export is not the model that was trained.
    """
    kind = target(request.to, request.lora_only)
    type = _type(kind, request.type)
    out = _resolved(request.out)
    seconds: dict[str, float] = {}
    try:
        _check(source, kind, type, request, out)
        with _alone(out) as place:
            asked = _asked(source, kind, place, seconds, say) if request.prove else None
            with replacing(out) as partial:
                with _timed(seconds, "write"):
                    say(f"writing {kind.name} {type}")
                    notes = kind.write(source, partial, type)
                proof = None
                if asked is not None:
                    with _timed(seconds, "proof"):
                        proof = _proven(source, kind, type, partial, place, *asked, say)
                _write_words(source, kind, type, partial, proof)
    except OSError as e:
        raise _sentence(e, out) from e
    files = {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    return Exported(out, kind.name, type, files, tuple(notes), seconds, peak_resident_bytes(), proof)


def _resolved(out: Path) -> Path:
    try:
        return out.resolve()
    except (OSError, RuntimeError) as e:  # links that lead in a circle
        raise UserError(f"{out} cannot be used: {e}", "choose another name for OUT") from e


def _check(source: Source, kind: Target, type: str, request: Request, out: Path) -> None:
    """Whatever can be known before any work. Raises UserError; OSError of a folder that may not be read."""
    data = source.recipe.data
    files = [expand(name) for name in (data.train, data.valid) if name and not is_hub_id(name)]
    for used in (source.folder, source.adapter, source.base.folder, *files):
        check_out(used, out, request.force, MARK)
    if out.exists():
        _check_own(out)
    if not request.lora_only:
        Merged(source.base, source.adapter)
    elif kind.name != "mlx":  # mlx-lm alone reads a packed base
        check_unpacked(source.base)
    kind.check(source, type)
    need = kind.n_bytes(source, type) + SPARE_DISK_BYTES
    check_disk(out.parent, need, "free some space, or choose another disk")


def _check_own(out: Path) -> None:
    """Raises UserError for what is not of the export that `out` is: --force would delete it."""
    if not (out / MARK).is_file():
        return  # an empty folder: `check_out` lets no other pass
    try:
        own = {*json.loads((out / MARK).read_text(encoding="utf-8"))["sha256"], MARK}
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{out / MARK} is damaged, so it tells no files", "remove the folder by hand") from e
    more = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir())
    more = [name for name in more if name not in own]
    if more:
        raise UserError(
            f"{out} holds {', '.join(more[:3])}{' and more' * (len(more) > 3)}, which the export did not "
            "write: --force would delete it",
            "move it away, or choose another name for OUT",
        )


def _sentence(error: OSError, out: Path) -> UserError:
    why = error.strerror or str(error)
    where = Path(error.filename) if isinstance(error.filename, str) else out
    if where.is_relative_to(out.parent):
        return UserError(
            f"{out} could not be written, and nothing of it was left: {why}",
            "free some space, or choose another place",
            EXIT_FAILED,
        )
    return UserError(f"{where} could not be read: {why}", "put it right, and try again", EXIT_FAILED)


def _type(kind: Target, asked: str | None) -> str:
    if asked is None:
        return kind.types[0]
    found = asked.lower()
    if found not in kind.types:
        raise UserError(
            f"--type: {kind.name} has {', '.join(kind.types)}; got {asked}", f"--type {kind.types[0]}"
        )
    return found


def _asked(
    source: Source, kind: Target, place: Path, seconds: dict[str, float], say: Callable[[str], object]
) -> tuple[Questions, Answers]:
    check_reader(kind)
    live_plan(source.recipe, source.base)  # said before any work, should it not fit
    with _timed(seconds, "live"):
        questions = ask_about(source)
        say(
            f"asking the trained model: {len(questions.rows)} {questions.origin}, "
            f"{questions.n_targets} answer tokens, {len(questions.asked)} prompts"
        )
        return questions, ask_live(source, questions, place)


def _proven(
    source: Source, kind: Target, type: str, folder: Path, place: Path, questions: Questions, live: Answers,
    say: Callable[[str], object],
) -> Proof:  # fmt: skip
    reading = _in_detail(kind.reading(source, folder, type, place), live)
    if kind.name == "ollama":
        questions = _as_ollama(questions, folder / "Modelfile")
    say(f"asking the export, loaded by {kind.package}")
    answers = ask_program(reading, questions, live.draws, place)
    proof = judge(live, answers, limits_of(*kind.limits(source, type), live.dtype), questions.origin)
    if not proof.passed:
        raise UserError(
            f"the export is not the model that was trained, and was removed. {proof.paragraph}",
            "export another type, or report this with the run's recipe",
            EXIT_FAILED,
        )
    return proof


def _in_detail(reading: Reading, live: Answers) -> Reading:
    """In the dtype that the live model was held in, and where it was: so weights are compared, and fit."""
    device = {"cuda": "cuda", "mps": "mps", "metal": "mps"}.get(live.device, "cpu")
    return replace(reading, dtype=live.dtype, device=device if reading.program == "hf" else reading.device)


def _as_ollama(questions: Questions, modelfile: Path) -> Questions:
    """The same, with chats as the text that Ollama makes of them before llama.cpp sees it."""
    found = {i.name: i.value for i in parse_modelfile(modelfile.read_text(encoding="utf-8"))}
    template = parse(found["TEMPLATE"])
    asked = tuple(
        replace(a, messages=(), text=ollama_prompt(template, a.messages)) if a.messages else a
        for a in questions.asked
    )
    return replace(questions, asked=asked)


def _write_words(source: Source, kind: Target, type: str, folder: Path, proof: Proof | None) -> None:
    if proof is not None:
        text = json.dumps(proof.as_json(), indent=1, ensure_ascii=False) + "\n"
        (folder / PROOF).write_text(text, encoding="utf-8")
    run = source.folder if (source.folder / "events.jsonl").is_file() else source.adapter.parent
    words = card(source, kind.card, run_scores(run), proof.paragraph if proof else "")
    (folder / CARD).write_text(words, encoding="utf-8")
    sums = {p.relative_to(folder).as_posix(): checksum(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    said = {
        "burnish": __version__,
        "to": kind.name,
        "type": type,
        "name": source.name,
        "base": base_name(source.base),
        "proven": proof is not None,
        "sha256": sums,
    }
    write_json(folder / MARK, said)


@contextmanager
def _alone(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what both sides of the proof leave for each other, perhaps a base model.

    It is locked, so that one process at a time makes `out`. Raises UserError where another does.
    """
    place = out.parent / f".{out.name}.proof"
    place.mkdir(exist_ok=True)
    lock = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process dies
        except BlockingIOError as e:
            raise UserError(
                f"another export to {out} is running", "wait for it, or choose another name for OUT"
            ) from e
        for path in place.iterdir():  # of a process that was killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 1)
