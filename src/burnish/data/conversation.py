"""What a row says: turns of a conversation, whoever wrote it down and however.

The readers make these, the renderer turns them into tokens, and nothing between them knows of columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: str  # JSON text of an object
    id: str = ""


@dataclass(frozen=True)
class Turn:
    role: Role
    content: str = ""
    reasoning: str = ""  # given apart from the answer; `<think>…</think>` inside `content` stays there
    calls: tuple[ToolCall, ...] = ()
    weight: float = 1.0  # how much its tokens count, where assistant turns are trained
    name: str = ""  # of the tool whose result this is
    id: str = ""  # of the call that it answers


@dataclass(frozen=True)
class Conversation:
    """Turns that the chat template renders, or (`plain`) a prompt and a completion that stand as they are.

    A plain conversation has one user turn (perhaps empty) and one assistant turn.
    """

    turns: tuple[Turn, ...]
    plain: bool
    at: str  # file:line
    tools: tuple[str, ...] = ()  # JSON text of each: {"type": "function", "function": {"name": …}}
    markup: bool = False  # plain, and special tokens written out are meant: whoever wrote it is the template

    @property
    def prompt(self) -> Conversation:
        """The same without its last answer: what is asked before it is known."""
        return replace(self, turns=self.turns[:-1])

    @property
    def answer(self) -> str:
        return self.turns[-1].content
