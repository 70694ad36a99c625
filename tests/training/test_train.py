"""The loop: the order of its events, validation, the best adapter, early stop, and how it is stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from burnish.backends.base import Memory, Scores, StepStats
from burnish.data.batches import Batch, Cursor, Example, split
from burnish.data.prepare import Part, Prepared
from burnish.models.tokenizer import Tokenizer
from burnish.planning.plan import Plan
from burnish.runs.events import Event, Interrupted, Noted, Saved, Stepped, Validated
from burnish.runs.folder import RunFolder, State
from burnish.training.keeper import Keeper
from burnish.training.train import train
from tests.tiny import tiny_plan


class Fake:
    """Learns nothing: its adapter is the number of its steps, and its validation losses are a script."""

    plan: Plan

    def __init__(self, valid_losses: Sequence[float] = ()) -> None:
        self.script, self.steps = list(valid_losses), 0
        self.seen: list[tuple[list[int], float]] = []

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        self.steps += 1
        self.seen.append((sorted(int(t) for m in micros for t in m.tokens_BT[:, 0]), lr))
        return StepStats(
            10.0 - self.steps, 1.0, sum(m.weight for m in micros), sum(m.n_tokens for m in micros)
        )

    def score(self, batch: Batch) -> Scores:
        nll = np.full(batch.weights_BT.shape, self.script[0], np.float32)
        return Scores(nll, np.zeros(batch.weights_BT.shape, bool))

    def save(self, folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_text(str(self.steps))
        (folder / "optimizer.safetensors").write_text("moments")

    def memory(self) -> Memory:
        return Memory(1, 2, 3)


def part(n: int, first: int = 0) -> Part:
    """n examples whose first token tells them apart."""
    examples = [
        Example(np.array([first + i, 5, 6], np.int32), np.array([0, 0, 1], np.float32)) for i in range(n)
    ]
    return Part(tuple(examples), (), 0, 0)


def run_loop(
    tmp_path: Path, model: Path, fake: Fake, n: int, valid: int = 0, state: State | None = None,
    stop: Callable[[], bool] = lambda: False, **settings: Any,
) -> list[Event]:  # fmt: skip
    prepared = Prepared(
        "text", "", part(n), part(valid, 100), False, "JSON Lines", (), "none", "", 0, cast(Tokenizer, None)
    )
    plan = tiny_plan(model, prepared.stats, train={"batch_size": 4, "micro_batch": 2, **settings})
    fake.plan = plan
    events: list[Event] = []
    with RunFolder.begin(tmp_path / "run", plan.recipe) as run:
        keeper = Keeper(run.path, plan.recipe.care, stop)  # not entered: it looks at no machine
        for event in train(fake, prepared, run, state or State(), keeper):  # type: ignore[arg-type]
            events.append(event)
            if isinstance(event, Validated):
                fake.script.pop(0)
    return events


def told(events: Sequence[Event]) -> list[str]:
    """Kinds and steps: 's1' stepped, 'v2' validated ('b2' best so far), 'k2' saved, 'i2' interrupted."""

    def one(e: Event) -> str:
        match e:
            case Stepped():
                return f"s{e.step}"
            case Validated():
                return f"{'b' if e.best else 'v'}{e.step}"
            case Saved():
                return f"k{e.step}"
            case Interrupted():
                return f"i{e.step}"
            case Noted():
                return "n"
        raise AssertionError(e)

    return [one(e) for e in events]


def test_the_order_of_events(tmp_path: Path, tiny_folder: Path):
    events = run_loop(tmp_path, tiny_folder, Fake([3, 2, 2.5]), 10, 3, epochs=2, eval_every=2, save_every=4)
    assert told(events) == ["s1", "s2", "b2", "s3", "s4", "b4", "k4", "s5", "s6", "v6", "k6"]


def test_the_last_step_validates_and_saves_whatever_the_numbers(tmp_path: Path, tiny_folder: Path):
    assert told(run_loop(tmp_path, tiny_folder, Fake([3]), 8, 3, max_steps=3)) == [
        "s1",
        "s2",
        "s3",
        "b3",
        "k3",
    ]


def test_without_validation_rows_nothing_is_validated(tmp_path: Path, tiny_folder: Path):
    events = run_loop(tmp_path, tiny_folder, Fake(), 8, eval_every=1, max_steps=2)
    assert told(events) == ["s1", "s2", "k2"]
    assert not (tmp_path / "run" / "best").exists()


def test_an_epoch_is_every_example_once_its_last_step_smaller(tmp_path: Path, tiny_folder: Path):
    fake = Fake()
    events = run_loop(tmp_path, tiny_folder, fake, 10, epochs=2)
    rows = [rows for rows, _ in fake.seen]
    assert [len(r) for r in rows] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*rows[:3])) == sorted(chain(*rows[3:])) == list(range(10))
    assert rows[:3] != rows[3:], "each epoch has an order of its own"
    stepped = [e for e in events if isinstance(e, Stepped)]
    assert [e.epoch for e in stepped] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert [e.trained for e in stepped] == [4, 4, 2, 4, 4, 2]


def test_a_step_tells_what_the_learner_did_and_the_schedules_rate(tmp_path: Path, tiny_folder: Path):
    fake = Fake()
    events = run_loop(tmp_path, tiny_folder, fake, 8, lr=1.0, epochs=2)
    stepped = [e for e in events if isinstance(e, Stepped)]
    assert [e.lr for e in stepped] == [lr for _, lr in fake.seen] == [1.0, 0.75, 0.5, 0.25]
    first = stepped[0]
    assert (first.steps, first.loss, first.tokens, first.now_bytes, first.peak_bytes) == (4, 9.0, 8, 1, 2)
    assert first.seconds > 0


def test_a_run_goes_on_where_its_state_says(tmp_path: Path, tiny_folder: Path):
    whole, rest = Fake(), Fake()
    run_loop(tmp_path / "a", tiny_folder, whole, 10, epochs=2, lr=1.0)
    events = run_loop(tmp_path / "b", tiny_folder, rest, 10, epochs=2, lr=1.0, state=State(4, Cursor(1, 4)))
    assert told(events) == ["s5", "s6", "k6"]
    assert rest.seen == whole.seen[4:]


def test_the_best_adapter_is_kept_and_the_state_knows_it(tmp_path: Path, tiny_folder: Path):
    losses = [3, 2, 2, 4]  # an equal loss is no better one
    events = run_loop(tmp_path, tiny_folder, Fake(losses), 16, 3, eval_every=1, save_every=9)
    assert told(events) == ["s1", "b1", "s2", "b2", "s3", "v3", "s4", "v4", "k4"]
    best = tmp_path / "run" / "best"
    assert [p.name for p in best.iterdir()] == ["adapter_model.safetensors"], "an adapter needs no optimizer"
    assert (best / "adapter_model.safetensors").read_text() == "2"
    with RunFolder.resume(tmp_path / "run", _recipe(tmp_path)) as run:
        found = run.newest_checkpoint()
    assert found is not None
    state = found[1]
    assert (state.step, state.best_step, state.best_loss, state.stale) == (4, 2, 2.0, 2)


def _recipe(tmp_path: Path) -> Any:
    from burnish.recipe import load

    return load(str(tmp_path / "run" / "recipe.yaml"))


def test_best_can_be_switched_off(tmp_path: Path, tiny_folder: Path):
    run_loop(tmp_path, tiny_folder, Fake([3, 2, 2, 4]), 16, 3, eval_every=1, best=False)
    assert not (tmp_path / "run" / "best").exists()


def test_early_stop_saves_and_says_so(tmp_path: Path, tiny_folder: Path):
    events = run_loop(
        tmp_path,
        tiny_folder,
        Fake([3, 2, 4, 1.5, 2, 2, 9]),
        40,
        3,
        eval_every=1,
        save_every=100,
        early_stop=2,
    )
    assert told(events) == ["s1", "b1", "s2", "b2", "s3", "v3", "s4", "b4", "s5", "v5", "s6", "v6", "k6", "n"]
    (note,) = [e for e in events if isinstance(e, Noted)]
    assert "in 2 validations" in note.message and "best was at step 4" in note.message


def test_an_early_stop_resumed_stays_stopped(tmp_path: Path, tiny_folder: Path):
    state = State(6, Cursor(0, 24), 1.5, 4, stale=2)
    events = run_loop(tmp_path, tiny_folder, Fake([1]), 40, 3, state=state, eval_every=1, early_stop=2)
    assert told(events) == ["n"]


def test_no_note_where_the_run_was_over_anyway(tmp_path: Path, tiny_folder: Path):
    events = run_loop(tmp_path, tiny_folder, Fake([1, 2]), 8, 3, eval_every=1, early_stop=1)
    assert told(events) == ["s1", "b1", "s2", "v2", "k2"]


def test_old_checkpoints_go(tmp_path: Path, tiny_folder: Path):
    run_loop(tmp_path, tiny_folder, Fake(), 40, save_every=2, keep_last=3)
    left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["000006", "000008", "000010"]


def stop_at(step: int) -> tuple[Fake, Callable[[], bool]]:
    fake = Fake([3] * 9)
    return fake, lambda: fake.steps >= step


def test_stopping_saves_first(tmp_path: Path, tiny_folder: Path):
    fake, stop = stop_at(3)
    assert told(run_loop(tmp_path, tiny_folder, fake, 40, stop=stop)) == ["s1", "s2", "s3", "k3", "i3"]


def test_stopping_just_after_a_save_does_not_save_twice(tmp_path: Path, tiny_folder: Path):
    fake, stop = stop_at(2)
    events = run_loop(tmp_path, tiny_folder, fake, 40, stop=stop, save_every=2)
    assert told(events) == ["s1", "s2", "k2", "i2"]


def test_stopping_before_the_first_step_saves_nothing(tmp_path: Path, tiny_folder: Path):
    assert told(run_loop(tmp_path, tiny_folder, Fake(), 40, stop=lambda: True)) == ["i0"]


def test_a_wish_to_stop_in_the_last_step_changes_nothing(tmp_path: Path, tiny_folder: Path):
    fake, stop = stop_at(2)
    assert told(run_loop(tmp_path, tiny_folder, fake, 8, stop=stop)) == ["s1", "s2", "k2"]


def test_validation_is_over_the_whole_set(tiny_folder: Path):
    rng = np.random.default_rng(0)
    examples = [Example(np.arange(n, dtype=np.int32), np.ones(n, np.float32)) for n in rng.integers(2, 9, 7)]
    plan = tiny_plan(tiny_folder, train={"batch_size": 8, "micro_batch": 3})
    batches = split(examples, plan.micro_batch.value, plan.lengths.value)
    assert [len(b.tokens_BT) for b in batches] == [3, 3, 1]
    assert sum(b.n_tokens for b in batches) == sum(len(e.tokens) - 1 for e in examples)
    assert split((), 3) == []
