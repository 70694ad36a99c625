"""An mlx-lm model taken apart: what comes before its layers, how each layer is called, what comes after.

mlx-lm's models are one function each: embed, go through the layers, norm, head, and every family has its own
scaling, masks and caps on the way. Instead of knowing the families, the model's own code is run with
stand-ins for its layers: they note how they are called and hand on what they are told. So

    calls(tokens)      is that code up to the first layer, and the arguments of every layer
    logits(hidden)     is that code from the last layer on

whatever the family does there. What it may not do is anything between two layers; `check.py` compares the
parts with the whole on the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

from burnish.errors import Unsupported


@dataclass(frozen=True)
class Call:
    """The arguments of a layer. HIDDEN and MASK stand where hidden states and mask belong."""

    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    mask: mx.array | str | None  # the model's own: "causal", boolean [T, T] or [1, 1, T, T], or None

    def to(self, layer: nn.Module, hidden: mx.array, mask: mx.array | str | None) -> mx.array:
        """Call `layer` so, with other hidden states and another mask. Raises Unsupported as `whole` does."""
        places = {HIDDEN: hidden, MASK: mask}
        args = [places.get(a, a) if isinstance(a, _Place) else a for a in self.args]
        kwargs = {k: places.get(a, a) if isinstance(a, _Place) else a for k, a in self.kwargs}
        return whole(layer(*args, **kwargs), hidden, layer)


@dataclass(frozen=True)
class _Place:
    name: str


HIDDEN, MASK = _Place("hidden"), _Place("mask")


def whole(out: Any, hidden: mx.array, layer: nn.Module) -> mx.array:
    """`out`, if it is hidden states and nothing else."""
    if not isinstance(out, mx.array) or out.shape != hidden.shape:
        raise Unsupported(f"{type(layer).__name__} gives more than hidden states to the next layer", "model")
    return out


class _StandIn:
    """In a layer's place: has the layer's attributes, but answers as it is told."""

    def __init__(self, layer: nn.Module, answer: Callable[..., mx.array]) -> None:
        self._layer, self._answer = layer, answer

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


class Decoder:
    """model: an mlx-lm model. Raises Unsupported where it has no list of `n_layers` layers."""

    def __init__(self, model: nn.Module, n_layers: int) -> None:
        self.model = model
        self.home, self.name = _home_of_layers(model, n_layers)
        self.layers: list[nn.Module] = list(getattr(self.home, self.name))

    def calls(self, tokens_BT: mx.array) -> tuple[mx.array, list[Call]]:
        """Hidden states before the first layer [B, T, D], and how each layer would be called."""
        noted: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def note(*args: Any, **kwargs: Any) -> mx.array:
            noted.append((args, kwargs))
            return _first_array(args, kwargs)

        try:
            with self._replaced([_StandIn(layer, note) for layer in self.layers]):
                self.model(tokens_BT)
        except (TypeError, ValueError) as e:  # the model unpacks or subscripts what its layers give
            raise Unsupported(
                "this model's layers give more than hidden states to the next one", "model"
            ) from e
        if len(noted) != len(self.layers):
            raise Unsupported(
                f"{len(noted)} of {len(self.layers)} layers are called, or some more than once", "model"
            )
        hidden = _first_array(*noted[0])
        return hidden, [_as_call(args, kwargs, hidden) for args, kwargs in noted]

    def logits(self, hidden: mx.array) -> mx.array:
        """[B, T, D] after the last layer → [B, T, V]."""
        hand_on = [
            _StandIn(layer, lambda *args, **kwargs: _first_array(args, kwargs)) for layer in self.layers
        ]
        hand_on[-1] = _StandIn(self.layers[-1], lambda *args, **kwargs: hidden)
        with self._replaced(hand_on):
            # The tokens only give the shape: what is embedded of them goes nowhere.
            return self.model(mx.zeros(hidden.shape[:2], mx.int32))

    @contextmanager
    def _replaced(self, stand_ins: list[_StandIn]) -> Iterator[None]:
        layers = getattr(self.home, self.name)
        setattr(self.home, self.name, stand_ins)
        try:
            yield
        finally:
            setattr(self.home, self.name, layers)


def _home_of_layers(model: nn.Module, n_layers: int) -> tuple[nn.Module, str]:
    """The module that has the list, and the list's name. Lists in layers may be as long; they lie deeper."""
    found = [
        (path.count("."), module, name)
        for path, module in model.named_modules()
        for name, value in module.items()
        if isinstance(value, list) and len(value) == n_layers and all(isinstance(v, nn.Module) for v in value)
    ]
    depth = min((d for d, _, _ in found), default=0)
    outermost = [(module, name) for d, module, name in found if d == depth]
    if len(outermost) != 1:
        kind = type(model).__module__.rsplit(".", 1)[-1]
        raise Unsupported(f"mlx-lm's {kind} has no single list of {n_layers} decoder layers", "model")
    return outermost[0]


def _first_array(args: tuple[Any, ...], kwargs: dict[str, Any]) -> mx.array:
    for value in (*args, *kwargs.values()):
        if isinstance(value, mx.array):
            return value
    raise Unsupported("this model's layers are not called with hidden states", "model")


def _as_call(args: tuple[Any, ...], kwargs: dict[str, Any], hidden: mx.array) -> Call:
    masks: list[mx.array | str] = []

    def place(value: Any) -> Any:
        if value is hidden:
            return HIDDEN
        if isinstance(value, str) and value == "causal":
            masks.append(value)
            return MASK
        if isinstance(value, mx.array):
            length = hidden.shape[1]
            if value.dtype == mx.bool_ and value.shape[-2:] == (length, length):
                masks.append(value)
                return MASK
            raise Unsupported("this model hands its layers more than hidden states and a mask", "model")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise Unsupported(f"this model hands its layers a {type(value).__name__}", "model")

    call = tuple(place(a) for a in args), tuple((k, place(a)) for k, a in kwargs.items())
    if len(masks) > 1 and any(m is not masks[0] for m in masks):
        raise Unsupported("this model hands its layers several masks", "model")
    return Call(*call, masks[0] if masks else None)
