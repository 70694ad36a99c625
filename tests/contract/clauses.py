"""The contract (docs/DESIGN.md, the interface), clause by clause: plain functions that assert on any backend.

    check_6_resume(make, tmp_path)      # make(**recipe overrides) opens a fresh learner on the same tiny
    model

Each runs on every backend in test_clauses.py, and there too on a broken double, for which it has to fail.
Exact equality is asked of one backend against itself; tolerances are for sums taken in another order.
"""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from burnish.backends.adapter_folder import read_floats
from burnish.backends.base import Learner, Memory, Sampling, Token
from burnish.data.batches import Batch
from burnish.errors import NonFinite, UserError
from burnish.planning.plan import Choice
from tests.tiny import packed, random_batch, random_example, take

Make = Callable[..., Learner]

VOCAB, N_LAYERS, LR = 280, 3, 1e-2
BATCH = random_batch(np.random.default_rng(1), rows=8, length=14, vocab=VOCAB, segments=2)
HALVES = [take(BATCH, slice(0, 4)), take(BATCH, slice(4, 8))]
OTHER = random_batch(np.random.default_rng(2), rows=4, length=12, vocab=VOCAB)
PROMPTS = [[7, 8, 9, 10, 11], [50], [200, 30, 31]]
DROPOUT = {"rank": 4, "alpha": 8, "dropout": 0.3}


# --- helpers ---


def raises(kind: type[Exception], do: Callable[[], Any]) -> Exception:
    """AssertionError unless `do` raises exactly this kind."""
    try:
        do()
    except Exception as e:
        assert type(e) is kind, f"expected {kind.__name__}, got {e!r}"
        return e
    raise AssertionError(f"expected {kind.__name__}, nothing was raised")


def saved(learner: Learner, folder: Path) -> dict[str, Any]:
    """Everything that `save` writes, as values to compare."""
    folder.mkdir(parents=True)
    learner.save(folder)
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found |= {f"{path.name}/{k}": v for k, v in read_floats(path).items()}
            with safetensors.safe_open(path, framework="numpy") as f:
                found[f"{path.name}/metadata"] = f.metadata()
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
    return found


