"""Answers, token by token, for a batch of prompts with one key-value cache.

Prompts are padded on the left, so that every row's next token is at the same place; a row that has ended goes
on unseen until all have. The next token is chosen on the CPU by the function that all backends share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from burnish.backends.base import Sampling, Token
from burnish.backends.sampling import choose, stream
from burnish.backends.torch.device import free_cache, translated
from burnish.errors import Unsupported


def generate(
    decoder: Any,
    embed: Callable[[torch.Tensor], torch.Tensor],
    logits: Callable[[torch.Tensor], torch.Tensor],
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
) -> Iterator[Token]:
    """Yields every row's tokens as they come. Closing the iterator frees the cache.

    Raises Unsupported, at the first token, where a quantised cache is asked for.
    """
    if not prompts or how.max_new_tokens < 1:
        return
    if how.cache_bits:
        raise Unsupported("generation.cache_bits: a quantised key-value cache is for backend mlx, not torch")
    width = max(len(p) for p in prompts)
    tokens = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros((len(prompts), width + how.max_new_tokens), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
    cache: DynamicCache | None = DynamicCache()
    seen = [set(p) for p in prompts]
    draws = [stream(how.seed, row) for row in range(len(prompts))]
    running = [True] * len(prompts)
    # Without padding no mask is needed, and attention may take its fastest kernel.
    padded = any(len(p) < width for p in prompts)
    try:
        for n in range(how.max_new_tokens):
            with translated(), torch.inference_mode():
                hidden = decoder(
                    inputs_embeds=embed(tokens),
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    attention_mask=mask[:, : width + n] if padded else None,
                ).last_hidden_state[:, -1]  # nothing else of the output: it would keep the cache alive
                rows = logits(hidden).cpu().numpy()
            chosen = []
            for row in range(len(prompts)):
                if not running[row]:
                    chosen.append(0)
                    continue
                token, logprob = choose(rows[row], seen[row], how, draws[row])
                seen[row].add(token)
                finish = "stop" if token in how.stop_ids else "length" if n == how.max_new_tokens - 1 else ""
                running[row] = not finish
                chosen.append(token)
                yield Token(row, token, logprob, finish)
            if not any(running):
                return
            tokens = torch.tensor(chosen, device=device)[:, None]
            positions = positions[:, -1:] + 1
    finally:
        cache = None
        free_cache(device)
