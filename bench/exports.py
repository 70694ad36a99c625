"""Every export of a run: its size, its time, its memory, its proof, and its answers beside the live model's.

    python bench/exports.py RUN OUT FILE.jsonl live hf:f32 gguf:q8_0 mlx:4bit gguf:lora …   # a line each
    python bench/exports.py --table FILE.jsonl                                    # the lines as a table

RUN has validation rows whose answers are right or wrong, such as the one of `bench/wikisql_cpu.py quality`.
Right is what `burnish train` calls right (exact match), on the first `--rows` of them, answered greedily one
by one by the program that the export is for, in a process of its own; `live` is base and adapter by burnish.
The proof's limits are those of the package; a failed one is a line as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from alone import alone, say
from burnish.errors import UserError
from burnish.export.source import Source, open_source

NEW_TOKENS = 50


def one(run: Path, place: Path, what: str, rows: int) -> dict[str, Any]:
    """An export as `burnish export` makes it."""
    from burnish.export.job import Request, export
    from burnish.export.targets import target

    to, _, type = what.partition(":")
    lora = type == "lora"
    source = open_source(run, None, [])
    request = Request(to, None if lora else type, place / what.replace(":", "-"), lora_only=lora, force=True)
    try:
        done = export(source, request, lambda _: None)
    except UserError as e:
        return {"what": what, "failed": e.message}
    assert done.proof is not None
    p, kind = done.proof, target(to, lora)
    row = {
        "what": what, "mib": round(done.n_bytes / 2**20, 1), "seconds": done.seconds,
        "peak_mib": done.peak_bytes >> 20, "targets": p.targets, "mean": p.mean, "worst": p.worst,
        "divergence": p.divergence, "survival": p.survival, "greedy": p.greedy, "loss": p.loss,
        "notes": done.notes, "program": p.program,
    }  # fmt: skip
    if rows:
        reading = replace(kind.reading(source, done.out, done.type, place), dtype="float32")
        row["right"], row["asked"] = alone(by_program, run, reading, rows)
    shutil.rmtree(done.out)
    return row


def by_program(run: Path, reading: Any, rows: int) -> tuple[int, int]:
    """(right answers, all) of an export, computed as its own program does."""
    from burnish.evaluation.tasks.text import exact_match
    from burnish.export.consume import open_reading

    source, asked = _asked(run, rows)
    consumer, right = open_reading(reading), 0
    for prompt, expected in asked:
        tokens = consumer.greedy(prompt, NEW_TOKENS, source.tokenizer.stop_ids)
        right += exact_match(source.tokenizer.decode(tokens), expected)
    return right, len(asked)


def live(run: Path, rows: int) -> dict[str, Any]:
    from burnish import backends
    from burnish.backends.base import Sampling
    from burnish.evaluation.tasks.text import exact_match
    from burnish.export.live import live_plan
    from burnish.training.environment import prepare_environment

    prepare_environment()
    source, asked = _asked(run, rows)
    learner = backends.open(live_plan(source.recipe, source.base))
    learner.load_adapter(source.adapter)
    how, right = Sampling(NEW_TOKENS, stop_ids=source.tokenizer.stop_ids), 0
    for prompt, expected in asked:
        tokens = [t.id for t in learner.generate([prompt], how) if t.id not in how.stop_ids]
        right += exact_match(source.tokenizer.decode(tokens), expected)
    return {"what": "live", "right": right, "asked": len(asked)}


def _asked(run: Path, rows: int) -> tuple[Source, list[tuple[list[int], str]]]:
    from burnish.data.prepare import prepare
    from burnish.data.render import Renderer

    source = open_source(run, None, [])
    renderer = Renderer(source.tokenizer, source.recipe.data.loss_on)
    conversations = prepare(source.recipe, source.tokenizer).valid.conversations[:rows]
    return source, [(renderer.prompt(c.prompt), c.answer) for c in conversations]


def table(path: Path) -> None:
    print("| export | MiB | write s | proof s | peak MiB | mean | worst | KL | survival | greedy | right |")
    print("|---|" + "--:|" * 10)
    for r in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        right = f"{r['right']} of {r['asked']}" if "right" in r else "–"
        if "mib" not in r:
            print(f"| {r['what']} | {r.get('failed', '')} |||||||||{right} |")
            continue
        proof_s = r["seconds"]["live"] + r["seconds"]["proof"]
        print(
            f"| {r['what']} | {r['mib']} | {r['seconds']['write']} | {proof_s:.0f} | {r['peak_mib']} "
            f"| {r['mean']:.1e} | {r['worst']:.1e} | {r['divergence']:.1e} | {r['survival']:.1%} "
            f"| {r['greedy']:.0%} | {right} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path)
    parser.add_argument("--rows", type=int, default=100, help="answered and held against the file's answer")
    parser.add_argument("rest", nargs="*", metavar="RUN OUT FILE.jsonl EXPORT…")
    a = parser.parse_args()
    if a.table:
        table(a.table)
        return
    run, place, out = (Path(p) for p in a.rest[:3])
    place.mkdir(parents=True, exist_ok=True)
    for what in a.rest[3:]:
        began = time.perf_counter()
        row = alone(live, run, a.rows) if what == "live" else alone(one, run, place, what, a.rows)
        row["all_s"] = round(time.perf_counter() - began, 1)
        say(row)
        with out.open("a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
