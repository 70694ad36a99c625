"""Forward and backward, one decoder layer at a time.

The forward pass keeps each layer's input; the backward pass takes one layer after another: its
vector-Jacobian product runs the layer again, gives the gradients of its adapter and of its input, and the
input is freed. Of the last `keep` layers the products' outcomes are kept as well (projection.py), so that
only what lies between products is computed again.

Layers of equal shape share one compiled forward and one compiled backward function: weights, adapter, mask
and dropout keys are arguments. A layer's share is known by its modules, shapes and settings (`_signature`).
Where memory is short a layer is finished before the next is handed to the device, for buffers of work that is
only queued are held; where there is room, one layer is always waiting for the device.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_unflatten

from burnish.backends.mlx.attention import Mask, joined, ours
from burnish.backends.mlx.decoder import Call, Decoder
from burnish.backends.mlx.projection import PLAIN, RECORD, REPLAY, Context, Order, Outcome

Arrays = list[mx.array]
_ADAPTER = (".lora_a", ".lora_b")


@dataclass
class _Layer:
    """A decoder layer as arguments: frozen arrays and adapter arrays, each in the order of their names."""

    module: nn.Module
    frozen_names: list[str]
    adapter_names: list[str]
    frozen: Arrays  # kept beside the module: to collect them again at every call costs 3 % of a small step
    adapter: Arrays
    signature: str

    @classmethod
    def of(cls, module: nn.Module) -> _Layer:
        every = dict(tree_flatten(module.parameters()))
        adapter = sorted(n for n in every if n.endswith(_ADAPTER))
        frozen = sorted(n for n in every if not n.endswith(_ADAPTER))
        arrays = [every[n] for n in frozen], [every[n] for n in adapter]
        return cls(module, frozen, adapter, *arrays, _signature(module))


@dataclass
class Saved:
    """What one layer's backward pass needs: its input, and the products' outcomes where they are kept."""

    hidden: mx.array
    outcomes: Arrays


@dataclass
class Pass:
    """One forward pass over a batch, as far as the backward pass needs it."""

    calls: list[Call]
    masks: list[Mask]
    keys: mx.array | None  # uint32 [layers, projections, 2]
    saved: dict[int, Saved]


class _Queue:
    """Work handed to the device: at most `ahead` pieces are not finished when `add` returns."""

    def __init__(self, ahead: int) -> None:
        self._ahead, self._waiting = ahead, deque[Any]()

    def add(self, *arrays: Any) -> None:
        mx.async_eval(*arrays)
        self._waiting.append(arrays)
        if len(self._waiting) > self._ahead:
            mx.eval(self._waiting.popleft())


class Engine:
    """first: the first layer with an adapter. keep: of how many layers, from the last, outcomes are kept.
    ahead: layers that may wait for the device.
    """

    def __init__(self, decoder: Decoder, context: Context, first: int, keep: int, ahead: int) -> None:
        self._decoder, self._context, self._ahead = decoder, context, ahead
        self._layers = [_Layer.of(module) for module in decoder.layers]
        self._first, self._kept_from = first, max(first, len(self._layers) - keep)
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def forward(
        self, tokens_BT: mx.array, segments: mx.array | None, keys: mx.array | None = None, *, train: bool
    ) -> tuple[mx.array, Pass]:
        """Hidden states after the last layer, and what `backward` needs. segments: boolean [B, 1, T, T], who
        may see whom, where rows hold several examples.
        """
        hidden, calls = self._decoder.calls(tokens_BT)
        masks = joined([c.mask for c in calls], segments, self._context.compute)
        saved: dict[int, Saved] = {}
        queue = _Queue(self._ahead)
        for i, layer in enumerate(self._layers):
            record = train and i >= self._kept_from
            run = self._function("forward", layer, calls[i], masks[i], record, keys is not None)
            key = keys[i] if keys is not None else None
            entered = hidden
            hidden, outcomes = run(hidden, *self._arguments(layer, masks[i], key))
            queue.add(hidden, outcomes)
            if train and i >= self._first:
                saved[i] = Saved(entered, outcomes)
        return hidden, Pass(calls, masks, keys, saved)

    def backward(self, done: Pass, slope: mx.array) -> dict[int, Arrays]:
        """Gradients of each layer's adapter arrays (float32), from the gradient at the last hidden states.

        What `done` has saved is gone afterwards.
        """
        gradients: dict[int, Arrays] = {}
        queue = _Queue(self._ahead)
        for i in reversed(range(self._first, len(self._layers))):
            layer, saved = self._layers[i], done.saved.pop(i)
            replay, mask = i >= self._kept_from, done.masks[i]
            kind = "backward" if i > self._first else "last backward"
            run = self._function(kind, layer, done.calls[i], mask, replay, done.keys is not None)
            key = done.keys[i] if done.keys is not None else None
            slope, gradients[i] = run(saved.hidden, *self._arguments(layer, mask, key), saved.outcomes, slope)
            queue.add(slope, gradients[i])
        return gradients

    def adapter_names(self, layer: int) -> list[str]:
        """Of this layer's adapter arrays, in the order that `backward` gives their gradients in."""
        return self._layers[layer].adapter_names

    def put(self, layer: int, arrays: Arrays) -> None:
        """Make these the layer's adapter arrays, in the order of `adapter_names`."""
        changed = self._layers[layer]
        changed.module.update(tree_unflatten(list(zip(changed.adapter_names, arrays, strict=True))))
        changed.adapter = arrays

    def _arguments(self, layer: _Layer, mask: Mask, key: mx.array | None) -> tuple[Any, ...]:
        return (
            layer.frozen,
            layer.adapter,
            [mask] if isinstance(mask, mx.array) else [],
            [] if key is None else [key],
        )

    def _function(
        self, kind: str, layer: _Layer, call: Call, mask: Mask, kept: bool, drops: bool
    ) -> Callable[..., Any]:
        """The compiled function for layers like this one, made when it is first asked for."""
        form = mask if isinstance(mask, str) else "array" if mask is not None else "none"
        key = (kind, layer.signature, str((call.args, call.kwargs)), form, kept, drops)
        if key not in self._compiled:
            run = self._runner(layer, call, mask if isinstance(mask, str) else None)
            made = _forward(run, kept) if kind == "forward" else _backward(run, kept, kind == "backward")
            self._compiled[key] = mx.compile(made)
        return self._compiled[key]

    def _runner(self, layer: _Layer, call: Call, named: str | None) -> Callable[..., tuple[mx.array, Arrays]]:
        """The layer as a function of arrays alone; it stands for every layer of its signature."""
        context, module = self._context, layer.module

        def run(
            mode: str,
            backward: bool,
            hidden: mx.array,
            frozen: Arrays,
            adapter: Arrays,
            masks: Arrays,
            keys: Arrays,
            outcomes: Arrays,
        ) -> tuple[mx.array, Arrays]:
            before = dict(tree_flatten(module.parameters()))
            given = {**dict(zip(layer.frozen_names, frozen)), **dict(zip(layer.adapter_names, adapter))}
            context.mode, context.keys = mode, keys[0] if keys else None
            context.order = Order()
            context.outcomes = _paired(outcomes)
            module.update(tree_unflatten(list(given.items())))
            try:
                with ours([module], backward):
                    out = call.to(module, hidden, masks[0] if masks else named)
                return out, _flat(context.outcomes)
            finally:
                module.update(tree_unflatten(list(before.items())))
                context.mode, context.keys, context.outcomes, context.order = PLAIN, None, [], None

        return run