def written(learner: Learner, folder: Path) -> dict[str, bytes]:
    """The files that `save` writes."""
    folder.mkdir()
    learner.save(folder)
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def differing(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Keys whose values are not the same, bit for bit."""
    def same(x: Any, y: Any) -> bool:
        if isinstance(x, np.ndarray):
            return isinstance(y, np.ndarray) and x.shape == y.shape and x.tobytes() == y.tobytes()
        return x == y

    return [k for k in sorted(a.keys() | b.keys()) if k not in a or k not in b or not same(a[k], b[k])]


def largest_difference(a: dict[str, Any], b: dict[str, Any], file: str) -> float:
    """Between the arrays of one file."""
    keys = [k for k in a if k.startswith(f"{file}/") and isinstance(a[k], np.ndarray)]
    assert keys
    return max(float(np.abs(a[k] - b[k]).max()) for k in keys)


def without_weights(batch: Batch) -> Batch:
    return replace(batch, weights_BT=np.zeros_like(batch.weights_BT))


def poisoned(batch: Batch) -> Batch:
    """One target's weight is NaN, and so will the loss be."""
    weights_BT = batch.weights_BT.copy()
    weights_BT[tuple(np.argwhere(weights_BT != 0)[0])] = np.nan
    return replace(batch, weights_BT=weights_BT)


def beyond_the_vocabulary(batch: Batch) -> Batch:
    tokens_BT = batch.tokens_BT.copy()
    tokens_BT[0, 0] = VOCAB + 1000
    return replace(batch, tokens_BT=tokens_BT)


def rows_of(tokens: Sequence[Token], row: int) -> list[Token]:
    return [replace(t, row=0) for t in tokens if t.row == row]


def assert_same_tokens(a: Sequence[Token], b: Sequence[Token]) -> None:
    assert [(t.row, t.id, t.finish) for t in a] == [(t.row, t.id, t.finish) for t in b]
    np.testing.assert_allclose([t.logprob for t in a], [t.logprob for t in b], atol=1e-5)


def held_bytes() -> int:
    """Memory in arrays: NumPy's through tracemalloc, torch's by counting its tensors, MLX's by its own count.

    A framework that is not loaded holds nothing.
    """
    gc.collect()
    held = tracemalloc.get_traced_memory()[0]
    torch, mlx = sys.modules.get("torch"), sys.modules.get("mlx.core")
    if torch is not None:
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        held += sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    if mlx is not None:
        held += mlx.get_active_memory()
    return held


# --- the clauses ---


def check_1_types(make: Make, tmp: Path) -> None:
    """NumPy arrays, Python numbers and our dataclasses cross, in the promised dtypes; nothing else does."""
    learner = make()
    scores = learner.score(BATCH)
    for array, dtype in ((scores.nll_BT, np.float32), (scores.hit_BT, np.bool_)):
        assert type(array) is np.ndarray and array.dtype == dtype and array.shape == BATCH.tokens_BT.shape
    untrained = BATCH.weights_BT == 0
    assert not scores.nll_BT[untrained].any() and not scores.hit_BT[untrained].any()
    assert (scores.nll_BT[~untrained] > 0).all() and not scores.hit_BT.all()

    stats = learner.step(HALVES, LR)
    numbers = (stats.loss, stats.grad_norm, stats.weight, stats.tokens)
    assert [type(v) for v in numbers] == [float, float, float, int]
    assert stats.weight == BATCH.weight and stats.tokens == BATCH.n_tokens
    for token in learner.generate([[5]], Sampling(2)):
        assert [type(v) for v in (token.row, token.id, token.logprob, token.finish)] == [int, int, float, str]
    memory = learner.memory()
    assert type(memory) is Memory and all(type(v) is int for v in (memory.now_bytes, memory.peak_bytes))
    assert min(memory.now_bytes, memory.peak_bytes, memory.limit_bytes) > 0
    learner.close()


def check_2_atomic(make: Make, tmp: Path) -> None:
    """A step that raises leaves no trace: neither in what is saved nor in what follows, dropout included."""
    learner, twin = make(lora=DROPOUT), make(lora=DROPOUT)
    assert learner.step([BATCH], LR) == twin.step([BATCH], LR)
    before = saved(learner, tmp / "before")
    raises(NonFinite, lambda: learner.step([HALVES[0], poisoned(HALVES[1])], LR))
    assert differing(before, saved(learner, tmp / "after NaN")) == []
    raised = False
    try:
        learner.step([HALVES[0], beyond_the_vocabulary(HALVES[1])], LR)
    except Exception:  # which error it is, is not promised: this is a mistake of burnish, not of a person
        raised = True
    assert raised
    assert differing(before, saved(learner, tmp / "after an error")) == []
    for _ in range(2):
        assert learner.step(HALVES, LR) == twin.step(HALVES, LR)
    assert differing(saved(learner, tmp / "learner"), saved(twin, tmp / "twin")) == []


def check_2_rehearsal(make: Make, tmp: Path) -> None:
    """A rehearsed step leaves no trace either, and looks at its numbers as a step does."""
    learner, twin = make(lora=DROPOUT), make(lora=DROPOUT)
    files = written(twin, tmp / "twin's")
    for number, micros in enumerate((HALVES, [OTHER], [BATCH])):
        learner.rehearse([BATCH, OTHER])
        assert written(learner, tmp / f"rehearsed {number}") == files
        assert learner.step(micros, LR) == twin.step(micros, LR)
        files = written(twin, tmp / f"twin's {number}")
    raises(NonFinite, lambda: learner.rehearse([HALVES[0], poisoned(HALVES[1])]))
    raises(UserError, lambda: learner.rehearse([without_weights(BATCH)]))
    assert written(learner, tmp / "after errors") == files
    assert learner.step(HALVES, LR) == twin.step(HALVES, LR)
    assert written(learner, tmp / "learner") == written(twin, tmp / "twin")


def check_2_reshape(make: Make, tmp: Path) -> None:
    """Another cut of the same steps, in the middle of a run: nothing is lost, and the numbers stay."""
    whole = {"lora": DROPOUT, "train": {"keep_layers": N_LAYERS}}
    learner, twin = make(**whole), make(**whole)
    assert learner.step(HALVES, LR) == twin.step(HALVES, LR)
    before = saved(learner, tmp / "before")
    for kept, rows in ((0, 64), (1, 128)):
        plan = learner.plan
        shape = replace(plan.shape, keep_layers=kept, loss_slice=rows)
        learner.reshape(
            replace(plan, keep_layers=Choice(kept, ""), loss_slice=Choice(rows, ""), shape=shape)
        )
        assert (learner.plan.keep_layers.value, learner.plan.loss_slice.value) == (kept, rows)
        if kept == 0:
            assert differing(before, saved(learner, tmp / "reshaped")) == []
        for micros in (HALVES, [OTHER]):
            a, b = learner.step(micros, LR), twin.step(micros, LR)
            np.testing.assert_allclose([a.loss, a.grad_norm], [b.loss, b.grad_norm], rtol=1e-5)
    ends = saved(learner, tmp / "learner"), saved(twin, tmp / "twin")
    assert largest_difference(*ends, "adapter_model.safetensors") < 1e-4
    assert_same_tokens(*(list(x.generate([[7, 8, 9]], Sampling(4))) for x in (learner, twin)))


def check_3_split(make: Make, tmp: Path) -> None:
    """How a step's rows are split into micro-batches changes neither loss nor gradient, step after step."""
    ends: dict[str, dict[str, Any]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    for sizes in ([8], [4, 4], [3, 3, 2], [1] * 8):
        cuts = np.cumsum([0, *sizes])
        micros = [take(BATCH, slice(int(a), int(b))) for a, b in pairwise(cuts)]
        learner, name = make(), "+".join(map(str, sizes))
        stats = [learner.step(micros, LR) for _ in range(10)]
        curves[name] = [(s.loss, s.grad_norm) for s in stats]
        ends[name] = saved(learner, tmp / name)
    whole = curves["8"]
    assert whole[-1][0] < 0.9 * whole[0][0], "nothing was learned, so nothing was compared"
    first = np.average(make().score(BATCH).nll_BT, weights=BATCH.weights_BT)
    assert abs(whole[0][0] - first) < 1e-5, "the loss is not Σ w·nll / Σ w"
    for name, curve in curves.items():
        np.testing.assert_allclose(curve, whole, rtol=1e-5, atol=1e-5, err_msg=name)
        assert largest_difference(ends[name], ends["8"], "adapter_model.safetensors") < 1e-4, name


def check_4_errors(make: Make, tmp: Path) -> None:
    """What is wrong has a type: NonFinite for numbers, UserError for what a person can put right."""
    learner = make()
    start = saved(learner, tmp / "start")
    raises(NonFinite, lambda: learner.step([poisoned(BATCH)], LR))
    error = raises(UserError, lambda: learner.step([without_weights(BATCH)], LR))
    assert "no trained tokens" in str(error)
    raises(UserError, lambda: learner.load(tmp / "nowhere"))
    larger = make(lora={"rank": 8})
    larger.step([BATCH], LR)
    saved(larger, tmp / "rank 8")
    raises(UserError, lambda: learner.load(tmp / "rank 8"))
    broken = saved_copy_without_a_moment(tmp / "start", tmp / "broken")
    raises(UserError, lambda: learner.load(broken))
    assert differing(start, saved(learner, tmp / "end")) == []
    with learner.moved("", ""):
        np.testing.assert_array_equal(learner.score(BATCH).nll_BT, make().score(BATCH).nll_BT)


def saved_copy_without_a_moment(source: Path, target: Path) -> Path:
    """A checkpoint whose adapter has changed and whose optimizer lacks a tensor: to be refused as a whole."""
    from safetensors.numpy import save_file

    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    changed = {k: v + 1 for k, v in read_floats(source / "adapter_model.safetensors").items()}
    save_file(changed, target / "adapter_model.safetensors", metadata={"format": "pt"})
    moments = read_floats(source / "optimizer.safetensors")
    moments.pop(sorted(moments)[0])
    save_file(moments, target / "optimizer.safetensors", metadata={"step": "3"})
    return target


def check_5_optimizer_from_open_on(make: Make, tmp: Path) -> None:
    """The optimizer's state is there before the first step, at rest, and of its final size."""
    learner = make(lora=DROPOUT)
    start = saved(learner, tmp / "start")
    weights = {k: v for k, v in start.items() if k.startswith("adapter_model.") and isinstance(v, np.ndarray)}
    moments = {k: v for k, v in start.items() if k.startswith("optimizer.") and isinstance(v, np.ndarray)}
    assert sum(v.size for v in moments.values()) == 2 * sum(v.size for v in weights.values())
    assert not any(v.any() for v in moments.values())
    twin = make(lora=DROPOUT)
    twin.load(tmp / "start")
    assert learner.step([BATCH], LR) == twin.step([BATCH], LR)
    end = saved(learner, tmp / "end")
    assert {k for k in end} == {k for k in start}
    assert differing(end, saved(twin, tmp / "twin")) == []
    assert any(v.any() for k, v in end.items() if k.startswith("optimizer.") and isinstance(v, np.ndarray))


def check_6_resume(make: Make, tmp: Path) -> None:
    """save → load → step equals not having stopped, to the bit, dropout included; saving disturbs nothing."""
    steps: list[list[Batch]] = [HALVES, [BATCH], [OTHER], HALVES, [OTHER], [BATCH]]
    straight, stopped = make(lora=DROPOUT), make(lora=DROPOUT)
    whole = [straight.step(micros, LR) for micros in steps]
    for micros in steps[:3]:
        stopped.step(micros, LR)
    saved(stopped, tmp / "checkpoint")
    fresh, used = make(lora=DROPOUT), make(lora=DROPOUT)
    used.step([OTHER], LR)
    end = saved(straight, tmp / "straight")
    for name, learner in (("stopped", stopped), ("fresh", fresh), ("used", used)):
        if name != "stopped":
            learner.load(tmp / "checkpoint")
        assert [learner.step(micros, LR) for micros in steps[3:]] == whole[3:], name
        assert differing(end, saved(learner, tmp / name)) == [], name


def check_7_dropout_recomputed(make: Make, tmp: Path) -> None:
    """With dropout, recomputed layers give the gradients of kept ones; and dropout is on in `step` only."""
    curves, ends = {}, {}
    for keep in (0, 1, N_LAYERS):
        learner = make(lora=DROPOUT, train={"keep_layers": keep})
        curves[keep] = [(s.loss, s.grad_norm) for s in (learner.step(HALVES, LR) for _ in range(3))]
        ends[keep] = saved(learner, tmp / str(keep))
        scores = learner.score(BATCH).nll_BT
        np.testing.assert_array_equal(scores, learner.score(BATCH).nll_BT)
    for keep in (0, 1):
        np.testing.assert_allclose(curves[keep], curves[N_LAYERS], rtol=1e-5, err_msg=f"keep_layers {keep}")
        assert largest_difference(ends[keep], ends[N_LAYERS], "optimizer.safetensors") < 1e-5
    plain = make(lora={**DROPOUT, "dropout": 0.0})
    without = [plain.step(HALVES, LR).loss for _ in range(3)]
    assert abs(without[0] - curves[0][0][0]) < 1e-5, "B is zero at the start, so dropout cannot show yet"
    assert abs(without[2] - curves[0][2][0]) > 1e-3, "dropout did nothing"


def check_7_masks_are_new(make: Make, tmp: Path) -> None:
    """Each step and micro-batch draws its own mask; with lr 0 nothing else moves the gradient."""
    learner, twice = make(lora=DROPOUT), make(lora=DROPOUT)
    norms = [learner.step([OTHER], 0.0).grad_norm for _ in range(3)]
    assert len({round(n, 6) for n in norms}) == 3, "the same mask at every step"
    assert abs(twice.step([OTHER, OTHER], 0.0).grad_norm - norms[0]) > 1e-5, "micro-batches share a mask"
    plain = make(lora={**DROPOUT, "dropout": 0.0})
    even = [plain.step([OTHER] * n, 0.0).grad_norm for n in (1, 2, 1)]
    np.testing.assert_allclose(even, even[0], rtol=1e-5)


def check_8_generate(make: Make, tmp: Path) -> None:
    """A batch of prompts equals them one by one; tokens come in rounds; log-probabilities are the model's."""
    learner = make()
    for _ in range(3):
        learner.step([BATCH], LR)  # so that the adapter takes part
    greedy = Sampling(max_new_tokens=6)
    together = list(learner.generate(PROMPTS, greedy))
    assert [t.row for t in together] == [0, 1, 2] * 6
    assert [t.finish for t in together] == [""] * 15 + ["length"] * 3
    for row, prompt in enumerate(PROMPTS):
        answer = rows_of(together, row)
        assert_same_tokens(answer, list(learner.generate([prompt], greedy)))
        example = packed([[_example(prompt, [t.id for t in answer])]], len(prompt) + 5)
        expected = -learner.score(example).nll_BT[0, -6:]
        np.testing.assert_allclose([t.logprob for t in answer], expected, atol=1e-5)

    # a stop id ends its row and no other
    stop = next(t.id for t in rows_of(together, 0)[1:] if t.id not in {u.id for u in together if u.row != 0})
    stopped = list(learner.generate(PROMPTS, replace(greedy, stop_ids=(stop,))))
    ended = rows_of(stopped, 0)
    assert ended[-1].finish == "stop" and ended[-1].id == stop and all(t.id != stop for t in ended[:-1])
    assert len(rows_of(stopped, 1)) == 6
    assert_same_tokens(rows_of(stopped, 1), rows_of(together, 1))

    # sampling: a row's stream is its own
    sampled = Sampling(6, temperature=1.5, top_p=0.95, top_k=100, repetition_penalty=1.2, seed=3)
    first = list(learner.generate(PROMPTS, sampled))
    assert_same_tokens(first, list(learner.generate(PROMPTS, sampled)))
    mixed = list(learner.generate([[99, 98], PROMPTS[1], [3]], sampled))
    assert_same_tokens(rows_of(first, 1), rows_of(mixed, 1))
    other = list(learner.generate(PROMPTS, replace(sampled, seed=4)))
    assert [t.id for t in first] != [t.id for t in other]
    repeated = list(learner.generate([PROMPTS[0]] * 2, sampled))
    assert [t.id for t in rows_of(repeated, 0)] != [t.id for t in rows_of(repeated, 1)], "two rows drew alike"


def _example(prompt: Sequence[int], answer: Sequence[int]) -> Any:
    from burnish.data.batches import Example

    weights = np.array([0.0] * len(prompt) + [1.0] * len(answer), np.float32)
    return Example(np.array([*prompt, *answer], np.int32), weights)


def check_8_closing_frees(make: Make, tmp: Path) -> None:
    """Closing the iterator frees the cache, and training goes on as if nothing had been generated."""
    learner, twin = make(), make()
    # So many that the cache outweighs what Python itself keeps.
    long = [list(range(3, 103)), list(range(103, 203))] * 8
    list(learner.generate(long, Sampling(2)))  # what the framework sets up once is not the cache
    tracemalloc.start()
    try:
        before = held_bytes()
        tokens = learner.generate(long, Sampling(20))
        for _ in range(2 * len(long)):
            next(tokens)
        during = held_bytes()
        tokens.close()  # type: ignore[attr-defined]
        after = held_bytes()
    finally:
        tracemalloc.stop()
    # Keys and values, layers, prompts, tokens, heads, size, bytes.
    cache = 2 * N_LAYERS * len(long) * 100 * 2 * 8 * 4
    assert during - before >= cache
    assert after - before < cache / 4, f"{after - before} of {during - before} bytes are still held"
    assert learner.step([BATCH], LR) == twin.step([BATCH], LR)


def check_9_peft_folder(make: Make, tmp: Path) -> None:
    """What `save` writes, PEFT loads, and it scores as the learner does, whatever the recipe's options."""
    variants: list[dict[str, Any]] = [
        {"lora": {"rank": 4, "alpha": 8}},
        {"lora": {"alpha": 8, "rslora": True, "last_layers": 1, "targets": ["q_proj", "down_proj"]}},
    ]
    for i, overrides in enumerate(variants):
        learner, folder = make(**overrides), tmp / f"adapter {i}"
        for _ in range(3):
            learner.step([BATCH], LR)
        start = make(**overrides).score(OTHER).nll_BT
        contents = saved(learner, folder)
        assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in folder.iterdir()}
        for key, value in contents.items():
            if key.startswith("adapter_model.safetensors/base"):
                assert value.dtype == np.float32 and ".lora_" in key
        got = learner.score(OTHER).nll_BT
        assert np.abs(got - start).max() > 0.01, "the adapter did nothing, so nothing was compared"
        np.testing.assert_allclose(peft_scores(folder, OTHER), got, atol=1e-5)
        (folder / "optimizer.safetensors").unlink()  # as other tools, and the final adapter, have it
        reader = make(**overrides)
        reader.load_adapter(folder)
        np.testing.assert_array_equal(reader.score(OTHER).nll_BT, got)


def peft_scores(folder: Path, batch: Batch) -> np.ndarray:
    """Negative log-likelihoods of a batch of one segment a row, by PEFT and transformers alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    assert batch.segments_BT.max() == 1
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(batch.tokens_BT.astype(np.int64)),
            attention_mask=torch.tensor((batch.segments_BT > 0).astype(np.int64)),
        ).logits
        targets = torch.tensor(batch.targets_BT.astype(np.int64))
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").numpy()
    return np.where(batch.weights_BT != 0, nll, 0)


def check_packing(make: Make, tmp: Path) -> None:
    """Examples packed into one row score, and train, as they do alone; padding changes nothing."""
    rng = np.random.default_rng(4)
    examples = [random_example(rng, n, VOCAB) for n in (9, 6)]
    learner = make()
    for _ in range(3):
        learner.step([BATCH], LR)
    together = packed([examples], 20)
    alone = [packed([[e]], len(e.tokens) - 1) for e in examples]
    whole = learner.score(together).nll_BT[0]
    np.testing.assert_allclose(whole[:8], learner.score(alone[0]).nll_BT[0], atol=1e-5)
    np.testing.assert_allclose(whole[8:13], learner.score(alone[1]).nll_BT[0], atol=1e-5)
    assert not whole[13:].any()
    twin = make()
    saved(learner, tmp / "adapter")
    twin.load(tmp / "adapter")
    a, b = learner.step([together], LR), twin.step(alone, LR)
    np.testing.assert_allclose([a.loss, a.grad_norm], [b.loss, b.grad_norm], rtol=1e-5)
    assert a.tokens == b.tokens and a.weight == b.weight
