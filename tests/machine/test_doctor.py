"""`checks` on recorded machines: what is wrong is found, what is right is left alone."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from burnish.machine.doctor import Check, checks
from burnish.machine.doctor_check import numbers
from burnish.machine.doctor_packages import PYTHONS, RANGES
from burnish.machine.doctor_place import Place
from burnish.machine.health import Health
from burnish.machine.probe import probe
from tests.machine.recorded import (
    CONTAINER,
    GIB,
    H100,
    INSTALLED,
    M1_8,
    M2_PRO_32,
    M4_MAX_128,
    ROSETTA,
    RTX_4090,
    Recorded,
    with_mlx,
)

LDCONFIG = "/sbin/ldconfig -p"
EVERY = {"m1": M1_8, "m2": M2_PRO_32, "m4": M4_MAX_128, "rosetta": ROSETTA, "4090": RTX_4090, "h100": H100,
         "container": CONTAINER}


def look(
    system: Recorded,
    environment: Mapping[str, str] | None = None,
    health: Health | None = None,
    place: Place | None = None,
) -> dict[str, Check]:
    found = checks(probe(Path("."), system), environment or {}, health, place)
    assert len({c.name for c in found}) == len(found)
    return {c.name: c for c in found}


@pytest.mark.parametrize("system", EVERY.values(), ids=EVERY.keys())
def test_whatever_is_not_ok_says_what_was_found_and_what_to_do(system: Recorded):
    bad = replace(system, python_version="3.9.6", versions={})
    environment = {"HF_ENDPOINT": "https://hf-mirror.com", "KMP_DUPLICATE_LIB_OK": "1"}
    health = Health(True, 9, True, "critical", 900 * GIB, True)
    place = Place("Darwin", "/Users/a/Dropbox", "/Users/a", "apfs", "/tmp", 0, 64, 1)
    found = look(bad, environment, health, place)
    assert {"power", "low power mode", "heat", "memory pressure", "swap in use", "working folder",
            "temporary folder", "open files", "sleep", "KMP_DUPLICATE_LIB_OK"} <= found.keys()
    for check in found.values():
        assert check.found
        assert check.status == "ok" or check.advice


@pytest.mark.parametrize(("system", "wanted"), [
    (with_mlx(M4_MAX_128), {}),
    (M4_MAX_128, {"MLX": "warning"}),
    (RTX_4090, {}),
    (H100, {}),
    (with_mlx(H100), {"MLX": "warning"}),
    (with_mlx(H100, "mlx-cuda-13"), {}),
    (with_mlx(M1_8), {"GPU": "warning", "memory": "warning"}),
    (M2_PRO_32, {"GPU": "warning", "MLX": "warning"}),
    (CONTAINER, {"GPU": "warning", "CPU": "warning", "memory": "warning", "swap": "warning"}),
    (ROSETTA, {"architecture": "problem", "GPU": "warning", "CPU": "warning"}),
])
def test_the_verdicts_of_each_machine(system: Recorded, wanted: dict[str, str]):
    assert {c.name: c.status for c in look(system).values() if c.status != "ok"} == wanted


@pytest.mark.parametrize(("version", "status"), [
    ("3.9.6", "problem"), ("3.10.14", "problem"), ("3.11.0", "ok"), ("3.13.9", "ok"), ("3.14.0", "problem"),
])
def test_python(version: str, status: str):
    check = look(replace(RTX_4090, python_version=version))["Python"]
    assert check.status == status and version in check.found


def test_the_advice_under_rosetta_names_an_arm64_python():
    check = look(ROSETTA)["architecture"]
    assert "Rosetta" in check.found and "arm64" in check.advice


@pytest.mark.parametrize(("macos", "torch", "status", "advice"), [
    ("12.7.6", "2.13.0", "problem", "update macOS"),
    ("13.7.4", "2.13.0", "problem", "update macOS"),
    ("13.7.4", "2.8.0", "ok", ""),
    ("14.6", "2.14.1", "ok", ""),
    ("14.6", "2.15.0", "problem", "update macOS, or pip install 'torch<2.15'"),
    ("15.0", "2.15.0", "ok", ""),
    ("26.1", "2.15.0", "ok", ""),
])
def test_macos_against_torch(macos: str, torch: str, status: str, advice: str):
    system = replace(M4_MAX_128, versions={**INSTALLED, "torch": torch},
                     commands={**M4_MAX_128.commands, "sw_vers -productVersion": macos})
    check = look(system)["macOS"]
    assert (check.status, check.advice) == (status, advice)


@pytest.mark.parametrize(("package", "version", "status"), [
    ("torch", "", "problem"), ("torch", "2.5.1", "problem"), ("torch", "2.11.0+cu130", "ok"),
    ("torch", "2.16.0", "problem"),
    ("transformers", "4.57.1", "problem"), ("transformers", "5.23.0", "ok"), ("transformers", "", "problem"),
    ("peft", "", "problem"), ("peft", "0.10.0", "problem"), ("numpy", "1.26.4", "ok"),
    ("numpy", "2.4.6", "ok"),
    ("bitsandbytes", "", "ok"),
])
def test_packages(package: str, version: str, status: str):
    check = look(replace(RTX_4090, versions={**INSTALLED, package: version}))[package]
    assert check.status == status
    if status == "problem":
        assert check.advice.startswith(f"pip install '{package}>=")


def test_the_ranges_are_those_of_pyproject():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    plain = [re.sub(r"\[\w+\]|;.*", "", line) for line in [*extras, *project["dependencies"]]]
    asked = {re.split("[<>=]", line)[0]: line for line in plain}
    for package in ("mlx", "mlx-lm"):  # asked for in several places
        assert len({line for line in plain if re.split("[<>=]", line)[0] == package}) == 1
    for package, (oldest, beyond, needed) in RANGES.items():
        if needed or "<" in asked[package]:
            assert asked[package] == f"{package}>={'.'.join(map(str, oldest))},<{'.'.join(map(str, beyond))}"
        else:
            assert asked[package] == f"{package}>={'.'.join(map(str, oldest))}"
    first, last = PYTHONS
    assert project["requires-python"] == f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"


def test_the_mlx_extra_brings_a_build_for_the_platform_and_no_second_one():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    assert "burnish[mlx]" in extras["dev"], "or the tests of the backend are not run"
    for system, kind in (("darwin", ""), ("linux", "cpu")):
        needed = [r for r in map(Requirement, extras["mlx"])
                  if r.marker is None or r.marker.evaluate({"sys_platform": system})]
        assert [(r.name, ",".join(r.extras)) for r in needed] == [("mlx", kind), ("mlx-lm", "")]
    assert [(r.name, ",".join(r.extras)) for r in map(Requirement, extras["mlx-cuda"])] == [
        ("mlx", "cuda13"), ("mlx-lm", "")]


def test_a_mac_is_told_of_mlx():
    for missing in ("mlx", "mlx-lm"):
        whole = with_mlx(M4_MAX_128)
        check = look(replace(whole, versions={**whole.versions, missing: ""}))["MLX"]
        assert check.status == "warning" and check.advice == "pip install 'burnish[mlx]'"
    assert "MLX" not in look(with_mlx(M4_MAX_128))


def test_mlx_on_a_linux_cpu_wants_openblas():
    slow = look(with_mlx(CONTAINER))["MLX"]
    assert slow.status == "warning" and "libopenblas0-pthread" in slow.advice and "LD_PRELOAD=" in slow.advice
    listed = {LDCONFIG: "\tlibopenblas.so.0 (libc6,x86-64) => /usr/lib/…\n"}
    found = replace(with_mlx(CONTAINER), commands=listed)
    assert look(found)["MLX"].status == "ok"
    other = replace(found, commands={LDCONFIG: "\tlibblas.so.3 (libc6,x86-64) => /usr/lib/…\n"})
    assert look(other)["MLX"].status == "warning"
    assert look(with_mlx(CONTAINER), {"LD_PRELOAD": "/opt/libopenblas.so.0"})["MLX"].status == "ok"
    assert look(with_mlx(CONTAINER), {"LD_PRELOAD": "/opt/libjemalloc.so"})["MLX"].status == "warning"
    assert "MLX" not in look(CONTAINER)


def test_memory_and_disk():
    check = look(replace(RTX_4090, ram=(16 * GIB, GIB // 2, GIB)))["memory"]
    assert check.status == "problem" and "0.5 GiB free of 16.0 GiB" in check.found
    assert look(replace(RTX_4090, disk=GIB))["disk"].status == "problem"
    assert look(replace(RTX_4090, disk=10 * GIB))["disk"].status == "warning"


@pytest.mark.parametrize(("value", "status"), [
    ("0.0", "problem"), ("0", "problem"), (".0", "problem"), ("0.7", "warning"),
])
def test_the_guides_watermark_is_a_problem_on_a_mac(value: str, status: str):
    environment = {"PYTORCH_MPS_HIGH_WATERMARK_RATIO": value}
    check = look(M2_PRO_32, environment)["PYTORCH_MPS_HIGH_WATERMARK_RATIO"]
    assert check.status == status and "unset PYTORCH_MPS_HIGH_WATERMARK_RATIO" in check.advice
    assert "PYTORCH_MPS_HIGH_WATERMARK_RATIO" not in look(RTX_4090, environment)


def test_the_guides_fallback_is_a_warning_on_a_mac():
    name = "PYTORCH_ENABLE_MPS_FALLBACK"
    assert look(M4_MAX_128, {name: "1"})[name].status == "warning"
    assert name not in look(M4_MAX_128, {name: "0"})


@pytest.mark.parametrize(("endpoint", "status"), [
    ("https://hf-mirror.com", "warning"), ("https://huggingface.co/", "ok"), ("hf-mirror.com", "problem"),
])
def test_mirror(endpoint: str, status: str):
    check = look(RTX_4090, {"HF_ENDPOINT": endpoint})["HF_ENDPOINT"]
    assert check.status == status and endpoint in check.found


def test_a_tilde_that_nobody_expands():
    check = look(M4_MAX_128, {"HF_HOME": "~/Documents/models"})["HF_HOME"]
    assert check.status == "warning" and check.advice == 'export HF_HOME="$HOME/Documents/models"'
    assert look(M4_MAX_128, {"HF_HOME": "/Users/a/models"})["HF_HOME"].status == "ok"


def test_a_variable_that_transformers_no_longer_reads():
    check = look(M4_MAX_128, {"TRANSFORMERS_CACHE": "/m"})["TRANSFORMERS_CACHE"]
    assert check.status == "warning" and check.advice == "export HF_HOME=/m instead"


def test_offline_and_proxies():
    found = look(RTX_4090, {
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "0", "https_proxy": "http://me:secret@host:1",
    })
    assert "HF_HUB_OFFLINE" in found["offline"].found and "TRANSFORMERS" not in found["offline"].found
    assert "host:1" in found["HTTPS_PROXY"].found and "secret" not in found["HTTPS_PROXY"].found


def test_nothing_is_said_of_variables_that_are_not_set():
    assert not {"offline", "HF_ENDPOINT", "HF_HOME", "HTTPS_PROXY"} & look(RTX_4090).keys()
    assert checks(probe(Path("."), RTX_4090)) == checks(probe(Path("."), RTX_4090), {})
    assert checks(probe(Path("."), M1_8)) == checks(probe(Path("."), M1_8), {}, Health())


@pytest.mark.parametrize(("text", "wanted"), [
    ("2.13.0+cpu", (2, 13, 0)), ("", ()), ("26", (26,)), ("2.15.0a0", (2, 15, 0)),
])
def test_numbers(text: str, wanted: tuple[int, ...]):
    assert numbers(text) == wanted


# ---- versions that do not go together


@pytest.mark.parametrize(("torch", "numpy", "there"), [
    ("2.2.2", "2.0.0", True), ("2.2.2", "1.26.4", False), ("2.3.0", "2.4.6", False), ("", "2.4.6", False),
    ("2.13.0", "2.4.6", False), ("2.2.2", "", False),
])
def test_numpy_2_with_an_old_torch(torch: str, numpy: str, there: bool):
    found = look(replace(M4_MAX_128, versions={**INSTALLED, "torch": torch, "numpy": numpy}))
    assert ("torch and numpy" in found) is there
    if there:
        check = found["torch and numpy"]
        assert check.status == "problem" and "torch>=2.11" in check.advice


def test_a_torch_for_cpus_beside_an_nvidia_gpu():
    cpu = {**INSTALLED, "torch": "2.13.0+cpu"}
    check = look(replace(RTX_4090, versions=cpu))["torch build"]
    assert check.status == "warning" and "pip install 'torch>=2.11" in check.advice
    for fine in (RTX_4090, replace(RTX_4090, versions={**INSTALLED, "torch": "2.13.0+cu130"}),
                 replace(CONTAINER, versions=cpu), replace(M4_MAX_128, versions=cpu)):
        assert "torch build" not in look(fine)


@pytest.mark.parametrize(("value", "there"), [
    ("TRUE", True), ("True", True), ("1", True), ("FALSE", False), ("0", False), ("", False),
])
def test_openmp_loaded_twice_is_not_to_be_silenced(value: str, there: bool):
    found = look(M4_MAX_128, {"KMP_DUPLICATE_LIB_OK": value})
    assert ("KMP_DUPLICATE_LIB_OK" in found) is there
    assert not there or found["KMP_DUPLICATE_LIB_OK"].status == "warning"


def test_what_metal_has_of_its_own():
    name = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
    assert "21.3 GiB" in look(M2_PRO_32)["Metal"].found
    assert f"export {name}=1" in look(M2_PRO_32)[name].found
    assert look(M2_PRO_32, {name: "1"})[name].found.startswith("1:")
    for other in (RTX_4090, ROSETTA, CONTAINER):
        assert not {"Metal", name} & look(other, {name: "1"}).keys()


# ---- this moment


@pytest.mark.parametrize(("health", "status", "found"), [
    (Health(True, 57), "warning", "on battery, 57 % left"), (Health(True, None), "warning", "on battery"),
    (Health(False, 80), "ok", "mains, battery at 80 %"), (Health(False, None), "ok", "mains"),
])
def test_power(health: Health, status: str, found: str):
    check = look(M1_8, health=health)["power"]
    assert (check.status, check.found) == (status, found)


def test_low_power_mode_heat_and_pressure():
    assert not {"power", "heat", "memory pressure", "low power mode", "swap in use"} & look(M1_8).keys()
    assert look(M1_8, health=Health(low_power=True))["low power mode"].status == "warning"
    assert "low power mode" not in look(M1_8, health=Health(low_power=False))
    assert look(M1_8, health=Health(hot=True))["heat"].status == "warning"
    assert look(M1_8, health=Health(hot=False))["heat"].status == "ok"
    for level, status in (("normal", "ok"), ("warning", "warning"), ("critical", "problem")):
        health = Health(pressure=level)  # type: ignore[arg-type]
        assert look(M1_8, health=health)["memory pressure"].status == status


@pytest.mark.parametrize(("used", "status"), [(2 * GIB, "ok"), (2 * GIB + 1, "warning"), (0, ""), (None, "")])
def test_swap_in_use_is_judged_by_memory(used: int | None, status: str):
    found = look(M1_8, health=Health(swap_bytes=used))  # 8 GiB of memory
    assert (found["swap in use"].status if status else "") == status
    assert ("swap in use" in found) is bool(status)
