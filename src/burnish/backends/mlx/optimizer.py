"""AdamW over the adapter's weights (Loshchilov & Hutter 2019), as torch.optim.AdamW computes it."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from burnish.backends.reference import BETA1, BETA2, EPS

Named = dict[str, mx.array]


class AdamW:
    """An optimizer that does not change: a step gives a new one, so a step that fails leaves no trace.

    Its state exists from the start, zeros in the weights' shapes, so memory cannot run out for want of it
    between gradients and update.
    """

    def __init__(self, weight_decay: float, first: Named, second: Named | None = None, step: int = 0) -> None:
        self.weight_decay, self.step = weight_decay, step
        self.first, self.second = first, dict(first) if second is None else second
        if second is None:
            mx.eval(self.first)

    def at(self, first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], step: int) -> AdamW:
        """One in this state."""
        one, two = ({k: mx.array(v) for k, v in some.items()} for some in (first, second))
        return AdamW(self.weight_decay, one, two, step)

    def stepped(
        self, weights: Named, gradients: Mapping[str, mx.array], shrink: float, lr: float
    ) -> tuple[AdamW, Named]:
        """The optimizer and the weights after a step, evaluated. shrink multiplies the gradients."""
        step = self.step + 1
        numbers = [shrink, lr, lr * self.weight_decay, 1 - BETA1**step, 1 - BETA2**step]
        scalars = mx.array(numbers, mx.float32)
        new: list[Named] = [{}, {}, {}]
        for key, w in weights.items():
            found = _updated(w, gradients[key], self.first[key], self.second[key], scalars)
            for arrays, array in zip(new, found, strict=True):
                arrays[key] = array
        mx.eval(new)
        return AdamW(self.weight_decay, new[1], new[2], step), new[0]


@mx.compile
def _updated(
    w: mx.array, g: mx.array, m: mx.array, v: mx.array, scalars: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    shrink, lr, decay, correction1, correction2 = (scalars[i] for i in range(5))
    g = g * shrink
    m = BETA1 * m + (1 - BETA1) * g
    v = BETA2 * v + (1 - BETA2) * g * g
    update = (m / correction1) / (mx.sqrt(v / correction2) + EPS)
    return w * (1 - decay) - lr * update, m, v
