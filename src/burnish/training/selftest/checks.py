"""What a selftest looks at, but for the whole run (`whole`): each a generator of lines about one `Lab`.

A check raises what goes wrong on the way; the child that runs it makes a line of that and goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from burnish.backends.adapter_folder import ADAPTER, OPTIMIZER, read_floats
from burnish.backends.base import Learner, Sampling, StepStats, Token
from burnish.data.batches import Batch, collate, collate_rows
from burnish.training.rehearsal import predicted_bytes
from burnish.training.selftest.lab import (
    Lab,
    Taken,
    answered,
    apart,
    gradients_apart,
    loss_apart,
    sliced,
    stats_of,
)
from burnish.training.selftest.limits import limits_of, memory_limit
from burnish.training.selftest.packed import four_bits
from burnish.training.selftest.report import MEMORY, TRUTH, Line
from burnish.training.selftest.whole import whole_run
from burnish.training.selftest.world import examples, long_example, prompts

Check = Callable[[Lab], Iterator[Line]]
STEP, LONG = "truth-step.npz", "truth-long.npz"
DROPOUT = 0.1
NOT_NOTHING = 1e-2  # a difference that must be there, or a comparison shows nothing
TIMED_S, MOST_STEPS = 1.0, 20


def truth(lab: Lab) -> Iterator[Line]:
    """What others are held against, into files. Yields nothing."""
    rows = examples(lab.size)
    lab.taken([collate(rows)]).write(lab.place / STEP)
    lab.taken([collate([long_example(lab.size)])]).write(lab.place / LONG)
    yield from ()


def memory_and_speed(lab: Lab) -> Iterator[Line]:
    """As a run would plan it. The first of a process: on a CPU the peak is the process's, since it began."""
    batch = collate([long_example(lab.size)] * lab.size.many)
    rows = len(batch.tokens_BT)
    plan = lab.plan(
        stats_of([batch]),
        dtype="auto",
        train={"keep_layers": "auto", "batch_size": rows, "micro_batch": rows},
    )
    with lab.learner(plan) as learner:
        learner.rehearse([batch])
        measured, predicted = learner.memory().peak_bytes, predicted_bytes(plan)
        learner.step([batch], 0.0)  # what is compiled or set up once is not speed
        began, n = time.perf_counter(), 0
        while n < MOST_STEPS and time.perf_counter() - began < TIMED_S:
            learner.step([batch], 0.0)
            n += 1
        seconds = (time.perf_counter() - began) / n
    note = f"{predicted / 2**20:,.0f} MiB predicted ({100 * (predicted - measured) / measured:+.0f} %)"
    limit = memory_limit(lab.device, predicted)
    yield lab.judged(MEMORY, "most memory of a step", measured, limit, "bytes", note=note)
    what = f"speed of a step of {batch.n_tokens:,} tokens in {plan.compute.value}"
    yield lab.line("speed", what, "told", number=batch.n_tokens / seconds, unit="tokens/s")


def loss_and_gradients(lab: Lab) -> Iterator[Line]:
    """Of one step, against the truth, in each dtype that a run here would use."""
    yield from _held(lab, "loss and gradients", [collate(examples(lab.size))], STEP, "a step")


def long_row(lab: Lab) -> Iterator[Line]:
    example = long_example(lab.size)
    tokens = len(example.tokens) - 1
    yield from _held(lab, "long row", [collate([example])], LONG, f"one row of {tokens:,} tokens")


def _held(lab: Lab, check: str, micros: Sequence[Batch], file: str, of: str) -> Iterator[Line]:
    expected = Taken.read(lab.place / file)
    for dtype in lab.dtypes():
        compute = lab.plan(dtype=dtype).compute.value
        limits, taken = limits_of(lab.device, compute), lab.taken(micros, dtype=dtype)
        held = f"{compute}{' from bfloat16 weights' if dtype == 'auto' and compute == 'float32' else ''}"
        yield lab.judged(
            check, f"loss of {of}, {held}", loss_apart(taken, expected), limits.loss, dtype=compute
        )
        number, worst = gradients_apart(taken, expected)
        yield lab.judged(
            check, f"gradients of {of}, {held}", number, limits.gradient, note=worst, dtype=compute
        )


