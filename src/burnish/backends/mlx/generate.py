"""Answers, token by token, from an mlx-lm model with a key-value cache.

    for token in generate(model, [prompt, other], how, prefixes):
        ...

Each prompt but its last token is read by itself, in chunks, so that activations do not grow with its length
and no logits are made for it; it starts from what it shares with a prompt read before, of this batch or the
last. (Read by itself, a prompt costs a pass over the weights that a padded batch would share, and saves the
padding.) Then the rows' caches become one, padded on the left, and a round is one pass for all rows that are
left. Where caches do not merge, and with quantised ones, a round is a pass a row. The next token is chosen on
the CPU by the function that all backends share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from burnish.backends.base import Sampling, Token
from burnish.backends.mlx.device import free_cache, translated
from burnish.backends.mlx.families import ATTENTION_CACHES
from burnish.backends.mlx.prefix import Cache, PrefixCache, Read, best_start
from burnish.backends.sampling import choose, stream
from burnish.errors import OutOfMemory, Unsupported, UserError

CHUNK = 512  # tokens of a prompt in one pass
GROUP_SIZES = (64, 32)  # numbers of a quantised cache that share a scale; MLX has kernels for these
ROUNDS_A_CLEARING = 256  # a growing cache leaves buffers of sizes that are never asked for again


def generate(
    model: nn.Module, prompts: Sequence[Sequence[int]], how: Sampling, prefixes: PrefixCache
) -> Iterator[Token]:
    """Every row's tokens as they come, on MLX's default device. Closing the iterator frees the cache.

    Raises UserError where a prompt is empty; while iterating OutOfMemory, NonFinite, and Unsupported where
    `how.cache_bits` is set and this model's cache or attention has no quantised form.
    """
    if not all(len(p) for p in prompts):
        raise UserError("a prompt is empty: generation needs at least one token to start from")
    return _generate(model, [np.array(p, np.int32) for p in prompts], how, prefixes)


def _generate(
    model: nn.Module, prompts: Sequence[np.ndarray], how: Sampling, prefixes: PrefixCache
) -> Iterator[Token]:
    if not prompts or how.max_new_tokens < 1:
        return
    seen = [set(p.tolist()) for p in prompts]
    draws = [stream(how.seed, row) for row in range(len(prompts))]
    running = list(range(len(prompts)))
    tokens = [int(p[-1]) for p in prompts]
    rows: _Rows | None = None
    try:
        with translated():
            rows = _Rows(model, _read_all(model, prompts, prefixes, how.cache_bits), how.cache_bits)
        for n in range(how.max_new_tokens):
            with translated():
                logits_RV = rows.logits(tokens)
            tokens, kept = [], []
            for i, row in enumerate(running):
                token, logprob = choose(logits_RV[i], seen[row], how, draws[row])
                seen[row].add(token)
                finish = "stop" if token in how.stop_ids else "length" if n == how.max_new_tokens - 1 else ""
                if not finish:
                    tokens.append(token)
                    kept.append(i)
                yield Token(row, token, logprob, finish)
            if not kept:
                return
            if len(kept) < len(running):
                running = [running[i] for i in kept]
                rows.keep(kept)
            if n % ROUNDS_A_CLEARING == ROUNDS_A_CLEARING - 1:
                mx.clear_cache()
    except OutOfMemory:
        prefixes.clear()  # whoever tries again needs the memory more
        raise
    finally:
        rows = None
        free_cache()


class _Rows:
    """The caches of the rows that still run: one for all where they merge, else one each."""

    def __init__(self, model: nn.Module, caches: list[Cache], bits: int) -> None:
        self._model, self._bits = model, bits
        self._together = len(caches) > 1 and not bits and merges(model)
        self._caches = [_merged(caches)] if self._together else caches

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [rows, V], float32, after one more token a row."""
        if self._together:
            out_RV = self._model(mx.array(tokens)[:, None], cache=self._caches[0])[:, -1]
        else:
            outs = [_pass(self._model, [t], c, self._bits) for t, c in zip(tokens, self._caches, strict=True)]
            out_RV = mx.concatenate([out[:, -1] for out in outs])
        out_RV = out_RV.astype(mx.float32)
        mx.eval(out_RV, [_state(c) for c in self._caches])
        return np.array(out_RV)

    def keep(self, at: list[int]) -> None:
        """Go on with these of the rows only."""
        if not self._together:
            self._caches = [self._caches[i] for i in at]
            return
        for layer in self._caches[0]:
            layer.filter(mx.array(at))


