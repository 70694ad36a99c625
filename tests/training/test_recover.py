"""What a run does about memory that runs out and numbers that are not finite: the policy, and the loop with a
reference learner that fails where the test says.
"""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish import backends
from burnish.backends.base import Scores, StepStats
from burnish.backends.reference import ReferenceLearner
from burnish.data.batches import Batch
from burnish.errors import EXIT_WILL_NOT_FIT, NonFinite, OutOfMemory, UserError
from burnish.planning.choice import Choice
from burnish.planning.plan import Plan
from burnish.recipe import Recipe, load
from burnish.runs.events import (
    Event,
    Finished,
    Noted,
    Planned,
    Recovered,
    Saved,
    Skipped,
    Stepped,
    Validated,
)
from burnish.runs.folder import RunFolder
from burnish.training.job import run_job
from burnish.training.material import gather
from burnish.training.orders import Aftermath
from burnish.training.recover import (
    AGAIN,
    after_out_of_memory,
    difference,
    let_go,
    lighter,
    named_rows,
    take,
)
from tests.contract.doubles import Wrapped
from tests.tiny import tiny_plan
from tests.world import World

FULL = OutOfMemory("CUDA out of memory. Tried to allocate 2.00 GiB\nmore of it")
NAN = NonFinite("loss nan, gradient norm nan")


# --- the policy


def rungs(plan: Plan) -> list[Plan]:
    found = [plan]
    while (way := lighter(found[-1])) is not None:
        assert way.did == difference(found[-1], way.plan) != ""
        found.append(way.plan)
    return found


def large(model: Path, **settings: Any) -> Plan:
    return tiny_plan(model, backend="torch", train={"micro_batch": 8, "keep_layers": 3, **settings})


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("backend", ["torch", "mlx", "reference"])
def test_every_rung_trains_the_same_in_no_more_memory(backend: str, pack: bool, tiny_folder: Path) -> None:
    plans = rungs(tiny_plan(tiny_folder, backend=backend, train={"keep_layers": 3, "pack": pack}))
    first, last = plans[0], plans[-1]
    assert len(plans) > 3 and (last.micro_batch.value, last.keep_layers.value) == (1, 0)
    for a, b in pairwise(plans):
        assert b.total_bytes <= a.total_bytes
        for name in ("pack", "row_length", "lengths", "weights", "compute", "targets", "layers", "length",
                     "device", "backend", "quantize", "steps"):  # fmt: skip
            assert getattr(b, name) == getattr(first, name), name
        assert b.recipe == first.recipe
    assert lighter(last) is None and after_out_of_memory(last, 1, renewable=False) is None


def test_at_first_the_same_is_done_again(tiny_folder: Path) -> None:
    """Even where nothing is left: the freed cache may do."""
    for plan in (large(tiny_folder), rungs(large(tiny_folder))[-1]):
        way = after_out_of_memory(plan, 0, renewable=False)
        assert way is not None and way.plan is plan and way.did == AGAIN
    way = after_out_of_memory(large(tiny_folder), 1, renewable=False)
    assert way is not None and way.plan.micro_batch.value == 4 and way.did == "micro-batch 8 → 4"


def test_on_a_cpu_a_new_process_is_the_better_way(tiny_folder: Path) -> None:
    """What was freed there is not always there for others; a GPU's cache is."""
    plan = large(tiny_folder)
    gpu = replace(plan, device=Choice("cuda", ""))
    assert after_out_of_memory(plan, 0, renewable=True) is not None
    assert after_out_of_memory(plan, 1, renewable=True) is None
    assert after_out_of_memory(gpu, 1, renewable=True) is not None
    assert after_out_of_memory(plan, 1, renewable=False) is not None


def test_a_difference_names_what_differs(tiny_folder: Path) -> None:
    plan = large(tiny_folder)
    other = replace(plan, micro_batch=Choice(2, ""), loss_slice=Choice(64, ""))
    assert difference(plan, other) == f"micro-batch 8 → 2, loss slice {plan.loss_slice.value} → 64"
    assert difference(plan, plan) == ""


