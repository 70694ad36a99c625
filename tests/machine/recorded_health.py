"""What macOS, Linux and nvidia-smi print of power, heat and memory, as people's machines have printed it.

From published terminal sessions and bug reports, names and serial numbers changed; `pmset`'s thermal lines as
in Apple's source of it. None was recorded by us: we have no Mac.
"""

from __future__ import annotations

from dataclasses import replace

from burnish.machine.health import _POWER, _ZONE, sysfs_command
from tests.machine.recorded import H100, M1_8, M2_PRO_32, Recorded

BATT = "pmset -g batt"
THERM = "pmset -g therm"
LEVEL = "notifyutil -g com.apple.system.thermalpressurelevel"
SETTINGS = "pmset -g"
PRESSURE = "sysctl -n kern.memorystatus_vm_pressure_level"
FREE = "memory_pressure -Q"
SWAP = "sysctl -n vm.swapusage"
POWER = " ".join(sysfs_command("/sys/class/power_supply/*", _POWER))
ZONES = " ".join(sysfs_command("/sys/class/thermal/thermal_zone*", _ZONE))
EVENTS = "nvidia-smi --query-gpu=clocks_event_reasons.hw_thermal_slowdown --format=csv,noheader"
THROTTLE = "nvidia-smi --query-gpu=clocks_throttle_reasons.hw_thermal_slowdown --format=csv,noheader"


def source(percent: str, drawn: str = "Battery", name: str = "InternalBattery-0") -> str:
    """`pmset -g batt` with one line; a tab before the percentage."""
    return f"Now drawing from '{drawn} Power'\n -{name} (id=22675555)\t{percent} present: true\n"


# macOS 12 to 26 print the same, but for the id, which macOS 10.12 and before left out.
DISCHARGING = source("57%; discharging; 3:12 remaining")
NO_ESTIMATE = source("47%; discharging; (no estimate)")  # the first minute after the plug is pulled
CHARGING = source("43%; charging; 1:20 remaining", "AC")
FINISHING = source("99%; finishing charge; 0:00 remaining", "AC")
CHARGED = source("100%; charged; 0:00 remaining", "AC")
HELD = source("80%; AC attached; not charging", "AC")  # holding at 80 %; or a charger that is too weak
OLD = DISCHARGING.replace(" (id=22675555)", "")
DESKTOP = "Now drawing from 'AC Power'\n"
UPS_OUT = source("87%; discharging; 0:45 remaining", "UPS", "Back-UPS ES 700")
UPS_IN = source("100%; charged; 0:00 remaining", "AC", "UPS-1500VA")
LAPTOP_AND_UPS = (
    "Now drawing from 'Battery Power'\n"
    " -UPS-1500VA (id=1234567)\t100%; charged; 0:00 remaining present: true\n"
    " -InternalBattery-0 (id=7340131)\t12%; discharging; 0:20 remaining present: true\n"
)
TAKEN_OUT = "Now drawing from 'AC Power'\n -InternalBattery-0 (id=1)\t0%; (removed) present: false\n"

# Apple silicon, macOS 15 and 26.
COOL = (
    "Note: No thermal warning level has been recorded\n"
    "Note: No performance warning level has been recorded\n"
    "Note: No CPU power status has been recorded\n"
)
# Intel, macOS 12: the names are followed by a blank, a tab and =.
INTEL = (
    "Note: No thermal warning level has been recorded\n"
    "Note: No performance warning level has been recorded\n"
    "2023-08-20 05:08:37 -0700 CPU Power notify\n"
    "\tCPU_Scheduler_Limit \t= 100\n\tCPU_Available_CPUs \t= 12\n\tCPU_Speed_Limit \t= {}\n"
)
WARNED = (
    "2026-09-23 14:05:31 -0700 Thermal Warning Level = {}\n"
    "Note: No performance warning level has been recorded\n"
    "Note: No CPU power status has been recorded\n"
)
# A MacBook with macOS 15. One with three energy modes has `powermode` in place of `lowpowermode`.
PMSET = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                {sleep}
 hibernatemode        3
 ttyskeepawake        1
 displaysleep         10
 tcpkeepalive         1
 {mode}
 womp                 1
