"""Answers: the fallback ladder, stop strings, and text that grows by whole characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import pytest

from burnish.backends.base import Model, Sampling, Token
from burnish.errors import NonFinite, OutOfMemory, Unsupported, UserError
from burnish.inference.generate import Answer, answer, check_window, sampling
from burnish.models.tokenizer import Tokenizer
from burnish.planning.memory import ANSWERS_AT_ONCE
from burnish.recipe import Generation

END = 0
OOM = OutOfMemory("CUDA out of memory. Tried to allocate 2 GiB\nand more")
DTYPE = Unsupported("'mps.add' op requires the same element type for all operands", "dtype")
OPERATION = Unsupported("aten::x is not implemented for MPS", "operation")


class Bytes:
    """A tokenizer whose ids are bytes, so that a character may take several tokens."""

    stop_ids = (END,)

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


class Scripted:
    """Says `says`, whatever it is asked, but fails as `fails` tells: where it is (device, dtype) → the error.

    An error comes after two tokens; each answer that was begun is in `asked`, with its place.
    """

    def __init__(self, says: str, fails: Sequence[Exception | None] = ()) -> None:
        self.says, self.fails = says.encode(), list(fails)
        self.place: tuple[str, str] = ("", "")
        self.asked: list[tuple[tuple[str, str], int, int]] = []
        self.closed = 0

    def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
        error = self.fails.pop(0) if self.fails else None
        self.asked.append((self.place, how.max_new_tokens, len(prompts)))
        try:
            for n, token in enumerate([*self.says, END][: how.max_new_tokens]):
                if error is not None and n == 2:
                    raise error
                for row in range(len(prompts)):
                    last = n + 1 == how.max_new_tokens
                    yield Token(row, token, -0.5, "stop" if token == END else "length" if last else "")
        finally:
            self.closed += 1

    @contextmanager
    def moved(self, device: str, dtype: str) -> Iterator[None]:
        before, self.place = self.place, (device, dtype)
        try:
            yield
        finally:
            self.place = before


def ask(
    model: Scripted, max_new_tokens: int = 40, stop: Sequence[str] = (), rows: int = 1, on_text: Any = None
):
    how = Sampling(max_new_tokens, stop_ids=(END,))
    return answer(cast(Model, model), cast(Tokenizer, Bytes()), [[65]] * rows, how, stop, on_text)


# --- the ladder ---


@pytest.mark.parametrize(
    ("fails", "places", "rung"),
    [
        ([], [("", "", 40)], ""),
        ([OOM], [("", "", 40), ("", "", 20)], "half as many tokens"),
        ([OOM, OOM], [("", "", 40), ("", "", 20), ("cpu", "float32", 40)], "the CPU, in float32"),
        ([DTYPE], [("", "", 40), ("", "float32", 40)], "float32"),
        ([DTYPE, DTYPE], [("", "", 40), ("", "float32", 40), ("cpu", "float32", 40)], "the CPU, in float32"),
        ([DTYPE, OOM], [("", "", 40), ("", "float32", 40), ("cpu", "float32", 40)], "the CPU, in float32"),
        ([OPERATION], [("", "", 40), ("cpu", "float32", 40)], "the CPU, in float32"),
        ([OOM, DTYPE], [("", "", 40), ("", "", 20), ("", "float32", 40)], "float32"),
        ([OOM, OPERATION], [("", "", 40), ("", "", 20), ("cpu", "float32", 40)], "the CPU, in float32"),
    ],
    ids=[
        "as asked",
        "oom",
        "oom oom",
        "dtype",
        "dtype dtype",
        "dtype oom",
        "operation",
        "oom dtype",
        "oom operation",
    ],
)
def test_the_ladder(fails: list[Exception], places: list[tuple[str, str, int]], rung: str):
    model = Scripted("fine", fails)
    reason = str(fails[-1]).splitlines()[0] if fails else ""
    assert ask(model) == [Answer("fine", 5, "stop", rung, reason)]
    assert [(*place, n) for place, n, _ in model.asked] == places
    assert model.place == ("", ""), "it is where it was"
    assert model.closed == len(places), "every cache is freed before the next rung"


@pytest.mark.parametrize("fails", [[OOM, OOM, OOM], [OPERATION, OPERATION], [OPERATION, OOM], [DTYPE] * 3])
def test_at_the_ladders_end_the_error_comes_out(fails: list[Exception]):
    model = Scripted("fine", list(fails))
    with pytest.raises((OutOfMemory, Unsupported)) as caught:
        ask(model)
    assert caught.value is fails[-1]
    assert model.place == ("", "") and not model.fails


def test_other_errors_are_not_climbed_over():
    model = Scripted("fine", [NonFinite("nan")])
    with pytest.raises(NonFinite):
        ask(model)
    assert len(model.asked) == 1


def test_half_is_rounded_down_but_never_to_nothing():
    (given,) = ask(Scripted("abcdefgh", [OOM]), 7)
    assert (given.text, given.rung, given.finish) == ("abc", "half as many tokens", "length")

    class AtOnce(Scripted):
        def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
            if self.fails:
                self.fails.clear()
                raise OOM
            return super().generate(prompts, how)

    (given,) = ask(AtOnce("abc", [OOM]), 1)
    assert (given.text, given.finish) == ("a", "length")


@pytest.mark.parametrize(
    ("second", "told"), [("abcdef", "abcdef"), ("abXYZ!", "abXYZ!"), ("aXYZ!", "ab\naXYZ!"), ("a", "ab")]
)
def test_what_was_told_is_not_told_again(second: str, told: str):
    """The first try tells 'ab' and fails. The same answer goes on from there, another one on a new line."""

    class Changing(Scripted):
        def generate(self, prompts: Sequence[Sequence[int]], how: Sampling) -> Iterator[Token]:
            if not self.fails:
                self.says = second.encode()
            return super().generate(prompts, how)

    pieces: list[str] = []
    (given,) = ask(Changing("abcdef", [DTYPE]), on_text=lambda _, piece: pieces.append(piece))
    assert given.text == second
    assert "".join(pieces) == told


# --- stopping ---


def test_the_model_ends_or_the_limit_does():
    assert ask(Scripted("abc"))[0] == Answer("abc", 4, "stop", "", "")
    assert ask(Scripted("abc"), 2)[0] == Answer("ab", 2, "length", "", "")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((";",), "select 1"), (("1; s",), "select "), (("s 2", ";"), "select 1"), (("select",), ""),
        (("absent",), "select 1; select 2"),
    ],
)  # fmt: skip
def test_a_stop_string_ends_the_answer_before_it(stop: tuple[str, ...], text: str):
    model = Scripted("select 1; select 2")
    (given,) = ask(model, stop=stop)
    assert (given.text, given.finish) == (text, "stop")
    if stop != ("absent",):
        assert given.tokens < len("select 1; select 2"), "no more tokens are made than needed"
    assert model.closed == 1


@pytest.mark.parametrize(("says", "stop"), [
    ("one two\n\nthree", ("\n\n",)), ("one\ntwo", ("\n\n",)), ("ends with \n", ("\n\n",)),
    ("a#b##c###d", ("###",)), ("héllo — 你好 🎉", ()), ("你好", ("好",)), ("plain", ("plainly",)),
])  # fmt: skip
def test_pieces_join_to_the_text(says: str, stop: tuple[str, ...]):
    shown: list[str] = []
    (given,) = ask(Scripted(says), stop=stop, on_text=lambda _, piece: shown.append(piece))
    assert "".join(shown) == given.text == (says.split(stop[0])[0] if stop else says)
    assert all(shown), "nothing is told in an empty piece"


def test_half_a_character_waits():
    shown: list[str] = []
    ask(Scripted("a🎉b"), on_text=lambda _, piece: shown.append(piece))
    assert shown == ["a", "🎉", "b"]


def test_half_a_character_at_the_limit_is_told_in_the_end():
    shown: list[str] = []
    (given,) = ask(Scripted("a🎉"), 3, on_text=lambda _, piece: shown.append(piece))
    assert given.text == "".join(shown) == "a\ufffd"


def test_what_may_become_a_stop_string_waits():
    shown: list[str] = []
    ask(Scripted("a##b###c"), stop=("###",), on_text=lambda _, piece: shown.append(piece))
    assert shown == ["a", "##b"]


# --- many prompts ---


def test_many_prompts_are_answered_in_order_in_groups():
    model, heard = Scripted("ok"), []
    given = ask(model, rows=ANSWERS_AT_ONCE + 3, on_text=lambda row, piece: heard.append(row))
    assert [a.text for a in given] == ["ok"] * (ANSWERS_AT_ONCE + 3)
    assert [n for _, _, n in model.asked] == [ANSWERS_AT_ONCE, 3]
    assert sorted(set(heard)) == list(range(ANSWERS_AT_ONCE + 3))


def test_a_group_that_fails_does_not_change_the_others():
    model = Scripted("ok", [None, OOM])
    given = ask(model, rows=ANSWERS_AT_ONCE + 1)
    assert [a.rung for a in given] == [""] * ANSWERS_AT_ONCE + ["half as many tokens"]


# --- settings ---


def test_settings_become_sampling():
    tokenizer = cast(Tokenizer, Bytes())
    asked = Generation(max_new_tokens=7, temperature=0.3, top_p=0.9, top_k=5, repetition_penalty=1.2, seed=4)
    assert sampling(asked, tokenizer) == Sampling(7, 0.3, 0.9, 5, 1.2, (END,), 4)
    assert sampling(asked.model_copy(update={"greedy": True}), tokenizer).temperature == 0


def test_a_prompt_must_leave_room():
    check_window([1] * 7, 8, "prompt 1")
    check_window([1] * 99, 0, "prompt 1")  # the config does not say how many
    with pytest.raises(UserError, match="prompt 1 has 8 tokens, and this model has 8 positions"):
        check_window([1] * 8, 8, "prompt 1")
