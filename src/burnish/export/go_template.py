"""A reader of Ollama's prompt templates (Go's text/template), to check the ones that burnish writes.

    template = parse("{{ range .Messages }}[{{ .Role }}] {{ .Content }}\\n{{ end }}")
    ollama_prompt(template, [{"role": "user", "content": "Why?"}])      # '[user] Why?\\n'

It knows the part of the language that Ollama's templates use (https://pkg.go.dev/text/template) and is
stricter than Go: a name that is not there is an error, where Go prints `<no value>`. What it does not know is
a TemplateError with line and column, never a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from burnish.export.go_syntax import Node, Operand, Pipe, TemplateError, error_at, parse_nodes

__all__ = ["Template", "TemplateError", "literal", "ollama_prompt", "parse", "string"]

# `{{` and a `{` at the end, several quotes, and what might not print.
_RISKY = re.compile(r'\{(?=\{|\Z)|""+|[^\n\x20-\x7e]')


@dataclass(frozen=True)
class Template:
    source: str
    nodes: Sequence[Node]
    names: frozenset[str]  # every field that is named in it

    def render(self, data: Mapping[str, Any], cut: bool = False) -> str:
        """cut: ends where `.Response` stands, as the prompt of an answer does. Raises TemplateError."""
        return _Run(self.source, data, cut).text(self.nodes)


def parse(source: str) -> Template:
    """Raises TemplateError where it is not a template."""
    return Template(source, *parse_nodes(source, _FUNCTIONS))


def ollama_prompt(template: Template, messages: Sequence[Mapping[str, str]]) -> str:
    """The text that Ollama makes of messages (role, content): neighbours of one role are joined, all system
    texts are `.System` besides, and a template without `.Messages` is run once for each question.
    """
    joined: list[dict[str, str]] = []
    for m in messages:
        if joined and joined[-1]["Role"] == m["role"] != "tool":
            joined[-1]["Content"] += "\n\n" + m["content"]
        else:
            joined.append({"Role": m["role"], "Content": m["content"]})
    if "Messages" in template.names:
        system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
        return template.render({"System": system, "Messages": joined, "Tools": [], "Response": ""})
    if "Response" not in template.names:
        template = parse(template.source + "{{ .Response }}")
    text, waiting = "", {"System": "", "Prompt": "", "Response": ""}
    for m in joined:
        role = {"system": "System", "user": "Prompt", "assistant": "Response"}.get(m["Role"])
        later = {"System": ("Prompt", "Response"), "Prompt": ("Response",)}.get(role or "", ())
        if any(waiting[k] for k in later):
            text += template.render(waiting)
            waiting = dict.fromkeys(waiting, "")
        if role:
            waiting[role] = m["Content"]
    return text + template.render(waiting, cut=True)


def literal(text: str) -> str:
    """Template source that writes this text. What may be lost on the way (Ollama drops characters of a
    Modelfile that do not print), or end a quotation there, is written as an escape.
    """
    return _RISKY.sub(_safe, text)


def _safe(m: re.Match[str]) -> str:
    plain = len(m[0]) == 1 and m[0].isprintable() and m[0] != "{"
    return m[0] if plain else f"{{{{ {string(m[0])} }}}}"


def string(text: str) -> str:
    """A Go string of this text."""
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}
    return '"' + "".join(short.get(c) or (c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + '"'


class _Cut(Exception):
    pass


class _Leave(Exception):
    """break or continue"""


class _Run:
    """One rendering. Owns the variables that are set on the way."""

    def __init__(self, source: str, data: Mapping[str, Any], cut: bool) -> None:
        self.source, self.cut = source, cut
        self.data = data
        self.variables: list[list[Any]] = [["$", data]]
        self.out: list[str] = []

    def text(self, nodes: Sequence[Node]) -> str:
        with suppress(_Cut):
            self.walk(nodes, self.data)
        return "".join(self.out)

    def walk(self, nodes: Sequence[Node], dot: Any) -> None:
        known = len(self.variables)
        for node in nodes:
            match node.kind:
                case "text":
                    self.out.append(node.text)
                case "action":
                    value = self.pipe(node.pipe, dot)
                    if not node.pipe.names:
                        self.out.append(self.printed(value, node.at))
                case "range":
                    self.range(node, dot)
                case "break" | "continue":
                    raise _Leave(node.kind)
                case _:
                    self.branch(node, dot)
        del self.variables[known:]

    def branch(self, node: Node, dot: Any) -> None:
        known = len(self.variables)
        for pipe, body in node.branches:
            value = True if pipe is None else self.pipe(pipe, dot)
            if value:
                self.walk(body, value if node.kind == "with" and pipe is not None else dot)
                break
        del self.variables[known:]

    def range(self, node: Node, dot: Any) -> None:
        pipe, body = node.branches[0]
        items = self.pipe(Pipe((), False, pipe.commands, pipe.at), dot)
        if not isinstance(items, Sequence) or isinstance(items, str):
            raise self.error(f"range wants a list, got {items!r:.40}", node.at)
        for i, item in enumerate(items):
            known = len(self.variables)
            pair = (i, item) if len(pipe.names) == 2 else (item,)
            for name, value in zip(pipe.names, pair, strict=False):
                self.set(name, value, pipe.declares)
            try:
                self.walk(body, item)
            except _Leave as e:
                if str(e) == "break":
                    break
            finally:
                del self.variables[known:]
        if not items and len(node.branches) > 1:
            self.walk(node.branches[1][1], dot)

    def pipe(self, pipe: Pipe, dot: Any) -> Any:
        value: tuple[Any, ...] = ()
        for command in pipe.commands:
            value = (self.command(command, value, dot),)
        for name in pipe.names:
            self.set(name, value[0], pipe.declares)
        return value[0]

    def command(self, command: Sequence[Operand], last: tuple[Any, ...], dot: Any) -> Any:
        first = command[0]
        if first.kind != "function":
            return self.operand(first, dot)
        lazy = [*((lambda o=o: self.operand(o, dot)) for o in command[1:]), *((lambda v=v: v) for v in last)]
        if first.value in ("and", "or"):
            value: Any = None
            if not lazy:
                raise self.error(f"{first.value} wants a value", first.at)
            for one in lazy:  # Go stops at the first that decides
                value = one()
                if bool(value) == (first.value == "or"):
                    break
            return value
        values = [one() for one in lazy]
        try:
            return _FUNCTIONS[first.value](*values)
        except (TypeError, ValueError, IndexError, KeyError) as e:
            raise self.error(f"{first.value}: {e}", first.at) from e

    def operand(self, operand: Operand, dot: Any) -> Any:
        match operand.kind:
            case "value":
                value = operand.value
            case "dot":
                value = dot
            case "variable":
                value = next(v for name, v in reversed(self.variables) if name == operand.value)
            case "function":
                value = self.command((operand,), (), dot)
            case _:
                value = self.pipe(operand.value, dot)
        for name in operand.fields:
            if self.cut and name == "Response":
                raise _Cut
            if not isinstance(value, Mapping) or name not in value:
                raise self.error(f"there is no .{name} here", operand.at)
            value = value[name]
        return value

    def set(self, name: str, value: Any, declare: bool) -> None:
        if declare:
            self.variables.append([name, value])
            return
        next(pair for pair in reversed(self.variables) if pair[0] == name)[1] = value

    def printed(self, value: Any, at: int) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str | int):
            return str(value)
        raise self.error(f"this cannot be printed: {value!r:.40}", at)

    def error(self, what: str, at: int) -> TemplateError:
        return error_at(self.source, what, at)


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        raise TypeError(f"incompatible types: {a!r:.30} and {b!r:.30}")
    return a == b


def _ordered(name: str) -> Callable[[Any, Any], bool]:
    def compare(a: Any, b: Any) -> bool:
        less = not _same(a, b) and a < b
        return {"lt": less, "le": less or a == b, "gt": not less and a != b, "ge": not less}[name]

    return compare


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if not isinstance(value, Mapping) and not 0 <= key < _len(value):
            raise IndexError(f"out of range: {key}")
        value = value.encode()[key] if isinstance(value, str) else value[key]
    return value


def _slice(value: Any, *ends: int) -> Any:
    start, stop = (*ends, *(0, _len(value))[len(ends) :])
    if not 0 <= start <= stop <= _len(value):
        raise IndexError(f"out of range: {start}, {stop}")
    return value.encode()[start:stop].decode() if isinstance(value, str) else value[start:stop]


def _len(value: Any) -> int:
    """Of a text in bytes, as Go counts."""
    return len(value.encode() if isinstance(value, str) else value)


def _eq(first: Any, *others: Any) -> bool:
    if not others:
        raise TypeError("wants two values")
    return any(_same(first, o) for o in others)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "eq": _eq, "ne": lambda a, b: not _same(a, b), "not": lambda a: not a, "len": _len, "index": _index,
    "slice": _slice, "json": lambda a: json.dumps(a, ensure_ascii=False, separators=(",", ":")),
    **{name: _ordered(name) for name in ("lt", "le", "gt", "ge")},
}  # fmt: skip
