"""How the machine is right now, and what a run should make of it.

    health = read_health(Quick())                                # some tens of milliseconds
    verdict(health, "go-on", 20, "slow", "pause")                # Verdict('go-on', '', '')

Power, heat and memory are asked of the system's own tools and files; nothing needs more rights than a user's.
What is not told is None, never an error: a run does not end because a thermometer broke. The price is that a
machine that tells nothing is never spared. Nothing here was run on a Mac: those formats are recorded ones.

`verdict` is pure. That a pause ends later than it began is in `paused`; how often one looks is the caller's.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Pressure = Literal["normal", "warning", "critical"]
Action = Literal["go-on", "slow", "pause"]

LIMIT_S = 0.9  # for each thing asked
RECHARGED = (
    5  # percent above the least charge at which a paused run goes on: charge readings waver by one or two
)
KIB = 1 << 10
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}

# Thermal pressure as macOS's thermald publishes it: 0 nominal, 1 moderate, 2 heavy, 3 trapping, 4 sleeping. A
# MacBook Air under load is at moderate within minutes and stays there; from heavy on clocks fall markedly.
HEAVY = 2
# A zone that is to act this close to the temperature at which Linux powers the machine off is hot; at that
# temperature itself there is nobody left to ask. In thousandths of a degree, as sysfs has it.
MARGIN_MC = 5_000
# Firmware makes trips up: 0, -274 °C, a critical one of 20.8 °C on many desktop boards.
LEAST_TRIP_MC = 60_000
# Stalls by memory, percent of the last ten seconds. 'full': nobody at all got anything done. systemd-oomd
# kills at 60 for half a minute; half of that is critical, so that a pause comes before the kill. 'some': a
# tenth of the time somebody waited, which one notices and which hurts nobody.
PSI_CRITICAL, PSI_WARNING = 30.0, 10.0
# `memory_pressure -Q`, only where the kernel's own verdict cannot be read. The kernel begins to end idle
# programs at about 5 % available.
FREE_CRITICAL, FREE_WARNING = 5, 15


@dataclass(frozen=True)
class Health:
    """None: the system does not say."""

    on_battery: bool | None = None  # or on a UPS whose mains are gone
    battery_percent: int | None = None
    hot: bool | None = None  # the system or the GPU is held back by heat
    pressure: Pressure | None = None  # on memory
    swap_bytes: int | None = None  # in use
    low_power: bool | None = None  # a saving mode that lowers clocks


@dataclass(frozen=True)
class Verdict:
    action: Action
    why: Literal["battery", "heat", "memory pressure", "asked", ""] = ""  # asked: by a person
    words: str = ""  # for a person: 'on battery, 17 % left'


class Asked(Protocol):
    """The part of `probe.System` that is needed."""

    def uname(self) -> tuple[str, str, str]: ...
    def run(self, *command: str) -> str | None: ...
    def read(self, path: str) -> str | None: ...
    def variable(self, name: str) -> str | None: ...


class Quick:
    """The real one, in haste: what does not answer within LIMIT_S is given up, even what cannot be killed."""

    def uname(self) -> tuple[str, str, str]:
        return platform.system(), platform.release(), platform.machine()

    def run(self, *command: str) -> str | None:
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        try:
            process = subprocess.Popen(command, stdin=null, stdout=pipe, stderr=null)
        except OSError:  # not installed
            return None
        try:
            out, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            # Not waited for: a tool that hangs in a driver dies when the driver lets it, and Python collects
            # it whenever it starts another process.
            process.kill()
            if process.stdout is not None:
                process.stdout.close()
            return None
        return out.decode("utf-8", "replace") if process.returncode == 0 else None

    def read(self, path: str) -> str | None:
        try:
            return Path(path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)


def read_health(ask: Asked) -> Health:
    """What the system says now. Never raises; each question has LIMIT_S seconds if `ask` is `Quick`."""
    match ask.uname()[0]:
        case "Darwin":
            return _darwin(ask)
        case "Linux":
            return _linux(ask)
    return Health()


# ---- macOS


def _darwin(ask: Asked) -> Health:
    on_battery, percent = pmset_batt(ask.run("pmset", "-g", "batt") or "")
    settings = ask.run("pmset", "-g") or ""
    # Since macOS 12 on Macs with a battery; a MacBook Pro that knows three modes has `powermode`, 1 is low.
    mode = re.search(r"^\s*(?:lowpowermode|powermode)\s+(\d+)", settings, re.MULTILINE)
    return Health(
        on_battery=on_battery,
        battery_percent=percent,
        hot=any_of(
            pmset_therm(ask.run("pmset", "-g", "therm") or ""),
            thermal_level(ask.run("notifyutil", "-g", "com.apple.system.thermalpressurelevel") or ""),
        ),
        pressure=_darwin_pressure(ask),
        swap_bytes=swapusage(ask.run("sysctl", "-n", "vm.swapusage") or ""),
        low_power=None if mode is None else mode[1] == "1",
    )


def any_of(*answers: bool | None) -> bool | None:
    """True where one is, False where one at least was given, else None."""
    given = [a for a in answers if a is not None]
    return any(given) if given else None


def pmset_batt(text: str) -> tuple[bool | None, int | None]:
    """Is it on battery, and percent left, of `pmset -g batt`: the Mac's own battery before a UPS.

    The first line says what feeds the machine: 'AC Power', 'Battery Power', 'UPS Power'. A desktop Mac has no
    more lines than that. Then a line a source: ' -InternalBattery-0 (id=…)', a tab, '57%; discharging; 3:12
    remaining present: true'. A Mac that holds its charge at 80 % says 'AC attached; not charging'.
    """
    drawn = re.search(r"Now drawing from '(\w+) Power'", text)
    on_battery = None if drawn is None else {"AC": False, "Battery": True, "UPS": True}.get(drawn[1])
    lines = re.findall(r"^ *-(.+?)(?: \(id=\d+\))?\s+(\d+)%;(.*)$", text, re.MULTILINE)
    there = [(name, int(percent)) for name, percent, rest in lines if "present: false" not in rest]
    own = [percent for name, percent in there if name.startswith("InternalBattery")]
    return on_battery, next(iter([*own, *(percent for _, percent in there)]), None)


def pmset_therm(text: str) -> bool | None:
    """Is it hot, of `pmset -g therm`; None where it says nothing.

    As Apple's source of pmset prints it: 'Note: No thermal warning level has been recorded', or the date and
    'Thermal Warning Level = N' (0 is normal); then the CPU's limits, on Intel: a tab, 'CPU_Speed_Limit',
    a blank, a tab, '= 100'. Apple silicon says 'No thermal …' even when throttled, hence `thermal_level`.
    """
    level = re.search(r"Thermal Warning Level\s*=\s*(\d+)", text)
    speed = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", text)
    none = "No thermal warning level has been recorded" in text
    if level is None and speed is None and not none:
        return None
    return (level is not None and int(level[1]) > 0) or (speed is not None and int(speed[1]) < 100)


def thermal_level(text: str) -> bool | None:
    """Is it hot, of `notifyutil -g com.apple.system.thermalpressurelevel`: the name again, and its value.

    The name is not documented; where a macOS does not know it the tool says 0 or fails.
    """
    found = re.search(r"thermalpressurelevel\s+(\d+)", text)
    return None if found is None else int(found[1]) >= HEAVY


def _darwin_pressure(ask: Asked) -> Pressure | None:
    levels: dict[str, Pressure] = {"1": "normal", "2": "warning", "4": "critical"}
    told = (ask.run("sysctl", "-n", "kern.memorystatus_vm_pressure_level") or "").strip()
    if told in levels:
        return levels[told]
    # Some releases give the level to root alone.
    free = re.search(r"free percentage:\s*(\d+)%", ask.run("memory_pressure", "-Q") or "")
    if free is None:
        return None
    percent = int(free[1])
    return "critical" if percent < FREE_CRITICAL else "warning" if percent < FREE_WARNING else "normal"


def swapusage(text: str) -> int | None:
    """Bytes in use, of `sysctl -n vm.swapusage`: 'total = 2048.00M  used = 1021.75M  free = …'; with decimal
    commas where the locale has them.
    """
    found = re.search(r"used = (\d+)[.,](\d+)([KMGT])", text)
    return None if found is None else int(float(f"{found[1]}.{found[2]}") * (1 << _UNITS[found[3]]))


# ---- Linux


def _linux(ask: Asked) -> Health:
    on_battery, percent = power_supplies(_sysfs(ask, "/sys/class/power_supply/*", _POWER))
    profile = (ask.read("/sys/firmware/acpi/platform_profile") or "").strip()
    # In a container the first is the host's; the second, where it is there, is the container's own.
    pressures = [
        psi(ask.read(path) or "") for path in ("/proc/pressure/memory", "/sys/fs/cgroup/memory.pressure")
    ]
    return Health(
        on_battery=on_battery,
        battery_percent=percent,
        hot=any_of(thermal_zones(_sysfs(ask, "/sys/class/thermal/thermal_zone*", _ZONE)), _nvidia_hot(ask)),
        pressure=next((p for p in ("critical", "warning", "normal") if p in pressures), None),
        swap_bytes=_swap(ask.read("/proc/meminfo") or ""),
        low_power=profile == "low-power" if profile else None,
    )


_POWER = ("type", "scope", "online", "present", "status", "capacity", "energy_full", "charge_full")
_ZONE = ("temp", "trip_point_*_type", "trip_point_*_temp")


def sysfs_command(folders: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """Prints 'path:value' of each file there is. A process of its own, since a driver may hang in a read; and
    nothing but the shell, so that killing it kills all of it.
    """
    files = " ".join(f"{folders}/{name}" for name in names)
    return "sh", "-c", f'for f in {files}; do read -r v <"$f" && echo "$f:$v"; done 2>/dev/null; true'


def _sysfs(ask: Asked, folders: str, names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Folder → file → value."""
    found: dict[str, dict[str, str]] = {}
    for line in (ask.run(*sysfs_command(folders, names)) or "").splitlines():
        path, _, value = line.partition(":")
        folder, _, name = path.rpartition("/")
        found.setdefault(folder, {})[name] = value.strip()
    return found


