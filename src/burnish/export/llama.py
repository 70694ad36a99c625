"""A GGUF file as llama.cpp reads it: its weights, its tokenizer, its chat template, its arithmetic.

    consumer = open_llama(Path("model.gguf"))
    consumer.score(tokens)          # float32 [T - 1], log-probabilities in nats
    consumer.close()

Through the C interface that llama-cpp-python exposes, with a context no longer than the tokens at hand: its
`Llama` class keeps the logits of a whole context, which for a large vocabulary is gigabytes. What llama.cpp
finds broken it refuses, and that is a UserError here; what it asserts ends the process. So whoever opens a
file that may be bad does it in a child.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from burnish.errors import EXIT_FAILED, UserError

_BATCH = 128  # tokens a call; their logits are in memory: 128 MB for a vocabulary of 250,000
_F32 = 0  # ggml's number of it: the cache is not to round keys and values
_NO_FLASH = 0  # flash attention rounds to float16
_NO_MMAP = 0  # read whole: a file that changes or goes afterwards must not end the process
_WARN_ERROR = (3, 4)  # of ggml_log_level
_TEMPLATE = "tokenizer.chat_template"


def open_llama(path: Path, adapter: Path | None = None) -> Llama:
    """adapter: a GGUF adapter of that base. Raises UserError where llama-cpp-python is missing, or llama.cpp
    does not take a file.
    """
    try:
        import llama_cpp
    except ImportError as e:
        raise UserError(
            f"a GGUF file is run by llama-cpp-python, which cannot be imported: {e}",
            "pip install 'burnish[gguf]'",
        ) from e
    for file in (path, *([adapter] if adapter else [])):
        if not file.is_file():
            raise UserError(f"{file} is not a file", "give the path of one .gguf file")
    kept_log().clear()
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.load_mode = _NO_MMAP
    settings.use_extra_bufts = False  # repacked weights are multiplied in another order
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise _refused(path)
    lora = None
    if adapter is not None:
        lora = llama_cpp.llama_adapter_lora_init(model, str(adapter).encode())
        if not lora:
            error = _refused(adapter)
            llama_cpp.llama_model_free(model)
            raise error
    return Llama(path, model, lora)


def _refused(path: Path) -> UserError:
    return UserError(f"llama.cpp does not load {path}: {why()}", "write the file again", EXIT_FAILED)


def why() -> str:
    """What llama.cpp said of its last failure, in one line."""
    said = kept_log()
    return next((line for line in said if "error" in line.lower()), said[-1] if said else "it said nothing")


def kept_log() -> list[str]:
    """llama.cpp's warnings and errors from now on: kept, and not printed."""
    return _log()[0]