def test_what_failed_is_let_go() -> None:
    """The frames of an error hold what the step had made."""

    class Tensor:
        pass

    def failing() -> None:
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        try:
            try:
                raise RuntimeError("of the framework")
            except RuntimeError as e:
                inner = Tensor()
                held.append(weakref.ref(inner))
                raise OutOfMemory("ours") from e
        finally:
            pass

    held: list[weakref.ref[Tensor]] = []
    try:
        failing()
    except OutOfMemory as e:
        error = e
    gc.collect()
    assert all(ref() is not None for ref in held), "else there is nothing to let go"
    let_go(error)
    assert all(ref() is None for ref in held)
    assert str(error) == "ours"


def test_many_rows_are_counted() -> None:
    few, many = (str(named_rows(NAN, 7, [f"a:{i}" for i in range(n)])) for n in (8, 11))
    assert "step 7" in few and few.endswith("a:7") and many.endswith("a:7 and 3 more")


# --- a learner that fails


@dataclass
class Faults:
    """Which calls of which verb fail, with what. Calls are counted from 1, over all tries."""

    at: Callable[[str, int, int], Exception | None]  # verb, call, rows of the first micro-batch
    calls: dict[str, int] = field(default_factory=dict)
    steps: list[list[Batch]] = field(default_factory=list)  # what each call of `step` was given
    opened: int = 0

    def now(self, verb: str, rows: int) -> None:
        self.calls[verb] = self.calls.get(verb, 0) + 1
        error = self.at(verb, self.calls[verb], rows)
        if error is not None:
            raise type(error)(*error.args)


class Faulty(Wrapped):
    def __init__(self, inner: ReferenceLearner, faults: Faults) -> None:
        super().__init__(inner)
        self.faults = faults

    def step(self, micros: Sequence[Batch], lr: float) -> StepStats:
        self.faults.steps.append(list(micros))
        self.faults.now("step", len(micros[0].tokens_BT))
        return self.inner.step(micros, lr)

    def score(self, batch: Batch) -> Scores:
        self.faults.now("score", len(batch.tokens_BT))
        return self.inner.score(batch)

    def save(self, folder: Path) -> None:
        self.inner.save(folder)
        self.faults.now("save", 0)

    def rehearse(self, micros: Sequence[Batch]) -> None:
        self.faults.now("rehearse", len(micros[0].tokens_BT))
        self.inner.rehearse(micros)


Fail = Callable[..., Faults]


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Fail:
    open_ = backends.open

    def fail(at: Callable[[str, int, int], Exception | None] = lambda *_: None) -> Faults:
        faults = Faults(at)

        def opened(plan: Plan) -> Faulty:
            inner = open_(plan)
            assert isinstance(inner, ReferenceLearner)
            faults.opened += 1
            return Faulty(inner, faults)

        monkeypatch.setattr(backends, "open", opened)
        return faults

    return fail


def calls(verb: str, *numbers: int, error: Exception = FULL) -> Callable[[str, int, int], Exception | None]:
    return lambda v, n, _rows: error if v == verb and n in numbers else None


def more_than(rows: int, *verbs: str) -> Callable[[str, int, int], Exception | None]:
    """No room for more rows a pass, ever."""
    return lambda v, _n, there: FULL if v in verbs and there > rows else None


@pytest.fixture
def asked(world: World) -> Recipe:
    """Six steps of four, saved every other, validated every third."""
    world.recipe(
        backend="reference",
        data={"train": str(world.root / "data.jsonl"), "valid_share": 0.25},
        train={"micro_batch": 4, "max_steps": 6, "save_every": 2, "eval_every": 3, "keep_last": 9},
        care={"keep_awake": False},
    )
    return load(str(world.root / "recipe.yaml"))


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    return recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=keys) for name, keys in sections.items()}
    )


def listen(recipe: Recipe, out: Path, resume: bool = False, **more: Any) -> Iterator[Event]:
    return run_job(recipe, out, resume=resume, skip_before=False, stop=lambda: False, **more)


def run(recipe: Recipe, out: Path, resume: bool = False, **more: Any) -> list[Event]:
    return list(listen(recipe, out, resume, **more))


