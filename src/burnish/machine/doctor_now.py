"""What the doctor says of power, heat and memory at this moment."""

from __future__ import annotations

from burnish.machine.doctor_check import Check, gib
from burnish.machine.health import Health
from burnish.machine.probe import Machine

# Of memory. macOS swaps out what nobody used for hours, which harms nobody; from here on programs do.
MUCH_SWAP = 0.25


def power(health: Health) -> list[Check]:
    found: list[Check] = []
    left = "" if health.battery_percent is None else f", {health.battery_percent} % left"
    if health.on_battery:
        advice = "plug it in before a long run; in the recipe, care.on_battery says what a run does"
        found.append(Check("power", "warning", f"on battery{left}", advice))
    elif health.on_battery is False:
        charge = "" if health.battery_percent is None else f", battery at {health.battery_percent} %"
        found.append(Check("power", "ok", f"mains{charge}", ""))
    if health.low_power:
        advice = "switch it off before a long run (macOS: System Settings, Battery; Linux: the power profile)"
        found.append(Check("low power mode", "warning", "on: the chip is kept slow", advice))
    return found


def heat(health: Health) -> list[Check]:
    if health.hot is None:
        return []
    if not health.hot:
        return [Check("heat", "ok", "not held back by heat", "")]
    advice = "let it cool, and give its vents air; in the recipe, care.when_hot says what a run does"
    return [Check("heat", "warning", "hot: the machine is held back until it cools", advice)]


def pressure(health: Health, machine: Machine) -> list[Check]:
    """Of memory: what the system says of it, and what it has swapped out."""
    found: list[Check] = []
    if health.pressure == "normal":
        found.append(Check("memory pressure", "ok", "normal", ""))
    elif health.pressure is not None:
        status = "problem" if health.pressure == "critical" else "warning"
        advice = "close other programs before you train"
        found.append(Check("memory pressure", status, f"{health.pressure}: memory is short now", advice))
    if health.swap_bytes:
        much = health.swap_bytes > MUCH_SWAP * machine.ram_bytes
        words = f"{gib(health.swap_bytes)} of other programs' memory is on disk"
        advice = "close what you do not use, or restart: a run would fight for memory with what comes back"
        found.append(Check("swap in use", "warning" if much else "ok", words, advice if much else ""))
    return found
