"""The only wrapper around a tokenizer: text to ids and back, chat templates, and what ends an answer.

tok = load_tokenizer(folder)
tok.encode("Hello")            # no special tokens are added unless asked for
"""

from __future__ import annotations

import datetime
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Protocol, cast

from burnish.errors import UserError
from burnish.models.spec import read_spec

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


# Some templates write today's date. A run must give the same tokens on any day and machine, so it is always
# this one: the day that Llama 3's own template falls back to.
_DAY = datetime.date(2024, 7, 26)
_TODAY = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class _Encoding(Protocol):
    ids: list[int]


class _Backend(Protocol):  # the few names of the tokenizers library that are used here
    def encode(self, sequence: str, *, add_special_tokens: bool) -> _Encoding: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def get_added_tokens_decoder(self) -> Mapping[int, Any]: ...
    @property
    def normalizer(self) -> Any: ...


class _Tokenizer(Protocol):  # the few names of transformers' class that are used here
    chat_template: str | dict[str, str] | None
    eos_token_id: int | None
    eos_token: str | None
    bos_token: str | None
    bos_token_id: int | None
    all_special_ids: list[int]
    backend_tokenizer: _Backend

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def save_pretrained(self, save_directory: str) -> Any: ...


class Refused(Exception):
    """A chat template's own words on why it does not take a conversation."""


class Tokenizer:
    """Owns a transformers tokenizer. `stop_ids` are the tokens that end an answer, from the model's own
    settings.
    """

    def __init__(self, inner: _Tokenizer, eos_ids: Sequence[int], adds_bos: bool) -> None:
        self._inner = inner
        self._backend = inner.backend_tokenizer
        own = () if inner.eos_token_id is None else (inner.eos_token_id,)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *eos_ids]))
        self.adds_bos = adds_bos
        self._dated = _TODAY.sub(lambda m: json.dumps(_DAY.strftime(m[2])), self.template)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.template)

    @property
    def template(self) -> str:
        """The chat template (Jinja); empty where there is none."""
        found = self._inner.chat_template
        if isinstance(found, dict):
            found = found.get("default") or next(iter(found.values()), "")
        return found or ""

    def for_tools(self) -> Tokenizer:
        """The same; of several templates, with the one that transformers takes when tools are given."""
        found = self._inner.chat_template
        return (
            self.with_template(found["tool_use"]) if isinstance(found, dict) and "tool_use" in found else self
        )

    def normal(self, text: str) -> str:
        """Text as this tokenizer takes it, where it first brings Unicode into a normal form (Qwen: NFC)."""
        form = type(self._backend.normalizer).__name__
        return unicodedata.normalize(form, text) if form in ("NFC", "NFD", "NFKC", "NFKD") else text

    @property
    def eos_id(self) -> int | None:
        return self._inner.eos_token_id

    @property
    def bos_id(self) -> int | None:
        return self._inner.bos_token_id if self.adds_bos else None

    @property
    def added(self) -> dict[str, int]:
        """Tokens that are matched as a whole before any text is cut: special ones, and such as `<think>`."""
        return {t.content: i for i, t in self._backend.get_added_tokens_decoder().items()}

    @property
    def special(self) -> dict[str, int]:
        """Those of `added` that no ordinary text is meant to contain."""
        ids = {*self._inner.all_special_ids, *self.stop_ids}
        found = self._backend.get_added_tokens_decoder().items()
        return {t.content: i for i, t in found if t.special or i in ids}

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; special tokens written out in it are recognised (templates contain them)."""
        return list(self._backend.encode(text, add_special_tokens=False).ids) if text else []

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=not keep_special)

    def with_template(self, template: str) -> Tokenizer:
        """The same with another chat template; `save` then writes that one."""
        other = copy(self)
        other._inner = copy(self._inner)
        other._inner.chat_template = template
        other._dated = _TODAY.sub(lambda m: json.dumps(_DAY.strftime(m[2])), template)
        return other

    def with_stop(self, token: int) -> Tokenizer:
        """The same, and this token ends an answer too."""
        if token in self.stop_ids:
            return self
        other = copy(self)
        other.stop_ids = (*self.stop_ids, token)
        return other

    def chat(self, messages: Sequence[Mapping[str, Any]], ask: bool, tools: Sequence[Any] = ()) -> str:
        """The template's text for these messages; `ask` appends what opens an assistant's answer.

        Raises Refused where the template does not take the conversation (roles out of order, …).
        """
        from jinja2 import TemplateError

        try:
            text = self._inner.apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                tokenize=False,
                add_generation_prompt=ask,
                chat_template=self._dated,
            )
        # A template is a program: what it does with a message that it does not expect may raise anything.
        except (TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError) as e:
            raise Refused(str(e) or type(e).__name__) from e
        return cast(str, text)

    def save(self, folder: Path) -> None:
        """With the chat template as it was rendered, its date included. Raises OSError."""
        inner = self._inner
        if self.has_chat_template:
            inner = copy(inner)
            inner.chat_template = self._dated
        try:
            inner.save_pretrained(str(folder))
        except Exception as e:  # tokenizers has no type of its own: 'No space left on device (os error 28)'
            number = _OS_ERROR.search(str(e))
            if number is None:
                raise
            raise OSError(int(number[1]), str(e)) from e


def load_tokenizer(folder: Path, trust_remote_code: bool = False, model: Path | None = None) -> Tokenizer:
    """The tokenizer of a folder. model: where the model is, if not there too: it says what ends an answer.

    Raises UserError where there is none, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in _FILES):
        raise UserError(
            f"{folder} has no tokenizer; expected one of {', '.join(_FILES)}",
            "download the tokenizer files of the model into the folder",
        )
    from transformers import AutoTokenizer  # heavy: only where a tokenizer is wanted

    try:
        inner = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (ValueError, OSError, KeyError) as e:
        raise UserError(
            f"the tokenizer in {folder} cannot be read: {str(e).splitlines()[0]}",
            "download tokenizer.json and tokenizer_config.json again",
        ) from e
    if not inner.encode("burnish 1"):
        raise UserError(
            f"the tokenizer in {folder} turns text into nothing: its vocabulary is missing",
            "download tokenizer.json again",
        )
    with_special = inner.encode("a", add_special_tokens=True)
    adds_bos = inner.bos_token_id is not None and with_special[:1] == [inner.bos_token_id]
    if not hasattr(inner, "backend_tokenizer"):
        raise UserError(
            f"the tokenizer in {folder} has no tokenizer.json form; burnish reads only such",
            "look for a newer upload of the model with a tokenizer.json",
        )
    return Tokenizer(cast(_Tokenizer, inner), read_spec(model or folder).eos_ids, adds_bos)
