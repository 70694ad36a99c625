"""Questions to answers, with a fallback ladder for what may go wrong on the way.

    answers = answer(model, tokenizer, prompts, how, stop=("\\n\\n",))
    answers[0].rung      # '' where it went as asked

The ladder is the seed guide's, as policy on types: out of memory → the cache is freed and half as many tokens
are asked for → the CPU; mixed dtypes → float32 → the CPU; an operation the device lacks → the CPU. The rung
that gave the answer is in the result, never silent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from burnish.backends.base import Model, Sampling
from burnish.errors import OutOfMemory, Unsupported, UserError
from burnish.models.tokenizer import Tokenizer
from burnish.planning.memory import ANSWERS_AT_ONCE
from burnish.recipe import Generation


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    finish: str  # 'stop': the model or a stop string ended it; 'length': max_new_tokens did
    rung: str
    reason: str


@dataclass(frozen=True)
class Rung:
    name: str
    halve: bool = False
    device: str = ""
    dtype: str = ""


ASKED = Rung("")
HALF = Rung("half as many tokens", halve=True)
FLOAT32 = Rung("float32", dtype="float32")
CPU = Rung("the CPU, in float32", device="cpu", dtype="float32")


def next_rung(rung: Rung, error: Exception) -> Rung | None:
    """Where to go on after `error` on `rung`; None at the ladder's end."""
    if rung is CPU:
        return None
    if isinstance(error, OutOfMemory):
        return HALF if rung is ASKED else CPU
    if isinstance(error, Unsupported) and error.kind != "model":
        return FLOAT32 if error.kind == "dtype" and rung is not FLOAT32 else CPU
    return None


def check_window(prompt: Sequence[int], positions: int, what: str) -> None:
    """Raises UserError where a prompt leaves the model (of `positions`, 0: unknown) no room to answer."""
    if 0 < positions <= len(prompt):
        raise UserError(
            f"{what} has {len(prompt)} tokens, and this model has {positions} positions, the answer included",
            "ask something shorter",
        )


def sampling(settings: Generation, tokenizer: Tokenizer) -> Sampling:
    return Sampling(
        settings.max_new_tokens,
        0.0 if settings.greedy else settings.temperature,
        settings.top_p,
        settings.top_k,
        settings.repetition_penalty,
        tokenizer.stop_ids,
        settings.seed,
        settings.cache_bits or 0,
    )


def answer(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
    at_once: int = ANSWERS_AT_ONCE,
) -> list[Answer]:
    """One answer a prompt, in order, `at_once` of them side by side. `on_text(row, piece)` hears the text as
    it grows.

    Raises OutOfMemory or Unsupported where even the CPU could not.
    """
    answers: list[Answer] = []
    for i in range(0, len(prompts), at_once):
        answers += _climb(model, tokenizer, prompts[i : i + at_once], how, stop, on_text, i)
    return answers


def _climb(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    stop: Sequence[str],
    on_text: Callable[[int, str], None] | None,
    offset: int,
) -> list[Answer]:
    rung, reason = ASKED, ""
    writers = [_Writer(tokenizer, stop) for _ in prompts]
    while True:
        limit = max(1, how.max_new_tokens // 2) if rung.halve else how.max_new_tokens
        place = model.moved(rung.device, rung.dtype) if rung.device or rung.dtype else nullcontext()
        try:
            with place:
                _listen(model, prompts, replace(how, max_new_tokens=limit), writers, on_text, offset)
            return [w.answer(rung.name, reason) for w in writers]
        except (OutOfMemory, Unsupported) as e:
            following = next_rung(rung, e)
            if following is None:
                raise
            rung, reason = following, str(e).splitlines()[0][:200]
            writers = [_Writer(tokenizer, stop, w.told) for w in writers]


def _listen(
    model: Model,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    writers: Sequence[_Writer],
    on_text: Callable[[int, str], None] | None,
    offset: int,
) -> None:
    tokens = model.generate(prompts, how)
    try:
        for token in tokens:
            piece = writers[token.row].add(token.id, token.finish)
            if piece and on_text is not None:
                on_text(offset + token.row, piece)
            if all(w.finish for w in writers):  # stop strings end rows that the model would go on with
                return
    finally:
        close = getattr(tokens, "close", None)  # a generator's own; plain iterators have none
        if close is not None:
            close()


class _Writer:
    """The growing text of one row: whole characters only, cut at a stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], told_before: str = "") -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._before = told_before  # by a rung that failed: the same words are not told twice
        self._ids: list[int] = []
        self.text = self.finish = ""
        self._told = 0

    def add(self, token: int, finish: str) -> str:
        """What may be shown now. A tail that could still become a stop string, or half a character, waits."""
        if self.finish:
            return ""
        self._ids.append(token)
        ended = finish == "stop"
        self.text = self._tokenizer.decode(self._ids[:-1] if ended else self._ids)
        cut = min((at for s in self._stop if (at := self.text.find(s)) >= 0), default=None)
        if cut is not None:
            self.text, finish = self.text[:cut], "stop"
        self.finish = finish
        upto = len(self.text) if finish else len(self.text) - self._waiting()
        again, self._before = self._before, ""
        if again.startswith(self.text[:upto]):
            self._before = again
            return ""
        start = "\n" if again and not self.text.startswith(again) else ""  # another answer: a line of its own
        piece = self.text[0 if start else max(self._told, len(again)) : upto]
        self._told = max(self._told, upto)
        return start + piece

    @property
    def told(self) -> str:
        return self._before or self.text[: self._told]

    def _waiting(self) -> int:
        tail = len(self.text) - len(self.text.rstrip("\ufffd"))
        for s in self._stop:
            tail = max(tail, next((n for n in range(len(s) - 1, 0, -1) if self.text.endswith(s[:n])), 0))
        return tail

    def answer(self, rung: str, reason: str) -> Answer:
        return Answer(self.text, len(self._ids), self.finish or "length", rung, reason)