def fails(recipe: Recipe, out: Path, resume: bool = False, **more: Any) -> tuple[list[Event], Exception]:
    events: list[Event] = []
    with pytest.raises(Exception) as e:
        for event in listen(recipe, out, resume, **more):
            events.append(event)
    return events, e.value


def numbers(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for e in events:
        if isinstance(e, Stepped):
            found.append((e.step, e.loss, e.grad_norm, e.lr, e.tokens, e.trained))
        elif isinstance(e, Validated):
            found.append((e.step, e.loss, e.accuracy, e.trained, e.best))
    return found


def near(events: Sequence[Event], others: Sequence[Event]) -> None:
    assert len(numbers(events)) == len(numbers(others))
    for a, b in zip(numbers(events), numbers(others)):
        assert a[0] == b[0]
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def of(kind: type[Any], events: Sequence[Event]) -> list[Any]:
    return [e for e in events if isinstance(e, kind)]


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def micro_batch(out: Path) -> int:
    return json.loads((out / "plan.json").read_text("utf-8"))["choices"]["micro_batch"]["value"]


@pytest.fixture
def untouched(asked: Recipe, tmp_path: Path) -> list[Event]:
    return run(asked, tmp_path / "untouched")


# --- memory that runs out


@pytest.mark.parametrize(("verb", "call", "step"), [("step", 1, 0), ("step", 3, 2), ("step", 6, 5),
                                                     ("score", 1, 3),
                                                     ("score", 2, 6), ("rehearse", 1, 0)])  # fmt: skip
def test_once_it_changes_not_a_bit(
    verb: str, call: int, step: int, asked: Recipe, untouched: list[Event], fail: Fail, tmp_path: Path
) -> None:
    fail(calls(verb, call))
    events = run(asked, tmp_path / "run")
    (recovered,) = of(Recovered, events)
    assert (recovered.step, recovered.did, recovered.repeated) == (step, AGAIN, 0)
    assert recovered.cause.startswith("out of memory") and recovered.seconds >= 0
    assert recovered.error == "CUDA out of memory. Tried to allocate 2.00 GiB", "its first line"
    assert numbers(events) == numbers(untouched)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "untouched")
    assert micro_batch(tmp_path / "run") == 4


@pytest.mark.parametrize("verbs", [("step",), ("score",), ("step", "score"), ("step", "score", "rehearse")])
def test_always_it_is_cut_smaller_and_the_numbers_stay(
    verbs: tuple[str, ...], asked: Recipe, untouched: list[Event], fail: Fail, tmp_path: Path
) -> None:
    fail(more_than(2, *verbs))
    out = tmp_path / "run"
    events = run(asked, out)
    near(events, untouched)
    assert [e.did for e in of(Recovered, events)] == [AGAIN, "micro-batch 4 → 2"], "once for all that follows"
    assert micro_batch(out) == 2
    assert "measured" in json.loads((out / "plan.json").read_text("utf-8")), "what was known stays"
    recorded = [json.loads(line)["event"] for line in (out / "events.jsonl").read_text().splitlines()]
    assert recorded.count("recovered") == 2


