"""The environment a framework finds: what is missing is set, what a person set stays, a Mac has more."""

from __future__ import annotations

import os
import sys

import pytest

from burnish.training.environment import prepare_environment

WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"


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
