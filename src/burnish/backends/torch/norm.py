"""The root-mean-square norm as one operation.

transformers writes it as eight, each a kernel and most of them a float32 copy of the hidden states; torch has
one that computes in float32 inside. In float32 the numbers agree to rounding (tests); in bfloat16 ours rounds
once, after the weight, where theirs rounds before and after.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import rms_norm

# Norms known to be x / sqrt(mean(x²) + eps) · weight. Others (Gemma's is · (1 + weight)) stay as they are.
_PLAIN = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Phi3RMSNorm")


class FusedRMSNorm(nn.Module):
    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def fuse_norms(root: nn.Module) -> None:
    """Replace every known norm below `root`; the weights are shared, not copied."""
    for name, child in root.named_children():
        if type(child).__name__ in _PLAIN:
            setattr(root, name, FusedRMSNorm(child.weight, child.variance_epsilon))  # type: ignore[arg-type]
        else:
            fuse_norms(child)
