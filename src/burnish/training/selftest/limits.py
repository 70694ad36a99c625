"""How far apart is wrong: by backend, device and the dtype that is computed in.

Measured, with these very checks (the largest of every comparison that a limit is for):

                            float32                            bfloat16
                   loss     gradient  same     log-prob.      loss     gradient
  torch, CPU       4e-8     7e-6      3e-7     4e-6           3e-4     4.2e-2
  mlx, CPU         3e-7     6e-6      4e-6     5e-6
  torch, H100      9e-8     5e-6      4e-6     9e-6           2e-4     4.6e-2
  mlx, H100        9e-8     2e-5      1e-5     5e-6           8e-5     4.8e-2

`EXACT` and `NARROW` are some times those. Those for the Apple GPU, mps and metal, are predictions: no Mac
has been measured. Its float32 is a true one, but its compilers may round a function's last digits otherwise,
and its attention in bfloat16 is taken by the plain formula, whose scores are rounded too; so they are wider.
What these checks are for is well beyond them: a mask drawn anew changes gradients by 0.8, one missing bias or
a leak between packed rows by 0.1 and more.

Products of MLX in float32 are taken without TF32, which it would use on CUDA and on an M5 (`child`): with it
gradients are 4e-3 off (H100), and a run in float32 has them so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """The first three relative, as `lab.loss_apart` and `lab.gradients_apart` measure."""

    loss: float
    gradient: float
    same: float  # of a step computed here in two ways that must not matter
    logprob: float  # nats


EXACT = Limits(5e-6, 1e-4, 1e-4, 2e-4)
NARROW = Limits(2e-3, 0.1, 0.1, 0.1)
APPLE_EXACT = Limits(5e-5, 1e-3, 1e-3, 2e-3)
APPLE_NARROW = Limits(5e-3, 0.2, 0.2, 0.2)
APPLE = ("mps", "metal")

# A step may take so many times what was predicted, and so much besides. The predictor is within 9 % on a CPU
# and 6 % on an H100 for models of a size that matters; this one is so small that what a framework keeps for
# itself counts as much. MPS reports what its driver took, in large pieces.
MEMORY_TIMES, MEMORY_SPARE_BYTES, APPLE_SPARE_BYTES = 1.25, 128 << 20, 384 << 20


def limits_of(device: str, compute: str) -> Limits:
    """compute: the plan's dtype of activations."""
    if device in APPLE:
        return APPLE_NARROW if compute == "bfloat16" else APPLE_EXACT
    return NARROW if compute == "bfloat16" else EXACT


def memory_limit(device: str, predicted_bytes: int) -> int:
    spare = APPLE_SPARE_BYTES if device in APPLE else MEMORY_SPARE_BYTES
    return int(MEMORY_TIMES * predicted_bytes) + spare
