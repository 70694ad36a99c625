"""Attention whose backward pass holds a block of scores, not all of them.

MLX's fused attention has a fused backward pass on CUDA only; elsewhere its gradient is that of the plain
formula, with all heads' T × T scores held several times over. Here the backward pass goes through the queries
in blocks and computes each block's scores again; so does the forward pass where there is no fused one.

    S = scale q kᵀ, P = softmax(S), o = P v
    dv = Pᵀ do;  dS = P (do vᵀ - Σ P (do vᵀ));  dq = scale dS k;  dk = scale dSᵀ q

Masks: "causal" (position t sees s ≤ t), a boolean [..., T, T] that is never true above the diagonal, or None.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn

from burnish.backends.mlx.device import kernels

# Float32 scores of one block, all heads.
BLOCK_BYTES = 64 << 20
_NAME = "scaled_dot_product_attention"  # mlx-lm's function, as every one of its models imports it

Mask = mx.array | str | None


def attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> mx.array:
    """q [B, H, T, d], k and v [B, K, T, d] with K dividing H → [B, H, T, d]."""
    have = kernels(mx.default_device(), q.dtype, q.shape[-1])
    if have.fused_backward:
        return _fused(q, k, v, scale, mask)

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        if have.fused_forward:
            return _fused(q, k, v, scale, mask)
        blocks = [_weights(q, k, scale, mask, at) @ _seen(v, mask, at) for at in _blocks(q)]
        return _regrouped(mx.concatenate(blocks, axis=3), q.shape[:3])

    @attend.vjp
    def _(primals: tuple[mx.array, ...], do: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        return _backward(*primals, do, scale, mask)

    return attend(q, k, v)


def _fused(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Mask) -> mx.array:
    if isinstance(mask, mx.array) and mask.dtype == mx.bool_ and not mx.metal.is_available():
        # cuDNN takes a mask as a bias: converted here it is one for all heads, converted there one for each.
        mask = mx.where(mask, mx.array(0, q.dtype), mx.array(mx.finfo(q.dtype).min, q.dtype))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


def _backward(
    q: mx.array, k: mx.array, v: mx.array, do: mx.array, scale: float, mask: Mask
) -> tuple[mx.array, mx.array, mx.array]:
    grouped = _grouped(do, k.shape[1])
    dq, dk, dv = [], mx.zeros(k.shape, mx.float32), mx.zeros(v.shape, mx.float32)
    for at in _blocks(q):
        keys, values, do_b = _seen(k, mask, at), _seen(v, mask, at), grouped[:, :, :, at]
        P = _weights(q, k, scale, mask, at).astype(mx.float32)
        dP = (do_b @ values.swapaxes(-1, -2)).astype(mx.float32)
        dS = (P * (dP - (P * dP).sum(-1, keepdims=True)) * scale).astype(q.dtype)
        q_b = _grouped(q, k.shape[1])[:, :, :, at]
        dq.append(dS @ keys)
        n = keys.shape[-2]
        dk = dk.at[:, :, :n].add((dS.swapaxes(-1, -2) @ q_b).sum(2).astype(mx.float32))
        dv = dv.at[:, :, :n].add((P.astype(q.dtype).swapaxes(-1, -2) @ do_b).sum(2).astype(mx.float32))
    dq_BHTd = _regrouped(mx.concatenate(dq, axis=3), q.shape[:3])
    return dq_BHTd, dk.astype(k.dtype), dv.astype(v.dtype)


def _blocks(q: mx.array) -> Iterator[slice]:
    """Slices of the queries whose scores are BLOCK_BYTES or less, 16 rows at least."""
    B, H, T, _ = q.shape
    rows = max(16, BLOCK_BYTES // (4 * B * H * T) // 16 * 16)
    return (slice(s, min(s + rows, T)) for s in range(0, T, rows))


def _weights(q: mx.array, k: mx.array, scale: float, mask: Mask, at: slice) -> mx.array:
    """softmax(scale q kᵀ) of the queries in `at`: [B, K, H/K, rows, keys seen]."""
    keys = _seen(k, mask, at)
    S = (_grouped(q, k.shape[1])[:, :, :, at] * scale) @ keys.swapaxes(-1, -2)
    n = keys.shape[-2]
    if isinstance(mask, str):
        S = mx.where(mx.arange(at.start, at.stop)[:, None] >= mx.arange(n), S, -mx.inf)
    elif mask is not None:
        part = mask[..., at, :n]
        part = part[:, :, None] if part.ndim == 4 else part  # over the heads of a group
        S = mx.where(part, S, mx.finfo(S.dtype).min) if part.dtype == mx.bool_ else S + part.astype(S.dtype)
    return mx.softmax(S, axis=-1, precise=True)


def _seen(kv: mx.array, mask: Mask, at: slice) -> mx.array:
    """The keys or values that queries in `at` may see: [B, K, 1, n, d]."""
    return kv[:, :, None] if mask is None else kv[:, :, None, : at.stop]


def _grouped(x_BHTd: mx.array, n_kv_heads: int) -> mx.array:
    B, H, T, d = x_BHTd.shape
    return x_BHTd.reshape(B, n_kv_heads, H // n_kv_heads, T, d)


def _regrouped(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    return x.reshape(*shape, x.shape[-1])


@contextmanager
def ours(layers: Iterable[nn.Module]) -> Iterator[list[int]]:
    """Within, the models that these layers come from attend with `attention`; what is given counts the calls.

    mlx-lm's models import the function by name into their own modules; there it is replaced, and put back.
    """
    calls = [0]

    def attend(
        queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> Any:
        calls[0] += 1
        if cache is not None or sinks is not None:
            return original(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
        return attention(queries, keys, values, scale, mask)

    modules = {type(m).__module__ for layer in layers for m in layer.modules()}
    homes = [sys.modules[name] for name in modules if hasattr(sys.modules[name], _NAME)]
    originals = [getattr(home, _NAME) for home in homes]
    original = originals[0] if originals else None
    for home in homes:
        setattr(home, _NAME, attend)
    try:
        yield calls
    finally:
        for home, function in zip(homes, originals, strict=True):
            setattr(home, _NAME, function)