def test_a_run_gone_on_with_begins_with_the_smaller_cut(
    asked: Recipe, untouched: list[Event], fail: Fail, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    faults = fail(lambda v, n, rows: FULL if v == "step" and (rows > 2 or n > 6) else None)
    first, error = fails(asked, out)
    assert isinstance(error, OutOfMemory) and faults.calls["step"] > 6
    (out / "plan.json").write_text(json.dumps(_with(out, micro_batch=2)))  # as it was before the last rungs
    faults = fail(more_than(2, "step", "score", "rehearse"))
    rest = run(asked, out, resume=True)
    assert of(Recovered, rest) == [], "it knew"
    (planned,) = of(Planned, rest)
    assert planned.summary["choices"]["micro_batch"]["value"] == 2 and planned.resumed_at == 4
    near([e for e in first if getattr(e, "step", 9) <= 4] + rest, untouched)


def _with(out: Path, **values: int) -> dict[str, Any]:
    plan = json.loads((out / "plan.json").read_text("utf-8"))
    for name, value in values.items():
        plan["choices"][name]["value"] = value
    return plan


def test_where_nothing_is_left_it_ends_and_lets_go(asked: Recipe, fail: Fail, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fail(lambda v, n, _: FULL if v == "step" and n >= 4 else None)
    events, error = fails(asked, out)
    assert isinstance(error, OutOfMemory) and str(error) == str(FULL)
    did = [e.did for e in of(Recovered, events)]
    assert did[0] == AGAIN and len(did) > 2 and len(set(did)) == len(did)
    assert {e.step for e in of(Recovered, events)} == {3}
    assert (out / "checkpoints" / "000002").is_dir() and not (out / "adapter").exists()
    RunFolder.resume(out, asked).close()  # nobody owns it


def test_a_place_counts_for_itself(asked: Recipe, untouched: list[Event], fail: Fail, tmp_path: Path) -> None:
    """Short of memory for a moment, now and then: no rung is taken."""
    fail(lambda v, n, _: FULL if (v, n) in (("step", 1), ("step", 3), ("step", 6), ("score", 1)) else None)
    events = run(asked, tmp_path / "run")
    assert [e.did for e in of(Recovered, events)] == [AGAIN] * 4
    assert numbers(events) == numbers(untouched)


def test_in_a_save_it_ends_the_run_and_half_a_checkpoint_is_none(
    asked: Recipe, untouched: list[Event], fail: Fail, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    fail(calls("save", 3))  # the checkpoints of steps 2, then best of 3, then 4
    first, error = fails(asked, out)
    assert isinstance(error, OutOfMemory)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["000002"] and not list(out.rglob(".tmp-*"))
    fail()
    rest = run(asked, out, resume=True)
    assert numbers([e for e in first if getattr(e, "step", 9) <= 2]) + numbers(rest) == numbers(untouched)


def test_in_the_rehearsal_nothing_is_left_is_said_before_any_step(
    asked: Recipe, fail: Fail, tmp_path: Path
) -> None:
    fail(more_than(0, "rehearse"))
    events, error = fails(asked, tmp_path / "run")
    assert isinstance(error, UserError) and error.exit_code == EXIT_WILL_NOT_FIT
    assert of(Stepped, events) == [] and of(Recovered, events)


def test_taking_a_way_is_kept_with_the_run(asked: Recipe, tmp_path: Path) -> None:
    plan = gather(asked, tmp_path).plan
    learner = backends.open(plan)
    with RunFolder.begin(tmp_path / "run", asked) as folder:
        folder.write_json("plan.json", {"measured": 1})
        again = after_out_of_memory(plan, 0, renewable=False)
        assert again is not None
        take(again, plan, learner, folder, FULL)
        assert folder.read_json("plan.json") == {"measured": 1}
        less = after_out_of_memory(plan, 1, renewable=False)
        assert less is not None
        take(less, plan, learner, folder, FULL)
    assert learner.plan is less.plan and micro_batch(tmp_path / "run") == 2
    assert "measured" in json.loads((tmp_path / "run" / "plan.json").read_text("utf-8"))


# --- after a process has died


def died(lighter: bool) -> Aftermath:
    return Aftermath("SIGKILL", "its last words", lighter, step=5, since=0.0)


@pytest.mark.parametrize("lighter", [False, True])
def test_the_one_that_goes_on_says_so(
    lighter: bool, asked: Recipe, untouched: list[Event], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = []
    for event in listen(asked, out):
        first.append(event)
        if isinstance(event, Stepped) and event.step == 5:
            break
    rest = run(asked, out, resume=True, aftermath=died(lighter))
    (recovered,) = of(Recovered, rest)
    assert (recovered.step, recovered.cause, recovered.repeated) == (4, "SIGKILL", 1)
    assert recovered.error == "its last words" and ("micro-batch 4 → 2" in recovered.did) == lighter
    assert micro_batch(out) == (2 if lighter else 4)
    whole = [e for e in first if getattr(e, "step", 9) <= 4] + rest
    near(whole, untouched)
    assert (numbers(whole) == numbers(untouched)) or lighter


def test_each_that_shall_be_lighter_takes_a_rung_more(asked: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert isinstance(next(listen(asked, out)), Planned)
    cuts = []
    for _ in range(2):
        (planned,) = of(Planned, [next(listen(asked, out, resume=True, aftermath=died(True)))])
        cuts.append(planned.summary["choices"]["micro_batch"]["value"])
    assert cuts == [2, 1]


def test_where_nothing_is_left_the_next_one_says_what_to_type(asked: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = changed(asked, train={"micro_batch": 1})
    next(listen(asked, out))
    errors = []
    while not errors:
        try:
            next(listen(asked, out, resume=True, aftermath=died(True)))
        except UserError as e:
            errors.append(e)
    assert errors[0].exit_code == EXIT_WILL_NOT_FIT and "cannot be cut any smaller" in errors[0].message
    assert "train.max_length" in errors[0].hint


# --- numbers that are not finite


def test_a_device_that_slipped_once_changes_nothing(
    asked: Recipe, untouched: list[Event], fail: Fail, tmp_path: Path
) -> None:
    fail(calls("step", 3, error=NAN))
    events = run(asked, tmp_path / "run")
    (note,) = [e for e in of(Noted, events) if "nan" in e.message]
    assert "computed again, once" in note.message
    assert numbers(events) == numbers(untouched)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "untouched")


def places(recipe: Recipe, out: Path, micros: Sequence[Batch]) -> set[str]:
    """Where the examples of a step stand, found by their tokens."""
    part = gather(recipe, out).prepared.train
    known = {
        tuple(e.tokens[:-1].tolist()): c.at for e, c in zip(part.examples, part.conversations, strict=True)
    }
    assert len(known) == len(part.examples), "each example has tokens of its own"
    found = set()
    for micro in micros:
        for tokens, segments in zip(micro.tokens_BT, micro.segments_BT):
            found |= {known[tuple(tokens[segments == s].tolist())] for s in set(segments.tolist()) - {0}}
    return found


@pytest.fixture
def told_apart(world: World, asked: Recipe) -> Recipe:
    """Each example has tokens of its own, and a row of text holds several lines' worth of file."""
    rows = [{"prompt": f"question {i} {'why ' * (i % 4)}", "completion": f"answer {i}"} for i in range(24)]
    world.rows(rows)
    return asked


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("call", [1, 4])
def test_twice_it_ends_and_names_the_rows(
    pack: bool, call: int, told_apart: Recipe, fail: Fail, tmp_path: Path
) -> None:
    recipe = changed(told_apart, train={"pack": pack, "batch_size": 4})
    faults = fail(calls("step", call, call + 1, error=NAN))
    events, error = fails(recipe, tmp_path / "run")
    assert isinstance(error, NonFinite)
    assert f"step {call}, twice, of the rows" in str(error) and "loss nan" in str(error)
    named = set(str(error).split("of the rows ")[1].split(" and ")[0].split(", "))
    assert named == places(recipe, tmp_path, faults.steps[-1]) and len(named) > 1
    assert [e.step for e in of(Stepped, events)] == list(range(1, call))
    for a, b in zip(faults.steps[-1], faults.steps[-2], strict=True):
        assert (a.tokens_BT == b.tokens_BT).all(), "the very same step"


@pytest.mark.parametrize("pack", [False, True])
def test_a_step_may_be_left_out(pack: bool, told_apart: Recipe, fail: Fail, tmp_path: Path) -> None:
    recipe = changed(told_apart, care={"non_finite": "skip"}, train={"pack": pack})
    whole = run(recipe, tmp_path / "untouched")
    faults = fail(calls("step", 3, 4, error=NAN))
    events = run(recipe, tmp_path / "run")
    (skipped,) = of(Skipped, events)
    assert skipped.step == 3 and "nan" in skipped.error
    assert set(skipped.rows) == places(recipe, tmp_path, faults.steps[3])
    assert [e.step for e in of(Stepped, events)] == [1, 2, 4, 5, 6]
    assert numbers(events)[:2] == numbers(whole)[:2]
    after = [(e.step, e.lr, e.tokens) for e in of(Stepped, events) if e.step > 3]
    assert after == [(e.step, e.lr, e.tokens) for e in of(Stepped, whole) if e.step > 3], "the data goes on"
    assert of(Finished, events)[0].step == 6
    assert [e.step for e in of(Saved, events)] == [2, 4, 6] and [e.step for e in of(Validated, events)] == [
        3,
        6,
    ]
    recorded = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [e["rows"] for e in recorded if e["event"] == "skipped"] == [list(skipped.rows)]


def test_the_last_step_may_be_left_out(asked: Recipe, fail: Fail, tmp_path: Path) -> None:
    fail(calls("step", 6, 7, error=NAN))
    events = run(changed(asked, care={"non_finite": "skip"}), tmp_path / "run")
    assert [e.step for e in of(Skipped, events)] == [6] and of(Saved, events)[-1].step == 6


def test_not_two_in_a_row(asked: Recipe, fail: Fail, tmp_path: Path) -> None:
    fail(calls("step", 3, 4, 5, 6, error=NAN))
    events, error = fails(changed(asked, care={"non_finite": "skip"}), tmp_path / "run")
    assert [e.step for e in of(Skipped, events)] == [3]
    assert isinstance(error, NonFinite) and "step 4, twice" in str(error)


def test_two_apart_may_be(asked: Recipe, fail: Fail, tmp_path: Path) -> None:
    fail(calls("step", 1, 2, 4, 5, error=NAN))
    events = run(changed(asked, care={"non_finite": "skip"}), tmp_path / "run")
    assert [e.step for e in of(Skipped, events)] == [1, 3]
    assert [e.step for e in of(Stepped, events)] == [2, 4, 5, 6]


def test_left_out_and_gone_on_with_is_the_same_run(asked: Recipe, fail: Fail, tmp_path: Path) -> None:
    recipe = changed(asked, care={"non_finite": "skip"})
    fail(calls("step", 2, 3, error=NAN))
    whole = run(recipe, tmp_path / "whole")
    fail(calls("step", 2, 3, error=NAN))
    first = []
    for event in listen(recipe, tmp_path / "run"):
        first.append(event)
        if isinstance(event, Saved):
            break
    assert first[-1].step == 2, "just after the step that was left out"
    fail()
    rest = run(recipe, tmp_path / "run", resume=True)
    assert numbers(first) + numbers(rest) == numbers(whole)
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole")


def test_both_at_one_step(asked: Recipe, untouched: list[Event], fail: Fail, tmp_path: Path) -> None:
    errors = {3: FULL, 4: NAN}
    fail(lambda v, n, _: errors.get(n) if v == "step" else None)
    events = run(asked, tmp_path / "run")
    assert len(of(Recovered, events)) == 1 and numbers(events) == numbers(untouched)


# --- the recipe of a run that is gone on with


@pytest.mark.parametrize(
    "care",
    [{"non_finite": "skip"}, {"restarts": 0}, {"on_battery": "pause", "min_battery": 0},
     {"mps_limit": "none"}, {"silence_s": 77}],
)  # fmt: skip
def test_care_may_be_another(care: dict[str, Any], asked: Recipe, fail: Fail, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fail(calls("step", 3, 4, error=NAN))
    fails(asked, out)
    fail()
    other = changed(asked, care=care)
    assert of(Finished, run(other, out, resume=True))
    assert load(str(out / "recipe.yaml")).care == other.care


@pytest.mark.parametrize(
    "other",
    [{"train": {"lr": 0.5}}, {"train": {"micro_batch": 2}}, {"lora": {"rank": 3}}, {"data": {"rows": 5}}],
)
def test_nothing_else_may(other: dict[str, dict[str, Any]], asked: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(asked, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    _, error = fails(changed(asked, care={"restarts": 1}, **other), out, resume=True)
    assert isinstance(error, UserError) and "another recipe" in error.message and "care" not in error.message
    assert {p: p.read_bytes() for p in before} == before


# --- signs of life


def test_it_pulses_with_all_it_does(asked: Recipe, world: World, tmp_path: Path) -> None:
    pulses: list[int] = []
    recipe = asked.model_copy(update={"ask": ("question 1",)})
    between: dict[str, int] = {}
    for event in listen(recipe, tmp_path / "run", pulse=lambda: pulses.append(1)):
        between[type(event).__name__] = max(between.get(type(event).__name__, 0), len(pulses))
        pulses.clear()
    for kind in ("Rehearsed", "Answered", "Stepped", "Validated", "Saved"):
        assert between[kind], kind