def dropout(lab: Lab) -> Iterator[Line]:
    """Recomputed layers must draw the masks of the forward pass; and there must be masks."""
    micros, lora = [collate(examples(lab.size))], {"dropout": DROPOUT}
    kept = lab.taken(micros, lora=lora, train={"keep_layers": lab.size.layers})
    recomputed = lab.taken(micros, lora=lora, train={"keep_layers": 0})
    limit = limits_of(lab.device, "float32").same
    what = f"gradients with dropout {DROPOUT}, every layer recomputed against every layer kept"
    shown = gradients_apart(kept, lab.taken(micros))[0]
    if shown < NOT_NOTHING:
        yield lab.line("dropout", what, "failed", f"dropout changes gradients by {shown:.1g} only")
        return
    yield lab.judged("dropout", what, apart(recomputed, kept), limit)


def packing(lab: Lab) -> Iterator[Line]:
    rows = examples(lab.size)
    length = sum(len(e.tokens) - 1 for e in rows)
    together = lab.taken([collate_rows([rows], length + 3)], train={"pack": True})  # and padding
    alone = lab.taken([collate(rows)])
    what = f"loss and gradients of {len(rows)} examples packed into one row against one a row"
    limit = limits_of(lab.device, "float32").same
    yield lab.judged("packing", what, apart(together, alone), limit)


