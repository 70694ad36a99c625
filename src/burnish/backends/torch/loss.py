"""The head's loss over slices of supervised tokens; full logits never exist.

Loss and gradient are made in one pass, since the head is frozen: a slice's logits become its probabilities in
place, then the gradient at its hidden states, then they are gone. Peak: one slice × vocabulary in float32,
about twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear

# A head held narrower than is computed in is widened this many rows (words) at a time.
_TILE = 16384


@dataclass(frozen=True)
class Head:
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    softcap: float | None  # Gemma 2: logits = c·tanh(logits/c)

    def logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """float32 [N, V]"""
        out = self._product(hidden_ND)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def _product(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        W, b = self.weight_VD, self.bias_V
        if W.dtype == hidden_ND.dtype:
            return linear(hidden_ND, W, b).float()
        out = hidden_ND.new_empty((hidden_ND.shape[0], W.shape[0]), dtype=torch.float32)
        for i in range(0, W.shape[0], _TILE):
            out[:, i : i + _TILE] = hidden_ND @ W[i : i + _TILE].to(hidden_ND.dtype).t()
        return out if b is None else out.add_(b)

    def gradient(self, dlogits_NV: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """dlogits times the weight, in `dtype` [N, D]."""
        W = self.weight_VD
        if W.dtype == dtype:
            return dlogits_NV.to(dtype) @ W
        out = torch.zeros((dlogits_NV.shape[0], W.shape[1]), dtype=dtype, device=W.device)
        for i in range(0, W.shape[0], _TILE):
            out.addmm_(dlogits_NV[:, i : i + _TILE].to(dtype), W[i : i + _TILE].to(dtype))
        return out


class SlicedLoss(torch.autograd.Function):
    """hidden [N, D] → (Σ weights·nll, nll [N], hit [N]); only the first carries a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        head: Head,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden_ND) if wants_gradient else None
        nll = torch.empty(hidden_ND.shape[0], dtype=torch.float32, device=hidden_ND.device)
        hit = torch.empty(hidden_ND.shape[0], dtype=torch.bool, device=hidden_ND.device)
        for i in range(0, hidden_ND.shape[0], rows):
            at = slice(i, i + rows)
            target = targets_N[at, None]
            logits = head.logits(hidden_ND[at])
            capped = logits.clone() if wants_gradient and head.softcap is not None else None
            top, best = logits.max(dim=1, keepdim=True)
            hit[at] = best[:, 0] == targets_N[at]
            picked = logits.gather(1, target)
            logits.sub_(top).exp_()
            total = logits.sum(1, keepdim=True)
            nll[at] = (total.log() + top - picked)[:, 0]
            if gradient is None:
                del logits  # before the next slice makes its own
                continue
            scale = weights_N[at, None]
            logits.mul_(scale / total)
            logits.scatter_add_(1, target, -scale)
            if capped is not None and head.softcap is not None:
                logits.mul_(1 - (capped / head.softcap) ** 2)
            gradient[at] = head.gradient(logits, hidden_ND.dtype)
            del logits, capped
        ctx.gradient = gradient
        ctx.mark_non_differentiable(nll, hit)
        return (nll * weights_N).sum(), nll, hit

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        gradient = ctx.gradient
        ctx.gradient = None
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None, None, None
