"""The errors that cross a room's door, and what a person is told of each.

`UserError` is for people: a sentence, a hint, an exit code; the command line prints it without a traceback.
The other three are all that a backend raises on purpose (docs/DESIGN.md, the interface), so that recovery can
be policy on a type and not a search in a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_WILL_NOT_FIT = 3
EXIT_OUT_OF_MEMORY = 75
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """What a person can put right.

    message: what is wrong, with what was got and what was expected. hint: the next thing to do, often a
    command. exit_code: 2 where the input is at fault, 1 where the work failed, 3 where it will not fit. log:
    what the process that failed said last, where that was another one.
    """

    def __init__(
        self, message: str, hint: str = "", exit_code: int = EXIT_BAD_INPUT, log: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        self.log = tuple(log)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


def all_problems(title: str, problems: Sequence[str], hint: str = "", shown: int = 20) -> UserError:
    """One error that lists every problem (the first `shown` in full, the rest as a count)."""
    lines = [f"  {p}" for p in problems[:shown]]
    if len(problems) > shown:
        lines.append(f"  … and {len(problems) - shown} more")
    return UserError("\n".join([title, *lines]), hint)


class OutOfMemory(Exception):
    """The device (or the host, for the CPU) could not give the memory that was asked for."""


class NonFinite(Exception):
    """A loss or a gradient norm was NaN or infinite; nothing was updated."""


class Unsupported(Exception):
    """The backend cannot do this. `kind` is what a policy may act on: 'dtype' (mixed element types),
    'operation', 'model' (this model, on any device). hint: what would do it, where that is known.
    """

    def __init__(
        self, message: str, kind: Literal["dtype", "operation", "model"] = "operation", hint: str = ""
    ) -> None:
        super().__init__(message)
        self.kind, self.hint = kind, hint


def in_words(error: Exception) -> UserError | None:
    """What a person is told of an error that was raised on purpose; None where it is a defect of ours and
    deserves its traceback.
    """
    match error:
        case UserError():
            return error
        case OutOfMemory():
            return UserError(
                f"memory ran out: {(str(error).splitlines() or ['no more could be had'])[0]}",
                "begin again with train.micro_batch=1, train.keep_layers=0 or a smaller train.max_length, "
                "and --out DIR",
                EXIT_OUT_OF_MEMORY,
            )
        case NonFinite():
            return UserError(
                f"the numbers left the finite range: {error}; nothing was updated by that step",
                "set a smaller train.lr or dtype=float32, then begin again with --out DIR",
                EXIT_FAILED,
            )
        case Unsupported():
            usual = "set backend=torch" if error.kind == "model" else "try dtype=float32 or device=cpu"
            return UserError(f"this backend cannot do it: {error}", error.hint or usual, EXIT_FAILED)
    return None
