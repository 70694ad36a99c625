"""The rehearsal: which step it is, that nothing of it stays, what is said of it, and a run that it ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from burnish import backends
from burnish.backends.torch.learner import TorchLearner
from burnish.data import batches
from burnish.data.batches import Batch, Cursor, Example
from burnish.data.prepare import Part, Prepared
from burnish.errors import EXIT_BAD_INPUT, EXIT_WILL_NOT_FIT, OutOfMemory, UserError
from burnish.machine.known import known_machine
from burnish.models.geometry import spec_of_geometry
from burnish.models.tokenizer import Tokenizer
from burnish.planning.plan import Choice, Plan, make_plan
from burnish.recipe import load, parse
from burnish.runs.events import Rehearsed, Stepped
from burnish.training import job, rehearsal
from burnish.training.job import measure, run_job
from burnish.training.rehearsal import longest, predicted_bytes
from burnish.training.too_large import ran_out
from burnish.training.train import laid_out
from tests.tiny import random_example, tiny_plan
from tests.world import World

VOCAB = 280


def prepared_of(examples: Sequence[Example]) -> Prepared:
    empty = Part((), (), 0, 0)
    train = Part(tuple(examples), (), 0, 0)
    return Prepared("text", "", train, empty, False, "", (), "none", "", 0, cast(Tokenizer, None))


def planned(model: Path, lengths: Sequence[int], **train: Any) -> tuple[Plan, Prepared]:
    """Examples of these lengths, in this order; about half of their tokens are targets."""
    rng = np.random.default_rng(0)
    prepared = prepared_of([random_example(rng, n, VOCAB) for n in lengths])
    settings = {"batch_size": 4, "micro_batch": 2, **train}
    overrides = {"train": settings, "backend": settings.pop("backend", "torch")}
    return tiny_plan(model, prepared.stats, **overrides), prepared


def steps_of_the_run(plan: Plan, prepared: Prepared) -> list[list[Batch]]:
    assert plan.steps is not None
    batches = laid_out(plan, prepared.train.examples, Cursor())
    return [next(batches)[0] for _ in range(plan.steps.value)]


def same(a: Sequence[Batch], b: Sequence[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.tokens_BT.shape == y.tokens_BT.shape and (x.tokens_BT == y.tokens_BT).all()
        for x, y in zip(a, b, strict=True)
    )


def positions(micro: Batch, computes_padding: bool) -> int:
    return micro.tokens_BT.size if computes_padding else micro.n_tokens


# --- which step ---


@pytest.mark.parametrize("backend", ["torch", "mlx", "reference"])
@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("micro", [1, 3])
def test_it_is_a_step_of_the_run_and_none_has_a_larger_micro_batch(
    backend: str, pack: bool, micro: int, tiny_folder: Path
) -> None:
    lengths = np.random.default_rng(3).integers(4, 60, 70).tolist()
    settings = {"pack": pack, "micro_batch": micro, "batch_size": 8, "epochs": 3}
    plan, prepared = planned(tiny_folder, lengths, backend=backend, **settings)
    every = steps_of_the_run(plan, prepared)
    found = longest(plan, prepared)
    assert any(same(found, micros) for micros in every)
    padded = backend != "torch"
    several = [micros for micros in every if len(micros) > 1] or every
    sizes = [max(positions(m, padded) for m in micros) for micros in several]
    assert max(positions(m, padded) for m in found) == max(sizes)
    assert len(set(sizes)) > 1 or pack, "nothing to choose from"  # packed rows are alike


def test_gradients_add_up_beside_a_later_micro_batch(tiny_folder: Path) -> None:
    """One long example alone in the last, smaller step: a step of two micro-batches is rehearsed."""
    seed = next(s for s in range(99) if np.random.default_rng([s, 0]).permutation(5)[-1] == 4)
    plan, prepared = planned(tiny_folder, [20, 20, 20, 20, 60], seed=seed)
    assert [len(m) for m in steps_of_the_run(plan, prepared)] == [2, 1]
    assert [m.tokens_BT.shape for m in longest(plan, prepared)] == [(2, 19), (2, 19)]


def test_of_steps_as_long_the_one_with_most_targets(tiny_folder: Path) -> None:
    plan, prepared = planned(tiny_folder, [20] * 40)
    found = longest(plan, prepared)
    every = steps_of_the_run(plan, prepared)
    trained = [[np.count_nonzero(m.weights_BT) for m in micros] for micros in every]
    assert max(np.count_nonzero(m.weights_BT) for m in found) == max(map(max, trained))
    assert len(set(map(max, trained))) > 1


def test_only_steps_of_the_run_count(tiny_folder: Path) -> None:
    """With max_steps the rest of the data is never met; in a later epoch long examples may meet."""
    lengths = [10] * 36 + [60] * 4
    for steps in (1, 2, 60):
        plan, prepared = planned(tiny_folder, lengths, max_steps=steps)
        every = steps_of_the_run(plan, prepared)
        most = max(m.n_tokens for micros in every for m in micros)
        assert max(m.n_tokens for m in longest(plan, prepared)) == most


def test_work_is_bounded(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step is made of many, and an epoch is looked through once, whatever `epochs` says."""
    plan, prepared = planned(tiny_folder, [10] * 399 + [60], epochs=1000)
    made: list[int] = []
    drawn: list[int] = []
    order, lay = batches.order, rehearsal.laid_out
    monkeypatch.setattr(batches, "order", lambda n, s, e: drawn.append(e) or order(n, s, e))
    monkeypatch.setattr(rehearsal, "LOOK_EXAMPLES", 0)

    def counted(*args: Any) -> Any:
        for step in lay(*args):
            made.append(1)
            yield step

    monkeypatch.setattr(rehearsal, "laid_out", counted)
    assert max(m.tokens_BT.shape[1] for m in longest(plan, prepared)) == 59
    assert len(made) == 1 and drawn == [0, 0]  # to look, and to make the one


