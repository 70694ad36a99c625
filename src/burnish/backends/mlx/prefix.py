"""The beginning of a prompt that was read before, kept as its key-value cache.

    prefixes = PrefixCache()
    cache, n = best_start(prompt, [*prefixes.known(bits)])   # the cache of prompt[:n]; None, 0: start afresh
    prefixes.hold(Read(tokens, cache), bits)
    prefixes.clear()                                         # whenever the weights have changed

Questions to one model share a system prompt and a template's first lines; those are computed once. Only what
can be cut at any token is kept: a cache that slides or that sums up its past belongs to one end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache, QuantizedKVCache

Cache = list[Any]  # mlx-lm's: an object a layer


@dataclass(frozen=True)
class Read:
    """Tokens [N] that one row has read, and the cache that they left."""

    tokens: np.ndarray
    cache: Cache

    @property
    def reusable(self) -> bool:
        """Can the cache be cut at any token, and does it hold them all?"""
        n = len(self.tokens)
        return all(type(c) in (KVCache, QuantizedKVCache) and c.offset == n for c in self.cache)


class PrefixCache:
    """The newest prompt and its cache: as much of its beginning as `max_bytes` hold."""

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self.max_bytes = max_bytes
        self._read: Read | None = None
        self._bits = 0

    @property
    def held_bytes(self) -> int:
        return sum(c.nbytes for c in self._read.cache) if self._read else 0

    def known(self, bits: int) -> list[Read]:
        """What is held, where its numbers have as many bits as asked (0: as computed)."""
        return [self._read] if self._read and self._bits == bits else []

    def hold(self, read: Read, bits: int) -> None:
        """Keep a copy of what `read` begins with, in place of what was held."""
        if not len(read.tokens) or not read.reusable:
            return
        token_bytes = sum(x.nbytes // x.shape[-2] for x in _arrays(read.cache))
        n = min(len(read.tokens), self.max_bytes // token_bytes)
        if n <= max((common(read.tokens, held.tokens) for held in self.known(bits)), default=0):
            return
        self.clear()
        cache = beginning(read.cache, n)
        for layer in cache:  # else a part would keep the whole alive
            layer.keys, layer.values = tree_map(mx.contiguous, (layer.keys, layer.values))
        mx.eval(_arrays(cache))
        self._read, self._bits = Read(read.tokens[:n], cache), bits

    def clear(self) -> None:
        self._read = None


def best_start(tokens: np.ndarray, known: Sequence[Read]) -> tuple[Cache | None, int]:
    """The cache of the longest beginning of `tokens` [N] that was read before, and its length."""
    lengths = [common(tokens, read.tokens) for read in known]
    n = max(lengths, default=0)
    return (beginning(known[lengths.index(n)].cache, n), n) if n else (None, 0)


def common(a: np.ndarray, b: np.ndarray) -> int:
    """With how many equal tokens both begin."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    return int(differ.argmax()) if differ.any() else n


def beginning(cache: Cache, n: int) -> Cache:
    """A cache of the first `n` tokens. It shares memory with `cache` until it grows."""
    cut = []
    for layer in cache:
        quantized = type(layer) is QuantizedKVCache
        part = QuantizedKVCache(layer.group_size, layer.bits) if quantized else KVCache()
        part.keys, part.values = tree_map(lambda x: x[..., :n, :], (layer.keys, layer.values))
        part.offset = n
        cut.append(part)
    return cut


def _arrays(cache: Cache) -> list[mx.array]:
    """All arrays of keys and values, each [1, heads, tokens, …]."""
    return [x for _, x in tree_flatten([(layer.keys, layer.values) for layer in cache])]  # pyright: ignore[reportReturnType]
