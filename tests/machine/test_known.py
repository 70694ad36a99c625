"""Machines by name are what `probe` finds on recorded ones, and cannot be mistaken for each other."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from burnish.errors import UserError
from burnish.machine.doctor import checks
from burnish.machine.known import GIB, KNOWN, known_machine
from burnish.machine.probe import MLX_CUDA, Machine, probe
from burnish.planning.engine import MLX_PACKAGES
from tests.machine import recorded

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
# Not of the machine but of the day: what is installed and what else is open.
OF_THE_DAY = {
    "release", "python", "free_ram_bytes", "free_disk_bytes", "versions", "swap_bytes", "openblas", "gpus"
}  # fmt: skip
MACS = [n for n, m in KNOWN.items() if m.system == "Darwin"]
# The guide's four tiers of memory, and cards whose names say what they have.
NAMED_GB = {n: int(found[1]) for n in KNOWN if (found := re.search(r"-(\d+)gb$", n))}


@pytest.mark.parametrize(
    ("name", "answers"),
    [
        ("m1-8gb", recorded.M1_8), ("m1-16gb", recorded.M1_16), ("m2-pro-32gb", recorded.M2_PRO_32),
        ("m4-max-128gb", recorded.M4_MAX_128), ("rtx-4090-24gb", recorded.RTX_4090),
        ("h100-80gb", recorded.H100),
    ],
)  # fmt: skip
def test_a_known_machine_is_what_probe_finds(name: str, answers: Any) -> None:
    known, found = known_machine(name), probe(Path("."), answers)
    for field in fields(Machine):
        if field.name not in OF_THE_DAY:
            assert getattr(known, field.name) == getattr(found, field.name), field.name
    (mine,), theirs = known.gpus, found.gpus[0]
    assert (mine.name, mine.kind, mine.total_bytes) == (theirs.name, theirs.kind, theirs.total_bytes)
    if mine.kind == "cuda":
        assert mine.free_bytes == theirs.free_bytes
    assert known.versions.keys() == found.versions.keys()
    assert all(known.versions[k] == v for k, v in found.versions.items() if v)


@pytest.mark.parametrize("name", MACS)
def test_a_macs_chip_is_read_by_probe_as_it_is_known(name: str) -> None:
    known = known_machine(name)
    bf16 = known.cpu_bfloat16
    found = probe(Path("."), recorded.mac(known.chip, "26.1", known.ram_bytes // GIB, 1, known.cores, bf16))
    assert (found.chip, found.gpu_bfloat16, found.unified) == (known.chip, known.gpu_bfloat16, True)
    assert found.ram_bytes == known.ram_bytes == known.gpus[0].total_bytes


def test_only_the_m1_lacks_bfloat16_on_its_cpu_and_the_m3_brings_it_to_the_gpu() -> None:
    generation = {n: int(KNOWN[n].chip[len("Apple M")]) for n in MACS}
    assert {n for n in MACS if KNOWN[n].cpu_bfloat16} == {n for n in MACS if generation[n] >= 2}
    assert {n for n in MACS if KNOWN[n].gpu_bfloat16} == {n for n in MACS if generation[n] >= 3}


@pytest.mark.parametrize(("name", "gb"), NAMED_GB.items())
def test_memory_is_what_the_name_says(name: str, gb: int) -> None:
    gpu = known_machine(name).gpus[0]
    assert 0.97 * gb < gpu.total_bytes / GIB <= gb
    assert gpu.free_bytes < gpu.total_bytes


@pytest.mark.parametrize("name", MACS)
def test_macos_takes_its_part_but_not_half(name: str) -> None:
    mac = known_machine(name)
    assert 3 * GIB <= mac.ram_bytes - mac.free_ram_bytes < mac.ram_bytes / 2
    assert mac.gpus[0].free_bytes == mac.free_ram_bytes  # one memory


@pytest.mark.parametrize("name", KNOWN)
def test_the_packages_are_there_in_the_versions_that_the_tests_run_with(name: str) -> None:
    versions = known_machine(name).versions
    assert all(versions[p] for p in ("torch", "transformers", "peft", *MLX_PACKAGES))
    cuda = bool(KNOWN[name].gpus) and KNOWN[name].gpus[0].kind == "cuda"
    assert any(versions[p] for p in MLX_CUDA) == bool(versions["bitsandbytes"]) == cuda
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE))
    there = {p: v for p, v in versions.items() if v and p in pinned}
    assert {"mlx", "mlx-lm", "transformers", "peft"} <= there.keys()
    assert there == {p: pinned[p] for p in there}


@pytest.mark.parametrize("name", KNOWN)
def test_no_name_stands_for_a_machine_with_a_problem(name: str) -> None:
    assert [c for c in checks(known_machine(name)) if c.status == "problem"] == []


def test_capitals_do_not_matter() -> None:
    assert known_machine(" M2-Pro-32GB ") is KNOWN["m2-pro-32gb"]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("m2-pro-32", "m2-pro-32gb"),
        ("m1-16", "m1-16gb"),
        ("rtx-4090", "rtx-4090-24gb"),
        ("h100", "h100-80gb"),
    ],
)
def test_a_wrong_name_is_told_the_right_one(wrong: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"'{wrong}'; did you mean {meant}\\?") as e:
        known_machine(wrong)
    assert all(name in e.value.hint for name in KNOWN)


def test_a_name_like_nothing_gets_no_guess() -> None:
    with pytest.raises(UserError) as e:
        known_machine("zzz")
    assert "did you mean" not in e.value.message
