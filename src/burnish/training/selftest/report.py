"""What a selftest says: one `Line` for each thing looked at, and the whole as text or JSON, to be shared.

Of whoever runs it nothing is told: no user, no host, no path (`scrubbed`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from burnish import __version__
from burnish.machine.probe import Machine

Status = Literal["passed", "failed", "told", "left out"]
MARKS: Mapping[Status, str] = {"passed": "✓", "failed": "✗", "told": "·", "left out": "–"}
MEMORY, TRUTH = "memory", "the CPU's numbers"
CPU = "device=cpu"
# What to type until it is mended: check → keys of a recipe.
AVOID = {
    "loss and gradients": CPU,
    "dropout": "lora.dropout=0",
    "packing": "train.pack=false",
    "micro-batches": "train.micro_batch as large as train.batch_size",
    "resume": CPU,
    "generation": CPU,
    "long row": "train.max_length=512",
    MEMORY: "train.micro_batch=1 train.keep_layers=0",
    "4-bit base": "quantize=none",
    "whole run": CPU,
}
NARROW = "dtype=float32"  # where it is only wrong in 16 bits
_PATH = re.compile(r"(?<![\w.:/])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\":;,()<>]+)+[/\\]?")


@dataclass(frozen=True)
class Line:
    """status: 'told' is information that can be neither right nor wrong."""

    check: str  # 'packing': a key of AVOID
    where: str  # 'torch on mps'
    what: str  # in words: what was compared with what
    status: Status
    number: float | None = None
    limit: float | None = None  # the number is at most this
    unit: str = ""
    note: str = ""  # an error's own words, or what a number does not say
    dtype: str = ""  # that is computed in, where it matters

    @property
    def text(self) -> str:
        said = f"{MARKS[self.status]} {self.where}: {self.what}"
        if self.number is not None:
            said += f": {shown(self.number, self.unit)}"
        if self.limit is not None:
            said += f" (limit {shown(self.limit, self.unit)})"
        return f"{said} – {self.note}" if self.note else said


def shown(number: float, unit: str) -> str:
    """The one place where a number of a line gets its form."""
    if unit == "bytes":
        return f"{number / 2**20:,.0f} MiB"
    if unit == "tokens/s":
        return f"{number:,.0f} tokens/s"
    if float(number).is_integer():
        return f"{number:.0f}{unit and f' {unit}'}"
    return f"{number:.2g}{unit and f' {unit}'}"


@dataclass(frozen=True)
class Report:
    machine: Mapping[str, Any]
    against: str  # what it was held against: 'torch on cpu, float32'
    lines: Sequence[Line]
    seconds: float
    quick: bool
    closing: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "closing", _closing(self.lines, self.against))

    @property
    def right(self) -> bool:
        return not _fails(self.lines)

    def as_json(self) -> dict[str, Any]:
        return {"right": self.right, **asdict(self)}

    @property
    def head(self) -> list[str]:
        m = self.machine
        arch = m["arch"] if m["arch"] == m["python_arch"] else f"{m['arch']} (Python: {m['python_arch']})"
        return [
            f"burnish {m['burnish']} selftest{', quick' if self.quick else ''}",
            f"{m['chip']}, {m['cores']} cores, {m['ram_bytes'] / 2**30:.0f} GiB, "
            f"GPU: {', '.join(m['gpus']) or 'none'}",
            f"{m['system']} {m['release']}, {arch}, Python {m['python']}",
            ", ".join(f"{k} {v}" for k, v in m["versions"].items()),
            f"held against: {self.against}",
            "",
        ]

    @property
    def end(self) -> list[str]:
        return ["", f"{self.closing} ({self.seconds:.0f} s)"]

    @property
    def text(self) -> str:
        """Whole, as `selftest` says it line by line."""
        return "\n".join([*self.head, *(line.text for line in self.lines), *self.end])


def facts(machine: Machine) -> dict[str, Any]:
    """Of the machine, what is worth sharing: no host, no free disk, no user."""
    system = {"Darwin": "macOS"}.get(machine.system, machine.system)
    return {
        "burnish": __version__,
        "system": system,
        "release": machine.release,
        "arch": machine.arch,
        "python_arch": machine.python_arch,
        "python": machine.python,
        "chip": machine.chip,
        "cores": machine.cores,
        "ram_bytes": machine.ram_bytes,
        "free_ram_bytes": machine.free_ram_bytes,
        "gpus": [g.name for g in machine.gpus],
        "gpu_bfloat16": machine.gpu_bfloat16,
        "cpu_bfloat16": machine.cpu_bfloat16,
        "versions": {k: v for k, v in machine.versions.items() if v},
    }


def scrubbed(text: str, private: Sequence[Path] = ()) -> str:
    """One line, without what says whose machine this is: of every path only its last part stays.

    private: folders that are cut out first, since their names may hold spaces.
    """
    for folder in sorted({str(p) for p in private}, key=len, reverse=True):
        text = text.replace(folder, "…")
    text = _PATH.sub(lambda m: "…/" + re.split(r"[/\\]", m[0].rstrip("/\\"))[-1], text)
    return " ".join(text.split())[:300]


def _closing(lines: Sequence[Line], against: str) -> str:
    passed = [line for line in lines if line.status == "passed"]
    failed = [line for line in lines if line.status == "failed"]
    if not failed and not passed:
        return "nothing was checked"
    confirmed = sum(line.check == MEMORY for line in passed)
    them = "is a prediction" if confirmed == 1 else "are predictions"
    memory = f" {confirmed} of them {them} confirmed (memory)." if confirmed else ""
    if not failed:
        what = "its NumPy reference computes" if against.startswith("reference") else "it computes on the CPU"
        return f"all {len(passed)} checks passed: what burnish computes here is what {what}.{memory}"
    ways = "; ".join(dict.fromkeys(f"{line.check} on {line.where}: {advice(line, lines)}" for line in failed))
    return (
        f"{len(failed)} of {len(passed) + len(failed)} checks failed. Until it is mended: {ways}. "
        f"Please share this report.{memory}"
    )


def advice(line: Line, lines: Sequence[Line]) -> str:
    """What to set in a recipe so that the failed `line` does not matter; a backend, where it passed there."""
    if line.check == TRUTH:
        return "the CPU itself fails: burnish doctor"
    here = [o for o in lines if (o.check, o.where) == (line.check, line.where)]
    wide = [o for o in here if o.dtype == "float32"]
    if line.dtype == "bfloat16" and not _fails(wide):
        return NARROW
    others = dict.fromkeys(o.where for o in lines if o.where != line.where and o.check == line.check)
    passed = [w for w in others if not _fails([o for o in lines if (o.check, o.where) == (line.check, w)])]
    ways = [f"backend={w.partition(' on ')[0]}" for w in passed]
    own = AVOID.get(line.check, "")
    if own and not (own == CPU and line.where.endswith(" on cpu")):
        ways.append(own)
    return " or ".join(ways) or "no way around it is known here"


def _fails(lines: Sequence[Line]) -> bool:
    """Also where nothing was looked at."""
    return not any(o.status == "passed" for o in lines) or any(o.status == "failed" for o in lines)
