"""Which of a file's columns serve as what, after data.columns has renamed them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from burnish.data.formats.values import listed
from burnish.data.names import STANDARD, is_told
from burnish.data.rows import Row
from burnish.errors import UserError

LOOKED_AT = 100  # rows from which the format of a file is found


@dataclass(frozen=True)
class Match:
    """names: a column for each thing needed. note: what else could have served, for `why`; often empty."""

    names: tuple[str, ...]
    note: str


def names_in(rows: Sequence[Row], filled: bool) -> tuple[str, ...]:
    """Columns of the first rows in order; filled: only those in which some row of all holds something."""
    names = dict.fromkeys(key for row in rows[:LOOKED_AT] for key in row.values)
    if not filled:
        return tuple(names)
    empty = set(names)
    for row in rows:
        empty -= {key for key in empty if row.values.get(key) not in (None, "", [])}
        if not empty:
            break
    return tuple(name for name in names if name not in empty)


def filled_in(rows: Sequence[Row]) -> tuple[str, ...]:
    """Columns that hold something in some row of all, in the order in which they come up."""
    names: dict[str, None] = {}
    for row in rows:
        for key, value in row.values.items():
            if key not in names and value not in (None, "", []):
                names[key] = None
    return tuple(names)


def unused(columns: Sequence[str], why: str) -> str:
    """A word on the columns of known names that `why` does not name; often empty.

    A reader names in `why` each column that it reads, or says what becomes of it.
    """
    left = [c for c in columns if is_told(c) and f"`{c}`" not in why]
    return f"; not used: {', '.join(f'`{c}`' for c in left)}" if left else ""


def renamed(rows: Sequence[Row], wanted: Mapping[str, str], keep: bool) -> Sequence[Row]:
    """Rows with the file's columns under standard names (wanted: standard → the file's own).

    keep: a renamed column stands under its old name too, and any new name will do, as templates need it.
    Raises UserError for a name that is not standard, and for a column that the file does not have.
    """
    if not wanted:
        return rows
    have = names_in(rows, filled=False)
    for standard, own in wanted.items():
        if standard not in STANDARD and not keep:
            raise UserError(
                f"data.columns: {standard} is no standard name{_near(standard, STANDARD)}",
                f"data.columns says `standard name: column of the file`; standard: {', '.join(STANDARD)}",
            )
        if own not in have:
            raise UserError(
                f"data.columns names {own}, which is no column of {rows[0].file}{_near(own, have)}",
                f"its columns are {', '.join(have)}",
            )
    gone = set() if keep else set(wanted.values())
    return [
        replace(
            row,
            values={k: v for k, v in row.values.items() if k not in gone}
            | {new: row.values[own] for new, own in wanted.items() if own in row.values},
        )
        for row in rows
    ]


def match(columns: Sequence[str], *needs: tuple[str, ...]) -> Match | None:
    """A column for each need, a tuple of lower-case names, the best first; None where a need has none.

    Case does not count. Where several could serve, columns spelt in one style go together: `Question` beside
    `Complex_CoT`, `question` beside `answer`.
    """
    could = [
        sorted((c for c in columns if c.lower() in need), key=lambda c: need.index(c.lower()))
        for need in needs
    ]
    if not all(could):
        return None
    taken = None
    for capital in (False, True):
        styled = [[c for c in some if c[:1].isupper() == capital] for some in could]
        if taken is None and all(styled):
            taken = tuple(some[0] for some in styled)
    reason = "spelt in one style" if taken else "the first of its kind"
    taken = taken or tuple(some[0] for some in could)
    spare = [c for some in could for c in some if c not in taken]
    if not spare:
        return Match(taken, "")
    return Match(
        taken, f"; {listed(list(dict.fromkeys(spare)))} could serve too, not used: taken are those {reason}"
    )


def one(columns: Sequence[str], *names: str) -> str | None:
    """The first of `names` that is a column, whatever its case."""
    found = match(columns, names)
    return found.names[0] if found else None


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""