def _forward(run: Callable[..., tuple[mx.array, Arrays]], record: bool) -> Callable[..., Any]:
    def forward(hidden: mx.array, *arguments: Arrays) -> tuple[mx.array, Arrays]:
        return run(RECORD if record else PLAIN, False, hidden, *arguments, [])

    return forward


def _backward(
    run: Callable[..., tuple[mx.array, Arrays]], replay: bool, wants_input: bool
) -> Callable[..., Any]:
    def backward(
        hidden: mx.array, frozen: Arrays, adapter: Arrays, masks: Arrays, keys: Arrays, outcomes: Arrays,
        slope: mx.array,
    ) -> tuple[mx.array, Arrays]:  # fmt: skip
        mode = REPLAY if replay else PLAIN

        def again(*differentiated: mx.array) -> mx.array:
            x = differentiated[0] if wants_input else hidden
            inner = list(differentiated[1:] if wants_input else differentiated)
            return run(mode, True, x, frozen, inner, masks, keys, outcomes)[0]

        _, found = mx.vjp(again, [hidden, *adapter] if wants_input else adapter, [slope])
        return (found[0], found[1:]) if wants_input else (slope, found)

    return backward


def _flat(outcomes: Sequence[Outcome]) -> Arrays:
    """As arrays alone. The last projection's y is added to the residual and no gradient asks for it; its
    place is kept by an empty array.
    """
    empty = mx.zeros((0,))
    flat = [empty if part is None else part for pair in outcomes for part in pair]
    if flat:
        flat[-2] = empty
    return flat


def _paired(flat: Arrays) -> list[Outcome]:
    parts = [part if part.size else None for part in flat]
    return list(zip(parts[::2], parts[1::2], strict=True))


def _signature(module: nn.Module) -> str:
    """Equal for modules that compute alike but for the arrays in `parameters()`."""
    digest = hashlib.sha256()

    def add(value: Any, parameter: bool) -> None:
        if isinstance(value, nn.Module):
            digest.update(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
            for key in sorted(value):
                digest.update(key.encode())
                add(value[key], not key.startswith("_"))
            for key, setting in sorted(vars(value).items()):
                if key not in ("_no_grad", "_training"):
                    digest.update(key.encode())
                    add(setting, False)
            digest.update(b")")
        elif isinstance(value, mx.array):
            digest.update(f"{value.dtype}{value.shape}".encode())
            if not parameter:  # a constant such as frequencies
                digest.update(np.array(value.astype(mx.float32)).tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                add(value[key], parameter)
        elif isinstance(value, (list, tuple)):
            for part in value:
                add(part, parameter)
        elif isinstance(value, Context):
            digest.update(b"context")
        elif value is None or isinstance(value, (bool, int, float, str)) or is_dataclass(value):
            digest.update(repr(value).encode())
        else:  # unknown, so shared with nothing but itself
            digest.update(f"{type(value).__qualname__}@{id(value)}".encode())

    add(module, True)
    return digest.hexdigest()
