"""The same numbers however a batch is split, and the same as PEFT and transformers compute by themselves.

    python bench/same_numbers.py --model .cache/SmolLM2-135M-Instruct [--data ../shared/data]

All on WikiSQL rows, on the CPU in float32, each side in a process of its own. Three JSON lines:

splits    losses of 10 steps with batch 8 as 8, 4+4, 3+3+2 and 1×8: the largest difference from the first.
step      loss and every adapter gradient of one batch of 8: burnish beside transformers' own loss through
          PEFT's own modules (padded batch, attention mask, -100 on the prompt). A few steps of training come
          first, since with B at zero A has no gradient. burnish's gradients are read from what it saves:
          AdamW's first moment after one step from rest is 0.1 times the gradient.
scores    the negative log-likelihood of every token of 20 validation rows, from
          PeftModel.from_pretrained(base, adapter) and from burnish, with that trained adapter.

`largest` is the largest absolute difference; `relative` for gradients is the worst weight's
|difference| / |gradient| as norms.

torch's float32 log_softmax over a large vocabulary on the CPU is itself off by some 2e-5, always to the same
side (its sum of exponentials is taken naively), and transformers' loss is built on it. So transformers' and
PEFT's logits are held against ours twice: with that softmax (`stock`) and with one taken in float64
(`softmax64`). `float64` in `scores` is the peer's whole model in float64: who is how far from the truth. The
last line holds the softmax64 figures against 1e-5, and the exit code is 1 where one is beyond it; stock's
stand beside.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alone import alone, say

BOUND = 1e-5
RECIPE = """
device: cpu
dtype: float32
data: {answer_after: "\\nA:"}
lora: {rank: 16, alpha: 16, targets: attention+mlp}
train: {batch_size: 8, warmup_steps: 5, seed: 8137}
"""
B1 = 0.9  # AdamW's
Arrays = dict[str, np.ndarray]


def opened(a: argparse.Namespace, *overrides: str) -> tuple[Any, Any]:
    """A learner with a fresh adapter, and the data."""
    from burnish.training.environment import prepare_environment

    prepare_environment()
    from burnish import backends
    from burnish.recipe import parse
    from burnish.training.material import gather

    folder = Path(a.data).expanduser().absolute() / "wikisql"
    files = [f"data.{part}={folder / part}.jsonl" for part in ("train", "valid")]
    material = gather(parse(RECIPE, "bench", [f"model={a.model}", *files, *overrides]), Path.cwd())
    return backends.open(material.plan), material


def train(a: argparse.Namespace, micro_batch: int, steps: int, out: Path | None) -> list[float]:
    """Losses of the first steps; the adapter goes to `out`."""
    from burnish.data.batches import Cursor
    from burnish.data.batches import steps as batches
    from burnish.training.schedule import learning_rate

    learner, material = opened(a, f"train.micro_batch={micro_batch}", f"train.max_steps={steps}")
    recipe, losses = material.plan.recipe.train, []
    coming = batches(material.prepared.train.examples, recipe.batch_size, micro_batch, recipe.seed, Cursor())
    for step in range(steps):
        micros, _ = next(coming)
        losses.append(learner.step(micros, learning_rate(recipe, step, steps)).loss)
    if out is not None:
        out.mkdir()
        learner.save(out)
    return losses


def our_step(a: argparse.Namespace, adapter: Path, scratch: Path) -> tuple[float, Arrays]:
    """Loss and gradients of the first 8 rows."""
    from safetensors.numpy import load_file

    from burnish.data.batches import collate

    learner, material = opened(a, "train.clip=null")
    learner.load_adapter(adapter)  # the optimizer stays at rest
    loss = learner.step([collate(material.prepared.train.examples[:8])], 0.0).loss
    scratch.mkdir()
    learner.save(scratch)
    moments = load_file(scratch / "optimizer.safetensors")
    return loss, {
        name.removeprefix("exp_avg."): m / np.float32(1 - B1)
        for name, m in moments.items()
        if name.startswith("exp_avg.")
    }


def their_step(a: argparse.Namespace, adapter: Path) -> dict[str, tuple[float, Arrays]]:
    """The same by transformers and PEFT alone; rows and tokens come from burnish's renderer.

    'stock': the loss that the model gives. 'softmax64': cross entropy of its logits in float64.
    """
    examples = rows(a, "train", 8)
    import torch

    model = peft_model(a, adapter)
    model.train()  # nothing drops: the recipe's dropout is 0
    longest = max(len(tokens) for tokens, _ in examples)
    ids, mask = torch.zeros((2, len(examples), longest), dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, (tokens, weights) in enumerate(examples):
        n = len(tokens)
        ids[row, :n], mask[row, :n] = torch.from_numpy(tokens), 1
        trained = torch.from_numpy(weights) > 0
        labels[row, :n][trained] = ids[row, :n][trained]
    found = {}
    for how in ("stock", "softmax64"):
        model.zero_grad()
        out = model(input_ids=ids, attention_mask=mask, labels=labels)
        logits, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = out.loss if how == "stock" else torch.nn.functional.cross_entropy(logits.double(), targets)
        loss.backward()
        gradients = {
            name.replace(".default.weight", ".weight"): p.grad.numpy().copy()
            for name, p in model.named_parameters()
            if p.grad is not None
        }
        found[how] = float(loss.detach()), gradients
    return found


def our_scores(a: argparse.Namespace, adapter: Path) -> list[np.ndarray]:
    from burnish.data.batches import collate

    learner, material = opened(a, "data.loss_on=all")
    learner.load_adapter(adapter)
    examples = material.prepared.valid.examples[: a.rows]
    scores = learner.score(collate(examples))
    return [scores.nll_BT[i, : len(e.tokens) - 1] for i, e in enumerate(examples)]


def their_scores(a: argparse.Namespace, adapter: Path) -> dict[str, list[np.ndarray]]:
    """'stock': log_softmax as the logits come. 'softmax64': in float64. 'float64': the whole model is."""
    examples = rows(a, "valid", a.rows)
    import torch

    def scores(ids: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
        logp = model(input_ids=ids).logits.to(dtype).log_softmax(-1)
        return -logp[0, :-1].gather(1, ids[0, 1:, None])[:, 0].numpy()

    model, everyone = peft_model(a, adapter), [torch.from_numpy(t).long()[None] for t, _ in examples]
    with torch.inference_mode():
        found = {
            "stock": [scores(ids, torch.float32) for ids in everyone],
            "softmax64": [scores(ids, torch.float64) for ids in everyone],
        }
        model.double()
        return found | {"float64": [scores(ids, torch.float64) for ids in everyone]}


def rows(a: argparse.Namespace, part: str, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, weights) of the first n examples; no learner is made."""
    from burnish.training.environment import prepare_environment

    prepare_environment()
    from burnish.data.prepare import prepare
    from burnish.models.tokenizer import load_tokenizer
    from burnish.recipe import expand, parse

    folder = Path(a.data).expanduser().absolute() / "wikisql"
    recipe = parse(RECIPE, "bench", [f"data.train={folder / part}.jsonl"])
    found = prepare(recipe, load_tokenizer(expand(a.model))).train.examples[:n]
    return [(e.tokens, e.weights) for e in found]


