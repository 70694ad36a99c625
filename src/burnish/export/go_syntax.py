"""The grammar of Go's text/template, as far as Ollama's templates use it: text to a tree, which
go_template.py runs.

nodes, names = parse_nodes("{{ .Role }}: {{ .Content }}", functions)     # names: {'Role', 'Content'}
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

_SPACE = " \t\r\n"
_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+)|(?P<string>"(?:\\.|[^"\\\n])*")|(?P<raw>`[^`]*`)|(?P<number>-?\d+)"""
    r"""|(?P<variable>\$\w*)|(?P<field>\.[A-Za-z_]\w*)|(?P<dot>\.)|(?P<word>[A-Za-z_]\w*)"""
    r"""|(?P<declare>:=)|(?P<assign>=)|(?P<sign>[|(),])"""
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
_WORDS = {"true": True, "false": False, "nil": None}


class TemplateError(Exception):
    """What is wrong with a template, or with what it was given; the text begins with line:column."""


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    at: int


@dataclass
class Node:
    """kind: 'text', 'action', 'if', 'range', 'with', 'break', 'continue'. branches: for `if … else if … else`
    a list of (pipeline or None, nodes); `range` and `with` have one, and perhaps an `else`.
    """

    kind: str
    at: int
    text: str = ""
    pipe: Any = None
    branches: list[tuple[Any, list[Node]]] = field(default_factory=list)


@dataclass(frozen=True)
class Pipe:
    names: tuple[str, ...]  # variables that it sets
    declares: bool  # `:=`, not `=`
    commands: tuple[tuple[Any, ...], ...]
    at: int


@dataclass(frozen=True)
class Operand:
    """kind: 'value', 'dot', 'variable', 'function', 'pipe'; then the fields that are taken from it."""

    kind: str
    value: Any
    fields: tuple[str, ...]
    at: int


def parse_nodes(source: str, functions: Collection[str]) -> tuple[list[Node], frozenset[str]]:
    """The tree, and every field that is named in it. Raises TemplateError where it is not a template."""
    parser = _Parser(source, functions)
    nodes, _ = parser.nodes(())
    return nodes, frozenset(parser.names)