def power_supplies(supplies: dict[str, dict[str, str]]) -> tuple[bool | None, int | None]:
    """Is it on battery, and percent left over all batteries by their size. As UPower decides it: a battery
    discharges and nothing that feeds the machine is online. What has scope Device is a mouse's.
    """
    system = [s for s in supplies.values() if s.get("scope") != "Device"]
    batteries = [s for s in system if s.get("type") in ("Battery", "UPS") and s.get("present") != "0"]
    chargers = [s.get("online") for s in system if s.get("type") not in ("Battery", "UPS") and "online" in s]
    states = {s.get("status") for s in batteries}
    if any(online not in ("0", None) for online in chargers) or "Charging" in states:
        on_battery = False
    elif batteries:  # some never say Discharging: an unplugged charger says it for them
        on_battery = True if "Discharging" in states or chargers else None
    else:  # it runs without one, so on mains; or, with nothing listed, it is not known
        on_battery = False if chargers else None
    known = [s for s in batteries if s.get("capacity", "").isdecimal()]
    sizes = next(
        ([int(s[k]) for s in known] for k in ("energy_full", "charge_full") if _all_numbers(known, k)),
        [1] * len(known),
    )
    if not known or sum(sizes) == 0:
        return on_battery, None
    return on_battery, round(sum(int(s["capacity"]) * n for s, n in zip(known, sizes)) / sum(sizes))