# --- what is compared ---


def test_a_gpus_counters_do_not_see_the_framework(tiny_folder: Path) -> None:
    plan, _ = planned(tiny_folder, [20] * 8)
    framework = sum(p.n_bytes for p in plan.estimate if p.name == "framework")
    assert framework > 0
    assert predicted_bytes(plan) == plan.total_bytes
    for device in ("cuda", "mps", "metal"):
        assert predicted_bytes(replace(plan, device=Choice(device, ""))) == plan.total_bytes - framework


def test_as_much_memory_as_a_step(tiny_folder: Path) -> None:
    """By MLX's count of its arrays, with an adapter so large that its update is the largest moment."""
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    _, prepared = planned(tiny_folder, [20] * 4)
    wide = {
        "backend": "mlx",
        "lora": {"rank": 256},
        "train": {"batch_size": 4, "micro_batch": 4, "pack": False},
    }
    plan = tiny_plan(tiny_folder, prepared.stats, **wide)
    learner, micros = backends.open(plan), longest(plan, prepared)

    def added(do: Callable[[], object]) -> int:
        do()  # what is compiled is compiled
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        do()
        return mx.get_peak_memory() - before

    assert added(lambda: learner.rehearse(micros)) == pytest.approx(
        added(lambda: learner.step(micros, 1e-3)), rel=0.1
    )


# --- in a run ---


def run(world: World, *overrides: str, resume: bool = False, upto: int = 99) -> list[Any]:
    events: list[Any] = []

    def stop() -> bool:
        return any(isinstance(e, Stepped) and e.step >= upto for e in events)

    recipe = load(str(world.root / "recipe.yaml"), [f"data.train={world.root}/data.jsonl", *overrides])
    for event in run_job(recipe, world.out, resume=resume, skip_before=False, stop=stop):
        events.append(event)
    return events


def kinds(events: Sequence[Any]) -> list[str]:
    return [type(e).__name__.lower() for e in events]


