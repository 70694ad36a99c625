"""The environment a framework finds: what is missing is set, what a person set stays, a Mac has more."""

from __future__ import annotations

import os
import sys

import pytest

from burnish.recipe import Care
from burnish.training.environment import mps_limits, prepare_environment

WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
HIGH, LOW = "PYTORCH_MPS_HIGH_WATERMARK_RATIO", "PYTORCH_MPS_LOW_WATERMARK_RATIO"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    found: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", found)
    return found


@pytest.mark.parametrize(("platform", "wanted"), [("darwin", "1"), ("linux", None)])
def test_long_gpu_work_is_let_be_on_macs(
    platform: str, wanted: str | None, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    prepare_environment()
    assert environment.get(WATCHDOG) == wanted
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_a_persons_own_setting_is_never_overruled(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    environment.update({WATCHDOG: "0", "HF_HUB_OFFLINE": "0"})
    prepare_environment()
    assert (environment[WATCHDOG], environment["HF_HUB_OFFLINE"]) == ("0", "0")


# --- memory on an Apple GPU


@pytest.mark.parametrize("limit", [0.001, 0.3, 0.7, 1.0, 1.5, 2.0])
def test_a_limit_is_one_that_pytorch_takes(limit: float) -> None:
    """The lower mark not above the upper one, neither beyond 2, and what is asked for is what is set."""
    found = mps_limits(Care(mps_limit=limit))
    assert found.keys() == {HIGH, LOW}
    high, low = float(found[HIGH]), float(found[LOW])
    assert high == pytest.approx(limit) and 0 < low <= high <= 2


def test_there_is_a_limit_unless_it_is_asked_for_none() -> None:
    """0.0 is none at all, and macOS may go down with it."""
    assert float(mps_limits(Care())[HIGH]) == 1.0
    assert [float(v) for v in mps_limits(Care(mps_limit="none")).values()] == [0.0, 0.0]
    for no in (0, 0.0, -1, 2.1, "all"):
        with pytest.raises(ValueError):
            Care.model_validate({"mps_limit": no})


def test_that_none_may_freeze_the_machine_stands_where_it_is_asked_for() -> None:
    description = Care.model_fields["mps_limit"].description
    assert description is not None and "freeze" in description


def test_the_recipes_limit_is_set_before_anything_is_loaded(environment: dict[str, str]) -> None:
    prepare_environment(Care(mps_limit=0.5))
    assert (float(environment[HIGH]), float(environment[LOW])) == (0.5, pytest.approx(0.45))


@pytest.mark.parametrize("own", [{HIGH: "0.7"}, {LOW: "1.4"}, {HIGH: "0.0"}, {HIGH: "1.7", LOW: "1.4"}])
def test_a_persons_own_limit_is_neither_overruled_nor_completed(
    own: dict[str, str], environment: dict[str, str]
) -> None:
    """Ours beside it may be refused: a lower mark above the upper one."""
    environment.update(own)
    prepare_environment(Care(mps_limit=0.9))
    assert {k: v for k, v in environment.items() if "WATERMARK" in k} == own
