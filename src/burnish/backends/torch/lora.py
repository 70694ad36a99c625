"""The frozen linear layer and its adapter, as PEFT modules with a forward and backward of our own.

PEFT builds, names and saves the adapter; what runs is one autograd node a projection, y = xWᵀ + b +
s·(xAᵀ)Bᵀ, which keeps only x and the rank-sized product. PEFT's own forward keeps a float32 copy of x, the
product before and after scaling, and two full-size sums; on a bfloat16 base that is most of what training
costs above the weights.

Weights may be held in a narrower dtype than is computed in (`plan.weights`, `plan.compute`): they are widened
for the moment of their product. Dropout masks come from a counter, not from a stream: (seed, step,
micro-batch, projection) names one mask, so the backward pass, a recomputed layer and a resumed run all draw
the same one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.nn.functional import linear


class Masks:
    """Dropout masks by counter. `at(step, micro)` before a forward pass; off outside training steps."""

    def __init__(self, p: float, seed: int, device: torch.device) -> None:
        self.p, self._seed = p, seed
        self._generator = torch.Generator(device)
        self._place: tuple[int, int] | None = None

    def at(self, step: int, micro: int) -> None:
        self._place = (step, micro) if self.p else None

    def off(self) -> None:
        self._place = None

    def key(self, projection: int) -> int | None:
        """The seed of this projection's mask now; None where nothing is dropped."""
        if self._place is None:
            return None
        text = f"{self._seed}/{self._place[0]}/{self._place[1]}/{projection}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def draw(self, key: int, like: torch.Tensor) -> torch.Tensor:
        """0 with probability p, else 1/(1-p), in the shape and dtype of `like`."""
        self._generator.manual_seed(key)
        keep = 1.0 - self.p
        return torch.empty_like(like).bernoulli_(keep, generator=self._generator).div_(keep)


class FrozenLinear(nn.Linear):
    """A linear layer whose weight is never trained and may be narrower than its input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Adapted.apply(x, self.weight, self.bias, None, None, None, None, 0.0, None, None)


def frozen(layer: nn.Linear) -> FrozenLinear:
    """The same weights in a FrozenLinear; nothing is copied."""
    out = FrozenLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    out.weight, out.bias = layer.weight, layer.bias
    return out


class LoraLinear(PeftLinear):
    """PEFT's LoRA layer over a FrozenLinear, computed by one autograd node."""

    masks: Masks | None = None
    projection: int = 0  # its number in the model: part of its masks' name
    low: tuple[torch.Tensor, torch.Tensor] | None = None  # A and B in the dtype that is computed in: `narrow`

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = self.get_base_layer()
        if self.disable_adapters:
            return base(x)
        name = self.active_adapters[0]
        A, B, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        key = self.masks.key(self.projection) if self.masks is not None else None
        if isinstance(base, FrozenLinear):
            assert self.low is not None, "`narrow` comes before the first forward pass"
            return _Adapted.apply(x, base.weight, base.bias, A, B, *self.low, scale, self.masks, key)
        dropped = x if key is None or self.masks is None else x * self.masks.draw(key, x)
        # A quantised base layer has its own kernels for y and for the gradient of x.
        low = linear(dropped, A.to(x.dtype))  # type: ignore[arg-type]
        return base(x) + linear(low, B.to(x.dtype)) * scale  # type: ignore[arg-type]


def narrow(modules: Sequence[LoraLinear], compute: torch.dtype) -> None:
    """Give every adapter its A and B in `compute`, once a step instead of at every product.

    In float32 they are the parameters themselves; else copies, to be made again whenever the parameters
    change. Copies that are there already are written over, so a step that has updated cannot run out of
    memory here.
    """
    sources: list[torch.Tensor] = []
    copies: list[torch.Tensor] = []
    for m in modules:
        name = m.active_adapters[0]
        A, B = m.lora_A[name].weight.detach(), m.lora_B[name].weight.detach()  # type: ignore[operator]
        if compute == torch.float32:
            m.low = (A, B)
            continue
        if m.low is None or m.low[0].dtype != compute or m.low[0].device != A.device:
            m.low = (torch.empty_like(A, dtype=compute), torch.empty_like(B, dtype=compute))
        sources += [A, B]
        copies += m.low
    if copies:
        torch._foreach_copy_(copies, sources)


class _Adapted(torch.autograd.Function):
    """x [..., in] → x Wᵀ + b + scale · (dropout(x) Aᵀ) Bᵀ, [..., out]; without an adapter where a is None.

    A and B are there to receive gradients, in float32; a and b are the same numbers in the dtype of x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        W: torch.Tensor,
        bias: torch.Tensor | None,
        A: torch.Tensor | None,
        B: torch.Tensor | None,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        scale: float,
        masks: Masks | None,
        key: int | None,
    ) -> torch.Tensor:
        y = linear(x, W.to(x.dtype), None if bias is None else bias.to(x.dtype))
        h = None
        if a is not None and b is not None:
            dropped = x if key is None or masks is None else x * masks.draw(key, x)
            h = linear(dropped, a)
            y.view(-1, y.shape[-1]).addmm_(h.view(-1, h.shape[-1]), b.t(), alpha=scale)
        # Without an adapter the gradient of x needs only W: x itself is not kept.
        ctx.save_for_backward(x if a is not None else None, h, W, a, b)
        ctx.scale, ctx.masks, ctx.key = scale, masks, key
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, h, W, a, b = ctx.saved_tensors
        dy = grads[0].reshape(-1, W.shape[0])
        dx = dA = dB = None
        if ctx.needs_input_grad[0]:
            dx = dy @ W.to(dy.dtype)
        if a is not None:
            x2, h2 = x.reshape(-1, x.shape[-1]), h.reshape(-1, h.shape[-1])
            dh = (dy @ b).mul_(ctx.scale)
            mask = None if ctx.key is None else ctx.masks.draw(ctx.key, x).view_as(x2)
            if ctx.needs_input_grad[4]:
                dB = (dy.t() @ h2).float().mul_(ctx.scale)
            if ctx.needs_input_grad[3]:
                dA = (dh.t() @ (x2 if mask is None else x2 * mask)).float()
            if dx is not None:
                if mask is None:
                    dx.addmm_(dh, a)
                else:
                    dx.add_((dh @ a).mul_(mask))
        dx = None if dx is None else dx.view(*grads[0].shape[:-1], W.shape[1])
        return dx, None, None, dA, dB, None, None, None, None, None
