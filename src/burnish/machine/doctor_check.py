"""What a check says, and how versions and sizes are written in one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Check:
    name: str
    status: Status
    found: str
    advice: str  # '' where there is nothing to do


def numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' → (2, 13, 0); '' → ()."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(n) for n in version)


def gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.1f} GiB"
