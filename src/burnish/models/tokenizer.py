"""The only wrapper around a tokenizer: text to ids and back, chat templates, and what ends an answer.

tok = load_tokenizer(folder)
tok.encode("Hello")            # no special tokens are added unless asked for
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from burnish.errors import UserError
from burnish.models.spec import read_spec

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


class _Tokenizer(Protocol):  # the few names of transformers' class that are used here
    chat_template: str | None
    eos_token_id: int | None
    eos_token: str | None
    bos_token: str | None
    bos_token_id: int | None
    all_special_ids: list[int]

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...
    def save_pretrained(self, save_directory: str) -> Any: ...


class Tokenizer:
    """Owns a transformers tokenizer. `stop_ids` are the tokens that end an answer, from the model's own
    settings.
    """

    def __init__(self, inner: _Tokenizer, eos_ids: Sequence[int], adds_bos: bool) -> None:
        self._inner = inner
        own = () if inner.eos_token_id is None else (inner.eos_token_id,)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*own, *eos_ids]))
        self.adds_bos = adds_bos

    @property
    def has_chat_template(self) -> bool:
        return bool(self._inner.chat_template)

    @property
    def eos_id(self) -> int | None:
        return self._inner.eos_token_id

    @property
    def bos_id(self) -> int | None:
        return self._inner.bos_token_id if self.adds_bos else None

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone; special tokens written out in it are recognised (templates contain them)."""
        return list(self._inner.encode(text, add_special_tokens=False)) if text else []

    def decode(self, ids: Sequence[int], keep_special: bool = False) -> str:
        return self._inner.decode(list(ids), skip_special_tokens=not keep_special)

    def chat(self, messages: Sequence[dict[str, str]], ask: bool) -> str:
        """The template's text for these messages; `ask` appends what opens an assistant's answer.

        Raises UserError with the template's own words where it refuses the conversation (roles out of order,
        …).
        """
        from jinja2 import TemplateError

        try:
            text = self._inner.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        except TemplateError as e:
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(
                f"the model's chat template refuses this conversation ({roles}): {e}",
                "set data.chat_template=never, or give the rows in the order that the template wants",
            ) from e
        return cast(str, text)

    def save(self, folder: Path) -> None:
        """Raises OSError where the files cannot be written."""
        try:
            self._inner.save_pretrained(str(folder))
        except Exception as e:  # tokenizers has no type of its own: 'No space left on device (os error 28)'
            number = _OS_ERROR.search(str(e))
            if number is None:
                raise
            raise OSError(int(number[1]), str(e)) from e


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model folder. Raises UserError where there is none, or it cannot be read."""
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
    return Tokenizer(cast(_Tokenizer, inner), read_spec(folder).eos_ids, adds_bos)
