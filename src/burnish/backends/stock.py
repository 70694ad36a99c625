"""A model as a stranger's program reads it: one small face for transformers, mlx-lm and llama.cpp.

An export is proven by the library that will use it. Each of those has an `open_stock` (or
`open_llama`) that loads a folder or file in that library's own way, with nothing of burnish's
kernels, and answers with a `Consumer`: what the library makes of the tokens, of the chat
template, and of the weights.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np


class Consumer(Protocol):
    """A loaded model with its tokenizer, both as the library itself reads them."""

    def score(self, tokens: Sequence[int]) -> np.ndarray:
        """float32 [T - 1]: the log-probability, in nats, of each token after the first, given those before
        it.
        """
        ...

    def greedy(self, prompt: Sequence[int], max_new_tokens: int, stop_ids: Sequence[int]) -> list[int]:
        """The likeliest answer; a stop id ends it and is not part of it."""
        ...

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens that the program's own tokenizer and chat template make of these messages (role,
        content), ready for an answer. UserError: it has no chat template.
        """
        ...

    def tokens(self, text: str) -> list[int]:
        """Of a text that holds special tokens as text, with what the program adds by itself (BOS)."""
        ...

    def ends(self, token: int) -> bool | None:
        """Whether the program by itself ends an answer at this token. None: an adapter has no say in it."""
        ...

    def close(self) -> None:
        """Lets go of the model's memory; the consumer is not used afterwards."""
        ...
