"""Rows as values, and what is read of them: for the tests of the formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burnish.data.formats import Read, read_conversations
from burnish.data.rows import Row
from burnish.recipe import Data

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PQ = {"prompt": "p", "completion": "c"}
LINES = "(A) one\n(B) two\n(C) three"


def rows(*values: Mapping[str, Any]) -> list[Row]:
    return [Row(dict(v), "f.jsonl", i) for i, v in enumerate(values, 1)]


def read(*values: Mapping[str, Any], data: Data | None = None, chat: bool = True) -> Read:
    return read_conversations(rows(*values), data or Data(), chat)


def said(found: Read, n: int = 0) -> list[tuple[str, str]]:
    assert found.bad == ()
    return [(t.role, t.content) for t in found.conversations[n].turns]


def why_bad(found: Read) -> str:
    assert len(found.bad) == 1 and found.conversations == ()
    return found.bad[0].why
