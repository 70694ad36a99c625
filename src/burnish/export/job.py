"""A whole export: checked, written under a temporary name, proven by its own program, then put in place.

    exported = export(source, Request("gguf", "q8_0", Path("wiki-gguf")), print)

Nothing of the final name exists before the proof is passed; an interruption leaves nothing.
"""

from __future__ import annotations

import json
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
from burnish.export.limits import LIMITS
from burnish.export.live import ask_live, live_plan
from burnish.export.merged import Merged
from burnish.export.modelfile import parse_modelfile
from burnish.export.proof import Proof, judge
from burnish.export.questions import Questions, ask_about
from burnish.export.source import Source
from burnish.export.targets import Target, check_reader, target
from burnish.machine.usage import peak_resident_bytes
from burnish.models.folder import SPARE_DISK_BYTES, check_disk, check_out, replacing, write_json
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
    out = request.out.resolve()
    check_out(source.folder, out, request.force, MARK)
    kind.check(source, type)
    if not request.lora_only:
        Merged(source.base, source.adapter)  # an adapter that cannot be merged is said now
    need = kind.n_bytes(source.base, type) + SPARE_DISK_BYTES
    check_disk(out.parent, need, "free some space, or choose another disk")
    seconds: dict[str, float] = {}
    try:
        with _between(out) as place:
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
        raise UserError(
            f"{out} could not be written, and nothing of it was left: {e.strerror or e}",
            "free some space, or choose another place",
            EXIT_FAILED,
        ) from e
    files = {p.relative_to(out).as_posix(): p.stat().st_size for p in sorted(out.rglob("*")) if p.is_file()}
    return Exported(out, kind.name, type, files, tuple(notes), seconds, peak_resident_bytes(), proof)


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
    proof = judge(live, answers, LIMITS[kind.limits(source, type)], questions.origin)
    if not proof.passed:
        raise UserError(
            f"the export is not the model that was trained, and was removed. {proof.paragraph}",
            "export another type, or report this with the run's recipe",
            EXIT_FAILED,
        )
    return proof


def _in_detail(reading: Reading, live: Answers) -> Reading:
    """Computed as widely as the live model was, and where it was, so that the weights are compared."""
    dtype = "float32" if live.dtype == "float32" else "auto"
    device = {"cuda": "cuda", "mps": "mps", "metal": "mps"}.get(live.device, "cpu")
    return replace(reading, dtype=dtype, device=device if reading.program == "hf" else reading.device)


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
def _between(out: Path) -> Iterator[Path]:
    """A folder beside `out` for what both sides of the proof leave for each other, perhaps a base model."""
    place = out.parent / f".{out.name}.proof"
    shutil.rmtree(place, ignore_errors=True)  # of a process that was killed
    place.mkdir()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - began, 1)