def _read_all(
    model: nn.Module, prompts: Sequence[np.ndarray], prefixes: PrefixCache, bits: int
) -> list[Cache]:
    """A cache a prompt, of all its tokens but the last. The newest prompt becomes the one that is held."""
    known, caches = prefixes.known(bits), []
    for prompt in prompts:
        read = Read(prompt[:-1], _read(model, prompt[:-1], known, bits))
        caches.append(read.cache)
        if len(read.tokens) and read.reusable:
            known.append(read)
    prefixes.hold(Read(prompts[-1][:-1], caches[-1]), bits)
    return caches


def _read(model: nn.Module, tokens: np.ndarray, known: Sequence[Read], bits: int) -> Cache:
    cache, n = best_start(tokens, known)
    if cache is None:
        cache = make_prompt_cache(model)
        _check_narrows(cache, bits)
    while n < len(tokens):
        # A cache is made narrow once its sizes are known. That is after the first token, wherever a prompt is
        # cut later: so a prefix read before and one read now have the same numbers.
        size = 1 if bits and n == 0 else CHUNK
        _pass(model, tokens[n : n + size].tolist(), cache, bits)
        mx.eval(_state(cache))  # and nothing else: neither logits nor what leads to them
        if n + size < len(tokens):
            mx.clear_cache()
        n += size
    return cache


def _pass(model: nn.Module, tokens: Sequence[int], cache: Cache, bits: int) -> mx.array:
    """Logits [1, T, V] of one row, not yet computed; the cache grows by `tokens`."""
    if not bits:
        return model(mx.array([tokens]), cache=cache)
    try:
        out = model(mx.array([tokens]), cache=cache)
    except (TypeError, AttributeError, ValueError) as e:  # of code that expects one array, not packed three
        raise Unsupported(f"this model's attention cannot read a quantised key-value cache ({e})") from e
    _narrow(cache, bits)
    return out


def _check_narrows(cache: Cache, bits: int) -> None:
    others = sorted({type(c).__name__ for c in cache if type(c) is not KVCache})
    if bits and others:
        raise Unsupported(f"this model keeps its past in {', '.join(others)}, which has no quantised form")


def _narrow(cache: Cache, bits: int) -> None:
    """Quantise, in place, the layers that are not yet."""
    for i, layer in enumerate(cache):
        if type(layer) is KVCache and layer.keys is not None and layer.values is not None:
            sizes = layer.keys.shape[-1], layer.values.shape[-1]
            group = next((g for g in GROUP_SIZES if all(s % g == 0 for s in sizes)), None)
            if group is None:
                raise Unsupported(
                    f"a quantised key-value cache needs heads of a multiple of {GROUP_SIZES[-1]} numbers; "
                    f"this model's keys have {sizes[0]}, its values {sizes[1]}"
                )
            cache[i] = layer.to_quantized(group, bits)


def merges(model: nn.Module) -> bool:
    """May rows share a pass?

    A pass is laid out, not computed, for batches of two sizes. A model that wants its position as one number
    fails at both; one that takes the mask's rows for heads, at the size that is not their number.
    """
    if any(type(c) not in ATTENTION_CACHES for c in make_prompt_cache(model)):
        return False
    for n in (2, 3):
        cache = _merged([make_prompt_cache(model) for _ in range(n)])
        try:
            model(mx.zeros((n, 1), mx.int32), cache=cache)
        except (TypeError, ValueError):
            return False
    return True


def _merged(caches: list[Cache]) -> Cache:
    """One cache for all rows. Layer by layer, and those of the rows are emptied: not all is there twice."""
    merged = []
    for i in range(len(caches[0])):
        merged.append(caches[0][i].merge([cache[i] for cache in caches]))
        mx.eval(_state(merged[-1:]))
        for cache in caches:
            cache[i] = None
    return merged


def _state(cache: Cache) -> list[object]:
    """The arrays of a cache, for `mx.eval`, which passes over what else there is."""
    return [layer.state for layer in cache]
