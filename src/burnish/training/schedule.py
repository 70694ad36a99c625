"""The learning rate of each step: a linear warm-up, then linear, cosine or constant."""

from __future__ import annotations

import math

from burnish.recipe import Train


def warmup_steps(train: Train, steps: int) -> int:
    if train.warmup_ratio is not None:
        return math.ceil(train.warmup_ratio * steps)
    return train.warmup_steps or 0


def learning_rate(train: Train, step: int, steps: int) -> float:
    """Of step `step`, counted from 0, of `steps`.

    The first warm-up step already moves (transformers begins at exactly 0 and so wastes it), and no step has
    rate 0.
    """
    warmup = warmup_steps(train, steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    left = (steps - step) / max(1, steps - warmup)
    if train.schedule == "linear":
        return train.lr * left
    if train.schedule == "cosine":
        return train.lr * (0.5 - 0.5 * math.cos(math.pi * left))
    return train.lr
