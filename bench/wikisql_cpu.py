"""WikiSQL on the CPU: burnish beside the seed guide's way, on the same rows in the same order.

    python bench/wikisql_cpu.py speed   --model .cache/SmolLM2-135M-Instruct [--data ../shared/data]
    python bench/wikisql_cpu.py quality --model .cache/SmolLM2-135M-Instruct --out runs/wikisql
    python bench/wikisql_cpu.py quality --out runs/wikisql --only guide     # then ours, then score

`speed` trains a few steps each way, one process after the other: the guide (float32, 1 × 8, checkpointing,
loss on every token), then ours (8 rows a step, loss on the SQL) in float32 and in bfloat16. A token counts
once if it is no padding; time is from the end of step 2 to the end of the last one, whatever the loop does
between included. A JSON line each, then `ours / guide`. On a CPU without bfloat16 arithmetic (`compute` says
so) ours in bfloat16 only holds the weights in it, and is no faster.

`quality` trains one epoch each way and scores base, guide and ours by the same code: greedy, the first line
of the answer, equal to the file's SQL character by character. The guide's checkpointing is off there unless
asked for: it changes no number. Losses of the two are of different tokens; the exact match compares.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alone import GIB, alone, peak_bytes, say

SEED, BATCH, WARM = 8137, 8, 2  # WARM: steps at the beginning that are not timed
RECIPE = f"""
name: wikisql
device: cpu
data: {{answer_after: "\\nA:"}}
lora: {{rank: 16, alpha: 16, targets: attention+mlp}}
train: {{epochs: 1, batch_size: {BATCH}, lr: 2.0e-4, schedule: linear, warmup_steps: 5, weight_decay: 0.01,
  clip: 1.0, seed: {SEED}, max_length: 2048, save_every: 1000000}}
"""


@dataclass(frozen=True)
class Run:
    who: str
    steps: int
    tokens: int  # of the timed steps, no padding
    seconds: float  # of the timed steps
    tokens_per_s: float
    all_seconds: float  # from the beginning of the training, loading included, to its end
    peak_rss_gib: float
    loss_first: float
    loss_last: float
    held_in: str
    compute: str


def guide(a: argparse.Namespace, checkpointing: bool, out: Path | None) -> Run:
    """The guide's way; the adapter goes to `out`."""
    from burnish.data.batches import order
    from burnish.training.environment import prepare_environment

    began = time.perf_counter()
    prepare_environment()
    from transformers import AutoTokenizer

    from guide import Row, guide_base, guide_model, guide_trainer

    tokenizer = AutoTokenizer.from_pretrained(a.model, local_files_only=True)
    texts = [json.loads(line)["text"] for line in _file(a, "train").read_text("utf-8").splitlines()]
    rows = []
    for i in order(len(texts), SEED, 0):
        tokens = tokenizer(texts[i] + tokenizer.eos_token, truncation=True, max_length=2048)["input_ids"]
        rows.append(Row(tokens, tokens))
    steps = a.steps or -(-len(rows) // BATCH)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, clock = guide_trainer(
            guide_model(guide_base(a.model), checkpointing),
            rows,
            steps,
            BATCH,
            checkpointing,
            tokenizer.eos_token_id,
            scratch,
        )
        trainer.train()
    if out is not None:
        trainer.model.save_pretrained(str(out))  # type: ignore[union-attr]
    tokens_of = [sum(len(r.tokens) for r in rows[i * BATCH : (i + 1) * BATCH]) for i in range(steps)]
    who = "guide, checkpointing" if checkpointing else "guide, no checkpointing"
    return _run(who, began, clock.ends, tokens_of, clock.losses, "float32", "float32")


def ours(a: argparse.Namespace, dtype: str, out: Path) -> Run:
    """burnish's whole job, its records included; the run folder is `out`."""
    from burnish.recipe import parse
    from burnish.runs.events import Planned, Stepped
    from burnish.training.environment import prepare_environment
    from burnish.training.job import run_job

    began = time.perf_counter()
    prepare_environment()
    overrides = [f"model={a.model}", f"data.train={_file(a, 'train')}", f"dtype={dtype}"]
    overrides += [f"train.max_steps={a.steps}"] if a.steps else []
    recipe = parse(RECIPE, "bench", [*overrides, *a.set])
    ends, tokens, losses, examples, choices = [], [], [], 0, {}
    for event in run_job(recipe, out, resume=False, skip_before=True, stop=lambda: False):
        if isinstance(event, Planned):
            examples, choices = event.examples, event.summary["choices"]
        elif isinstance(event, Stepped):
            ends.append(time.perf_counter())
            rows = min(BATCH, examples - BATCH * (event.step - 1))
            tokens.append(event.tokens + rows)  # each row's last token is only predicted, never read
            losses.append(event.loss)
    held, compute = choices["weights"]["value"], choices["compute"]["value"]
    return _run(f"ours, {dtype}", began, ends, tokens, losses, held, compute)


def _run(
    who: str,
    began: float,
    ends: list[float],
    tokens: list[int],
    losses: list[float],
    held_in: str,
    compute: str,
) -> Run:
    all_seconds = time.perf_counter() - began
    warm = min(WARM, len(ends) - 1)
    counted, seconds = sum(tokens[warm:]), ends[-1] - ends[warm - 1] if warm else all_seconds
    return Run(
        who,
        len(ends),
        counted,
        round(seconds, 2),
        round(counted / seconds, 1),
        round(all_seconds, 1),
        round(peak_bytes() / GIB, 2),
        round(losses[0], 4),
        round(losses[-1], 4),
        held_in,
        compute,
    )


