"""Backpropagation one layer at a time: a layer keeps its input, and is run again when its gradient is wanted.

torch's own non-reentrant checkpoint does the same through a Python hook for every saved tensor; on an H100
those hooks cost more time than the recomputation (7B, 2,048 tokens: bench/RESULTS.md). Here one autograd node
a layer runs it without a graph, and its backward runs it again with one. The parameters' gradients are
accumulated inside, so the node itself has only the hidden states to answer for.

Nothing random happens inside a layer but our counted dropout masks (lora.py), so no random state has to be
put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from burnish.errors import Unsupported

Layer = Callable[[torch.Tensor], torch.Tensor]


class Recomputation:
    """Within this context the layers are recomputed; outside it they are plain, as generation with a cache
    needs.

    Recomputed are the layers from `first` (the first with an adapter) on, all but the last `keep`. Below
    `first` nothing carries a gradient, so nothing is kept there anyway. Uses the switch that transformers'
    layers have for it: two attributes, and a function that is given the layer and its hidden states.
    """

    def __init__(self, layers: nn.ModuleList, first: int, keep: int) -> None:
        anchor = torch.zeros((), requires_grad=True, device=next(layers.parameters()).device)

        def again(run: Layer, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
            if rest:
                raise Unsupported("this model's layers take more than hidden states by position")
            return _Recomputed.apply(anchor, hidden, run)  # type: ignore[no-any-return]

        self._layers = list(layers)[first : max(first, len(layers) - keep)]
        for layer in self._layers:
            if not hasattr(layer, "gradient_checkpointing"):
                raise Unsupported(f"{type(layer).__name__} cannot be recomputed in the backward pass")
            layer.gradient_checkpointing = True  # type: ignore[assignment]
            layer._gradient_checkpointing_func = again  # type: ignore[assignment]

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.training = True  # asked by the switch; the modules inside stay in eval mode

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.training = False


class _Recomputed(torch.autograd.Function):
    """hidden → run(hidden). `anchor` only makes autograd ask, where the hidden states carry no gradient
    themselves.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, hidden: torch.Tensor, run: Layer) -> torch.Tensor:
        ctx.run = run
        ctx.save_for_backward(hidden)
        out = run(hidden)
        if not isinstance(out, torch.Tensor):
            raise Unsupported("this model's layers return more than hidden states; they cannot be recomputed")
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor | None, None]:
        (hidden,) = ctx.saved_tensors
        hidden = hidden.detach().requires_grad_(ctx.needs_input_grad[1])
        with torch.enable_grad():
            out = ctx.run(hidden)
        torch.autograd.backward(out, grads[0])
        return None, hidden.grad, None
