"""A plan for a person: will it fit, what takes the memory, what decided it, how long, and what would help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from burnish.cli.show import console, duration, gib, verdict
from burnish.planning.plan import Plan

LEVERS = 3  # that are shown of those that fit
_BAR = 24


def show_plan(plan: Plan, summary: Mapping[str, Any]) -> None:
    out = console()
    out.print(choices_table(summary["choices"]))
    out.print()
    out.print(memory_table(summary))
    if summary.get("measured"):
        out.print(measured_line(summary["measured"]))
    elif "measured" in summary:
        out.print("not measured: what does not fit is not run")
    out.print()
    for line in (said(summary), *time_lines(summary), why(plan, summary)):
        out.print(line)
    for line in lever_lines(summary):
        out.print(line)


def said(summary: Mapping[str, Any]) -> str:
    return f"{verdict(summary)} (predicted)" if summary["predicted"] else verdict(summary)


def choices_table(choices: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table(title="decided", title_justify="left", box=None, pad_edge=False)
    for column in ("what", "value", "why"):
        table.add_column(column, overflow="fold")
    for name, choice in choices.items():
        value = choice["value"]
        if name == "budget":
            value = gib(value)
        elif isinstance(value, list | tuple):
            value = _span(value)
        table.add_row(name.replace("_", " "), str(value), choice["reason"])
    return table


def _span(values: Sequence[Any]) -> str:
    if not values:
        return "none"
    first = values[0]
    if len(values) > 2 and isinstance(first, int) and list(values) == list(range(first, first + len(values))):
        return f"{values[0]}–{values[-1]}"
    return ", ".join(str(v) for v in values)


def memory_table(summary: Mapping[str, Any]) -> Table:
    """A bar is as long as the part's share of the budget, or of the whole where that is more."""
    table = Table(title="memory", title_justify="left", box=None, pad_edge=False)
    table.add_column("part")
    table.add_column("GiB", justify="right")
    table.add_column("", width=_BAR)
    table.add_column("why", overflow="fold")
    whole = max(summary["total_bytes"], summary["budget_bytes"], 1)
    for part in summary["estimate"]:
        bar = "█" * round(_BAR * part["bytes"] / whole)
        table.add_row(part["part"], f"{part['bytes'] / 2**30:.2f}", bar, part["why"])
    over = summary["total_bytes"] - summary["budget_bytes"]
    left = f"{gib(over)} too much" if over > 0 else f"{gib(-over)} free"
    table.add_row(
        "total", f"{summary['total_bytes'] / 2**30:.2f}", "",
        f"of {gib(summary['budget_bytes'])} budget; {left}",
    )  # fmt: skip
    return table


def measured_line(measured: Mapping[str, Any]) -> str:
    peak, expected = gib(measured["peak_bytes"]), gib(measured["predicted_bytes"])
    error, seconds = f"{measured['error_percent']:+.1f} %", f"{measured['seconds']:.1f} s"
    return f"measured: {peak} in the longest step, {expected} predicted ({error}), {seconds}"


def time_lines(summary: Mapping[str, Any]) -> list[str]:
    time, rate = summary.get("time"), summary.get("rate")
    if not time or not rate:
        return ["time: not known; no rate of this device is measured, and none is published"]
    said = "predicted" if not rate["measured"] else "predicted from this machine's rate"
    between = f"({time['low']:.0f} to {time['high']:.0f})"
    line = f"time, {said}: {time['tokens_per_s']:.0f} tokens/s {between}"
    steps = summary["choices"].get("steps", {}).get("value")
    whole, about = time["seconds"], "about"
    if not whole and steps:  # of the longest rows allowed
        whole, about = steps * time["step_seconds"], "at most about"
    if whole:
        spread = time["tokens_per_s"] / time["low"]
        least, most = whole / spread, whole * spread
        line += f"; {about} {duration(whole)} of steps ({duration(least)} to {duration(most)})"
    return [line, f"  {rate['source']}", f"  {time['why'].removeprefix(rate['source'] + '; ')}"]


def why(plan: Plan, summary: Mapping[str, Any]) -> str:
    """One paragraph: what is large, and what follows from it."""
    parts = {p.name: p.n_bytes for p in plan.estimate}
    large = sorted((n for n in parts if n != "weights"), key=lambda n: -parts[n])[0]
    held = plan.weights.value if plan.quantize.value == "none" else plan.quantize.value
    kept, layers = plan.keep_layers.value, plan.spec.n_layers
    rows = f"{plan.micro_batch.value} row{'s' if plan.micro_batch.value > 1 else ''}"
    length = plan.row_length.value if plan.pack.value else plan.length.value
    text = (
        f"why: {plan.spec.parameters / 1e9:.2f} billion parameters in {held} take {gib(parts['weights'])} of "
        f"{gib(plan.budget.value)} on {plan.device.value} ({plan.budget.reason}). {rows} of up to {length} "
        f"tokens at a time; activations of {kept} of {layers} layers are kept. Beside the weights most goes "
        f"to: {large}, {gib(parts[large])}."
    )
    least = summary["least_bytes"]
    if plan.fits and least < plan.total_bytes:
        text += f" With nothing spent on speed it would take {gib(least)}."
    if summary["data"] != "read":
        text += f" This is for the longest rows allowed: {summary['data']}."
    if summary["model"] != str(plan.spec.folder):
        text += f" The model's facts are from {summary['model']}."
    return text


def lever_lines(summary: Mapping[str, Any]) -> list[str]:
    fitting = [lever for lever in summary["levers"] if lever["fits"]][:LEVERS]
    if summary["levers"]:
        title = "what would fit:" if fitting else "nothing alone would fit; what helps most:"
        chosen = fitting or summary["levers"][:LEVERS]
    elif not summary["fits"]:
        return ["nothing that burnish knows of would make it fit; --machine NAME plans for another machine"]
    else:
        title, chosen = "what else it could be:", summary["room"]
    return [title, *(_lever(lever) for lever in chosen)] if chosen else []


def _lever(lever: Mapping[str, Any]) -> str:
    same = "" if lever["changes_result"] else "; the same training"
    need = gib(lever["total_bytes"])
    if lever["least_bytes"] < 0.99 * lever["total_bytes"]:
        need += f" (least {gib(lever['least_bytes'])})"
    return f"  {' '.join(lever['overrides'])}   {need}: {lever['cost']}{same}"