def micro_batches(lab: Lab) -> Iterator[Line]:
    batch = collate(examples(lab.size))
    n = len(batch.tokens_BT)
    whole = lab.taken([batch])
    for size in (n // 2, 1):
        parts = [sliced(batch, i, i + size) for i in range(0, n, size)]
        taken = lab.taken(parts, train={"micro_batch": size})
        what = f"loss and gradients of {n} rows as {'+'.join([str(size)] * len(parts))} against {n}"
        limit = limits_of(lab.device, "float32").same
        yield lab.judged("micro-batches", what, apart(taken, whole), limit)


def resume(lab: Lab) -> Iterator[Line]:
    """In the dtype of a run, with dropout and two micro-batches a step."""
    batch = collate(examples(lab.size))
    n = len(batch.tokens_BT)
    micros = [sliced(batch, 0, n // 2), sliced(batch, n // 2, n)]
    plan = lab.plan(
        stats_of(micros),
        dtype="auto",
        lora={"dropout": DROPOUT},
        train={"keep_layers": lab.size.layers // 2, "micro_batch": n // 2},
    )
    with lab.folder() as saved, lab.folder() as end:
        with lab.learner(plan) as learner:
            learner.step(micros, 1e-3)
            learner.save(saved)
            whole = _three_steps(learner, micros, end)
        again = []
        for _ in range(2):
            with lab.learner(plan, fresh=True) as learner:
                learner.load(saved)
                again.append(_three_steps(learner, micros, end))
    differing = _differing(whole, again[0])
    note = ""
    if differing and _differing(*again):
        note = "the same three steps done twice differ too: this device does not repeat itself"
    what = "numbers that differ after save, load and three steps, from not having stopped"
    yield lab.judged("resume", what, differing, 0, note=note)


Steps = tuple[list[StepStats], dict[str, np.ndarray]]


def _three_steps(learner: Learner, micros: Sequence[Batch], folder: Path) -> Steps:
    stats = [learner.step(micros, 1e-3) for _ in range(3)]
    learner.save(folder)
    return stats, {f"{name}/{k}": v for name in (ADAPTER, OPTIMIZER) for k, v in
                   read_floats(folder / name).items()}  # fmt: skip


def _differing(a: Steps, b: Steps) -> int:
    """How many numbers are not the same, bit for bit: weights, moments, losses and norms."""
    stats = sum((x.loss != y.loss) + (x.grad_norm != y.grad_norm) for x, y in zip(a[0], b[0], strict=True))
    return stats + sum(
        int((a[1][k].view(np.uint32) != b[1][k].view(np.uint32)).sum()) for k in a[1].keys() & b[1].keys()
    ) + sum(v.size for k, v in (a[1] | b[1]).items() if (k in a[1]) != (k in b[1]))  # fmt: skip


def generation(lab: Lab) -> Iterator[Line]:
    """Greedy answers: together as alone, and as likely as `score` finds them, token by token."""
    asked, how = prompts(lab.size), Sampling(max_new_tokens=lab.size.answer)
    plan = lab.plan(train={"pack": False})
    with lab.learner(plan) as learner:
        together = _rows(learner.generate(asked, how), len(asked))
        alone = [_rows(learner.generate([p], how), 1)[0] for p in asked]
        batch = collate([answered(p, [t.id for t in row]) for p, row in zip(asked, together, strict=True)])
        scores = learner.score(batch)
    limit = limits_of(lab.device, "float32").logprob
    differing = sum(_parted(a, b, limit) for a, b in zip(together, alone, strict=True))
    yield lab.judged(
        "generation", f"of {len(asked)} greedy answers, those that differ asked together and alone",
        differing, 0,
    )  # fmt: skip
    chosen = batch.weights_BT > 0
    given = np.array([t.logprob for row in together for t in row])
    yield lab.judged(
        "generation", "log-probability of an answered token against its score",
        float(np.abs(given + scores.nll_BT[chosen]).max()), limit, "nats",
    )  # fmt: skip
    missed, n = int((~scores.hit_BT[chosen]).sum()), int(chosen.sum())
    yield lab.judged(
        "generation", f"of {n} answered tokens, those that `score` does not find the most likely",
        missed, max(1, n // 40), note="one may be a tie" if missed else "",
    )  # fmt: skip


def _rows(tokens: Iterator[Token], n: int) -> list[list[Token]]:
    found: list[list[Token]] = [[] for _ in range(n)]
    for token in tokens:
        found[token.row].append(token)
    return found


def _parted(a: Sequence[Token], b: Sequence[Token], tie: float) -> bool:
    """Do two answers part? Not where they part at two tokens that are equally likely."""
    for x, y in zip(a, b):
        if x.id != y.id:
            return abs(x.logprob - y.logprob) > tie
        if abs(x.logprob - y.logprob) > tie:
            return True
    return len(a) != len(b)


def four_bit_base(lab: Lab) -> Iterator[Line]:
    """A base in 4 bits against the same numbers written out, by NumPy, in float32."""
    what = "loss and gradients with a base in 4 bits against the same weights written out in float32"
    if lab.backend == "torch" and find_spec("bitsandbytes") is None:
        yield lab.line("4-bit base", what, "left out", "bitsandbytes is not installed")
        return
    if lab.backend not in ("torch", "mlx"):
        yield lab.line("4-bit base", what, "left out", f"{lab.backend} has none")
        return
    micros = [collate(examples(lab.size))]
    with lab.folder() as folder:
        model, quantize, plain = four_bits(lab.backend, lab.place, folder)
        packed = lab.taken(micros, model=str(model), quantize=quantize)
        unpacked = lab.taken(micros, model=str(plain))
    if gradients_apart(packed, lab.taken(micros))[0] < NOT_NOTHING:
        yield lab.line("4-bit base", what, "failed", "nothing was rounded: the base is not in 4 bits")
        return
    limit = limits_of(lab.device, "float32").same
    yield lab.judged("4-bit base", what, apart(packed, unpacked), limit)


CHECKS: dict[str, Check] = {
    TRUTH: truth,
    MEMORY: memory_and_speed,
    "loss and gradients": loss_and_gradients,
    "dropout": dropout,
    "packing": packing,
    "micro-batches": micro_batches,
    "resume": resume,
    "generation": generation,
    "long row": long_row,
    "4-bit base": four_bit_base,
    "whole run": whole_run,
}
SLOW = ("long row", "4-bit base", "whole run")  # left out by --quick


def names(quick: bool) -> list[str]:
    """In the order they are run."""
    return [name for name in CHECKS if name != TRUTH and not (quick and name in SLOW)]