def test_memory_comes_before_the_first_question(world: World) -> None:
    events = run(world, "ask=[question 1]")
    assert kinds(events)[:4] == ["planned", "rehearsed", "answered", "stepped"]
    (told,) = [e for e in events if isinstance(e, Rehearsed)]
    assert told.seconds > 0 and told.peak_bytes > 0
    assert told.predicted_bytes == events[0].summary["total_bytes"]
    assert told.error_percent == 100 * (told.predicted_bytes - told.peak_bytes) / told.peak_bytes
    assert told.tokens >= max(e.tokens for e in events if isinstance(e, Stepped))
    assert events[-1].peak_bytes >= told.peak_bytes, "the end's peak is of the whole run"
    kept = json.loads((world.out / "plan.json").read_text("utf-8"))
    assert kept.pop("measured") == {
        "peak_bytes": told.peak_bytes, "predicted_bytes": told.predicted_bytes,
        "error_percent": told.error_percent, "seconds": told.seconds,
    }  # fmt: skip
    assert kept == json.loads(json.dumps(events[0].summary))


def test_a_resumed_run_rehearses_no_more_and_keeps_what_was_measured(world: World) -> None:
    first = run(world, "train.max_steps=4", upto=2)
    measured = json.loads((world.out / "plan.json").read_text("utf-8"))["measured"]
    rest = run(world, "train.max_steps=4", resume=True)
    assert kinds(first).count("rehearsed") == 1 and "rehearsed" not in kinds(rest)
    assert json.loads((world.out / "plan.json").read_text("utf-8"))["measured"] == measured


