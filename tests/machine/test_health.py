"""What `read_health` makes of recorded outputs, and of this machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from burnish.machine import health as module
from burnish.machine.health import (
    LEAST_TRIP_MC,
    MARGIN_MC,
    Health,
    Quick,
    any_of,
    pmset_batt,
    pmset_therm,
    psi,
    read_health,
    swapusage,
    sysfs_command,
)
from burnish.machine.probe import ThisSystem
from tests.machine import recorded_health as r
from tests.machine.recorded import GIB, RTX_4090, Recorded

MIB = 1 << 20


def told(system: Recorded, commands: Mapping[str, str | None]) -> Health:
    """Of `system` with other answers; None takes a command away."""
    changed = {k: v for k, v in {**system.commands, **commands}.items() if v is not None}
    return read_health(replace(system, commands=changed))


def read(system: Recorded, files: Mapping[str, str]) -> Health:
    return read_health(replace(system, files={**system.files, **files}))


# ---- macOS


def test_an_air_at_eighty_percent():
    used = int(1021.75 * MIB)
    assert read_health(r.AIR) == Health(False, 80, False, "normal", used, False)


def test_a_desktop_mac_has_no_battery():
    assert read_health(r.STUDIO) == Health(False, None, False, "normal", 0, None)


@pytest.mark.parametrize(("text", "wanted"), [
    (r.DISCHARGING, (True, 57)), (r.NO_ESTIMATE, (True, 47)), (r.OLD, (True, 57)),
    (r.CHARGING, (False, 43)), (r.FINISHING, (False, 99)), (r.CHARGED, (False, 100)), (r.HELD, (False, 80)),
    (r.DESKTOP, (False, None)), (r.TAKEN_OUT, (False, None)),
    (r.UPS_OUT, (True, 87)), (r.UPS_IN, (False, 100)), (r.LAPTOP_AND_UPS, (True, 12)),
    ("", (None, None)), ("Now drawing from 'Solar Power'\n", (None, None)),
])
def test_pmset_batt(text: str, wanted: tuple[bool | None, int | None]):
    assert pmset_batt(text) == wanted


@pytest.mark.parametrize(("text", "wanted"), [
    (r.COOL, False), (r.INTEL.format(100), False), (r.INTEL.format(72), True),
    (r.WARNED.format(0), False), (r.WARNED.format(5), True), (r.WARNED.format(70), True),
    ("", None), ("Error: No thermal warning level with error code 0xe00002bc\n", None),
])
def test_pmset_therm(text: str, wanted: bool | None):
    assert pmset_therm(text) is wanted


@pytest.mark.parametrize(("level", "wanted"), [("0", False), ("1", False), ("2", True), ("4", True)])
def test_apple_silicon_tells_its_heat_elsewhere(level: str, wanted: bool):
    assert told(r.AIR, {r.LEVEL: f"com.apple.system.thermalpressurelevel {level}\n"}).hot is wanted


def test_heat_is_what_either_tells():
    hot = {r.LEVEL: "com.apple.system.thermalpressurelevel 2\n"}
    assert told(r.AIR, {**hot, r.THERM: None}).hot is True
    assert told(r.AIR, {r.LEVEL: None}).hot is False
    assert told(r.AIR, {r.LEVEL: None, r.THERM: None}).hot is None
    assert told(r.AIR, {r.LEVEL: "com.apple.system.thermalpressurelevel 0\n",
                        r.THERM: r.WARNED.format(5)}).hot is True


@pytest.mark.parametrize(("level", "free", "wanted"), [
    ("1\n", None, "normal"), ("2\n", None, "warning"), ("4\n", None, "critical"),
    (None, 70, "normal"), (None, 15, "normal"), (None, 14, "warning"), (None, 5, "warning"),
    (None, 4, "critical"), (None, None, None),
    ("0\n", 70, "normal"),  # a value nobody knows
    ("4\n", 70, "critical"),  # the kernel's own word counts
])
def test_memory_pressure_of_macos(level: str | None, free: int | None, wanted: str | None):
    commands = {r.PRESSURE: level, r.FREE: None if free is None else r.QUICK.format(free)}
    assert told(r.AIR, commands).pressure == wanted


@pytest.mark.parametrize(("text", "wanted"), [
    (r.SWAPPED, int(1021.75 * MIB)), (r.SWAPPED_DE, int(1021.75 * MIB)), (r.NO_SWAP, 0),
    ("total = 4.00G  used = 1.25G  free = 2.75G\n", int(1.25 * GIB)), ("", None),
])
def test_swap_of_macos(text: str, wanted: int | None):
    assert swapusage(text) == wanted


@pytest.mark.parametrize(("mode", "wanted"), [
    ("lowpowermode         0", False), ("lowpowermode         1", True),
    ("powermode            0", False), ("powermode            1", True), ("powermode            2", False),
    ("gpuswitch            2", None),
])
def test_low_power_mode(mode: str, wanted: bool | None):
    assert told(r.AIR, {r.SETTINGS: r.settings(mode=mode)}).low_power is wanted


# ---- Linux


def test_a_thinkpad_unplugged():
    swap = (8388604 - 8126460) * 1024
    assert read_health(r.THINKPAD) == Health(True, 61, False, "normal", swap, False)


@pytest.mark.parametrize(("supplies", "wanted"), [
    (r.MAINS_ON + r.battery("Charging", 61), (False, 61)),
    (r.MAINS_ON + r.battery("Not charging", 80), (False, 80)),  # held at a limit
    (r.MAINS_ON + r.battery("Full", 100), (False, 100)),
    (r.MAINS_ON + r.battery("Discharging", 70), (False, 70)),  # a weak charger, or being calibrated
    (r.MAINS_OFF + r.battery("Discharging", 61), (True, 61)),
    (r.MAINS_OFF + r.battery("Unknown", 61), (True, 61)),
    (r.MAINS_OFF + r.battery("Charging", 61), (False, 61)),  # by a port that is not listed
    (r.battery("Discharging", 61), (True, 61)), (r.battery("Unknown", 61), (None, 61)),
    (r.supply("usb", type="USB", online=2) + r.battery("Charging", 50), (False, 50)),
    (r.MAINS_ON, (False, None)), (r.MAINS_OFF, (False, None)), ("", (None, None)),
    (r.MOUSE, (None, None)), (r.MAINS_ON + r.MOUSE, (False, None)),
    (r.MAINS_OFF + r.MOUSE + r.battery("Charging", 61), (False, 61)),
    (r.MAINS_OFF + r.battery("Discharging", 61) + r.MOUSE, (True, 61)),  # a mouse on its cradle feeds nobody
    (r.MAINS_OFF + r.supply("BAT1", type="Battery", present=0, capacity=0), (False, None)),
    (r.supply("ups", type="UPS", status="Discharging", capacity=88), (True, 88)),
    # Two batteries, one four times the other: 10 % and 90 % are 74 % of all.
    (r.MAINS_OFF + r.battery("Not charging", 10, energy_full=10_000_000)
     + r.battery("Discharging", 90, "BAT1", energy_full=40_000_000), (True, 74)),
    (r.MAINS_OFF + r.battery("Not charging", 10, charge_full=1_000_000)
     + r.battery("Discharging", 90, "BAT1", charge_full=4_000_000), (True, 74)),
    (r.MAINS_OFF + r.battery("Not charging", 10)
     + r.battery("Discharging", 90, "BAT1", energy_full=40_000_000), (True, 50)),
    (r.MAINS_OFF + r.battery("Discharging", 30, energy_full=0), (True, None)),
    (r.MAINS_OFF + r.supply("BAT0", type="Battery", status="Discharging"), (True, None)),
])
def test_power_supplies(supplies: str, wanted: tuple[bool | None, int | None]):
    found = told(r.THINKPAD, {r.POWER: supplies})
    assert (found.on_battery, found.battery_percent) == wanted


@pytest.mark.parametrize(("zones", "wanted"), [
    (r.zone(0, 99_999, ("hot", 100_000)), False), (r.zone(0, 100_000, ("hot", 100_000)), True),
    (r.zone(0, 105_000 - MARGIN_MC - 1, ("critical", 105_000)), False),
    (r.zone(0, 105_000 - MARGIN_MC, ("critical", 105_000)), True),
    (r.zone(0, 99_000, ("passive", 95_000), ("critical", 105_000)), False),
    (r.zone(0, 40_000, ("hot", 90_000)) + r.zone(1, 91_000, ("hot", 90_000)), True),
    # Firmware that makes things up.
    (r.zone(0, 16_800, ("critical", 20_800)), None), (r.zone(0, 50_000, ("hot", 0)), None),
    (r.zone(0, 50_000, ("hot", -274_000)), None),
    (r.zone(0, LEAST_TRIP_MC, ("hot", LEAST_TRIP_MC)), True),
    (r.zone(0, 88_000, ("passive", 80_000)), None), (r.zone(0, 88_000), None), ("", None),
    ("/sys/class/thermal/thermal_zone0/trip_point_0_type:hot\n"
     "/sys/class/thermal/thermal_zone0/trip_point_0_temp:90000\n", None),  # the sensor does not answer
])
def test_thermal_zones(zones: str, wanted: bool | None):
    assert told(r.THINKPAD, {r.ZONES: zones}).hot is wanted


@pytest.mark.parametrize(("some", "full", "wanted"), [
    ("0.00", "0.00", "normal"), ("9.99", "5.00", "normal"), ("10.00", "9.00", "warning"),
    ("80.00", "29.99", "warning"), ("80.00", "30.00", "critical"),
])
def test_stalls_by_memory(some: str, full: str, wanted: str):
    text = r.PSI.format(some=some, full=full)
    assert psi(text) == wanted
    calm = r.PSI.format(some="0.00", full="0.00")
    for host, own in ((text, calm), (calm, text)):  # the worse of the two counts
        found = read(r.THINKPAD, {"/proc/pressure/memory": host, "/sys/fs/cgroup/memory.pressure": own})
        assert found.pressure == wanted


def test_a_kernel_without_stall_figures_says_nothing():
    assert read_health(Recorded()) == Health()
    assert psi("") is None
    assert psi("some avg10=12.00 avg60=0.00 avg300=0.00 total=0\n") == "warning"


@pytest.mark.parametrize(("profile", "wanted"), [
    ("low-power\n", True), ("quiet\n", False), ("performance\n", False),
])
def test_platform_profile(profile: str, wanted: bool):
    assert read(r.THINKPAD, {"/sys/firmware/acpi/platform_profile": profile}).low_power is wanted


@pytest.mark.parametrize(("events", "throttle", "wanted"), [
    ("Not Active\n", None, False), ("Active\n", None, True), ("Not Active\nActive\n", None, True),
    (None, "Active\n", True), (None, "Not Active\n", False),  # a driver before 535
    ("[N/A]\n", None, None), ("[Not Supported]\n", "[Not Supported]\n", None), (None, None, None),
])
def test_a_gpu_that_its_hardware_slows_down(events: str | None, throttle: str | None, wanted: bool | None):
    assert told(RTX_4090, {r.EVENTS: events, r.THROTTLE: throttle}).hot is wanted


def test_only_the_gpus_of_this_run_are_asked():
    both = {r.EVENTS: "Not Active\nActive\n", f"{r.EVENTS} -i 0": "Not Active\n"}
    assert told(r.SERVER, both).hot is True
    assert told(replace(r.SERVER, variables={"CUDA_VISIBLE_DEVICES": "0"}), both).hot is False
    for none in ("", "0 ; reboot"):
        assert told(replace(r.SERVER, variables={"CUDA_VISIBLE_DEVICES": none}), both).hot is None


def test_a_hot_zone_counts_beside_a_cool_gpu():
    hot = r.zone(0, 99_000, ("hot", 95_000))
    assert told(r.THINKPAD, {r.EVENTS: "Not Active\n", r.ZONES: hot}).hot is True
    assert told(r.THINKPAD, {r.EVENTS: "Active\n"}).hot is True


# ---- whatever is printed, nothing is raised


@pytest.mark.parametrize("system", [r.AIR, r.STUDIO, r.THINKPAD, r.SERVER])
def test_no_answer_is_an_error(system: Recorded):
    empty = Health()
    answers = {**system.commands, r.EVENTS: "", r.THROTTLE: "", r.FREE: ""}
    for text in ("", "\n", "?:%; = -\n:::\n", "\0", "9" * 5000, "used = 1M\nsleep\n" * 3, "é%;"):
        files = dict.fromkeys(system.files, text)
        broken = replace(system, commands=dict.fromkeys(answers, text), files=files)
        assert read_health(broken) in (empty, replace(empty, low_power=False))  # a profile of any other name
    assert read_health(replace(system, commands={}, files={})) == empty
    assert read_health(replace(system, name="Windows")) == empty


def test_each_reading_fails_alone():
    whole = read_health(r.AIR)
    for command, lost in ((r.BATT, ("on_battery", "battery_percent")), (r.SETTINGS, ("low_power",)),
                          (r.PRESSURE, ("pressure",)), (r.SWAP, ("swap_bytes",))):
        assert told(r.AIR, {command: None}) == replace(whole, **dict.fromkeys(lost))


# ---- this machine


def test_the_real_system_answers():
    for ask in (Quick(), ThisSystem()):
        found = read_health(ask)
        assert found.battery_percent is None or 0 <= found.battery_percent <= 100
        if platform.system() == "Linux":
            assert found.swap_bytes is not None


def test_quick_gives_up_on_what_hangs(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "LIMIT_S", 0.1)
    began = time.monotonic()
    assert Quick().run(sys.executable, "-c", "import time; time.sleep(60)") is None
    assert time.monotonic() - began < 30


def test_quick_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(module, "LIMIT_S", 1.0)
    note = tmp_path / "pid"
    assert Quick().run("sh", "-c", f"echo $$ > '{note}'; exec sleep 60") is None
    pid = int(note.read_text())
    with pytest.raises(ProcessLookupError):
        for _ in range(200):
            subprocess.run(["true"], check=True)  # Python collects what has died when it starts something
            os.kill(pid, 0)
            time.sleep(0.02)


def test_quick_says_nothing_of_what_fails():
    assert Quick().run("there-is-no-such-program") is None
    assert Quick().run("sh", "-c", "echo so far; exit 3") is None
    assert Quick().run("printf", "a\\377b") == "a\ufffdb"
    assert Quick().read("/no/such/file") is None


def test_the_shell_reads_what_is_there(tmp_path: Path):
    for name, files in {"BAT0": {"type": "Battery\n", "capacity": "61\n", "trip_0_type": "hot\n"},
                        "AC": {"type": "Mains\n"}}.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    out = Quick().run(*sysfs_command(f"{tmp_path}/*", ("type", "capacity", "trip_*_type")))
    assert out is not None and sorted(out.splitlines()) == sorted([
        f"{tmp_path}/AC/type:Mains", f"{tmp_path}/BAT0/type:Battery", f"{tmp_path}/BAT0/capacity:61",
        f"{tmp_path}/BAT0/trip_0_type:hot",
    ])
    assert Quick().run(*sysfs_command(f"{tmp_path}/nothing/*", ("type",))) == ""


def test_any_of():
    assert any_of() is None and any_of(None, None) is None
    assert any_of(None, False) is False and any_of(False, None, True) is True
