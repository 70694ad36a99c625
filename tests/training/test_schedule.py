"""Learning rates, held against the formulas of transformers' schedulers."""

from __future__ import annotations

import pytest

from burnish.recipe import Train
from burnish.training.schedule import learning_rate, warmup_steps


def rates(steps: int, **train: object) -> list[float]:
    settings = Train.model_validate({"lr": 1.0, **train})
    return [learning_rate(settings, step, steps) for step in range(steps)]


def test_linear_falls_to_zero_after_the_last_step():
    assert rates(4, schedule="linear") == [1.0, 0.75, 0.5, 0.25]


def test_constant():
    assert rates(3, schedule="constant") == [1.0, 1.0, 1.0]


def test_cosine():
    assert rates(4, schedule="cosine") == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_rises_to_the_full_rate(schedule: str):
    got = rates(8, schedule=schedule, warmup_steps=4)
    assert got[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(r > 0 for r in got)
    assert got[4:] == sorted(got[4:], reverse=True)


def test_warm_up_as_a_share_is_rounded_up():
    assert [warmup_steps(Train(warmup_ratio=r), 30) for r in (0, 0.01, 0.1, 1)] == [0, 1, 3, 30]
    assert warmup_steps(Train(), 30) == 0


def test_more_warm_up_than_steps_never_gets_there():
    assert rates(3, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_transformers_agrees_one_step_later_in_the_warm_up(schedule: str, warmup: int):
    """transformers begins at rate 0, and so wastes a step; from the warm-up's end on the two are the same."""
    torch = pytest.importorskip("torch")
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=warmup, num_training_steps=12)
    expected = []
    for _ in range(12):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = rates(12, schedule=schedule, warmup_steps=warmup)
    assert ours[warmup:] == pytest.approx(expected[warmup:])
    assert ours[:warmup] == pytest.approx(expected[1 : warmup + 1])