@cache
def _log() -> tuple[list[str], Callable[..., Any]]:
    """The lines, and the callback that adds them, which must live as long as llama.cpp may call it."""
    import llama_cpp

    said: list[str] = []

    def keep(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace").strip()
        if level in _WARN_ERROR and line:
            said.append(line)

    callback = llama_cpp.llama_log_callback(keep)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return said, callback


class Llama:
    """Owns llama.cpp's model, and its adapter where there is one; a context lives for one call."""

    def __init__(self, path: Path, model: Any, lora: Any) -> None:
        import llama_cpp

        self._cpp: Any = llama_cpp
        self._path, self._lora = path, lora
        self._model: Any = model
        self._vocab: Any = llama_cpp.llama_model_get_vocab(model)
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)

    @property
    def metadata(self) -> dict[str, str]:
        """Every key that is no array, its value as text."""
        cpp, model = self._cpp, self._model
        return {
            _read(lambda b, n, i=i: cpp.llama_model_meta_key_by_index(model, i, b, n)): _read(
                lambda b, n, i=i: cpp.llama_model_meta_val_str_by_index(model, i, b, n)
            )
            for i in range(cpp.llama_model_meta_count(model))
        }

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [T - 1]: the log-probability, in nats, of each token after the first."""
        found = np.zeros(max(0, len(tokens) - 1), np.float32)
        if not len(found):
            return found
        with self._context(len(tokens)) as context:
            for at in range(0, len(found), _BATCH):
                part = list(tokens[at : min(at + _BATCH, len(found))])
                self._decode(context, part, at, every=True)
                flat = np.ctypeslib.as_array(
                    self._cpp.llama_get_logits(context), shape=(len(part) * self.vocab_size,)
                )
                logits = flat.reshape(len(part), self.vocab_size).astype(np.float64)
                top = logits.max(-1)
                total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
                chosen = np.asarray(tokens[at + 1 : at + 1 + len(part)])
                found[at : at + len(part)] = logits[np.arange(len(part)), chosen] - total
        return found

    def ends(self, token: int) -> bool | None:
        """As `Consumer.ends`: llama.cpp knows eos, eot and their like from the file's keys."""
        return bool(self._cpp.llama_vocab_is_eog(self._vocab, token))

    def greedy(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """The likeliest answer by llama.cpp's own sampler; a stop id ends it and is not part of it."""
        cpp = self._cpp
        answer: list[int] = []
        with self._context(len(prompt) + max_new_tokens) as context:
            sampler = cpp.llama_sampler_init_greedy()
            try:
                for at in range(0, len(prompt), _BATCH):
                    self._decode(context, list(prompt[at : at + _BATCH]), at, every=False)
                while len(answer) < max_new_tokens:
                    token = cpp.llama_sampler_sample(sampler, context, -1)
                    if token in stop_ids:
                        break
                    answer.append(token)
                    if len(answer) < max_new_tokens:
                        self._decode(context, [token], len(prompt) + len(answer) - 1, every=False)
            finally:
                cpp.llama_sampler_free(sampler)
        return answer

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """By the template in the file, rendered as llama-cpp-python does. UserError: there is none, or it
        refuses these messages.
        """
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter, jinja2

        template = self.metadata.get(_TEMPLATE)
        if template is None:
            raise UserError(f"{self._path} holds no chat template", "ask it with plain text")
        bos, eos = (
            self._text(f(self._vocab)) for f in (self._cpp.llama_vocab_bos, self._cpp.llama_vocab_eos)
        )
        try:
            made = Jinja2ChatFormatter(template, eos, bos)(messages=[dict(m) for m in messages])  # type: ignore
        except (jinja2.TemplateError, ValueError) as e:
            raise UserError(f"{self._path}: its chat template refuses: {e}", "ask it another way") from e
        return self._tokens(made.prompt, add=not made.added_special)

    def tokens(self, text: str) -> list[int]:
        """Special tokens in the text are recognised; what the file says is added, BOS for one."""
        return self._tokens(text, add=True)

    def close(self) -> None:
        if self._model is not None:
            self._cpp.llama_model_free(self._model)  # its adapters with it
            self._model = None

    def _text(self, token: int) -> str:
        return "" if token < 0 else self._cpp.llama_vocab_get_text(self._vocab, token).decode()

    def _tokens(self, text: str, add: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        while True:
            ids = (self._cpp.llama_token * room)()
            n = self._cpp.llama_tokenize(self._vocab, data, len(data), ids, room, add, True)
            if n >= 0:
                return list(ids[:n])
            room = -n

    @contextmanager
    def _context(self, length: int) -> Iterator[Any]:
        cpp = self._cpp
        settings = cpp.llama_context_default_params()
        settings.n_ctx = length
        settings.n_batch = settings.n_ubatch = _BATCH
        settings.n_threads = settings.n_threads_batch = _threads()
        settings.type_k = settings.type_v = _F32
        settings.flash_attn_type = _NO_FLASH
        settings.no_perf = True
        context = cpp.llama_init_from_model(self._model, settings)
        if not context:
            raise _refused(self._path)
        try:
            if self._lora is not None:
                loras = (cpp.llama_adapter_lora_p_ctypes * 1)(self._lora)
                if cpp.llama_set_adapters_lora(context, loras, 1, (ctypes.c_float * 1)(1.0)):
                    raise _refused(self._path)
            yield context
        finally:
            cpp.llama_free(context)

    def _decode(self, context: Any, tokens: Sequence[int], start: int, every: bool) -> None:
        """every: logits of each token, not of the last alone."""
        cpp, n = self._cpp, len(tokens)
        wrong = [t for t in tokens if not 0 <= t < self.vocab_size]
        if wrong:
            raise UserError(f"token {wrong[0]} is not one of the {self.vocab_size} of {self._path}")
        batch = cpp.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
                batch.logits[i] = every or i == n - 1
            code = cpp.llama_decode(context, batch)
        finally:
            cpp.llama_batch_free(batch)
        if code:
            raise UserError(
                f"llama.cpp could not compute {n} tokens of {self._path} (code {code})",
                "close other programs: memory may have run out",
                EXIT_FAILED,
            )


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) else min(4, os.cpu_count() or 1)


def _read(ask: Callable[[Any, int], int]) -> str:
    """A string of llama.cpp's, however long: asked for again where it did not fit."""
    size = 1 << 12
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = ask(buffer, size)
        if n < size:
            return buffer.value.decode(errors="replace")
        size = n + 1