class _Parser:
    def __init__(self, source: str, functions: Collection[str]) -> None:
        self.source, self.at = source, 0
        self.functions = {*functions, "and", "or"}
        self.names: set[str] = set()
        self.scope: list[str] = ["$"]
        self.loops = 0
        self.trim = False  # the last action ended with -}}

    def nodes(self, ends: tuple[str, ...], opened: int = 0) -> tuple[list[Node], tuple[str, list[_Token]]]:
        """Nodes up to one of the keywords `ends`, which is returned with the rest of its action."""
        found: list[Node] = []
        while True:
            start = self.source.find("{{", self.at)
            text = self.source[self.at : start if start >= 0 else len(self.source)]
            text = text.lstrip(_SPACE) if self.trim else text
            if start < 0:
                if ends:
                    raise self.error("this has no {{ end }}", opened)
                return [*found, Node("text", self.at, text)], ("", [])
            tokens, trims = self.action(start)
            found.append(Node("text", start, text.rstrip(_SPACE) if trims else text))
            if not tokens:  # a comment
                continue
            word = tokens[0].text if tokens[0].kind == "word" else ""
            if word in ("end", "else"):
                if word not in ends:
                    raise self.error(f"{{{{ {word} }}}} without a beginning", tokens[0].at)
                return found, (word, tokens[1:])
            found.append(self.node(word, tokens))

    def action(self, start: int) -> tuple[list[_Token], bool]:
        """The tokens between {{ and }} from `start`, and whether it trims what stands before it."""
        at = start + 2
        trims = self.source[at : at + 1] == "-" and self.source[at + 1 : at + 2] in tuple(_SPACE)
        at += trims
        comment = re.compile(r"\s*/\*.*?\*/(\s-)?\}\}" if trims else r"/\*.*?\*/(\s-)?\}\}", re.DOTALL)
        if m := comment.match(self.source, at):
            self.at, self.trim = m.end(), m[1] is not None
            return [], trims
        tokens: list[_Token] = []
        while True:
            if m := re.compile(r"([ \t\r\n]-)?\}\}").match(self.source, at):
                self.at, self.trim = m.end(), m[1] is not None
                if not [t for t in tokens if t.kind != "space"]:
                    raise self.error("an empty action", start)
                return [t for t in tokens if t.kind != "space"], trims
            m = _TOKEN.match(self.source, at)
            if m is None or m.lastgroup is None:
                what = "this action is not closed" if at >= len(self.source) else "not understood"
                raise self.error(f"{what}: {self.source[start : start + 40]!r}", min(at, len(self.source)))
            tokens.append(_Token(m.lastgroup, m[0], at))
            at = m.end()

    def node(self, word: str, tokens: list[_Token]) -> Node:
        at = tokens[0].at
        if word in ("break", "continue"):
            if not self.loops or len(tokens) > 1:
                raise self.error(f"{word} stands alone, inside a range", at)
            return Node(word, at)
        if word in ("if", "range", "with"):
            return self.block(word, tokens[1:], at)
        if word in ("define", "template", "block"):
            raise self.error(f"{word} is not known here", at)
        return Node("action", at, pipe=self.whole(tokens, at))

    def block(self, word: str, tokens: list[_Token], at: int) -> Node:
        node, known = Node(word, at), len(self.scope)
        self.loops += word == "range"
        pipe: Any = self.whole(tokens, at, word == "range")
        while True:
            last = pipe is None
            inside = len(self.scope)
            body, (end, rest) = self.nodes(("end",) if last else ("end", "else"), at)
            del self.scope[inside:]
            node.branches.append((pipe, body))
            if end == "end":
                if rest:
                    raise self.error("nothing may follow `end`", rest[0].at)
                break
            if rest and (word != "if" or rest[0].text != "if"):
                raise self.error("only `if` may follow this `else`", rest[0].at)
            pipe = self.whole(rest[1:], rest[0].at) if rest else None
        self.loops -= word == "range"
        del self.scope[known:]
        return node

    def whole(self, tokens: list[_Token], at: int, ranges: bool = False) -> Pipe:
        pipe, rest = self.pipe(tokens, at, ranges)
        if rest:
            raise self.error(f"{rest[0].text!r} does not belong here", rest[0].at)
        return pipe

    def pipe(self, tokens: list[_Token], at: int, ranges: bool = False) -> tuple[Pipe, list[_Token]]:
        names, declares = [], False
        signs = [t.text for t in tokens[:4]]
        n = 3 if ranges and signs[1:2] == [","] and signs[3:4] in ([":="], ["="]) else 1
        if signs[n : n + 1] in ([":="], ["="]):
            if any(t.kind != "variable" for t in tokens[:n:2]):
                raise self.error("only a variable can be set", tokens[0].at)
            names, declares = [t.text for t in tokens[:n:2]], signs[n] == ":="
            tokens = tokens[n + 1 :]
        commands: list[tuple[Any, ...]] = []
        while True:
            command: list[Operand] = []
            while tokens and tokens[0].text not in ("|", ")") and tokens[0].kind not in ("declare", "assign"):
                operand, tokens = self.operand(tokens)
                command.append(operand)
            if not command:
                raise self.error("a value is missing", tokens[0].at if tokens else at)
            if command[0].kind != "function" and (len(command) > 1 or commands):
                raise self.error("what is no function takes no arguments", command[0].at)
            commands.append(tuple(command))
            if not tokens or tokens[0].text != "|":
                break
            tokens = tokens[1:]
        for name in names:
            if declares:
                self.scope.append(name)
            elif name not in self.scope:
                raise self.error(f"undefined variable {name}", at)
        return Pipe(tuple(names), declares, tuple(commands), at), tokens

    def operand(self, tokens: list[_Token]) -> tuple[Operand, list[_Token]]:
        t, rest = tokens[0], tokens[1:]
        value: Any = t.text
        match t.kind:
            case "string" | "raw":
                kind, value = "value", self.quoted(t) if t.kind == "string" else t.text[1:-1]
            case "number":
                kind, value = "value", int(t.text)
            case "dot":
                kind = "dot"
            case "field":
                kind, rest = "dot", tokens
            case "variable":
                kind = "variable"
                if t.text not in self.scope:
                    raise self.error(f"undefined variable {t.text}", t.at)
            case "word" if t.text in _WORDS:
                kind, value = "value", _WORDS[t.text]
            case "word" if t.text in self.functions:
                return Operand("function", t.text, (), t.at), rest
            case "word":
                raise self.error(f"function {t.text!r} is not defined", t.at)
            case "sign" if t.text == "(":
                kind = "pipe"
                value, rest = self.pipe(rest, t.at)
                if not rest or rest[0].text != ")":
                    raise self.error("a bracket is not closed", t.at)
                rest = rest[1:]
            case _:
                raise self.error(f"{t.text!r} does not belong here", t.at)
        fields: list[str] = []
        # `.A.B` is one operand, `.A .B` are two.
        while (
            rest and rest[0].kind == "field" and (rest is tokens or self.source[rest[0].at - 1] not in _SPACE)
        ):
            fields.append(rest[0].text[1:])
            rest = rest[1:]
        self.names.update(fields)
        return Operand(kind, value, tuple(fields), t.at), rest

    def quoted(self, token: _Token) -> str:
        def one(m: re.Match[str]) -> str:
            if m[4] is None:
                return chr(int(m[1] or m[2] or m[3], 16))
            if m[4] not in _ESCAPED:
                raise self.error(f"unknown escape \\{m[4]}", token.at + m.start())
            return _ESCAPED[m[4]]

        return _ESCAPE.sub(one, token.text[1:-1])

    def error(self, what: str, at: int) -> TemplateError:
        return error_at(self.source, what, at)


def error_at(source: str, what: str, at: int) -> TemplateError:
    line = source.count("\n", 0, at) + 1
    return TemplateError(f"{line}:{at - source.rfind(chr(10), 0, at)}: {what}")
