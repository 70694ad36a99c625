"""`burnish plan`: what it says holds when it is typed, on this machine and for others. Its processes are in
test_plan_processes.py.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import burnish.cli.plan
from burnish.cli.show import gib
from burnish.cli.show_plan import LEVERS, memory_table
from burnish.errors import EXIT_BAD_INPUT, EXIT_WILL_NOT_FIT
from burnish.machine.probe import Machine
from burnish.models.geometry import spec_of_geometry
from tests.tiny import MACHINE
from tests.world import World

LARGE = (
    "--machine", "m2-pro-32gb", "--model-geometry", "qwen2.5-14b", "device=auto", "dtype=auto",
    "train.max_length=2048", "train.keep_layers=auto",
)  # fmt: skip
BAR_WIDTH = 24


@pytest.fixture(scope="module", autouse=True)
def machine() -> Iterator[Machine]:
    """The same two cores and 8 GiB wherever the tests run; not in processes that a test starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(burnish.cli.plan, "probe", lambda _: MACHINE)
        yield MACHINE


@dataclass(frozen=True)
class Told:
    summary: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, machine: Machine) -> Told:
    """What is said of a plan that fits, of a model and data that are here."""
    world = World(tmp_path_factory.mktemp("good"), tiny_folder)
    return Told(planned(world), text(world))


def planned(world: World, *args: str, code: int = 0) -> dict[str, Any]:
    said = world.burnish("plan", "recipe.yaml", *args, "--json")
    assert (said.code, said.err) == (code, ""), said
    return json.loads(said.out)


def text(world: World, *args: str, code: int = 0) -> str:
    said = world.burnish("plan", "recipe.yaml", *args)
    assert (said.code, said.err) == (code, ""), said
    return said.out


def too_small(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], missing: float) -> None:
    """From now on the machine lacks so large a share of what `found` needs."""
    budget = (1 - missing) * found["total_bytes"]
    free = int(MACHINE.free_ram_bytes * budget / found["budget_bytes"])
    monkeypatch.setattr(burnish.cli.plan, "probe", lambda _: replace(MACHINE, free_ram_bytes=free))


# --- what is decided


def test_plan_gives_choices_reasons_and_the_sum_of_its_parts(good: Told):
    summary = good.summary
    assert summary["fits"] is True and summary["data"] == "read"
    assert summary["total_bytes"] == sum(part["bytes"] for part in summary["estimate"])
    assert all(choice["reason"] for choice in summary["choices"].values())
    assert summary["choices"]["length"]["value"] < 64, "the data was read"
    for name, choice in summary["choices"].items():
        if name not in ("budget", "targets", "layers", "lengths"):
            line = rf"^{name.replace('_', ' ')} +{re.escape(str(choice['value']))} "
            assert re.search(line, good.text, re.M), name
    for part in summary["estimate"]:
        assert f"{part['part']} " in good.text
    assert "fits: needs" in good.text