def score(a: argparse.Namespace, who: str, adapter: Path | None, answers: Path) -> dict[str, Any]:
    """Exact match on the validation rows; every answer goes to `answers`, a JSON line each."""
    from burnish import backends
    from burnish.data.render import Renderer
    from burnish.evaluation.score import run_task
    from burnish.recipe import parse
    from burnish.training.environment import prepare_environment
    from burnish.training.material import gather

    prepare_environment()
    files = [f"data.train={_file(a, 'train')}", f"data.valid={_file(a, 'valid')}"]
    material = gather(parse(RECIPE, "bench", [f"model={a.model}", "dtype=float32", *files]), answers.parent)
    learner = backends.open(material.plan)
    if adapter is not None:
        learner.load_adapter(adapter)
    began = time.perf_counter()
    asked = material.prepared.valid.conversations[: a.valid_rows]
    renderer = Renderer(material.tokenizer, "assistant")
    results = run_task("exact-match", learner, material.tokenizer, renderer, asked, 64, stop=("\n",))
    with answers.open("w", encoding="utf-8") as f:
        for r in results:
            f.write(json.dumps(asdict(r), ensure_ascii=False) + "\n")
    right = sum(r.right for r in results)
    return {
        "who": who,
        "right": right,
        "rows": len(results),
        "percent": round(100 * right / len(results), 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _file(a: argparse.Namespace, part: str) -> Path:
    return Path(a.data).expanduser().absolute() / "wikisql" / f"{part}.jsonl"


def speed(a: argparse.Namespace) -> None:
    a.steps = a.steps or 12
    sides = {}
    with tempfile.TemporaryDirectory() as scratch:
        if a.only in (None, "guide"):
            sides["guide"] = alone(guide, a, not a.no_checkpointing, None)
            say(asdict(sides["guide"]))
        if a.only in (None, "ours"):
            for dtype in ("float32", "bfloat16"):
                sides[dtype] = alone(ours, a, dtype, Path(scratch) / dtype)
                say(asdict(sides[dtype]))
    if len(sides) < 3:
        return
    theirs, ratios = sides["guide"], []
    for dtype in ("float32", "bfloat16"):
        mine = sides[dtype]
        if mine.tokens != theirs.tokens:
            raise SystemExit(f"not the same rows: {mine.who} saw {mine.tokens} tokens, not {theirs.tokens}")
        ratio = mine.tokens_per_s / theirs.tokens_per_s
        ratios.append(f"{dtype} (computed in {mine.compute}) {ratio:.2f}×")
    print(f"real tokens/s, ours / {theirs.who}: " + ", ".join(ratios))


def quality(a: argparse.Namespace) -> None:
    if not a.out:
        raise SystemExit("quality needs --out DIR, where the adapters are kept")
    out = Path(a.out).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    if a.only in (None, "guide"):
        _keep(out / "guide.json", alone(guide, a, a.checkpointing, out / "guide"))
    if a.only in (None, "ours"):
        _keep(out / "ours.json", alone(ours, a, "float32", out / "ours"))
    if a.only not in (None, "score"):
        return
    places = {"base": None, "guide": out / "guide", "ours": out / "ours" / "adapter"}
    missing = [str(p) for p in places.values() if p is not None and not p.is_dir()]
    if missing:
        raise SystemExit(f"no adapter in {', '.join(missing)}; run --only guide and --only ours first")
    scores = {}
    for who, adapter in places.items():
        scores[who] = alone(score, a, who, adapter, out / f"answers-{who}.jsonl")
        say(scores[who])
    print(f"{'':<6}{'exact match':>12}{'train s':>10}{'tokens/s':>10}{'loss first':>12}{'last':>8}")
    for who, got in scores.items():
        line = f"{who:<6}{got['percent']:>10.1f} %"
        if who != "base":
            r = json.loads((out / f"{who}.json").read_text("utf-8"))
            line += f"{r['all_seconds']:>10}{r['tokens_per_s']:>10}{r['loss_first']:>12}{r['loss_last']:>8}"
        print(line)
    base, theirs, mine = (scores[who]["percent"] for who in places)
    print(f"exact match on {scores['base']['rows']} rows: base {base} %, guide {theirs} %, ours {mine} %")


def _keep(path: Path, run: Run) -> None:
    say(asdict(run))
    path.write_text(json.dumps(asdict(run)) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=["speed", "quality"])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="../shared/data", help="the folder that holds wikisql/")
    parser.add_argument("--steps", type=int, help="speed: 12 where left out; quality: the whole epoch")
    parser.add_argument("--only", choices=["guide", "ours", "score"], help="this part alone")
    parser.add_argument("--out", help="quality: where adapters, figures and answers are kept")
    parser.add_argument("--no-checkpointing", action="store_true", help="speed: the guide's is off")
    parser.add_argument("--checkpointing", action="store_true", help="quality: the guide's is on")
    parser.add_argument("--valid-rows", type=int, help="quality: score only the first N rows")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="recipe overrides for ours")
    a = parser.parse_args()
    {"speed": speed, "quality": quality}[a.mode](a)


if __name__ == "__main__":
    main()
