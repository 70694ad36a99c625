"""The loss over slices of supervised tokens, and its gradient at the last hidden states.

Full logits never exist: a slice of hidden states goes through the model's norm and head, gives its loss and
its gradient, and is gone. Unsupervised tokens cost no head at all. A slice has one of few sizes, so that few
graphs are compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from burnish.backends.mlx.cpu_math import apart, exp
from burnish.planning.memory_mlx import slice_rows

Logits = Callable[[mx.array], mx.array]  # [1, N, D] → [1, N, V]
_RUN = 256  # numbers that are added one by one


@dataclass(frozen=True)
class Targets:
    """The supervised positions of a batch of B × T: which, what is to be predicted, and its weight."""

    at_M: np.ndarray  # int64, into the flattened positions
    targets_M: np.ndarray  # int32
    weights_M: np.ndarray  # float32


def _exponentials(x_NV: mx.array) -> tuple[mx.array, mx.array]:
    """exp(x - top) and its sum [N, 1]: on a CPU, where both passes of the loss take them, and where MLX adds
    a row up in float32 from its first number to its last (over 49,152 words 3e-4 off).
    """
    e, whole = exp(apart(x_NV - x_NV.max(axis=1, keepdims=True))), x_NV.shape[1] // _RUN * _RUN
    total = e[:, :whole].reshape(len(e), -1, _RUN).sum(-1).sum(-1, keepdims=True)
    return e, total + e[:, whole:].sum(axis=1, keepdims=True)


def _logsumexp(x_NV: mx.array) -> mx.array:
    """[N, 1]"""
    if mx.default_device() != mx.cpu:
        return mx.logsumexp(x_NV, axis=1, keepdims=True)
    return x_NV.max(axis=1, keepdims=True) + mx.log(_exponentials(x_NV)[1])


@mx.custom_function
def _nll(logits_NV: mx.array, targets_N: mx.array) -> mx.array:
    """Negative log-likelihood in nats, float32 [N]."""
    picked = mx.take_along_axis(logits_NV, targets_N[:, None], axis=1)[:, 0].astype(mx.float32)
    return _logsumexp(logits_NV.astype(mx.float32))[:, 0] - picked


@_nll.vjp
def _nll_back(
    primals: tuple[mx.array, mx.array], cotangent_N: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    """softmax less one at the target, straight in the logits' dtype: no float32 copy is kept."""
    logits_NV, targets_N = primals
    wide = logits_NV.astype(mx.float32)
    if mx.default_device() == mx.cpu:
        e, total = _exponentials(wide)
        p = apart(e / total)
    else:
        p = mx.exp(wide - _logsumexp(wide))
    hot = apart(mx.arange(logits_NV.shape[1])[None] == targets_N[:, None])
    return (apart(p - hot) * cotangent_N[:, None]).astype(logits_NV.dtype), mx.zeros_like(targets_N)


class SlicedLoss:
    """rows: the largest slice, in tokens."""

    def __init__(self, logits: Logits, rows: int) -> None:
        self._rows = rows

        def values(hidden_ND: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array]:
            out = logits(hidden_ND[None])[0]
            nll_N: mx.array = _nll(out, targets_N)  # type: ignore[assignment]
            return nll_N, mx.argmax(mx.stop_gradient(out), axis=1) == targets_N

        def with_gradient(
            hidden_ND: mx.array, targets_N: mx.array, weights_N: mx.array
        ) -> tuple[mx.array, mx.array]:
            def loss(hidden_ND: mx.array) -> mx.array:
                nll_N: mx.array = _nll(logits(hidden_ND[None])[0], targets_N)  # type: ignore[assignment]
                return (nll_N * weights_N).sum()

            return mx.value_and_grad(loss)(hidden_ND)

        self._values = mx.compile(values)
        self._with_gradient = mx.compile(with_gradient)

    def score(self, hidden_BTD: mx.array, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
        """nll float32 [M] and hit bool [M]."""
        flat, n = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), len(targets.at_M)
        nll, hit = np.empty(n, np.float32), np.empty(n, bool)
        for part in self._slices(n):
            at, wanted, _ = _padded(targets, part)
            some_nll, some_hit = self._values(flat[at], wanted)
            mx.eval(some_nll, some_hit)
            size = len(range(n)[part])
            nll[part], hit[part] = np.array(some_nll)[:size], np.array(some_hit)[:size]
        return nll, hit

    def gradient(self, hidden_BTD: mx.array, targets: Targets, total: float) -> tuple[mx.array, mx.array]:
        """Σ w·nll / total (float32, not yet evaluated), and its gradient at the hidden states [B, T, D]."""
        flat = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
        loss, gradient = mx.array(0.0), mx.zeros_like(flat)
        for part in self._slices(len(targets.at_M)):
            at, wanted, weights = _padded(targets, part)
            value, slope = self._with_gradient(flat[at], wanted, weights / total)
            loss, gradient = loss + value, gradient.at[at].add(slope)
            mx.eval(loss, gradient)
        return loss, gradient.reshape(hidden_BTD.shape)

    def _slices(self, n: int) -> list[slice]:
        size = slice_rows(n, self._rows)
        return [slice(i, i + size) for i in range(0, n, size)]


def _padded(targets: Targets, part: slice) -> tuple[mx.array, mx.array, mx.array]:
    """Positions, targets and weights of a slice; filled up with position 0 at weight 0."""
    size, found = part.stop - part.start, targets.at_M[part]
    fill = (0, size - len(found))
    return (
        mx.array(np.pad(found, fill).astype(np.int32)),
        mx.array(np.pad(targets.targets_M[part], fill).astype(np.int32)),
        mx.array(np.pad(targets.weights_M[part], fill).astype(np.float32)),
    )