def test_a_run_is_the_run_without_a_rehearsal(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, dropout included."""
    settings = ("lora.dropout=0.3", "train.micro_batch=2", "train.max_steps=4")

    def left(events: list[Any]) -> tuple[Any, ...]:
        steps = [(e.loss, e.grad_norm) for e in events if isinstance(e, Stepped)]
        return steps, (world.out / "adapter" / "adapter_model.safetensors").read_bytes()

    rehearsed = left(run(world, *settings))
    world.out.rename(world.root / "rehearsed")
    monkeypatch.setattr(TorchLearner, "rehearse", lambda *_: None)
    assert left(run(world, *settings)) == rehearsed


# --- what ends there ---


def out_of_memory(*_: Any) -> None:
    raise OutOfMemory("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of it")


def test_a_run_that_does_not_fit_ends_before_it_begins(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once every cut of the same training has been tried; each is said."""
    with monkeypatch.context() as m:
        m.setattr(TorchLearner, "rehearse", out_of_memory)
        said = world.train("ask=[question 1]")
    assert said.code == EXIT_WILL_NOT_FIT and "Traceback" not in said.err
    assert "memory ran out in the rehearsal" in said.err and "more of it" not in said.err
    assert "GiB measured until then" in said.err and "GiB predicted (CUDA out of memory" in said.err
    first, *rungs, last = [e["event"] for e in said.events]
    assert (first, last) == ("planned", "failed") and set(rungs) == {"recovered"}, "no question was asked"
    did = [e["did"] for e in said.events[1:-1]]
    assert did[0].startswith("memory was freed") and did[1].startswith("micro-batch 4 → ")
    assert len(set(did)) == len(did), "nothing is tried twice"
    told = {(e["step"], e["cause"], e["error"]) for e in said.events[1:-1]}
    error = "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert told == {(0, "out of memory in the rehearsal", error)}
    kept = json.loads((world.out / "plan.json").read_text("utf-8"))
    assert "measured" not in kept and kept["choices"]["micro_batch"]["value"] == 1
    assert not (world.out / "checkpoints").exists()
    # What it says can be typed, in the same folder, and is smaller.
    typed = [t for t in said.err.split("→ set ")[1].split(" (")[0].split() if "=" in t]
    assert typed, said.err
    again = world.train(*typed)
    assert again.code == 0, again.err
    estimates = [s.event("planned")["summary"]["total_bytes"] for s in (said, again)]
    assert estimates[1] < estimates[0], typed


def test_a_smaller_cut_that_fits_is_gone_on_with(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a run that goes on begins with it: `plan.json` knows."""
    rehearse_, tries = TorchLearner.rehearse, []

    def short_of_memory(self: TorchLearner, micros: Sequence[Batch]) -> None:
        tries.append(self.plan.micro_batch.value)
        if len(micros[0].tokens_BT) > 2:
            out_of_memory()
        rehearse_(self, micros)

    monkeypatch.setattr(TorchLearner, "rehearse", short_of_memory)
    said = world.train()
    assert said.code == 0, said.err
    assert tries == [4, 4, 2], "as it was, once more, then half"
    assert [e["event"] for e in said.events][:4] == ["planned", "recovered", "recovered", "rehearsed"]
    kept = json.loads((world.out / "plan.json").read_text("utf-8"))
    assert kept["choices"]["micro_batch"]["value"] == 2
    assert kept["measured"]["peak_bytes"] == said.event("rehearsed")["peak_bytes"]


def test_where_the_same_training_takes_no_less_the_levers_are_named(tiny_folder: Path) -> None:
    """And what is `auto` is written down with them: it would fill the memory again."""
    plan, prepared = planned(tiny_folder, [20] * 8, micro_batch="auto", keep_layers=0)
    least = tiny_plan(tiny_folder, prepared.stats, backend="torch", train={"micro_batch": 1, "batch_size": 4})
    plans = {"auto": replace(plan, micro_batch=least.micro_batch, estimate=least.estimate), "typed": least}
    for asked, tight in plans.items():
        hint = ran_out(tight, 1 << 30, 1 << 29, OutOfMemory("out of memory")).hint
        assert "the same training" not in hint and "lora.targets=attention (" in hint
        assert ("train.micro_batch=1" in hint) == (asked == "auto")


def test_what_is_named_changes_a_number_where_a_layer_was_ahead() -> None:
    """A layer ahead of the device is no key of a recipe, and a model that is not here is no way out."""
    asked = ("backend=mlx", "quantize=4bit", "train.micro_batch=2", "train.keep_layers=0", "train.pack=false")
    plan = make_plan(parse("", "test", asked), spec_of_geometry("qwen2.5-7b"), known_machine("m2-pro-32gb"))
    assert plan.ahead.value == 1
    hint = ran_out(plan, 1 << 30, 1 << 29, OutOfMemory("out of memory")).hint
    assert re.match(r"set [a-z_.]+=\S+", hint) and "model=" not in hint, hint


def test_numbers_that_are_not_finite_end_it_as_a_step_would(world: World) -> None:
    from safetensors.numpy import load_file, save_file

    path = world.copied_model() / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    said = world.train()
    assert said.code == 1 and "left the finite range" in said.err
    assert [e["event"] for e in said.events] == ["planned", "failed"]


# --- burnish plan --measure ---


def test_measure_writes_nothing_and_closes(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[int] = []
    close = TorchLearner.close
    monkeypatch.setattr(TorchLearner, "close", lambda self: closed.append(1) or close(self))
    recipe = load(str(world.root / "recipe.yaml"), [f"data.train={world.root}/data.jsonl"])
    before = world.tree()
    told = measure(recipe, world.root)
    assert world.tree() == before and closed == [1]
    assert told.keys() - {"measured"} == job.gather(recipe, world.root).plan.summary().keys()
    assert told["measured"]["predicted_bytes"] == told["total_bytes"]
    monkeypatch.setattr(TorchLearner, "rehearse", out_of_memory)
    with pytest.raises(UserError, match="ran out in the rehearsal"):
        measure(recipe, world.root)
    assert closed == [1, 1]


def measured(world: World, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-m", "burnish.training.measure", *args]
    return subprocess.run(command, cwd=world.root, env=env, capture_output=True, text=True)


def test_measure_is_a_process_that_prints_one_line(world: World) -> None:
    done = measured(world, "recipe.yaml", "backend=reference")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    told = json.loads(line)
    assert told["choices"]["backend"]["value"] == "reference"
    assert told["measured"]["seconds"] > 0 and told["measured"]["peak_bytes"] > 0


def test_measure_tells_errors_as_json_too(world: World) -> None:
    done = measured(world, "recipe.yaml", "data.train=nowhere.jsonl")
    assert done.returncode == EXIT_BAD_INPUT and "Traceback" not in done.stderr
    (line,) = done.stdout.splitlines()
    error = json.loads(line)["error"]
    assert "nowhere.jsonl" in error["message"] and error["exit_code"] == EXIT_BAD_INPUT
    assert error.keys() == {"message", "hint", "exit_code"}
