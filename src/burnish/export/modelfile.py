"""The grammar of Ollama's Modelfile: values quoted so that they come back, and a file read as Ollama does.

    quoted("Be brief.")                    # '"Be brief."'; None where no way of quoting brings it back
    parse_modelfile("FROM ./a.gguf\\n")    # [Instruction('FROM', '', './a.gguf', 1)]

A value ends with its line, unless it begins with a quotation mark or three of them: then at the first line
that ends so. There is no escape in it, and characters that do not print (a no-break space, a zero-width
joiner) are dropped by Ollama without a word; here they are an error. https://docs.ollama.com/modelfile
"""

from __future__ import annotations

from dataclasses import dataclass

from burnish.errors import UserError

_TRIPLE = '"""'
_INSTRUCTIONS = ("FROM", "PARAMETER", "TEMPLATE", "SYSTEM", "ADAPTER", "LICENSE", "MESSAGE", "REQUIRES")
_ROLES = ("system", "user", "assistant")
PARAMETERS: dict[str, type] = {
    "num_ctx": int, "num_predict": int, "num_gpu": int, "num_thread": int, "num_batch": int, "num_keep": int,
    "draft_num_predict": int, "repeat_last_n": int, "seed": int, "top_k": int, "repeat_penalty": float,
    "temperature": float, "top_p": float, "min_p": float, "typical_p": float, "presence_penalty": float,
    "frequency_penalty": float, "stop": str,
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """name: 'FROM', 'PARAMETER', …; key: a parameter's name, or a message's role; line: where it begins."""

    name: str
    key: str
    value: str
    line: int


def quoted(text: str) -> str | None:
    """The text as a value of a Modelfile; None where Ollama would read another one, however it is quoted."""
    if any(not _kept(c) for c in text):
        return None
    ways = [f'"{text}"', f"{_TRIPLE}{text}{_TRIPLE}", text]
    if "\n" in text or '"' in text:
        ways = [ways[1], ways[0], ways[2]]
    for written in ways:
        if _value_end(written + "\n", 0) == len(written) and _unquoted(written.strip()) == text:
            return written
    return None


def parse_modelfile(text: str) -> list[Instruction]:
    """Raises UserError, with the line, for what Ollama would not take, or would take for something else."""
    found: list[Instruction] = []
    at = 0
    while at < len(text):
        line = text.count("\n", 0, at) + 1
        end = _line_end(text, at)
        words = text[at:end].split(maxsplit=1)
        if not words or words[0].startswith("#"):
            at = end + 1
            continue
        name = words[0].upper()
        if name not in _INSTRUCTIONS:
            raise _error(line, f"expected one of {', '.join(_INSTRUCTIONS)}, got {words[0]!r:.40}")
        if not found and name != "FROM":
            raise _error(line, f"expected FROM first, got {name}")
        at = text.index(words[0], at) + len(name)
        key = ""
        if name in ("PARAMETER", "MESSAGE"):
            at = _blank_end(text, at)
            start = at
            while at < len(text) and not text[at].isspace():
                at += 1
            key = text[start:at]
        at = _blank_end(text, at)
        end = _value_end(text, at)
        if end < 0:
            raise _error(line, f"the quotation of {name} is not closed by a line that ends with the quotes")
        found.append(Instruction(name, key, _unquoted(text[at:end].strip()) or "", line))
        _check(found, text[at:end])
        at = end + 1
    if not found:
        raise _error(1, "expected a FROM line, got none")
    return found


def _check(found: list[Instruction], written: str) -> None:
    """The last instruction that was found."""
    last = found[-1]
    if not last.value.strip() and last.name != "TEMPLATE" and last.key != "stop":
        raise _error(last.line, f"{last.name} {last.key} has no value")
    if not last.value and last.key == "stop":
        raise _error(last.line, "an empty stop text ends every answer at once")
    for at, c in enumerate(written):
        if not _kept(c):
            line = last.line + written.count("\n", 0, at)
            raise _error(line, f"Ollama drops the character U+{ord(c):04X}, which does not print")
    once = last.name not in ("LICENSE", "PARAMETER", "MESSAGE")
    if once and any(i.name == last.name for i in found[:-1]):
        raise _error(last.line, f"a second {last.name}: only the last would be used")
    if last.name == "MESSAGE" and last.key not in _ROLES:
        raise _error(last.line, f"expected a role of {', '.join(_ROLES)}, got {last.key!r}")
    if last.name == "PARAMETER":
        _check_parameter(last)


def _check_parameter(p: Instruction) -> None:
    kind = PARAMETERS.get(p.key)
    if kind is None:
        raise _error(p.line, f"expected a parameter of {', '.join(PARAMETERS)}, got {p.key!r}")
    try:
        number = kind(p.value)
    except ValueError as e:
        what = "a whole number" if kind is int else "a number"
        raise _error(p.line, f"{p.key}: expected {what}, got {p.value!r:.40}") from e
    if kind is float and not abs(number) < 1e30:
        raise _error(p.line, f"{p.key}: expected a finite number, got {p.value}")


def _kept(c: str) -> bool:
    return c.isprintable() or c in "\n\r\t"


def _line_end(text: str, at: int) -> int:
    ends = [e for e in (text.find("\n", at), text.find("\r", at)) if e >= 0]
    return min(ends, default=len(text))


def _blank_end(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t":
        at += 1
    return at


def _value_end(text: str, at: int) -> int:
    """Where the value that begins at `at` ends: the first end of a line at which it is whole; -1: nowhere."""
    end = at
    while True:
        end = _line_end(text, end)
        if _unquoted(text[at:end].strip()) is not None:
            return end
        if end >= len(text):
            return -1
        end += 1


def _unquoted(value: str) -> str | None:
    """None where a quotation is still open."""
    for marks in (_TRIPLE, '"'):
        if value.startswith(marks):
            whole = len(value) >= 2 * len(marks) and value.endswith(marks)
            return value[len(marks) : len(value) - len(marks)] if whole else None
    return value


def _error(line: int, what: str) -> UserError:
    return UserError(f"Modelfile:{line}: {what}", "https://docs.ollama.com/modelfile describes its grammar")
