"""Columns that may stand beside a question and its answer, in any format: they are read, not dropped.

extra = beside(file, ("question", "answer"))
extra.note                      # "; `context` stands before the question"
(*extra.opening(row), Turn("user", extra.asked(row, question)), extra.answer(row, answer))
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from burnish.data.conversation import Turn
from burnish.data.formats.columns import one
from burnish.data.formats.values import BadRow, File, optional, parsed
from burnish.data.names import kind
from burnish.data.rows import Row

REASONING = ("complex_cot", "reasoning", "reasoning_content", "cot", "thinking", "think")


@dataclass(frozen=True)
class Beside:
    """system, history, reasoning: columns, None where there is none. before: columns that stand before the
    question. note: all of it in words, for `why`; often empty.
    """

    system: str | None
    history: str | None
    before: tuple[str, ...]
    reasoning: str | None
    note: str

    def opening(self, row: Row) -> list[Turn]:
        """The system message and the earlier turns of a row. Raises BadRow."""
        system = optional(row.values, self.system)
        return [Turn("system", system)] * bool(system.strip()) + _earlier(row, self.history)

    def asked(self, row: Row, question: str) -> str:
        """The question under what stands before it. Raises BadRow."""
        given = [optional(row.values, c) for c in self.before]
        return "\n\n".join([*(g for g in given if g.strip()), question])

    def answer(self, row: Row, content: str) -> Turn:
        return Turn("assistant", content, optional(row.values, self.reasoning))


def beside(
    file: File,
    taken: Collection[str],
    before: tuple[str, ...] = (),
    history: bool = False,
    reasoning: bool = False,
) -> Beside:
    """What the rows hold beside the columns `taken`; a column that is text in no row is left. before: names
    (lower case) of what the question is about; history, reasoning: whether the format has a place for them.
    """
    beside = [c for c in file.every if c not in taken]
    # a context of lists and titles has no one way to be written out
    free = tuple(c for c in beside if any(isinstance(row.values.get(c), str) for row in file.rows))
    system = one(free, "system")
    earlier = one(beside, "history") if history else None
    if earlier and not any(_is_turns(row, earlier) for row in file.rows):
        earlier = None  # a history in prose, as a patient's, is no conversation
    over = tuple(c for c in (one(free, name) for name in before) if c)
    thought = one(free, *REASONING) if reasoning else None
    words = [
        *(
            [f"`{system}` is the system message" if file.chat else f"`{system}` stands first"]
            if system
            else []
        ),
        *([f"`{earlier}` holds the turns before"] if earlier else []),
        *(f"`{c}` stands before the question, where there is one" for c in over),
        *([f"`{thought}` as reasoning"] if thought else []),
    ]
    return Beside(system, earlier, over, thought, "".join(f"; {w}" for w in words))


def _is_turns(row: Row, column: str) -> bool:
    try:
        return isinstance(parsed(row.values.get(column), "history"), list)
    except BadRow:
        return False


def _earlier(row: Row, column: str | None) -> list[Turn]:
    """Earlier turns: [[user, assistant], …], or JSON text of it."""
    value = row.values.get(column) if column else None
    earlier = parsed(value, f"`{column}`") if value else []
    if not isinstance(earlier, list):
        raise BadRow(f"`{column}` is {kind(earlier)}; expected a list of [question, answer]")
    turns: list[Turn] = []
    for pair in earlier:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
            raise BadRow(f"`{column}` holds {pair!r:.60}; expected [question, answer]")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns
