"""A model folder as mlx-lm reads it: its loader, its tokenizer, its steps, with nothing of ours.

    use_openblas()        # burnish.machine.blas; on Linux, before this module and with it mlx is imported
    consumer = open_stock(Path("exported-4bit"))
    nats = consumer.score(consumer.tokens("the whole text"))

What is put right elsewhere for mlx-lm (`families.py`) is on purpose not put right here: a key of config.json
that it does not read must show as a wrong score, because a user would get that score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step

from burnish.backends.mlx.device import translated
from burnish.backends.stock import Consumer
from burnish.errors import OutOfMemory, UserError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
_AT_A_TIME = 64  # rows of logits in float64: 64 × 150,000 words are 77 MB


class StockMlx:
    """mlx-lm's model and tokenizer behind `Consumer`."""

    def __init__(self, model: Any, tokenizer: Any, adapted: bool) -> None:
        self._model, self._tokenizer, self._adapted = model, tokenizer, adapted

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [T - 1], as `Consumer.score`. The softmax is NumPy's, in float64: MLX's on a CPU adds up a
        row naively and is off by 3e-4 over 49,152 words.
        """
        with translated():
            logits_TV = self._model(mx.array([list(tokens)]))[0, :-1].astype(mx.float32)
            logits_TV = np.array(logits_TV)
        targets = np.asarray(tokens[1:])
        found = np.empty(len(targets), np.float32)
        for at in range(0, len(targets), _AT_A_TIME):
            rows = logits_TV[at : at + _AT_A_TIME].astype(np.float64)
            rows -= rows.max(-1, keepdims=True)
            chosen = rows[np.arange(len(rows)), targets[at : at + _AT_A_TIME]]
            found[at : at + len(rows)] = chosen - np.log(np.exp(rows).sum(-1))
        return found

    def greedy(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """As `Consumer.greedy`, by mlx-lm's `generate_step`, whose sampler takes the likeliest."""
        answer: list[int] = []
        if max_new_tokens < 1:
            return answer
        with translated():
            for token, _ in generate_step(mx.array(list(prompt)), self._model, max_tokens=max_new_tokens):
                if int(token) in stop_ids:
                    break
                answer.append(int(token))
        return answer

    def ends(self, token: int) -> bool | None:
        """As `Consumer.ends`, by the ids that mlx-lm's tokenizer has from the folder."""
        return None if self._adapted else token in self._tokenizer.eos_token_ids

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """As `Consumer.prompt`, by the wrapper's `apply_chat_template`."""
        try:
            return list(
                self._tokenizer.apply_chat_template(
                    [dict(m) for m in messages], add_generation_prompt=True, return_dict=False
                )
            )
        except Exception as e:  # no template, or what Jinja and the template itself raise
            raise UserError(
                f"mlx-lm makes no prompt of the messages: {type(e).__name__}: {str(e)[:500]}",
                "check the folder's chat_template.jinja",
            ) from e

    def tokens(self, text: str) -> list[int]:
        """As `Consumer.tokens`. mlx-lm's `generate` adds a BOS only to a text that does not begin with it."""
        bos = self._tokenizer.bos_token
        return list(self._tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos)))

    def close(self) -> None:
        """Drops the model, and gives its buffers back."""
        del self._model
        mx.clear_cache()


def open_stock(folder: Path, adapter: Path | None = None, dtype: str = "auto") -> Consumer:
    """The model of `folder` on MLX's default device, with the mlx-lm adapter of `adapter` on it where one is
    given.

    dtype: 'auto' as stored; 'float32', 'bfloat16', 'float16' for all that is not packed, scales and biases of
    what is packed included, since products with it are computed in theirs. Raises UserError, in mlx-lm's own
    words, for a folder that it cannot read.
    """
    for there, file in ((folder, "config.json"), (adapter, "adapter_config.json")):
        if there is not None and not (there / file).is_file():  # mlx-lm would look for the name on a hub
            raise UserError(f"{there} holds no {file}", "give the folder that holds it")
    try:
        with translated():
            model, tokenizer = mlx_lm.load(str(folder), adapter_path=str(adapter) if adapter else None)[:2]
    except (OutOfMemory, MemoryError):
        raise
    # Keys that it needs and the config has not; one of its models ends the process if a package is missing.
    except (Exception, SystemExit) as e:
        what = f"{folder} with the adapter {adapter}" if adapter else str(folder)
        raise UserError(
            f"mlx-lm cannot load {what}: {type(e).__name__}: {str(e)[:500]}",
            "check that the folder is whole; burnish doctor   shows installed versions",
        ) from e
    if dtype != "auto":
        model.set_dtype(DTYPES[dtype])
    return StockMlx(model, tokenizer, adapter is not None)