def _all_numbers(rows: list[dict[str, str]], key: str) -> bool:
    return all(row.get(key, "").isdecimal() for row in rows)


def thermal_zones(zones: dict[str, dict[str, str]]) -> bool | None:
    """Is a zone at its 'hot' trip, or within a margin of its 'critical' one; None where none has such a trip
    that can be believed. A 'passive' trip only slows down a little, and on many laptops any work reaches it.
    """
    answers: list[bool | None] = []
    for zone in zones.values():
        now = _integer(zone.get("temp", ""))
        for name, kind in zone.items():
            trip = _integer(zone.get(name.removesuffix("_type") + "_temp", ""))
            if kind not in ("hot", "critical") or now is None or trip is None or trip < LEAST_TRIP_MC:
                continue
            answers.append(now >= (trip if kind == "hot" else trip - MARGIN_MC))
    return any_of(*answers)


def _integer(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _nvidia_hot(ask: Asked) -> bool | None:
    """Does one of this run's GPUs slow down by its hardware's emergency brake, which halves clocks. What the
    driver does by itself before that (sw_thermal_slowdown) costs less than anything that we could do.
    """
    chosen = ask.variable("CUDA_VISIBLE_DEVICES")
    if chosen is not None and not re.fullmatch(r"[\w-]+(,[\w-]+)*", chosen):  # '': none may be used
        return None
    only = () if chosen is None else ("-i", chosen)
    # Drivers before 535 know the second name only, and fail on the first.
    for name in ("clocks_event_reasons", "clocks_throttle_reasons"):
        query = f"--query-gpu={name}.hw_thermal_slowdown"
        out = ask.run("nvidia-smi", query, "--format=csv,noheader", *only)
        answers = [line.strip() for line in (out or "").splitlines()]
        if "Active" in answers or "Not Active" in answers:  # else '[N/A]', '[Not Supported]'
            return "Active" in answers
    return None


def psi(text: str) -> Pressure | None:
    """Of /proc/pressure/memory (Linux 4.20; not in every kernel): 'some avg10=0.00 avg60=…', then 'full'."""
    found = dict(re.findall(r"^(some|full) avg10=(\d+\.\d+)", text, re.MULTILINE))
    if "some" not in found:
        return None
    if float(found.get("full", 0)) >= PSI_CRITICAL:
        return "critical"
    return "warning" if float(found["some"]) >= PSI_WARNING else "normal"


def _swap(meminfo: str) -> int | None:
    found = dict(re.findall(r"^Swap(Total|Free):\s+(\d+) kB", meminfo, re.MULTILINE))
    return (int(found["Total"]) - int(found["Free"])) * KIB if len(found) == 2 else None


# ---- the policy


def verdict(
    health: Health,
    on_battery: str,
    min_battery: int,
    when_hot: str,
    under_pressure: str,
    paused: str = "",
) -> Verdict:
    """What to do. A pause wins over going slower, and a low battery over all.

    on_battery, when_hot: 'go-on', 'slow', 'pause'; under_pressure: 'go-on', 'pause'; min_battery: percent
    below which a run on battery pauses whatever on_battery says. paused: the `why` of the pause that the run
    is in, '' if it goes. A paused run wants better than what paused it: mains or RECHARGED percent more for
    'battery', and to be told that the machine is not hot, that memory is not short. A reading that fails
    ends no pause.
    """
    found = [
        v
        for v in (
            _battery(health, on_battery, min_battery, paused == "battery"),
            _memory(health, under_pressure, paused == "memory pressure"),
            _heat(health, when_hot, paused == "heat"),
        )
        if v is not None
    ]
    # min takes the first of equals: the order above.
    return min(found, key=lambda v: ("pause", "slow").index(v.action), default=Verdict("go-on"))


def _battery(health: Health, policy: str, least: int, paused: bool) -> Verdict | None:
    percent = health.battery_percent
    left = "" if percent is None else f", {percent} % left"
    if health.on_battery is None and paused:
        return Verdict("pause", "battery", "paused for the battery, and the system no longer tells of it")
    if not health.on_battery:
        return None
    if paused and policy != "pause":
        wanted = min(least + RECHARGED, 100)
        if percent is None or percent < wanted:
            return Verdict("pause", "battery", f"on battery{left}; goes on at {wanted} % or on mains power")
    elif percent is not None and percent < least:
        return Verdict("pause", "battery", f"on battery{left}, less than {least} %")
    if policy == "pause":
        return Verdict("pause", "battery", f"on battery{left}; goes on on mains power")
    return Verdict("slow", "battery", f"on battery{left}") if policy == "slow" else None


def _memory(health: Health, policy: str, paused: bool) -> Verdict | None:
    if policy != "pause":
        return None
    if health.pressure == "critical":
        return Verdict("pause", "memory pressure", "memory pressure is critical")
    if health.pressure is None and paused:
        words = "paused for memory pressure, and the system no longer tells of it"
        return Verdict("pause", "memory pressure", words)
    return None


def _heat(health: Health, policy: str, paused: bool) -> Verdict | None:
    if policy == "pause" and paused and health.hot is None:
        return Verdict("pause", "heat", "paused for heat, and the system no longer tells of it")
    if not health.hot or policy not in ("slow", "pause"):
        return None
    return Verdict("pause" if policy == "pause" else "slow", "heat", "the machine is held back by heat")