"""
AWAKE_SINCE = "1 (sleep prevented by powerd, caffeinate, runningboardd)"


def settings(sleep: str = "1", mode: str = "lowpowermode         0") -> str:
    return PMSET.format(sleep=sleep, mode=mode)


SWAPPED = "total = 2048.00M  used = 1021.75M  free = 1026.25M  (encrypted)\n"
SWAPPED_DE = "total = 2048,00M  used = 1021,75M  free = 1026,25M  (encrypted)\n"
NO_SWAP = "total = 0.00M  used = 0.00M  free = 0.00M  (encrypted)\n"
QUICK = (
    "The system has 25769803776 (1572864 pages with a page size of 16384).\n"
    "System-wide memory free percentage: {}%\n"
)

AIR = replace(
    M1_8,
    commands={
        **M1_8.commands, BATT: HELD, THERM: COOL, LEVEL: "com.apple.system.thermalpressurelevel 0\n",
        SETTINGS: settings(AWAKE_SINCE), PRESSURE: "1\n", SWAP: SWAPPED,
    },
)
STUDIO = replace(
    M2_PRO_32, commands={**M2_PRO_32.commands, BATT: DESKTOP, THERM: COOL, PRESSURE: "1\n", SWAP: NO_SWAP}
)


def supply(name: str, **values: str | int) -> str:
    return "".join(f"/sys/class/power_supply/{name}/{k}:{v}\n" for k, v in values.items())


def zone(n: int, temp: int, *trips: tuple[str, int]) -> str:
    """Trips in the shell's order: all types, then all temperatures."""
    base = f"/sys/class/thermal/thermal_zone{n}"
    types = "".join(f"{base}/trip_point_{i}_type:{kind}\n" for i, (kind, _) in enumerate(trips))
    return f"{base}/temp:{temp}\n{types}" + "".join(
        f"{base}/trip_point_{i}_temp:{at}\n" for i, (_, at) in enumerate(trips)
    )


MAINS_ON, MAINS_OFF = supply("AC", type="Mains", online=1), supply("AC", type="Mains", online=0)
MOUSE = supply("hidpp_battery_0", type="Battery", scope="Device", online=1, status="Discharging", capacity=5)


def battery(status: str, capacity: int, name: str = "BAT0", **more: int) -> str:
    return supply(name, type="Battery", present=1, status=status, capacity=capacity, **more)


# A ThinkPad unplugged: a USB-C port that gives nothing is listed as a charger, too.
UNPLUGGED = MAINS_OFF + battery("Discharging", 61, energy_full=50_450_000) + supply(
    "ucsi-source-psy-USBC000:001", type="USB", scope="Unknown", online=0
)
LAPTOP_ZONES = zone(0, 61_000, ("critical", 127_000), ("hot", 127_000)) + zone(
    1, 88_000, ("passive", 0), ("passive", 0)
)
PSI = (
    "some avg10={some} avg60=0.00 avg300=0.00 total=21841677\n"
    "full avg10={full} avg60=0.00 avg300=0.00 total=8875554\n"
)
MEMINFO = (
    "MemTotal:       16113532 kB\nSwapCached:            0 kB\n"
    "SwapTotal:       8388604 kB\nSwapFree:        8126460 kB\n"
)

THINKPAD = Recorded(
    commands={POWER: UNPLUGGED, ZONES: LAPTOP_ZONES},
    files={
        "/proc/pressure/memory": PSI.format(some="0.00", full="0.00"),
        "/proc/meminfo": MEMINFO,
        "/sys/firmware/acpi/platform_profile": "balanced\n",
    },
)
SERVER = replace(H100, commands={**H100.commands, POWER: "", ZONES: "", EVENTS: "Not Active\nNot Active\n"})