def peft_model(a: argparse.Namespace, adapter: Path) -> Any:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32, local_files_only=True)
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=True).eval()


def compared(ours: Arrays, theirs: Arrays) -> dict[str, float]:
    if ours.keys() != theirs.keys():
        raise SystemExit(f"not the same weights: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    norm = np.linalg.norm
    return {
        "gradients_largest": max(float(np.abs(ours[k] - theirs[k]).max()) for k in ours),
        "gradients_relative": max(float(norm(ours[k] - theirs[k]) / norm(theirs[k])) for k in ours),
        "largest_gradient": max(float(np.abs(g).max()) for g in theirs.values()),
    }


def apart(xs: Sequence[np.ndarray], ys: Sequence[np.ndarray]) -> dict[str, float]:
    """Over all tokens; `mean` shows what leans to one side."""
    d = np.concatenate([x.astype(np.float64) - y for x, y in zip(xs, ys)])
    return {"largest": float(np.abs(d).max()), "mean": float(d.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="../shared/data", help="the folder that holds wikisql/")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=20, help="validation rows that are scored")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        adapter = scratch / "adapter"
        losses = {n: alone(train, a, n, a.steps, adapter if n == 8 else None) for n in (8, 4, 3, 1)}
        names = {8: "8", 4: "4+4", 3: "3+3+2", 1: "1×8"}
        split = {names[n]: max(abs(x - y) for x, y in zip(losses[n], losses[8])) for n in (4, 3, 1)}
        say({"what": "splits", "steps": a.steps, "losses": losses[8], "largest": split})
        loss, mine = alone(our_step, a, adapter, scratch / "step")
        step = {
            how: {"loss": other, "loss_largest": abs(loss - other), **compared(mine, theirs)}
            for how, (other, theirs) in alone(their_step, a, adapter).items()
        }
        say({"what": "step", "weights": len(mine), "loss": loss, **step})
        ours, theirs = alone(our_scores, a, adapter), alone(their_scores, a, adapter)
        scores = {f"ours - {how}": apart(ours, got) for how, got in theirs.items()}
        scores["stock - float64"] = apart(theirs["stock"], theirs["float64"])
        say({"what": "scores", "rows": len(ours), "tokens": sum(map(len, ours)), **scores})
    verdicts, failed = [], False
    for what, value, stock in (
        ("split losses", max(split.values()), None),
        ("step loss", step["softmax64"]["loss_largest"], step["stock"]["loss_largest"]),
        ("gradients", step["softmax64"]["gradients_largest"], step["stock"]["gradients_largest"]),
        ("scores", scores["ours - softmax64"]["largest"], scores["ours - stock"]["largest"]),
    ):
        failed = failed or value > BOUND
        beside = "" if stock is None else f" (stock {stock:.1e})"
        verdicts.append(f"{what} {value:.1e}{' FAILS' if value > BOUND else ''}{beside}")
    print(f"largest differences, bound {BOUND:.0e}: " + ", ".join(verdicts))
    sys.exit(failed)


if __name__ == "__main__":
    main()
