"""Attention whose backward pass holds a block of scores, not all of them.

MLX's fused attention has a fused backward pass on CUDA only; elsewhere its gradient is that of the plain
formula, with all heads' T × T scores held several times over. Here the backward pass goes through the queries
in blocks and computes each block's scores again; so does the forward pass where there is no fused one.

    S = scale q kᵀ, P = softmax(S), o = P v
    dv = Pᵀ do;  dS = P (do vᵀ - Σ P (do vᵀ));  dq = scale dS k;  dk = scale dSᵀ q

Masks: "causal" (position t sees s ≤ t), numbers to add to the scores, [..., T, T], that hide everything above
the diagonal, or None.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models import activations, base

from burnish.backends.mlx.cpu_math import apart, softmax, swiglu
from burnish.backends.mlx.device import kernels
from burnish.planning.memory_mlx import SCORES_BLOCK_BYTES

# On a CPU a block should stay in its cache, and nothing is gained by fewer, larger ones: short blocks skip
# more of what causality hides.
CPU_BLOCK_ROWS = 64
_ATTENTION, _SWIGLU = "scaled_dot_product_attention", "swiglu"

Mask = mx.array | str | None


def attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask, backward: bool = False
) -> mx.array:
    """q [B, H, T, d], k and v [B, K, T, d] with K dividing H → [B, H, T, d]. backward: in a backward pass."""
    have = kernels(mx.default_device(), q.dtype, q.shape[-1], backward)
    if have.fused_backward:
        return _fused(q, k, v, scale, mask)

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if have.fused_forward:
            return _fused(q, k, v, scale, mask)
        blocks: list[mx.array] = []
        for at in _blocks(q):
            q, k, v = _after(blocks[-1:], q, k, v)
            blocks.append(_weights(q, k, scale, mask, at) @ _seen(v, mask, at))
        return _regrouped(mx.concatenate(blocks, axis=3), q.shape[:3])

    @attend.vjp
    def _(primals: tuple[mx.array, mx.array, mx.array], do: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        return _backward(*primals, do, scale, mask)

    return attend(q, k, v)  # type: ignore[return-value]


def _fused(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _backward(
    q: mx.array, k: mx.array, v: mx.array, do: mx.array, scale: float, mask: Mask
) -> tuple[mx.array, mx.array, mx.array]:
    grouped = _grouped(do, k.shape[1])
    dq, dk, dv = [], mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32)
    for at in _blocks(q):
        q, k, v, grouped = _after([*dq[-1:], dk, dv], q, k, v, grouped)
        keys, values, do_b = _seen(k, mask, at), _seen(v, mask, at), grouped[:, :, :, at]
        P = _weights(q, k, scale, mask, at).astype(mx.float32)
        dP = (do_b @ values.swapaxes(-1, -2)).astype(mx.float32)
        dS = (P * apart(dP - (P * dP).sum(-1, keepdims=True)) * scale).astype(q.dtype)
        q_b = _grouped(q, k.shape[1])[:, :, :, at]
        dq.append(dS @ keys)
        n = keys.shape[-2]
        dk = dk.at[:, :, :n].add((dS.swapaxes(-1, -2) @ q_b).sum(2).astype(mx.float32))
        dv = dv.at[:, :, :n].add((P.astype(q.dtype).swapaxes(-1, -2) @ do_b).sum(2).astype(mx.float32))
    dq_BHTd = _regrouped(mx.concatenate(dq, axis=3), q.shape[:3])
    return dq_BHTd, dk.astype(k.dtype), dv.astype(v.dtype)


def _after(done: list[mx.array], *arrays: mx.array) -> list[mx.array]:
    """The same arrays, not to be used before `done`: all blocks could begin at once, and MLX lets them."""
    return mx.depends(list(arrays), done) if done else list(arrays)


def _blocks(q: mx.array) -> Iterator[slice]:
    """Slices of the queries whose scores are SCORES_BLOCK_BYTES or less, 16 rows at least."""
    B, H, T, _ = q.shape
    rows = max(16, SCORES_BLOCK_BYTES // (4 * B * H * T) // 16 * 16)
    if mx.default_device() == mx.cpu:
        rows = min(rows, CPU_BLOCK_ROWS)
    return (slice(s, min(s + rows, T)) for s in range(0, T, rows))


def _weights(q: mx.array, k: mx.array, scale: float, mask: Mask, at: slice) -> mx.array:
    """softmax(scale q kᵀ) of the queries in `at`: [B, K, H/K, rows, keys seen]."""
    keys = _seen(k, mask, at)
    S = (_grouped(q, k.shape[1])[:, :, :, at] * scale) @ keys.swapaxes(-1, -2)
    n = keys.shape[-2]
    if isinstance(mask, str):
        S = S + additive(mx.arange(at.start, at.stop)[:, None] >= mx.arange(n), S.dtype)
    elif mask is not None:
        part = mask[..., at, :n]
        S = S + (part[:, :, None] if part.ndim == 4 else part)  # over the heads of a group
    return softmax(S)


def additive(sees: mx.array, dtype: mx.Dtype) -> mx.array:
    """A boolean mask as numbers to add to scores: 0 where it is true, else so little that softmax gives 0."""
    return mx.where(sees, mx.array(0, dtype), mx.array(mx.finfo(dtype).min / 2, dtype))


def joined(own: Sequence[Mask], segments: mx.array | None, dtype: mx.Dtype) -> list[Mask]:
    """Each layer's mask: its own (boolean or "causal") and, where rows are packed, only within an example, as
    numbers to add. Layers that share a mask share what is made of it.
    """
    made: dict[int, Mask] = {}
    for mask in own:
        if id(mask) not in made:
            sees = mask if segments is None else segments & mask if isinstance(mask, mx.array) else segments
            made[id(mask)] = additive(sees, dtype) if isinstance(sees, mx.array) else sees
    return [made[id(mask)] for mask in own]


def _seen(kv: mx.array, mask: Mask, at: slice) -> mx.array:
    """The keys or values that queries in `at` may see: [B, K, 1, n, d]."""
    return kv[:, :, None] if mask is None else kv[:, :, None, : at.stop]


def _grouped(x_BHTd: mx.array, n_kv_heads: int) -> mx.array:
    B, H, T, d = x_BHTd.shape
    return x_BHTd.reshape(B, n_kv_heads, H // n_kv_heads, T, d)


def _regrouped(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    return x.reshape(*shape, x.shape[-1])


@contextmanager
def ours(layers: Iterable[nn.Module], backward: bool = False) -> Iterator[None]:
    """Within, the models that these layers come from attend with `attention`, and on a CPU use our `swiglu`.

    mlx-lm's models import such functions by name into their own modules; there they are replaced, and put
    back.
    """
    theirs = {_ATTENTION: base.scaled_dot_product_attention, _SWIGLU: activations.swiglu}
    mine = {_ATTENTION: partial(_attend, theirs[_ATTENTION], backward), _SWIGLU: swiglu}
    # A model's own file (trust_remote_code) is not among the modules.
    names = {type(m).__module__ for layer in layers for m in layer.modules()} & sys.modules.keys()
    places = [
        (sys.modules[name], called)
        for name in names
        for called, function in theirs.items()
        if getattr(sys.modules[name], called, None) is function
    ]
    for module, called in places:
        setattr(module, called, mine[called])
    try:
        yield
    finally:
        for module, called in places:
            setattr(module, called, theirs[called])


def _attend(
    original: Callable[..., mx.array],
    backward: bool,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
) -> mx.array:
    """With mlx-lm's arguments. A cache is for generation; sinks are a matter of its own."""
    if cache is not None or sinks is not None:
        return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    return attention(queries, keys, values, scale, mask, backward)