def test_plan_says_that_it_does_not_fit(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(burnish.cli.plan, "probe", lambda _: replace(MACHINE, free_ram_bytes=50 << 20))
    unread = "data.train=later.jsonl"
    assert planned(world, unread, code=EXIT_WILL_NOT_FIT)["fits"] is False
    said = text(world, unread, code=EXIT_WILL_NOT_FIT)
    assert re.search(r"does not fit: needs 0\.\d\d GiB, budget 0\.04 GiB", said)


def test_plan_without_the_data_plans_for_the_longest_allowed(world: World):
    summary = planned(world, "data.train=later.jsonl")
    assert summary["choices"]["length"]["value"] == 64
    assert summary["data"].startswith("later.jsonl is not here")
    assert f"for the longest rows allowed: {summary['data']}" in text(world, "data.train=later.jsonl")


# --- what would fit, what else it could be


def shown_changes(said: str) -> list[list[str]]:
    """The changes that the text names, each as it would be typed, of the last paragraph."""
    lines = re.findall(r"^  (\S+=\S.*?)   \d+\.\d\d GiB(?: \(least \d+\.\d\d GiB\))?: ", said, re.M)
    return [line.split() for line in lines]


def test_a_plan_too_large_for_a_mac_names_what_fits(world: World):
    """The printed changes are typed, and each plans to exactly the memory that was promised."""
    found = planned(world, *LARGE, code=EXIT_WILL_NOT_FIT)
    fitting = [lever for lever in found["levers"] if lever["fits"]]
    assert fitting and found["room"] == []
    said = text(world, *LARGE, code=EXIT_WILL_NOT_FIT)
    assert "\nwhat would fit:\n" in said
    assert shown_changes(said) == [lever["overrides"] for lever in fitting[:LEVERS]]
    for lever in fitting:
        assert lever["total_bytes"] <= found["budget_bytes"] < found["total_bytes"]
        args = list(LARGE)
        if any(change.startswith("--model-geometry=") for change in lever["overrides"]):
            del args[2:4]  # another model than --model-geometry says
        after = planned(world, *args, *lever["overrides"])
        assert after["fits"] and after["total_bytes"] == lever["total_bytes"], lever


def test_what_is_enough_comes_first_and_the_cheapest_of_that(world: World):
    """In float32, bfloat16 helps most gently, but is not enough."""
    found = planned(world, *LARGE, "dtype=float32", code=EXIT_WILL_NOT_FIT)
    fits = [lever["fits"] for lever in found["levers"]]
    assert fits == sorted(fits, reverse=True) and len(set(fits)) == 2
    of = {True: [], False: []}
    for lever in found["levers"]:
        of[lever["fits"]].append(lever["overrides"][0])
    assert of[False][0] == "dtype=auto"
    assert len(of[True]) > 1
    assert of[True][-1].startswith("--model-geometry="), "a smaller model is the last resort"


def test_a_plan_too_large_for_its_data_names_what_fits(world: World, monkeypatch: pytest.MonkeyPatch):
    """Here with data that is read, and whose rows a change may cut."""
    long = [{"prompt": "why? " * 20, "completion": f"answer {i} " * (1 + 2 * i)} for i in range(12)]
    world.rows(long)
    asked = ("train.max_length=256", "train.keep_layers=3", "lora.rank=8", "train.micro_batch=1")
    too_small(monkeypatch, planned(world, *asked), missing=0.0001)
    found = planned(world, *asked, code=EXIT_WILL_NOT_FIT)
    fitting = [lever for lever in found["levers"] if lever["fits"]]
    assert found["data"] == "read"
    assert any(lever["overrides"][0].startswith("train.max_length=") for lever in fitting)
    for lever in fitting[:LEVERS]:
        after = planned(world, *asked, *lever["overrides"])
        # On a CPU the loss counts whatever moment is the largest, and which tokens a cut leaves to train is
        # known exactly only once the data is read again.
        assert after["fits"] and after["total_bytes"] == pytest.approx(lever["total_bytes"], rel=1e-4), lever


def test_where_nothing_is_enough_the_text_does_not_promise_it(world: World):
    """Mistral has no smaller sister, and 4 bits of it are too much for 8 GB."""
    hopeless = ("--machine", "m1-8gb", "--model-geometry", "mistral-7b-v0.3", *LARGE[4:])
    found = planned(world, *hopeless, code=EXIT_WILL_NOT_FIT)
    assert found["levers"] and not any(lever["fits"] for lever in found["levers"])
    said = text(world, *hopeless, code=EXIT_WILL_NOT_FIT)
    assert "\nnothing alone would fit; what helps most:\n" in said and "what would fit" not in said
    assert shown_changes(said) == [lever["overrides"] for lever in found["levers"][:LEVERS]]


def test_a_plan_that_fits_says_what_else_it_could_be(world: World, good: Told):
    room = good.summary["room"]
    assert good.summary["levers"] == [] and room, "keep_layers: 0 leaves something to say"
    assert "\nwhat else it could be:\n" in good.text and "what would fit" not in good.text
    assert shown_changes(good.text) == [change["overrides"] for change in room]
    for change in room:
        after = planned(world, *change["overrides"])
        assert (after["total_bytes"], after["fits"]) == (change["total_bytes"], change["fits"])


def test_a_smaller_model_that_would_fit_fits_when_typed(world: World, monkeypatch: pytest.MonkeyPatch):
    """Of a large model that is here, so that the data's lengths are known. Its tokenizer is the tiny one."""
    large = replace(spec_of_geometry("qwen2.5-14b"), folder=world.model)
    find_spec = burnish.cli.plan.find_spec
    monkeypatch.setattr(
        burnish.cli.plan, "find_spec",
        lambda recipe: (large, "") if recipe.model == str(world.model) else find_spec(recipe),
    )  # fmt: skip
    asked = ("--machine", "m2-pro-32gb", "device=auto", "dtype=auto", "train.max_length=8192")
    found = planned(world, *asked, code=EXIT_WILL_NOT_FIT)
    others = [v for v in found["levers"] if v["overrides"][0].startswith("--model-geometry=")]
    (smaller,) = [v for v in others if v["fits"]]
    assert found["data"] == "read"
    assert planned(world, *asked, *smaller["overrides"])["total_bytes"] == smaller["total_bytes"]


# --- other machines, other models


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("this is not to be asked")


def test_another_machine_and_model_need_nothing_of_this_one(world: World, monkeypatch: pytest.MonkeyPatch):
    """No model folder, no data, no network, no child process, no look at this machine."""
    for name in ("probe", "find_spec", "lengths", "ask", "measured_rate"):
        monkeypatch.setattr(burnish.cli.plan, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    world.recipe(model="nowhere", data={"train": "later.jsonl"})
    before = world.tree()
    found = planned(world, *LARGE, code=EXIT_WILL_NOT_FIT)
    assert found["choices"]["device"]["value"] == "metal"
    assert found["budget_bytes"] < 32 << 30, "the Mac's memory"
    assert "known" in found["data"] and found["rate"]["measured"] is False
    roomier = planned(world, "--machine", "m4-max-128gb", *LARGE[2:])
    assert roomier["fits"] and roomier["budget_bytes"] > found["budget_bytes"]
    smaller = planned(world, *LARGE[:2], "--model-geometry", "qwen2.5-0.5b", *LARGE[4:])
    assert smaller["fits"] and smaller["least_bytes"] < found["least_bytes"]
    assert world.tree() == before


def test_a_machine_of_the_table_has_the_recipes_own_data(world: World):
    found = planned(world, "--machine", "m2-pro-32gb", "device=auto", "dtype=auto")
    assert found["data"] == "read" and found["choices"]["length"]["value"] < 64


@pytest.mark.parametrize(
    "option, wrong, right",
    [("--machine", "m2-pro-32", "m2-pro-32gb"), ("--model-geometry", "qwen2.5-14", "qwen2.5-14b")],
)
def test_unknown_names_are_told_the_nearest(world: World, option: str, wrong: str, right: str):
    said = world.burnish("plan", "recipe.yaml", option, wrong)
    assert (said.code, said.out) == (EXIT_BAD_INPUT, "")
    assert said.err.startswith("burnish: ") and wrong in said.err
    assert re.search(rf"did you mean {re.escape(right)}\b", said.err), said.err
    assert re.search(rf"\n  → known.*\b{re.escape(right)}\b", said.err), "all of them"
    nothing_near = world.burnish("plan", "recipe.yaml", option, "zzz")
    assert nothing_near.code == EXIT_BAD_INPUT and "did you mean" not in nothing_near.err


@pytest.mark.parametrize(
    "model, args, source",
    [
        ("./Qwen2.5-7B", (), "the published config of Qwen/Qwen2.5-7B; ./Qwen2.5-7B is not there"),
        ("hf:Qwen/Qwen2.5-7B", (), "the published config of Qwen/Qwen2.5-7B; HF_HUB_OFFLINE is set"),
        ("nowhere", ("--model-geometry", "qwen2.5-7b"), "the published config of Qwen/Qwen2.5-7B"),
    ],
)
def test_why_names_where_the_models_facts_are_from(
    world: World, model: str, args: tuple[str, ...], source: str
):
    world.recipe(model=model)
    mac = ("--machine", "m4-max-128gb", "device=auto", "dtype=auto", *args)
    assert planned(world, *mac)["model"] == source
    (why,) = [line for line in text(world, *mac).splitlines() if line.startswith("why: ")]
    assert f"facts are from {source}." in why and "longest rows allowed" in why


def test_why_names_no_source_for_a_model_that_is_here(good: Told, tiny_folder: Path):
    assert good.summary["model"] == str(tiny_folder)
    assert "\nwhy: " in good.text
    assert "facts are from" not in good.text and "longest rows allowed" not in good.text


# --- what is predicted


@pytest.mark.parametrize("name", ["m1-8gb", "m2-pro-32gb", "m2-ultra-192gb"])
def test_numbers_about_a_mac_are_called_predicted(world: World, name: str):
    mac = ("--machine", name, "--model-geometry", "qwen2.5-0.5b", "device=auto", "dtype=auto")
    found = planned(world, *mac)
    assert found["predicted"] is True and found["rate"]["measured"] is False
    said = text(world, *mac)
    assert re.search(r"^fits.*: needs \d+\.\d\d GiB of \d+\.\d\d GiB \(predicted\)$", said, re.M)
    assert re.search(r"^time, predicted: \d+ tokens/s \(\d+ to \d+\)", said, re.M)
    assert f"  {found['rate']['source']}\n" in said and "published: " in said


def test_numbers_about_this_cpu_are_not(good: Told):
    assert good.summary["predicted"] is False and good.summary["rate"]["measured"] is True
    (verdict,) = [line for line in good.text.splitlines() if line.startswith("fits")]
    assert "predicted" not in verdict
    assert "\ntime, predicted from this machine's rate: " in good.text, "speed is never known before"


def test_the_time_lies_in_its_range_and_is_left_out_where_no_rate_is_known(
    world: World, good: Told, monkeypatch: pytest.MonkeyPatch
):
    time = good.summary["time"]
    assert time["low"] < time["tokens_per_s"] < time["high"] and time["seconds"] > 0
    monkeypatch.setattr(burnish.cli.plan, "measured_rate", lambda *_: None)
    unread = "data.train=later.jsonl"
    found = planned(world, unread)
    assert found["time"] is None and found["rate"] is None
    assert "\ntime: not known" in text(world, unread)


# --- what it looks like


def bars(said: str) -> dict[str, int]:
    """Of each part, the length of its bar."""
    table = said[said.index("\nmemory\n") :].split("\n\n")[0]
    lines = re.findall(r"^([a-z][a-z ]*?) +\d+\.\d\d (.*)$", table, re.M)
    return {part: rest.count("█") for part, rest in lines}


def check_bars(found: dict[str, Any], said: str) -> None:
    whole = max(found["total_bytes"], found["budget_bytes"])
    expected = {p["part"]: round(BAR_WIDTH * p["bytes"] / whole) for p in found["estimate"]}
    assert bars(said) == {**expected, "total": 0}
    runs = re.findall("█+", said)
    assert len(runs) == sum(n > 0 for n in expected.values()) > 0, "none is broken over two lines"
    assert all(len(run) <= BAR_WIDTH for run in runs)


@pytest.mark.parametrize("machine_name", ["m2-pro-32gb", "m1-8gb"])
def test_a_bar_is_a_parts_share_and_no_longer_than_its_column(world: World, machine_name: str):
    args = ("--machine", machine_name, *LARGE[2:])
    check_bars(planned(world, *args, code=EXIT_WILL_NOT_FIT), text(world, *args, code=EXIT_WILL_NOT_FIT))


def test_bars_of_what_fits_are_shares_of_the_budget(good: Told):
    check_bars(good.summary, good.text)


def test_one_part_that_is_all_fills_the_column():
    part = {"part": "weights", "bytes": 90 << 30, "why": "all of it"}
    table = memory_table({"estimate": [part], "total_bytes": 90 << 30, "budget_bytes": 1 << 30})
    (bar, _) = table.columns[2].cells
    assert bar == "█" * BAR_WIDTH and table.columns[2].width == BAR_WIDTH


# --- --measure


@pytest.mark.parametrize("option", [("--machine", "m1-8gb"), ("--model-geometry", "qwen2.5-7b")])
def test_measure_is_of_this_machine_and_the_recipes_model(
    world: World, option: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(burnish.cli.plan, "ask", refuse)
    said = world.burnish("plan", "recipe.yaml", "--measure", *option)
    assert (said.code, said.out) == (EXIT_BAD_INPUT, "")
    assert "--measure" in said.err and "\n  → leave out --machine and --model-geometry" in said.err


def test_measure_runs_the_longest_step(world: World, monkeypatch: pytest.MonkeyPatch):
    before = world.tree()
    found = planned(world, "--measure")
    assert world.tree() == before, "nothing is written"
    told = found["measured"]
    peak, expected = told["peak_bytes"], told["predicted_bytes"]
    assert peak > 50 << 20, "a whole process with its framework"
    assert expected == found["total_bytes"], "on a CPU all of the estimate can be measured"
    assert told["error_percent"] == pytest.approx(100 * (expected - peak) / peak)
    assert told["seconds"] > 0
    monkeypatch.setattr(burnish.cli.plan, "ask", lambda *_: {"measured": told})
    (line,) = [line for line in text(world, "--measure").splitlines() if line.startswith("measured: ")]
    assert line.startswith(f"measured: {gib(peak)} in the longest step, {gib(expected)} predicted (")
    assert f"({told['error_percent']:+.1f} %)" in line


def test_without_measure_nothing_is_measured(good: Told):
    assert "measured" not in good.summary and "\nmeasured: " not in good.text
