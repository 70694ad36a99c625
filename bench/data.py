"""What `burnish data` reads, and how fast it renders and proves.

    python bench/data.py files [--data ../shared/data] [--model FOLDER] [--template FILE]
    python bench/data.py speed [--rows 20000] [--characters 1500]

files   a Markdown table of every file below --data: format found, rows, conversations, bad rows, trained
        tokens; below it each refusal with its sentence. --template: another chat template (Jinja) for the
        same tokenizer, such as a stock one of the trl wheel; its `<|…|>` and `<think>` become tokens.
speed   rows of made-up prose, a third of each the question, as JSON Lines: read, found, rendered, proven, in
        a fresh process. CPU seconds and peak resident memory, of the whole `prepare` and of the checks for
        duplicates, overlap, secrets and e-mail addresses.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from alone import alone, peak_bytes, say

GIB = 2**30
_TOKENS = re.compile(r"<\|[^|<>\s]{1,40}\|>|<｜[^｜\s]{1,40}｜>|</?(?:think|tool_call|tool_response)>")
PROSE = (
    "the lamp burns low and every letter on the table waits for someone who reads slowly at night while rain "
    "counts the stones of the yard and a dog answers from far away as if it knew the question"
)


def files(data: Path, model: Path) -> None:
    from burnish.data.prepare import prepare
    from burnish.data.rows import read_rows
    from burnish.errors import UserError
    from burnish.models.tokenizer import load_tokenizer
    from burnish.recipe import Recipe

    tokenizer = load_tokenizer(model)
    refused = []
    print("| file | is | format | template | rows | conversations | bad | tokens | trained |")
    print("|---|---|---|---|--:|--:|--:|--:|--:|")
    for path in sorted(p for p in data.rglob("*") if p.suffix in (".json", ".jsonl")):
        name = str(path.relative_to(data))
        recipe = Recipe.model_validate(
            {
                "model": str(model),
                "data": {"train": str(path), "on_bad_row": "skip"},
                "train": {"max_length": 1_000_000},
            }
        )
        found = read_rows(path)
        rows = len(found.rows) + len(found.bad)
        try:
            made = prepare(recipe, tokenizer)
        except UserError as e:
            refused.append(f"{name}: {e}")
            print(f"| {name} | {found.container} | refused | | {rows} | | | | |")
            continue
        print(
            f"| {name} | {made.container} | {made.format} | {made.template} | {rows} "
            f"| {len(made.train.examples)} | {len(made.bad)} | {made.train.tokens} | {made.train.trained} |"
        )
        refused += [f"{b.at.rpartition('/')[2]}: {b.why}" for b in made.bad[:3]]
    print("\n" + "\n".join(f"- {r}" for r in refused))


def with_template(model: Path, template: Path, out: Path) -> Path:
    """The tokenizer and configuration of a model with another chat template, and that one's own tokens."""
    from transformers import AddedToken, AutoTokenizer

    inner = AutoTokenizer.from_pretrained(str(model))
    text = template.read_text(encoding="utf-8")
    known = set(inner.get_vocab())
    new = [t for t in dict.fromkeys(_TOKENS.findall(text)) if t not in known]
    inner.add_tokens([AddedToken(t, normalized=False, special="|" in t or "｜" in t) for t in new])
    inner.chat_template = text
    inner.save_pretrained(str(out))
    shutil.copy(model / "config.json", out)
    for weights in model.glob("*.safetensors"):  # only their headers are read
        (out / weights.name).symlink_to(weights.absolute())
    return out


def speed(model: Path, rows: int, characters: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        with path.open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(row) + "\n" for row in _rows(rows, characters))
        say({"rows": rows, "characters": characters, **alone(_speed, str(path), str(model))})


def _rows(n: int, characters: int) -> Iterator[dict[str, str]]:
    words = PROSE.split()
    for i in range(n):
        text = f"{i} " + " ".join(words[(i * 7 + k * k + k) % len(words)] for k in range(characters // 4))
        yield {"prompt": text[: characters // 3], "completion": text[characters // 3 : characters]}


def _speed(path: str, model: str) -> dict[str, float]:
    from burnish.data.facts import facts
    from burnish.data.prepare import prepare
    from burnish.models.tokenizer import load_tokenizer
    from burnish.recipe import Recipe

    tokenizer = load_tokenizer(Path(model))
    recipe = Recipe.model_validate({"model": model, "data": {"train": path}})
    began = _cpu(), time.perf_counter()
    made = prepare(recipe, tokenizer)
    prepared = _cpu(), time.perf_counter()
    told = facts(made, recipe)
    return {
        "prepare_cpu_seconds": prepared[0] - began[0],
        "prepare_seconds": prepared[1] - began[1],
        "facts_cpu_seconds": _cpu() - prepared[0],
        "whole_process_cpu_seconds": _cpu(),
        "peak_gib": peak_bytes() / GIB,
        "tokens": made.train.tokens,
        "trained": made.train.trained,
        "facts": len(told),
    }


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=("files", "speed"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, default=Path(".cache/SmolLM2-135M-Instruct"))
    parser.add_argument("--template", type=Path)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--characters", type=int, default=1_500)
    asked = parser.parse_args(arguments)
    if asked.what == "speed":
        speed(asked.model, asked.rows, asked.characters)
        return
    with tempfile.TemporaryDirectory() as folder:
        model = with_template(asked.model, asked.template, Path(folder)) if asked.template else asked.model
        files(asked.data, model)


if __name__ == "__main__":
    main()
